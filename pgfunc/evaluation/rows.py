"""The data of an evaluation: JSON Lines as for training, which may also have several references, or objects in pixels.

    {"image": "dog.jpg", "prefix": "caption en", "suffix": ["a dog on a sofa", "a brown dog"]}
    {"image": "dog.jpg", "prefix": "detect dog", "suffix": "<loc0102><loc0204><loc0511><loc0767> dog"}
    {"image": "dog.jpg", "objects": [{"label": "dog", "box": {"ymin": 40, "xmin": 80, "ymax": 200.5, "xmax": 300}}]}

`objects` has the form that `pgfunc detect --json` prints, with a `mask` in COCO's run lengths for `segment`. A text can
only name multiples of 1/1023 of a side, and its masks what 16 codes express, so pixels measure more exactly. Knows how
to read the truth; knows no answers.
"""

import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pgfunc.errors import DataError, SettingError
from pgfunc.files.jsonlines import check_texts, pictures, read_lines, short
from pgfunc.names import TASKS as PREFIXES
from pgfunc.objects import coco, detect, segment, vqvae
from pgfunc.objects.detect import Box, Detection
from pgfunc.objects.segment import Segment

Task = Literal["caption", "answer", "ocr", "detect", "segment"]
TASKS: tuple[Task, ...] = get_args(Task)
OBJECTS = ("detect", "segment")  # tasks whose answers are objects
UNKNOWN = (1024, 1024)  # in place of the size of a picture that cannot be read
KEYS = "image, prefix, and suffix or objects"
REGION = re.compile(r"(?:<loc\d{4}>)*\s*")  # what a prompt about a part of the picture begins with
WORDS: dict[str, Task] = {"caption": "caption", "cap": "caption", "describe": "caption", "answer": "answer",
                          "ocr": "ocr", "detect": "detect", "segment": "segment"}  # fmt: skip


class Row(NamedTuple):
    """A line of the file. It has references, or objects in pixels; `where` names the file and the line number."""

    where: str
    images: tuple[Path, ...]
    prefix: str  # "" if the line has none
    references: tuple[str, ...]
    objects: tuple[dict[str, Any], ...] | None


def read(path: str | Path, images: str | Path | None = None) -> list[Row]:
    """The rows of a file, in order. Pictures are in the folder `images`, or beside the file.

    Raises DataError, naming file and line, if a line cannot be used.
    """
    folder = Path(path).parent if images is None else Path(images)
    return [parse(line, where, folder) for where, line in read_lines(path, KEYS)]


def parse(line: dict[str, Any], where: str, folder: Path) -> Row:
    """The row in one line. Raises DataError as `read` does."""
    if "image" not in line or ("suffix" in line) == ("objects" in line):
        missing = "has both suffix and objects" if "suffix" in line and "objects" in line else "has not all it needs"
        raise DataError(f"{where}: {missing}; a line has {KEYS}")
    prefix, suffix = line.get("prefix", ""), line.get("suffix", [])
    references = suffix if isinstance(suffix, list) else [suffix]
    check_texts(where, "prefix", [prefix])
    check_texts(where, "suffix", references)
    if "suffix" in line and not references:
        raise DataError(f"{where}: suffix is an empty list; give one or more references")
    objects = line.get("objects", [])
    if not isinstance(objects, list):
        raise DataError(f"{where}: objects is {short(objects)}, expected a list")
    for item in objects:
        to_object(item, where)
    images = pictures(line, where, folder, "the next evaluation reads it again")
    return Row(where, images, prefix, tuple(references), tuple(objects) if "objects" in line else None)


def to_object(item: Any, where: str) -> Detection | Segment:
    """An object of a line, with its mask if it has one. Raises DataError if it is not a label and a box in pixels."""
    try:
        box = Box(**{edge: float(item["box"][edge]) for edge in Box._fields})
        if not (isinstance(item["label"], str) and all(map(isfinite, box)) and box.ymin <= box.ymax
                and box.xmin <= box.xmax):  # fmt: skip
            raise ValueError
    except (KeyError, TypeError, ValueError):
        form = 'expected {"label": "cat", "box": {"ymin": 1, "xmin": 2, "ymax": 30, "xmax": 40}}, in pixels'
        raise DataError(f"{where}: an object is {short(item)}; {form}") from None
    if item.get("mask") is None:
        return Detection(item["label"], box)
    try:
        return Segment(item["label"], box, coco.mask(item["mask"]))
    except SettingError as error:
        raise DataError(f"{where}: the mask of {item['label']!r:.80} is {error}") from error


