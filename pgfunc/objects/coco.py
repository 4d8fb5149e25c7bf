"""Objects as COCO's JSON, which pycocotools reads: boxes are x, y, width, height, and masks are run-length encoded.

Layout: cocodataset.org, "data format"; the string of a mask: cocoapi `common/maskApi.c`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from pgfunc.errors import SettingError
from pgfunc.objects.boxes import Detection, check_objects
from pgfunc.objects.masks import Segment, check_mask


class Picture(NamedTuple):
    """The name and size of a picture, and the objects in it."""

    name: str
    width: int
    height: int
    objects: Sequence[Detection | Segment]


def dataset(pictures: Iterable[Picture]) -> dict[str, Any]:
    """The content of a COCO file: pictures and categories are numbered from 1, categories in alphabetical order.

    Takes the pictures one by one, and keeps only the run lengths of their masks.
    """
    return numbered(map(unnumbered, pictures))


def unnumbered(picture: Picture) -> dict[str, Any]:
    """A picture and its annotations without ids: those of the categories are known only after the last picture."""
    entries = labelled(picture.objects)
    return {"image": picture.name, "width": picture.width, "height": picture.height, "annotations": entries}


def labelled(objects: Sequence[Detection | Segment]) -> list[dict[str, Any]]:
    """The annotations of one picture, with their labels in place of ids."""
    names = [item.label for item in objects]
    entries = annotations(objects, 0, dict.fromkeys(names, 0))
    return [{"label": name, **entry} for name, entry in zip(names, entries, strict=True)]


def numbered(pictures: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The content of a COCO file with these pictures, which are as `unnumbered` gives them."""
    images: list[dict[str, Any]] = []
    entries: list[tuple[str, dict[str, Any]]] = []
    for id, picture in enumerate(pictures, 1):
        images.append({"id": id, "file_name": picture["image"], "width": picture["width"], "height": picture["height"]})
        for entry in picture["annotations"]:
            rest = {name: value for name, value in entry.items() if name != "label"}
            entries.append((entry["label"], rest | {"image_id": id}))
    categories = {name: id for id, name in enumerate(sorted({name for name, _ in entries}), 1)}
    return {
        "images": images,
        "categories": [{"id": id, "name": name} for name, id in categories.items()],
        "annotations": [
            entry | {"category_id": categories[name], "id": id} for id, (name, entry) in enumerate(entries, 1)
        ],
    }


def annotations(
    objects: Sequence[Detection | Segment], image: int, categories: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The annotations of one picture, with the id of the picture and the ids of your own categories.

    `score` is the confidence, or 1 if there is none. pycocotools' `loadRes` takes a list of these for all pictures.
    Raises SettingError if a label has no id.
    """
    objects = check_objects(objects)
    if unknown := [item.label for item in objects if item.label not in categories]:
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
        for item in objects
    ]


def area(item: Detection | Segment) -> float:
    """The number of pixels in the mask, or in the box if there is no mask."""
    if isinstance(item, Segment):
        return float(item.mask.count_nonzero())  # sum() takes ten times as long
    return (item.box.xmax - item.box.xmin) * (item.box.ymax - item.box.ymin)


def rle(mask: Bool[Tensor, "y x"]) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths."""
    check_mask(mask)
    return {"size": list(mask.shape), "counts": compress(run_lengths(mask))}


def run_lengths(mask: Bool[Tensor, "y x"]) -> list[int]:
    """The number of zeros, then of ones, then of zeros, and so on, down each column from left to right."""
    values = mask.cpu().T.flatten()
    changes = values.diff(prepend=torch.tensor([False], device="cpu")).nonzero().flatten()
    ends = torch.cat([changes, torch.tensor([len(values)], device="cpu")])
    return ends.diff(prepend=torch.tensor([0], device="cpu")).tolist()


def compress(counts: Sequence[int]) -> str:
    """Run lengths as text: the first three as they are, each later one minus the one two before it.

    The numbers are signed and in base 32, low digits first.
    """
    differences = [count - counts[i - 2] if i > 2 else count for i, count in enumerate(counts)]
    return "".join(base32(difference) for difference in differences)


def base32(value: int) -> str:
    """A signed number, five bits per character from chr(48); a sixth bit tells that another character follows."""
    text = ""
    while True:
        digit, value = value & 31, value >> 5
        done = value == (-1 if digit & 16 else 0)  # only the sign is left, and the top bit of the digit holds it
        text += chr(48 + digit + (0 if done else 32))
        if done:
            return text


def mask(encoded: Mapping[str, Any]) -> Bool[Tensor, "y x"]:
    """The mask of run lengths, as text or as a list: the inverse of `rle`.

    Raises SettingError if they are not the run lengths of a mask of this size.
    """
    try:
        height, width = encoded["size"]
        counts = encoded["counts"] if isinstance(encoded["counts"], list) else decompress(encoded["counts"])
        if sum(counts) != height * width or min(height, width, *counts) < 0:
            raise ValueError(f"{sum(counts)} pixels, expected {height} x {width}")
        ones = torch.arange(len(counts), device="cpu") % 2 == 1
        return ones.repeat_interleave(torch.tensor(counts, device="cpu")).reshape(width, height).T
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise SettingError(f"not a mask in COCO's run lengths, with size and counts ({error})") from error


def decompress(text: str) -> list[int]:
    """The run lengths in a text: the inverse of `compress`. Raises ValueError if it ends within a number."""
    counts: list[int] = []
    value = shift = 0
    for code in text.encode("ascii"):
        digit = code - 48
        value, shift = value | (digit & 31) << shift, shift + 5
        if not digit & 32:
            value -= (1 << shift) * bool(digit & 16)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the text ends within a number")
    return counts
