"""`pgfunc evaluate`: the lines that it reads, the table, the JSON and the page; every mistake is one line."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from cases import text_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import pgfunc as pg
from examples.tiny import evaluate as card
from examples.tiny import export_heldout, heldout
from pgfunc import cli
from pgfunc.errors import DataError, ImageError, PgfuncError, SettingError
from pgfunc.evaluation import page, rows, tasks
from pgfunc.evaluation.tasks import evaluate
from pgfunc.image import open_image
from pgfunc.many.scheduling import Result
from pgfunc.objects import coco, segment, vqvae

# pycocotools 2.0.11 uses an old protocol of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
MODEL = text_model()
BOX = {"ymin": 0, "xmin": 0.5, "ymax": 20, "xmax": 10}
CAT = {"label": "cat", "box": BOX}
CAPTION = {"image": "a.png", "prefix": "caption en", "suffix": "ab"}


@pytest.fixture
def folder(tmp_path):
    """A model and two pictures."""
    pg.save(MODEL, tmp_path / "model")
    for name, color in {"a.png": "red", "b.png": "blue"}.items():
        Image.new("RGB", (40, 20), color).save(tmp_path / name)
    return tmp_path


def write(folder, *lines) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def says(monkeypatch, *texts: str, logprobs: list[float] | None = None) -> None:
    """Replace the model by one that gives these answers about the pictures that it can read, the last one first."""

    def generate_many(model, asked, max_new_tokens, workers):
        results, left = [], list(texts)
        for number, row in enumerate(asked):
            try:
                sizes = tuple(open_image(path).size for path in row[0])
            except ImageError as error:
                results.append(Result(number, row, None, error, ((0, 0),)))
                continue
            text = left.pop(0)
            ids = pg.tokenizer.encode(model.tokenizer, text)
            results.append(
                Result(number, row, pg.Completion(text, ids, logprobs or [-1.0] * len(ids), "eos"), None, sizes)
            )
        yield from reversed(results)

    monkeypatch.setattr(tasks, "generate_many", generate_many)


def run(folder, *words: str):
    command = ["evaluate", str(folder / "data.jsonl"), "--model", str(folder / "model"), "--device", "cpu", *words]
    return CliRunner().invoke(cli.app, command, catch_exceptions=False)


# --- the figures ------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_committed_scene_are_those_of_the_model_card(tmp_path, shipped):
    """The same scene, answered once through the exported files; `examples.tiny.evaluate` has the card's definitions."""
    examples = heldout.read(Path("examples/tiny/heldout"))["S2"][10:11]
    data = rows.read(export_heldout.export(tmp_path, "S2", examples))
    vq = pg.tree.map(lambda leaf: leaf.float(), segment.load("weights/tiny/masks.safetensors"))
    done = {task: evaluate(shipped, task, rows.of_task(data, task), vq, 80, workers=0) for task in rows.TASKS}
    cases = {case.row.where: case for one in done.values() for case in one.cases}
    kinds = {row.where: asked.task for row, asked in zip(data, examples[0].rows, strict=True)}
    assert cases.keys() == kinds.keys()
    expected = card.figures(examples, [cases[row.where].completion.text for row in data], vq)
    actual = {task: {name: metric.value for name, metric in one.metrics.items()} for task, one in done.items()}
    assert actual["caption"]["exact"] == expected["exact caption"]
    assert actual["detect"]["recall"] == expected["detect: IoU > 0.5"] > 0
    assert actual["detect"]["precision"] == expected["detect: precision"]
    assert actual["segment"]["mean_iou"] == pytest.approx(expected["segment: mean IoU"], rel=1e-6)  # float32 there
    assert actual["ocr"] == {"cer": expected["ocr: character error rate"], "exact": expected["ocr: exact"]}
    for kind in ("count", "existence", "position"):
        (score,) = (case.score for where, case in cases.items() if kinds[where] == kind)
        assert score == expected[f"question: {kind}"]


def test_the_table_names_value_interval_and_count(folder, monkeypatch):
    write(folder, CAPTION, CAPTION | {"image": "b.png", "suffix": ["xyz", "a b c"]})
    says(monkeypatch, "ab", "xy")
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert re.search(r"exact match +0\.500 +0\.095 – 0\.905 +2 answers", result.stdout)
    assert "caption: 2 lines" in result.stdout
    assert "Intervals: Wilson's for shares of answers; bootstrap" in result.stdout


