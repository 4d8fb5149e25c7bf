"""Metrics of boxes and masks: AP equals pycocotools' to the digit, the others equal those of the model card."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from examples.tiny import evaluate
from examples.tiny.heldout import SIDE, Example, Truth
from examples.tiny.texts import Row
from pgfunc.evaluation import boxes, masks
from pgfunc.evaluation.boxes import Located
from pgfunc.objects import coco, detect, segment, vqvae
from pgfunc.objects.detect import Box, Detection
from pgfunc.objects.segment import Segment

# pycocotools 2.0.11 uses an old protocol of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
VQ = vqvae.init(0)
LABELS = ("cat", "dog", "bus")


def random_box(rng: np.random.Generator) -> Box:
    y, x = (sorted(rng.integers(0, SIDE, 2).tolist()) for _ in range(2))
    return Box(float(y[0]), float(x[0]), float(y[1] + 1), float(x[1] + 1))


def filled(label: str, box: Box, confidence: float | None = None) -> Segment:
    """An object whose mask is its box."""
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[segment.pixels(box.ymin, box.ymax, SIDE), segment.pixels(box.xmin, box.xmax, SIDE)] = True
    return Segment(label, box, mask, confidence)


def near(item: Segment, rng: np.random.Generator) -> Segment:
    """The object moved by a few pixels, under a confidence of its own, and sometimes under another label."""
    moved = Box(*(float(np.clip(edge + rng.integers(-6, 7), 0, SIDE)) for edge in item.box))
    moved = moved._replace(ymax=max(moved.ymax, moved.ymin + 1), xmax=max(moved.xmax, moved.xmin + 1))
    label = item.label if rng.random() < 0.8 else str(rng.choice(LABELS))
    return filled(label, moved, float(rng.random()))


def scenes(seed: int, count: int = 12) -> tuple[list[list[Segment]], list[list[Segment]]]:
    """True objects of some pictures, and found ones: most of them near, some more, and some pictures empty."""
    rng = np.random.default_rng(seed)
    truths = [
        [filled(str(rng.choice(LABELS)), random_box(rng)) for _ in range(rng.integers(0, 5))] for _ in range(count)
    ]
    found = [[near(item, rng) for item in group if rng.random() < 0.85] for group in truths]
    for group in found[::3]:
        group.append(filled(str(rng.choice(LABELS)), random_box(rng), float(rng.random())))
    return truths, found


def pictures(truths: list[list[Segment]], found: list[list[Segment]]) -> list[Located]:
    return [Located(SIDE, SIDE, coco.labelled(a), coco.labelled(b), False) for a, b in zip(truths, found, strict=True)]


def by_pycocotools(truths: list[list[Segment]], found: list[list[Segment]], kind, folder) -> list[float]:
    """AP, AP50 and AP75 in the way of COCO's own scripts: two files, and `loadRes`."""
    data = coco.dataset([coco.Picture(str(i), SIDE, SIDE, group) for i, group in enumerate(truths)])
    ids = {category["name"]: category["id"] for category in data["categories"]}
    known = [[item for item in group if item.label in ids] for group in found]
    results = [entry for i, group in enumerate(known, 1) for entry in coco.annotations(group, i, ids)]
    (folder / "truth.json").write_text(json.dumps(data))
    (folder / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        done = COCOeval(truth, truth.loadRes(str(folder / "found.json")), kind)
        done.evaluate()
        done.accumulate()
        done.summarize()
    return done.stats[:3].tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_is_that_of_pycocotools_to_the_digit(seed, kind, tmp_path):
    truths, found = scenes(seed)
    actual = boxes.average_precision(pictures(truths, found), kind)
    assert [metric.value for metric in actual.values()] == by_pycocotools(truths, found, kind, tmp_path)
    assert 0.1 < (actual["ap"].value or 0) < 0.9


def test_a_label_that_no_truth_has_does_not_change_average_precision(tmp_path):
    truths, found = scenes(0)
    more = [[*group, filled("ghost", random_box(np.random.default_rng(1)), 0.99)] for group in found]
    assert boxes.average_precision(pictures(truths, more), "bbox") == boxes.average_precision(
        pictures(truths, found), "bbox"
    )
    assert by_pycocotools(truths, more, "bbox", tmp_path) == by_pycocotools(truths, found, "bbox", tmp_path)


def test_nothing_found_has_a_precision_of_0_and_nothing_true_has_none():
    truths, found = scenes(0, 4)
    nothing = [[] for _ in truths]
    measured = boxes.measure(pictures(truths, nothing))
    assert [measured.metrics[name].value for name in ("ap", "recall", "precision")] == [0, 0, None]
    measured = boxes.measure(pictures(nothing, found))
    assert [measured.metrics[name].value for name in ("ap", "recall", "precision")] == [None, None, 0]
    assert boxes.measure(pictures(nothing, nothing)).scores == [1] * 4
    assert masks.measure(pictures(nothing, nothing)).scores == [1] * 4
    assert masks.measure(pictures(truths, nothing)).metrics["mean_iou"].value == 0


def card_example(group: list[Segment], task: str) -> Example:
    things = [Truth(item.label, item.box, item.mask) for item in group]
    row = Row(task, f"{task} it", "", tuple(range(len(things))))
    return Example(Image.new("RGB", (SIDE, SIDE)), things, [row], "")


@pytest.mark.parametrize("seed", range(3))
def test_found_objects_and_correct_boxes_are_those_of_the_model_card(seed):
    truths, found = scenes(seed)
    texts = [detect.render([Detection(*item[:2]) for item in group], SIDE, SIDE) for group in found]
    parsed = [detect.parse(text, SIDE, SIDE) for text in texts]
    given = [
        Located(SIDE, SIDE, coco.labelled(a), coco.labelled(b), False) for a, b in zip(truths, parsed, strict=True)
    ]
    actual = boxes.measure(given).metrics
    expected = evaluate.figures([card_example(group, "detect") for group in truths], texts, VQ)
    assert actual["recall"].value == expected["detect: IoU > 0.5"]
    assert actual["precision"].value == expected["detect: precision"]
    assert 0.2 < expected["detect: IoU > 0.5"] < 1


def test_the_mean_iou_is_that_of_the_model_card(monkeypatch):
    truths, found = scenes(4)
    texts = [str(i) for i in range(len(found))]
    monkeypatch.setattr(segment, "parse", lambda text, *more: found[int(text)])
    expected = evaluate.share(
        evaluate.overlaps(
            ((one, one.rows[0], text) for one, text in
             zip([card_example(group, "segment") for group in truths], texts, strict=True)),
            VQ,
        )
    )  # fmt: skip
    measured = masks.measure(pictures(truths, found))
    assert measured.metrics["mean_iou"].value == pytest.approx(expected, rel=1e-6)  # float32 there
    first = next(i for i, group in enumerate(truths) if group)
    alone = masks.measure(pictures([truths[first]], [found[first]]))
    assert measured.scores[first] == alone.metrics["mean_iou"].value


def test_the_score_of_boxes_is_f1():
    cat, dog, far = (filled(label, Box(0, x, 50, x + 50)) for label, x in (("cat", 0), ("dog", 60), ("cat", 150)))
    measured = boxes.measure(pictures([[cat, dog]], [[cat, far, far]]))
    assert measured.scores == [2 * 1 / (2 + 3)]
