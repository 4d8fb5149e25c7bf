"""Boxes against true boxes: COCO's average precision, and recall and precision at one IoU.

AP is computed by pycocotools on our own COCO entries: the score of a box is its confidence, see
`detect.with_confidence`. Labels that no truth has do not count in AP, as in COCO.

A box is correct if its IoU with a true box of the same label is above 0.5 and no other box has taken that true box; the
true boxes choose in their order, each the best box that is left. Recall is the share of true boxes that have one,
precision the share of boxes that are correct.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from pgfunc.evaluation.metrics import Measured, Metric, fractions, ratio, share, single

ENOUGH = 0.5  # a correct box has an IoU above this
STATS = {"ap": 0, "ap50": 1, "ap75": 2}  # where COCOeval has these figures

Entry = dict[str, Any]  # a COCO annotation with its label; masks are run lengths, which take little memory


class Located(NamedTuple):
    """The true objects of a picture, those in the answer, and whether parts of the answer are no objects."""

    width: int
    height: int
    truths: list[Entry]
    objects: list[Entry]
    invalid: bool


def measure(pictures: Sequence[Located]) -> Measured:
    """The metrics of boxes. The score of an answer is its F1: correct boxes over the mean of boxes and true boxes."""
    right = [correct(picture) for picture in pictures]
    true, boxes = [len(picture.truths) for picture in pictures], [len(picture.objects) for picture in pictures]
    metrics = average_precision(pictures, "bbox") | {
        "recall": ratio(right, true, "objects"),
        "precision": ratio(right, boxes, "boxes"),
        "invalid": share([picture.invalid for picture in pictures]),
    }
    scores = [2 * hits / (a + b) if a + b else 1.0 for hits, a, b in zip(right, true, boxes, strict=True)]
    return fractions(metrics, scores, "F1 of boxes")


def correct(picture: Located) -> int:
    """The number of correct boxes, which is also the number of true objects that were found."""
    free = list(range(len(picture.objects)))
    hits, table = 0, overlaps(picture, "bbox")
    for truth, row in zip(picture.truths, table, strict=True):
        same = [i for i in free if picture.objects[i]["label"] == truth["label"]]
        best = max(same, key=lambda i: row[i], default=None)
        if best is not None and row[best] > ENOUGH:
            free.remove(best)
            hits += 1
    return hits


def overlaps(picture: Located, key: str) -> list[list[float]]:
    """The IoU of each true object with each object of the answer; `key` says what is compared: bbox or segmentation."""
    from pycocotools import mask

    if not picture.truths or not picture.objects:
        return [[] for _ in picture.truths]
    truths, objects = ([entry[key] for entry in items] for items in (picture.truths, picture.objects))
    return np.asarray(mask.iou(truths, objects, [0] * len(objects))).tolist()


def average_precision(pictures: Sequence[Located], kind: Literal["bbox", "segm"]) -> dict[str, Metric]:
    """COCO's AP over IoUs of 0.50 to 0.95, at 0.50 and at 0.75; of boxes ("bbox") or masks ("segm").

    None if there are no true objects.
    """
    from pycocotools.cocoeval import COCOeval

    count = sum(len(picture.truths) for picture in pictures)
    if not count:
        return {name: single(None, 0, "objects") for name in STATS}
    labels = sorted({entry["label"] for picture in pictures for entry in (*picture.truths, *picture.objects)})
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        truths = table(pictures, labels, [picture.truths for picture in pictures])
        evaluation = COCOeval(truths, table(pictures, labels, [picture.objects for picture in pictures]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: single(float(evaluation.stats[i]), count, "objects") for name, i in STATS.items()}


def table(pictures: Sequence[Located], labels: Sequence[str], objects: Sequence[Sequence[Entry]]) -> Any:
    """pycocotools' table of these objects. Built without `loadRes`, which fails if there are none."""
    from pycocotools.coco import COCO

    ids = {label: id for id, label in enumerate(labels, 1)}
    rows = [(image, entry) for image, group in enumerate(objects, 1) for entry in group]
    result: Any = COCO()
    result.dataset = {
        "images": [
            {"id": id, "width": picture.width, "height": picture.height} for id, picture in enumerate(pictures, 1)
        ],
        "categories": [{"id": id, "name": label} for label, id in ids.items()],
        "annotations": [
            entry | {"id": id, "image_id": image, "category_id": ids[entry["label"]]}
            for id, (image, entry) in enumerate(rows, 1)
        ],
    }
    result.createIndex()
    return result