def test_json_has_every_metric_and_every_case(folder, monkeypatch):
    write(folder, CAPTION | {"prefix": "ocr"}, CAPTION | {"prefix": "ocr", "image": "b.png", "suffix": "xyz"})
    says(monkeypatch, "ab", "xy")
    value = json.loads(run(folder, "--json").stdout)
    assert value["task"] == "ocr"
    assert value["metrics"]["cer"] | {"low": 0, "high": 0} == {
        "value": 0.2, "low": 0, "high": 0, "counted": 5, "unit": "characters", "interval": "bootstrap",
    }  # fmt: skip
    assert value["cases"][1] == {
        "line": f"{folder}/data.jsonl:2", "images": [str(folder / "b.png")], "prompt": "ocr", "answer": "xy",
        "score": pytest.approx(2 / 3), "error": None,
    }  # fmt: skip


def test_the_score_of_a_box_is_its_confidence(folder, monkeypatch):
    """The right box is surer than the wrong one, so its precision is 1; the other order would give 1/2."""
    right, wrong = "<loc0000><loc0000><loc0001><loc0001> cat", "<loc0001><loc0001><loc0003><loc0003> cat"
    write(folder, {"image": "a.png", "prefix": "detect cat", "suffix": right})
    for logprobs, expected in {(-0.1, -2.0): 1.0, (-2.0, -0.1): 0.5}.items():
        text = f"{wrong} ; {right}"
        ids = pg.tokenizer.encode(MODEL.tokenizer, text)
        half = ids.index(MODEL.tokenizer.backend.token_to_id("<loc0000>"))
        values = [logprobs[i < half] for i in range(len(ids))]
        says(monkeypatch, text, logprobs=values)
        assert json.loads(run(folder, "--json").stdout)["metrics"]["ap"]["value"] == pytest.approx(expected)


def test_true_objects_in_pixels_or_as_text_are_the_same_truth(folder, monkeypatch):
    mask = torch.zeros(20, 40, dtype=torch.bool)
    mask[4:9, 10:30] = True
    vq = vqvae.init(5)
    vq = vq._replace(to_map=vqvae.Conv(vq.to_map.weight, torch.full_like(vq.to_map.bias, 9.0)))  # masks are not empty
    item = segment.from_mask("cat", mask)
    text = segment.render([item], vq)
    (decoded,) = segment.parse(text, 40, 20, vq)
    true = {"label": "cat", "box": decoded.box._asdict(), "mask": coco.rle(decoded.mask)}
    segment.save(folder / "masks.safetensors", vq)
    write(folder, {"image": "a.png", "objects": [true]}, {"image": "a.png", "prefix": "segment cat", "suffix": text})
    says(monkeypatch, text, text)
    result = run(folder, "--task", "segment", "--masks", str(folder / "masks.safetensors"), "--json")
    value = json.loads(result.stdout)
    assert [case["score"] for case in value["cases"]] == [1, 1]
    assert [case["prompt"] for case in value["cases"]] == ["segment cat", "segment cat"]
    assert value["metrics"]["mask_ap"]["value"] == pytest.approx(1)


# --- pictures that cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "line", "metric", "value"), [
    ("caption", {"suffix": ""}, "exact", 0.5), ("answer", {"prefix": "answer en ?", "suffix": ""}, "exact", 0.5),
    ("ocr", {"prefix": "ocr", "suffix": "ab"}, "cer", 0.5),
    ("detect", {"prefix": "detect cat", "suffix": "<loc0000><loc0000><loc0003><loc0003> cat"}, "recall", 0.5),
])  # fmt: skip
def test_a_picture_that_cannot_be_read_is_named_and_counts_as_wrong(task, line, metric, value, folder, monkeypatch):
    write(folder, CAPTION | line | {"image": "none.png"}, CAPTION | line)
    says(monkeypatch, line["suffix"])
    result = run(folder, "--json", "--html", str(folder / "page.html"))
    assert result.exit_code == 1
    assert f"data.jsonl:1: {folder}/none.png: no such file" in result.stderr
    done = json.loads(result.stdout)
    assert done["task"] == task
    assert done["metrics"][metric]["value"] == value
    assert done["cases"][0]["answer"] is None
    assert "none.png: no such file" in (folder / "page.html").read_text()


def test_a_prompt_that_does_not_fit_is_named_and_the_others_are_answered(folder, monkeypatch):
    write(folder, CAPTION, CAPTION | {"prefix": "caption " + "long " * 60})
    done = evaluate(MODEL, "caption", rows.read(folder / "data.jsonl"), max_new_tokens=2, workers=0)
    assert [bool(case.error) for case in done.cases] == [False, True]
    assert "shorten the text" in done.cases[1].error


