"""The demo: the Python that it shows gives the same answer, mistakes are one line, and `tests/browser` passes."""

import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import pgfunc as pg
from pgfunc import cli
from pgfunc.demo import actions, server
from pgfunc.demo.actions import Answer, Checkpoint, Request, answers
from pgfunc.demo.attention import attention, heat, tokens
from pgfunc.demo.snippet import snippet
from pgfunc.errors import PromptError

HERE = Path(__file__).parent
PICTURE = HERE.parent / "examples/images/cat-and-bus.png"
SAMPLING = {"max_new_tokens": 22, "temperature": 0.0, "top_k": None, "top_p": None, "min_p": None, "seed": 0}
SAMPLED = {"max_new_tokens": 6, "temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.001, "seed": 3}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [package for package in ("gradio", "playwright") if find_spec(package) is None]
MISSING += [] if BROWSER else ["chromium"]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(pg.load(device="cpu"), {"source": None, "device": "cpu"}, pg.segment.load())


@pytest.fixture(scope="module")
def answer_to(checkpoint) -> Callable[[str], Answer]:
    """The last answer to one of REQUESTS; each is computed once."""
    return cache(lambda name: [*answers(checkpoint, REQUESTS[name])][-1])


REQUESTS = {
    "caption": Request(PICTURE, "caption", "", SAMPLING | {"max_new_tokens": 8}),
    "a question": Request(PICTURE, "ask", "what color is the bus?", SAMPLED),
    "detect": Request(PICTURE, "detect", "bus", SAMPLING, 0.2),
    "segment": Request(PICTURE, "segment", "bus", SAMPLING),
    "quotes": Request(PICTURE, "free", 'say "it\'s" \\ {}', SAMPLED),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_python_that_is_shown_gives_the_same_answer(checkpoint, answer_to, name, monkeypatch, tmp_path, capsys):
    answer = answer_to(name)
    shutil.copy(PICTURE, tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(snippet(checkpoint, REQUESTS[name], PICTURE.name), {})
    assert capsys.readouterr().out == answer.text + "\n"
    if answer.result is not None:
        assert answer.result.objects
        assert Image.open("drawing.png").convert("RGB") == answer.result.draw()


def test_the_python_that_is_shown_loads_the_same_checkpoint(checkpoint):
    loading = {"source": "my model", "dtype": "bfloat16", "device": None, "config": None, "tokenizer": None,
               "quantize": "int8", "adapter": "my/adapter"}  # fmt: skip
    other = Checkpoint(checkpoint.model, loading, checkpoint.mask_decoder, "my model/masks.safetensors")
    lines = snippet(other, REQUESTS["segment"], "a.png").splitlines()
    assert lines[2] == 'model = pg.load("my model", dtype="bfloat16", quantize="int8", adapter="my/adapter")'
    assert lines[3] == 'vq = pg.segment.load("my model/masks.safetensors")'
    assert lines[4] == 'result = pg.segment.find(model, "a.png", "bus", vq, max_new_tokens=22)'


def test_a_text_grows_piece_by_piece_to_the_text_of_generate(checkpoint):
    texts = [answer.text for answer in answers(checkpoint, REQUESTS["caption"])]
    (expected,) = pg.generate(checkpoint.model, PICTURE, "caption en", max_new_tokens=8)
    assert texts[-1] == expected.text
    assert len(set(texts)) > 5
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@pytest.mark.parametrize("task", actions.NEEDS)
def test_a_task_says_which_text_it_needs(checkpoint, task):
    with pytest.raises(PromptError, match=f"{task} needs "):
        next(answers(checkpoint, Request(PICTURE, task, " ", SAMPLING)))


def test_a_model_without_a_mask_decoder_cannot_be_asked_for_masks(checkpoint):
    bare = checkpoint._replace(mask_decoder=None)
    assert set(actions.tasks(checkpoint)) - set(actions.tasks(bare)) == {"segment"}
    with pytest.raises(PromptError, match="segment needs a mask decoder; start the demo with --masks FILE"):
        next(answers(bare, REQUESTS["segment"]))


def test_attention_is_the_mean_over_heads_at_the_position_that_predicts_the_token(checkpoint, answer_to):
    cfg, params, tokenizer = checkpoint.model.cfg, checkpoint.model.params, checkpoint.model.tokenizer
    text = answer_to("caption").text
    ids = pg.tokenizer.encode(tokenizer, text)
    assert tokens(checkpoint, text)[1] == pg.tokenizer.decode(tokenizer, ids[1:2])
    prefix = [*pg.prepare(checkpoint.model, PICTURE, "caption en").tokens[0].tolist()]
    for token in (0, 1):
        prompt = pg.prepare(checkpoint.model, PICTURE, prefix + ids[:token])
        prompt = prompt._replace(causal=torch.tensor([[False] * len(prefix) + [True] * token]))
        _, seen = pg.lab.capture(pg.prefill, "language.2.pattern")(params, prompt, cfg, 1)
        expected = seen["language.2.pattern"][0, :, -1, : cfg.vision.tokens].float().mean(0)
        actual = attention(checkpoint, REQUESTS["caption"], text, token, 2)
        assert torch.allclose(actual, expected, atol=2e-3)  # bf16
    assert heat(checkpoint, REQUESTS["caption"], text, 1, 2).size == (1104, 528)


def test_a_small_picture_is_magnified_with_its_boxes_and_masks(answer_to):
    result = answer_to("segment").result
    assert result is not None
    large = actions.magnified(result, 600)
    assert large.picture.size == (672, 672)
    for item, other in zip(result.objects, large.objects, strict=True):
        assert other.box == pg.detect.Box(*(3 * edge for edge in item.box))
        assert other.mask[1::3, ::3].equal(item.mask)
        assert other.mask.sum() == 9 * item.mask.sum()
    assert actions.magnified(result, 224) is result


def test_what_may_surprise_is_noted():
    left_out = [pg.detect.Malformed("a cat", "0 location tokens")]
    result = pg.detect.Result([], left_out, "", "a cat", "length", Image.new("RGB", (1, 1)))
    noted = actions.notes(REQUESTS["detect"], Answer("a cat", "length", result))
    assert noted == ["left out 'a cat': 0 location tokens", "stopped at 22 tokens, perhaps too early"]
    assert actions.notes(REQUESTS["caption"], Answer("a cat", "eos")) == []


def test_the_wheel_carries_the_examples():
    build = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = build["targets"]["wheel"]["force-include"]
    for name, *_ in server.EXAMPLES:
        assert included[f"examples/images/{name}"] == f"pgfunc/examples/images/{name}"
        assert (server.example_pictures() / name).is_file()


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `pgfunc demo` with these options; returns exit status and standard error."""

    def call(*options: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["pgfunc", "demo", *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    return call


def test_the_command_line_imports_gradio_only_to_serve():
    assert "gradio" not in sys.modules


def test_without_gradio_the_command_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = 'pgfunc: the demo needs Gradio, which is not installed: python -m pip install "pgfunc[demo]"\n'
    assert run() == (2, message)


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs Gradio, which pgfunc[demo] installs")
def test_a_port_that_is_in_use_is_named_before_anything_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        expected = f"pgfunc: host 127.0.0.1, port {port}: cannot listen there (Address already in use); give another"
        assert run("--port", port, "--model", "no such model") == (2, f"{expected} --port\n")
    assert run("--port", "99999")[0] == 2


@pytest.mark.skipif(bool(MISSING), reason=f"the page is not tested: {', '.join(MISSING)} missing on this machine")
def test_the_page_works_in_a_browser():
    """In a process of its own, so that one server and one browser serve all of its tests."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-W", "default", str(HERE / "browser")]
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "BROWSER": str(BROWSER)}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
