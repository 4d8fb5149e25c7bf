"""Masks against true masks: the mean IoU, and COCO's average precision of masks.

The mean IoU is over the true objects: each has the IoU of its mask with the best mask of its label, or 0 if the answer
has none. Further masks do not lower it; they lower AP.
"""

from collections.abc import Sequence

from pgfunc.evaluation.boxes import Located, average_precision, overlaps
from pgfunc.evaluation.metrics import Measured, fractions, ratio, share


def measure(pictures: Sequence[Located]) -> Measured:
    """The metrics of masks. The score of an answer is its mean IoU, or without true objects whether it is empty."""
    best = [best_overlaps(picture) for picture in pictures]
    metrics = {"mean_iou": ratio(list(map(sum, best)), list(map(len, best)), "objects")}
    metrics |= {f"mask_{name}": metric for name, metric in average_precision(pictures, "segm").items()}
    metrics["invalid"] = share([picture.invalid for picture in pictures])
    scores = [
        sum(values) / len(values) if values else float(not picture.objects)
        for values, picture in zip(best, pictures, strict=True)
    ]
    return fractions(metrics, scores, "mean IoU")


def best_overlaps(picture: Located) -> list[float]:
    """For each true object the IoU of its mask with the best mask of its label; 0 if there is none."""
    return [
        max((iou for iou, other in zip(row, picture.objects) if other["label"] == truth["label"]), default=0.0)  # noqa: B905  an empty row
        for truth, row in zip(picture.truths, overlaps(picture, "segmentation"), strict=True)
    ]