# --- lines ------------------------------------------------------------------------------------------------------------


def read(folder, task: str, *lines) -> list[rows.Row]:
    return rows.of_task(rows.read(write(folder, *lines)), rows.as_task(task))


@pytest.mark.parametrize(("task", "line", "prefix"), [
    ("caption", {"suffix": "s"}, "caption en"), ("ocr", {"suffix": "s"}, "ocr"),
    ("detect", {"suffix": "<loc0001><loc0001><loc0002><loc0002> cat ; <loc0001><loc0001><loc0002><loc0003> dog ; "
     "<loc0001><loc0001><loc0002><loc0004> cat"}, "detect cat ; dog"),
    ("detect", {"objects": [CAT, CAT]}, "detect cat"), ("caption", {"prefix": "say", "suffix": "s"}, "say"),
])  # fmt: skip
def test_a_line_without_a_prefix_has_that_of_the_task(task, line, prefix, folder):
    (row,) = read(folder, task, {"image": "a.png"} | line)
    assert row.prefix == prefix


@pytest.mark.parametrize(("prefix", "task"), [
    ("caption en", "caption"), ("<loc0000><loc0000><loc0001><loc0001> caption en", "caption"), ("cap de", "caption"),
    ("answer en what?", "answer"), ("ocr", "ocr"), ("detect cat", "detect"), ("segment a ; b", "segment"),
    ("", None), ("captions", None), ("What is this?", None),
])  # fmt: skip
def test_a_prefix_names_its_task(prefix, task):
    assert rows.task_of(rows.Row("", (), prefix, (), None)) == task


def test_lines_of_other_tasks_are_left_out_with_a_note(folder, monkeypatch):
    write(folder, CAPTION, CAPTION | {"prefix": "ocr"}, CAPTION, CAPTION)
    says(monkeypatch, "ab", "ab")
    result = run(folder, "--task", "caption", "--limit", "2")
    assert f"pgfunc: {folder}/data.jsonl: 1 lines of other tasks are left out" in result.stderr
    assert "caption: 2 lines" in result.stdout


@pytest.mark.parametrize(("task", "line", "message"), [
    (None, {"prefix": "say"}, "prefix 'say' names no task; say which with --task"),
    (None, {"prefix": "ocr"}, "is of task ocr, the lines above of caption; name one with --task"),
    ("colour", {}, "task is 'colour', expected one of caption, answer, ocr, detect, segment"),
    ("ocr", {}, "neither this line nor another one is of task ocr"),
    ("caption", {"suffix": []}, "suffix is an empty list"),
    ("caption", {"suffix": ["a", 1]}, "suffix is 1, expected text"),
    ("caption", {"objects": []}, "has both suffix and objects"),
    ("caption", {"suffix": None, "image": ["a.png", 3]}, "suffix is null, expected text"),
])  # fmt: skip
def test_a_line_that_cannot_be_used_is_named(task, line, message, folder):
    write(folder, CAPTION, CAPTION | line) if task != "ocr" else write(folder, CAPTION)
    with pytest.raises(PgfuncError, match=re.escape(message)):
        run(folder, *(["--task", task] if task else []))


@pytest.mark.parametrize(("task", "line", "message"), [
    ("answer", {"suffix": "x"}, "prefix is missing, and only the line can tell the question"),
    ("caption", {"objects": [CAT]}, "has objects, which caption does not compare"),
    ("detect", {"objects": []}, "prefix is missing, and there is no object"),
    ("detect", {"objects": [], "image": "https://a.org/b.png"}, "download it, the next evaluation reads it again"),
    ("detect", {"objects": {}}, "objects is {}, expected a list"),
    ("detect", {"objects": [3]}, "an object is 3; expected {"),
    ("detect", {"objects": [{"label": "cat", "box": BOX | {"xmax": 0}}]}, "an object is {"),
    ("detect", {"objects": [{"label": "cat", "box": BOX | {"xmax": float("inf")}}]}, "an object is {"),
    ("detect", {"objects": [CAT | {"mask": {"size": [2, 2], "counts": "05"}}]}, "the mask of 'cat' is not a mask"),
    ("detect", {"suffix": "cat"}, "suffix has 'cat': 0 location tokens, expected 4"),
    ("detect", {"suffix": ["", ""]}, "suffix is a list; detect compares with one text"),
    ("segment", {"objects": [CAT]}, "an object has no mask, which segment compares"),
    ("segment", {"suffix": "<loc0001><loc0001><loc0002><loc0002> cat"}, "0 mask codes, expected 16"),
])  # fmt: skip
def test_a_line_without_what_the_task_needs_is_named(task, line, message, folder):
    with pytest.raises(DataError, match="data.jsonl:1: .*" + re.escape(message)):
        read(folder, task, {"image": "a.png"} | line)


