"""`detect.find` and `segment.find` are generate, with_confidence and draw in one call."""

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

import pgfunc as pg
from pgfunc.errors import CheckpointError, ImageError, PromptError, SettingError
from pgfunc.objects import draw

PICTURE = Path(__file__).parent.parent / "examples/images/cat-and-bus.png"
LABELS = ["cat", "bus"]
DECODER = pg.segment.load()


@pytest.fixture(scope="module")
def model() -> pg.Model:
    return pg.load(device="cpu")


@pytest.fixture(scope="module")
def boxes(model) -> pg.detect.Result:
    return pg.detect.find(model, PICTURE, "cat ; bus")


@pytest.fixture(scope="module")
def answer(model) -> pg.Completion:
    return pg.generate(model, PICTURE, "detect cat ; bus", max_new_tokens=512)[0]


@pytest.fixture
def prompts(monkeypatch, answer) -> list[str]:
    """Replace the model by one that always gives this answer; the list collects its prompts."""
    asked: list[str] = []
    for module in (pg.detect, pg.segment):
        monkeypatch.setattr(module, "generate", lambda model, image, prompt, *rest: asked.append(prompt) or [answer])
    return asked


def test_boxes_are_those_of_the_answer_with_their_confidence(model, boxes, answer):
    picture = Image.open(PICTURE).convert("RGB")
    assert boxes.objects == pg.detect.with_confidence(answer, model.tokenizer, *picture.size)
    assert [item.label for item in boxes.objects] == LABELS
    assert boxes[1:] == ([], "detect cat ; bus", answer.text, "eos", picture)


def test_masks_are_those_of_the_answer_with_their_confidence(model):
    result = pg.segment.find(model, PICTURE, "cat", DECODER)
    (answer,) = pg.generate(model, PICTURE, "segment cat", max_new_tokens=512)
    expected = pg.segment.with_confidence(answer, model.tokenizer, *result.picture.size, DECODER)
    assert [item._replace(mask=()) for item in result.objects] == [item._replace(mask=()) for item in expected]
    assert all(one.mask.equal(other.mask) for one, other in zip(result.objects, expected, strict=True))
    assert [item.label for item in result.objects] == ["cat"]
    assert result.draw() == draw.objects(PICTURE, expected, confidence=True) != result.picture


def test_labels_are_a_text_or_a_list(model, boxes, prompts):
    assert pg.detect.find(model, Image.open(PICTURE), LABELS) == boxes
    pg.segment.find(model, PICTURE, LABELS, DECODER)
    pg.detect.find(model, PICTURE, "<image>cat ; bus")
    assert prompts == [f"{task} cat ; bus" for task in ("detect", "segment", "detect")]


def test_sampling_and_the_token_limit_reach_the_sampler(model):
    settings = {"max_new_tokens": 3, "temperature": 3.0, "top_k": 50, "top_p": 0.9, "min_p": 1e-4, "seed": 4}
    (answer,) = pg.generate(model, PICTURE, "detect cat", **settings)
    result = pg.detect.find(model, PICTURE, "cat", **settings)
    assert (result.text, result.finish) == (answer.text, "length")
    assert result.malformed == pg.detect.malformed(answer.text) != []


def test_objects_below_the_least_confidence_are_left_out(model, boxes, prompts):
    low, high = sorted(boxes.objects, key=lambda item: item.confidence)
    between = (low.confidence + high.confidence) / 2
    assert pg.detect.find(model, PICTURE, "cat ; bus", min_confidence=between).objects == [high]
    assert pg.detect.find(model, PICTURE, "cat ; bus", min_confidence=low.confidence) == boxes


def test_an_unknown_confidence_counts_as_zero():
    unknown = pg.detect.Detection("cat", pg.detect.Box(0, 0, 1, 1))
    answer, picture = pg.Completion("", [], [], "eos"), Image.new("RGB", (4, 4))
    kept = [pg.objects.result.result([unknown], [], "", answer, picture, least).objects for least in (0.0, 0.01)]
    assert kept == [[unknown], []]


def test_notebooks_show_the_drawing_with_confidence(boxes):
    shown = Image.open(BytesIO(boxes._repr_png_())).convert("RGB")
    assert shown == draw.objects(PICTURE, boxes.objects, confidence=True) == boxes.draw()
    assert boxes.draw(confidence=False) == draw.objects(PICTURE, boxes.objects)
    assert boxes.draw() != boxes.picture


def test_the_repr_is_one_short_line(boxes):
    percent = [f"{item.confidence:.0%}" for item in boxes.objects]
    assert repr(boxes) == f"Result(cat {percent[0]}, bus {percent[1]}; 0 malformed, eos)"
    assert repr(boxes._replace(objects=[])) == "Result(nothing found; 0 malformed, eos)"
    assert len(repr(boxes._replace(objects=boxes.objects * 500))) < 500


MISTAKES = {
    "nothing to look for": (PICTURE, " ", {}, PromptError, "detect needs to know what to look for"),
    "no labels": (PICTURE, [], {}, PromptError, "labels are []"),
    "no picture": ("no.png", "cat", {}, ImageError, "no.png: no such file"),
    "confidence above 1": (PICTURE, "cat", {"min_confidence": 1.5}, SettingError, "min-confidence is 1.5, expected 0"),
    "temperature": (PICTURE, "cat", {"temperature": -1.0}, SettingError, "temperature is -1.0"),
}


@pytest.mark.parametrize(("picture", "labels", "settings", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(model, picture, labels, settings, kind, message):
    with pytest.raises(kind) as error:
        pg.detect.find(model, picture, labels, **settings)
    assert str(error.value).startswith(message)


def test_the_default_mask_decoder_is_the_shipped_one():
    path = PICTURE.parent.parent.parent / "weights/tiny/masks.safetensors"
    expected = pg.tree.flatten(pg.segment.load(path))
    assert all(leaf.equal(expected[name]) for name, leaf in pg.tree.flatten(DECODER).items())
    with pytest.raises(CheckpointError, match="no such file"):
        pg.segment.load("no.npz")
