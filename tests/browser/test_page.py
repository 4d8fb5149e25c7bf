"""The page in Chromium, as people use it: by mouse and by keyboard, with good files and bad ones."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx  # which Gradio installs
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import pgfunc as pg
from pgfunc.demo.actions import magnified

PICTURE = Path(__file__).parent.parent.parent / "examples/images/cat-and-bus.png"
INTERACTIVE = {"button", "radio", "textbox", "slider", "spinbutton", "checkbox", "combobox", "link"}


@pytest.fixture(scope="module")
def model() -> pg.Model:
    return pg.load(device="cpu")


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Start the demo as a user does. At the end it has deleted its files, and printed no traceback."""
    folder = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "pgfunc.cli", "demo", "--port", "0", "--device", "cpu"]
    proxy = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # where nobody answers
    environment = os.environ | {"TMPDIR": str(folder)} | proxy
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout
    yield re.findall(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())[0]
    assert list(folder.iterdir())
    server.terminate()
    _, errors = server.communicate(timeout=30)
    assert server.returncode == 128 + signal.SIGTERM
    assert errors.count("Traceback") == errors.count("InvalidPathError: Cannot move /etc/hostname") <= 1
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=os.environ["BROWSER"], args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def tab(address, browser) -> Iterator[Page]:
    """The page in a new tab. At the end, nothing was requested elsewhere and nothing had failed."""
    page, requested, failed = browser.new_page(), [], []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: failed.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(20_000)
    page.goto(address)
    yield page
    page.close()
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []
    assert failed == []


def ask(tab: Page, picture: Path, task: str, label: str = "", text: str = "") -> None:
    """Fill in the left side and run."""
    tab.locator("input[type=file]").set_input_files(picture)
    expect(tab.locator("#picture img")).to_be_visible()
    tab.get_by_role("radio", name=task, exact=True).check()
    if label:
        tab.get_by_role("textbox", name=label).fill(text)
    tab.get_by_role("button", name="Run").click()


def drawing(tab: Page) -> Image.Image:
    source = tab.locator("#drawing img").get_attribute("src")
    return Image.open(BytesIO(tab.request.get(str(source)).body())).convert("RGB")


def test_objects_are_drawn_with_a_legend_and_python(tab, model):
    ask(tab, PICTURE, "Detect", "What to look for", "cat ; bus")
    expect(tab.get_by_role("table")).to_be_visible()
    expected = pg.detect.find(model, PICTURE, "cat ; bus")
    large = magnified(expected)
    assert drawing(tab) == large.draw() != large.picture
    rows = tab.get_by_role("table").get_by_role("row").all_inner_texts()[1:]
    assert [row.split()[:2] for row in rows] == [[item.label, f"{item.confidence:.0%}"] for item in expected.objects]
    expect(tab.get_by_role("textbox", name="Answer")).to_have_value(expected.text)
    expect(tab.get_by_text('pg.detect.find(model, "examples/images/cat-and-bus.png", "cat ; bus")')).to_be_visible()


def test_a_question_is_answered(tab, model):
    question = "what color is the bus?"
    ask(tab, PICTURE, "Ask", "Question", question)
    (expected,) = pg.generate(model, PICTURE, f"answer en {question}")
    expect(tab.get_by_role("textbox", name="Answer")).to_have_value(expected.text)
    expect(tab.get_by_text("print(answer.text)")).to_be_visible()


def test_a_mistake_is_one_line(tab, tmp_path):
    (tmp_path / "wrong.png").write_text("no picture")
    tab.get_by_role("button", name="Run").click()
    expect(tab.get_by_role("alert")).to_have_text(re.compile("^there is no picture yet; upload one, paste one, or"))
    ask(tab, PICTURE, "Detect", "What to look for", " ")
    expect(tab.get_by_role("alert")).to_have_text("detect needs what to look for, such as: cat ; bus")
    tab.get_by_role("button", name="Remove Image").click()
    tab.locator("input[type=file]").set_input_files(tmp_path / "wrong.png")
    tab.get_by_role("textbox", name="What to look for").fill("cat")
    tab.get_by_role("button", name="Run").click()
    expect(tab.get_by_role("alert")).to_have_text(re.compile("^wrong.png: not a picture, or in a format that Pillow"))


def tab_to(tab: Page, name: str) -> None:
    """Press Tab until the control with this name has the focus."""
    for _ in range(60):
        tab.keyboard.press("Tab")
        if name in tab.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''"):
            return
    raise AssertionError(f"Tab does not reach {name}")


def test_the_keyboard_is_enough(tab):
    tab.get_by_role("button", name="Run").wait_for()
    tab_to(tab, "Detect cat ; bus")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("textbox", name="What to look for")).to_have_value("cat ; bus")
    tab.get_by_role("radio", name="Detect", exact=True).focus()
    tab_to(tab, "Run")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("table")).to_contain_text("cat")


def test_every_control_has_a_name(tab):
    tab.get_by_role("button", name="Settings").click()
    ask(tab, PICTURE, "Segment", "What to look for", "cat")
    expect(tab.get_by_role("table")).to_be_visible()
    tab.get_by_role("button", name="Attention over the picture").click()
    tab.get_by_role("radio", name="cat").check()
    expect(tab.get_by_role("button", name="Map of the attention")).to_be_visible()
    nodes = tab.context.new_cdp_session(tab).send("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in INTERACTIVE]
    assert len(controls) > 30
    assert [node for node in controls if not node.get("name", {}).get("value", "").strip()] == []


def forged(address: str, path: str) -> str:
    """The last message about a request, not made by the page, that names a picture by this path."""
    dependencies = httpx.get(f"{address}config").json()["dependencies"]
    (index,) = [each["id"] for each in dependencies if len(each["inputs"]) == 10]
    picture = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    data = [picture, "caption", "", 0, 8, 0, 0, 1, 0, 0]
    joined = {"data": data, "fn_index": index, "session_hash": "forged"}
    assert httpx.post(f"{address}gradio_api/queue/join", json=joined).status_code == 200
    with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash=forged") as stream:
        return next(line for line in stream.iter_lines() if "process_completed" in line)


def test_files_of_the_machine_are_not_served_and_uploads_are_limited(address):
    for path in ("/etc/hostname", PICTURE.parent.parent.parent / "pyproject.toml"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code == 403
    assert '"success":false' in forged(address, "/etc/hostname")
    assert "the demo fetches nothing from elsewhere" in forged(address, "https://example.com/a.png")
    status = [
        httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", bytes(size * 2**20))}).status_code
        for size in (31, 33)
    ]
    assert status == [200, 413]