def test_a_mask_of_another_size_than_the_picture_is_named(folder, monkeypatch):
    mask = {"size": [2, 2], "counts": [1, 3]}
    segment.save(folder / "masks.safetensors", vqvae.init(5))
    write(folder, {"image": "a.png", "objects": [CAT | {"mask": mask}]})
    says(monkeypatch, "")
    with pytest.raises(DataError, match=r"data\.jsonl:1: the mask of 'cat' is 2 x 2, the picture 40 x 20 pixels"):
        run(folder, "--task", "segment", "--masks", str(folder / "masks.safetensors"))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_a_mask_is_read_back_from_its_run_lengths(width, height, seed, density):
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < density
    assert torch.equal(coco.mask(coco.rle(mask)), mask)
    assert torch.equal(coco.mask({"size": [height, width], "counts": coco.run_lengths(mask)}), mask)


@given(st.binary(max_size=12), st.tuples(st.integers(-2, 9), st.integers(-2, 9)))
def test_any_run_lengths_are_a_mask_of_their_size_or_refused(counts, size):
    try:
        mask = coco.mask({"size": list(size), "counts": counts.decode("latin-1")})
    except SettingError:
        return
    assert mask.shape == size


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The tags and the pictures of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.pictures += [dict(attrs)] if tag == "img" else []


def test_the_page_has_the_worst_cases_with_pictures_and_nothing_from_outside(folder, monkeypatch):
    texts = ["ab"] * 3 + ["ax"] * 2 + [f"wrong {i}" for i in range(22)]
    write(folder, *[CAPTION | {"prefix": "ocr"}] * len(texts))
    says(monkeypatch, *texts)
    assert run(folder, "--html", str(folder / "page.html")).exit_code == 0
    text = (folder / "page.html").read_text()
    found = Page(text)
    assert found.tags.count("article") == 20
    assert "script" not in found.tags
    assert all(picture["src"].startswith("data:image/jpeg;base64,") for picture in found.pictures)
    assert all(picture["alt"] == "the picture a.png" for picture in found.pictures)
    assert "http" not in text
    assert "wrong 1" in text
    assert ">ax<" not in text, "it is better than the twenty worst"


def test_the_best_answers_are_not_on_the_page(folder, monkeypatch):
    write(folder, CAPTION | {"prefix": "answer en ?"})
    says(monkeypatch, "ab")
    assert run(folder, "--html", str(folder / "page.html")).exit_code == 0
    assert "All answers have the best score." in (folder / "page.html").read_text()


def test_text_on_the_page_cannot_be_markup(folder, monkeypatch):
    evil = "<script>alert(1)</script>\u202e\x1b[31m\"'&"
    shutil.copy(folder / "a.png", folder / '"><img src=x>.png')
    write(folder, {"image": '"><img src=x>.png', "prefix": f"ocr {evil}", "suffix": evil})
    says(monkeypatch, evil + "!")
    assert run(folder, "--html", str(folder / "page.html")).exit_code == 0
    text = (folder / "page.html").read_text()
    assert "script" not in Page(text).tags
    assert len(Page(text).pictures) == 1
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_true_objects_and_those_of_the_answer_have_their_own_colors():
    picture = Image.new("RGB", (30, 60), "white")
    true, answered = ([pg.detect.Detection("", pg.detect.Box(top, 5, top + 10, 25))] for top in (10, 40))
    drawn = page.drawing(picture, true, answered)
    assert drawn.size == (240, 480)
    assert drawn.getpixel((40, 84)) == page.TRUE
    assert drawn.getpixel((40, 324)) == page.ANSWERED


@pytest.mark.parametrize("name", ["data.jsonl", "a.png"])
def test_the_page_does_not_replace_what_is_read(name, folder):
    write(folder, CAPTION)
    before = (folder / name).read_bytes()
    with pytest.raises(SettingError, match="--html"):
        run(folder, "--html", str(folder / name))
    assert (folder / name).read_bytes() == before


def test_a_missing_package_is_named_with_its_install_command(folder, monkeypatch):
    write(folder, CAPTION)
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=re.escape("python -m pip install 'pgfunc[evaluate]'")):
        run(folder)


def test_a_limit_below_one_is_refused(folder):
    write(folder, CAPTION)
    with pytest.raises(SettingError, match="--limit is 0"):
        run(folder, "--limit", "0")
