"""COCO's JSON for what was found: annotations of pictures, with boxes as x, y, width, height and masks run-length
encoded, as pycocotools reads them (its `loadRes` too). Layout: cocodataset.org, "data format"; the string of a mask:
cocoapi `common/maskApi.c`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from pgfunc.errors import SettingError
from pgfunc.objects.detect import Detection, checked_objects
from pgfunc.objects.segment import Segment, check_mask


class Picture(NamedTuple):
    """A picture and what was found on it."""

    name: str
    width: int
    height: int
    found: Sequence[Detection | Segment]


def dataset(pictures: Iterable[Picture]) -> dict[str, Any]:
    """A whole file: pictures and categories numbered from 1, categories in the order of their names.

    The pictures are asked for one by one, and what is kept of a mask is its run lengths.
    """
    images: list[dict[str, Any]] = []
    entries: list[tuple[str, dict[str, Any]]] = []
    for id, picture in enumerate(pictures, 1):
        images.append({"id": id, "file_name": picture.name, "width": picture.width, "height": picture.height})
        names = [item.label for item in picture.found]
        entries += zip(names, annotations(picture.found, id, dict.fromkeys(names, 0)), strict=True)
    categories = {name: id for id, name in enumerate(sorted({name for name, _ in entries}), 1)}
    return {
        "images": images,
        "categories": [{"id": id, "name": name} for name, id in categories.items()],
        "annotations": [
            entry | {"category_id": categories[name], "id": id} for id, (name, entry) in enumerate(entries, 1)
        ],
    }


def annotations(
    found: Sequence[Detection | Segment], image: int, categories: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The objects of a picture, with the picture's id and the ids of your own categories.

    `score` is the confidence, and 1 where there is none. A list of these for all pictures is what `loadRes` takes.
    Raises SettingError for a label that has no id.
    """
    found = checked_objects(found)
    if unknown := [item.label for item in found if item.label not in categories]:
        raise SettingError(f"category {unknown[0]!r:.80} has no id; the categories are {', '.join(categories):.200}")
    return [
        {
            "image_id": image,
            "category_id": categories[item.label],
            "bbox": [item.box.xmin, item.box.ymin, item.box.xmax - item.box.xmin, item.box.ymax - item.box.ymin],
            "area": area(item),
            "iscrowd": 0,
            "score": 1.0 if item.confidence is None else item.confidence,
        }
        | ({"segmentation": rle(item.mask)} if isinstance(item, Segment) else {})
        for item in found
    ]


def area(item: Detection | Segment) -> float:
    """The pixels of the mask, or of the box where there is no mask."""
    if isinstance(item, Segment):
        return float(item.mask.count_nonzero())  # a sum of bytes takes ten times as long
    return (item.box.xmax - item.box.xmin) * (item.box.ymax - item.box.ymin)


def rle(mask: Bool[Tensor, "y x"]) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths: columns one after the other, zeros first."""
    check_mask(mask)
    return {"size": list(mask.shape), "counts": compressed(run_lengths(mask))}


def run_lengths(mask: Bool[Tensor, "y x"]) -> list[int]:
    """How many zeros, then how many ones, then zeros, ..., down the columns from left to right."""
    values = mask.cpu().T.flatten()
    changes = values.diff(prepend=torch.tensor([False], device="cpu")).nonzero().flatten()
    ends = torch.cat([changes, torch.tensor([len(values)], device="cpu")])
    return ends.diff(prepend=torch.tensor([0], device="cpu")).tolist()


def compressed(counts: Sequence[int]) -> str:
    """Run lengths as letters: each the difference to the one two before, in signed base 32, low digits first."""
    differences = [count - counts[i - 2] if i > 2 else count for i, count in enumerate(counts)]
    return "".join(letters(difference) for difference in differences)


def letters(value: int) -> str:
    """A number in five bits a letter, from chr(48); the sixth bit says that more follow."""
    text = ""
    while True:
        digit, value = value & 31, value >> 5
        done = value == (-1 if digit & 16 else 0)  # what is left is the sign, which the digit's own top bit repeats
        text += chr(48 + digit + (0 if done else 32))
        if done:
            return text