def as_task(name: str) -> Task:
    """The task with this name. Raises SettingError if there is none."""
    for task in TASKS:
        if task == name:
            return task
    raise SettingError(f"task is {name!r:.40}, expected one of {', '.join(TASKS)}")


def task_of(row: Row) -> Task | None:
    """The task that a row's prefix names; None if there is no prefix, or the prefix is none of PaliGemma's."""
    return WORDS.get(REGION.sub("", row.prefix, count=1).partition(" ")[0])


def only_task(rows: Sequence[Row]) -> Task:
    """The task of all rows. Raises DataError if a row's prefix names none, or two rows have different tasks."""
    first = task_of(rows[0])
    for row in rows:
        if (task := task_of(row)) is None:
            raise DataError(f"{row.where}: prefix {row.prefix!r:.40} names no task; say which with --task")
        if task != first:
            raise DataError(f"{row.where}: is of task {task}, the lines above of {first}; name one with --task")
    assert first is not None
    return first


def of_task(rows: Sequence[Row], task: Task) -> list[Row]:
    """The rows of a task, each with a prefix. Rows whose prefix names another task are left out.

    Raises DataError if there are none, or a row lacks what the task needs.
    """
    chosen = [with_prefix(row, task) for row in rows if task_of(row) in (task, None)]
    if not chosen:
        raise DataError(f"{rows[0].where}: neither this line nor another one is of task {task}")
    return chosen


def with_prefix(row: Row, task: Task) -> Row:
    """The row with the task's prefix if it has none. Raises DataError if the row lacks what the task needs."""
    if task not in OBJECTS and row.objects is not None:
        raise DataError(f"{row.where}: has objects, which {task} does not compare; expected a suffix")
    if task in OBJECTS:
        check_objects(row, task)
    if row.prefix:
        return row
    if task == "answer":
        raise DataError(f"{row.where}: prefix is missing, and only the line can tell the question: 'answer en ...'")
    if task not in OBJECTS:
        return row._replace(prefix=PREFIXES[task])
    labels = list(dict.fromkeys(labels_of(row)))
    if not labels:
        raise DataError(f"{row.where}: prefix is missing, and there is no object that tells what to look for")
    return row._replace(prefix=PREFIXES[task].format(detect.join_labels(labels)))


def check_objects(row: Row, task: str) -> None:
    """Raise DataError if the objects of a row, or the text about them, cannot be read."""
    if row.objects is not None:
        if task == "segment" and any(item.get("mask") is None for item in row.objects):
            raise DataError(f"{row.where}: an object has no mask, which segment compares")
        return
    text, *more = row.references
    if more:
        raise DataError(f"{row.where}: suffix is a list; {task} compares with one text of objects")
    for malformed in (segment if task == "segment" else detect).malformed(text):
        raise DataError(f"{row.where}: suffix has {malformed.piece!r:.80}: {malformed.reason}")


def labels_of(row: Row) -> list[str]:
    """The labels of the true objects."""
    if row.objects is not None:
        return [item["label"] for item in row.objects]
    return [item.label for item in detect.well_formed(row.references[0])]


def truths(row: Row, size: tuple[int, int] | None, vq: vqvae.Params | None) -> list[Detection | Segment]:
    """The true objects of a row in a picture of this width and height; with masks if there is a mask decoder.

    Without a size, because the picture cannot be read, they are those of some picture, and can only be counted. Raises
    DataError if a mask has another size than the picture.
    """
    if row.objects is None:
        text, size = row.references[0], size or UNKNOWN
        return [*segment.parse(text, *size, vq)] if vq else [*detect.parse(text, *size)]
    items = [to_object(item, row.where) for item in row.objects]
    for item in items:
        if size and isinstance(item, Segment) and item.mask.shape != size[::-1]:
            sizes = [" x ".join(map(str, sides)) for sides in (item.mask.shape[::-1], size)]
            raise DataError(f"{row.where}: the mask of {item.label!r:.80} is {sizes[0]}, the picture {sizes[1]} pixels")
    return items if vq else [Detection(item.label, item.box) for item in items]
