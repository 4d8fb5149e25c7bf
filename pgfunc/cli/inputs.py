"""The pictures that a command is about: files, folders, globs, URLs, tables, and names on standard input.

    photo.jpg  https://host/photo.jpg     itself
    photos/                               all pictures below the folder, by their names' endings, in order
    'photos/**/*.jpg'                     the files that match, in order
    questions.jsonl  questions.csv        a row for each line: `image`, and if you like `prompt` or `prefix`;
                                          other columns pass through to the results
    -                                     a name, or a JSON object as in a table, for each line of standard input

A name in a table is relative to the table's folder. Names are listed before anything is computed; what is in the files
is read later, so that memory does not grow with them. This module imports neither PyTorch nor Pillow.
"""

import csv
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pgfunc.errors import DataError, ImageError, first_line
from pgfunc.names import is_url

# of pictures in a folder; a file that is named itself may end in anything
ENDINGS = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".icns", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm",
})  # fmt: skip
TABLES = (".jsonl", ".csv")
STDIN = "-"


class Item(NamedTuple):
    """One picture, and what is asked about it."""

    number: int  # its place among all inputs, from 0
    image: str  # its name, as results have it
    source: str  # the file or URL to read
    drawing: str  # the name of its drawing in a folder: the path below the folder that was given
    prompt: str | None = None  # from a table, in place of --prompt
    prefix: str | None = None  # from a table: what the model gets, word for word
    columns: dict[str, Any] = {}  # noqa: RUF012  # the other columns of a table


class Inputs(NamedTuple):
    """The pictures of a command, and how many there are; None: their names come from standard input."""

    arguments: Sequence[str]
    items: Iterable[Item]
    total: int | None
    single: bool  # one file that was named itself: its error ends the command


def expand(arguments: Sequence[str]) -> Inputs:
    """The pictures that the arguments name, in order.

    Raises ImageError if a file does not exist, or if a folder or a pattern has no pictures; DataError if a table cannot
    be read.
    """
    if STDIN in arguments:
        return Inputs(arguments, numbered(chain.from_iterable(map(items_of, arguments))), None, single=False)
    items = [*numbered(chain.from_iterable(map(items_of, arguments)))]
    single = len(items) == len(arguments) == 1 and not is_table(arguments[0]) and not is_folder(arguments[0])
    return Inputs(arguments, items, len(items), single)


def check_inputs(inputs: Inputs, asked: Callable[[Item], str]) -> None:
    """Raise PromptError if nothing is asked about one of the pictures that are already known."""
    for item in inputs.items if inputs.total is not None else ():
        asked(item)


def numbered(items: Iterable[Item]) -> Iterator[Item]:
    return (item._replace(number=number) for number, item in enumerate(items))


def items_of(argument: str) -> Iterator[Item]:
    """The pictures that one argument names."""
    if argument == STDIN:
        yield from standard_input()
    elif is_url(argument):
        yield plain(argument)
    elif exists(argument):
        if Path(argument).is_dir():
            yield from in_folder(argument)
        elif is_table(argument):
            yield from table(Path(argument))
        else:
            yield plain(argument)
    elif glob.has_magic(argument):
        names = sorted(name for name in glob.glob(argument, recursive=True) if Path(name).is_file())  # noqa: PTH207
        if not names:
            raise ImageError(f"{argument}: no file matches")
        yield from map(plain, names)
    else:
        raise ImageError(f"{argument}: no such file")


def plain(name: str, columns: dict[str, Any] | None = None, source: str | None = None) -> Item:
    """A picture with this name."""
    columns = dict(columns or {})
    prompt, prefix = columns.pop("prompt", None), columns.pop("prefix", None)
    base = Path(urlsplit(name).path if is_url(name) else name).name
    return Item(0, name, source or name, base, prompt, prefix, columns)


def in_folder(folder: str) -> Iterator[Item]:
    """The pictures below a folder, in the order of their paths; hidden files and folders are left out.

    Raises ImageError if there are none.
    """
    found = False
    for path in pictures_below(Path(folder)):
        found = True
        yield plain(str(path))._replace(drawing=str(path.relative_to(folder)))
    if not found:
        raise ImageError(f"{folder}: has no pictures; those in it are recognized by endings such as .jpg and .png")


def pictures_below(folder: Path) -> Iterator[Path]:
    """The files below a folder whose names end as those of pictures do. Links to folders are not followed."""
    with os.scandir(folder) as entries:
        ordered = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in ordered:
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from pictures_below(path)
        elif path.suffix.lower() in ENDINGS and entry.is_file():
            yield path


def is_table(argument: str) -> bool:
    return Path(argument).suffix.lower() in TABLES


def table(path: Path) -> Iterator[Item]:
    """The rows of a table. Raises DataError, with the line, for a row without a picture."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv_rows(file) if path.suffix.lower() == ".csv" else json_rows(file)
            for number, row in lines:
                yield row_item(f"{path}:{number}", row, path.parent)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({first_line(error)})") from error


def json_rows(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """The line numbers and objects of JSON Lines; a line that is not JSON is returned as text."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, line


def csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """The line numbers and rows of CSV with a header."""
    reader = csv.DictReader(lines)
    for row in reader:
        named = {name: value for name, value in row.items() if name is not None}
        yield reader.line_num, {name: value for name, value in named.items() if value is not None}


def row_item(place: str, row: Any, folder: Path) -> Item:
    """The picture of a table's row. Raises DataError if the row names none."""
    image = row.get("image") if isinstance(row, dict) else None
    if not isinstance(image, str) or not image:
        raise DataError(f'{place}: expected an image, as in {{"image": "photo.jpg", "prompt": "what is this?"}}')
    if wrong := [name for name in ("prompt", "prefix") if not isinstance(row.get(name, ""), str)]:
        raise DataError(f"{place}: {wrong[0]} is {row[wrong[0]]!r:.60}, expected text")
    columns = {name: value for name, value in row.items() if name != "image"}
    return plain(image, columns, image if is_url(image) else str(folder / image))


def standard_input() -> Iterator[Item]:
    """A picture for each line of standard input: its name, or a JSON object as in a table."""
    for number, line in enumerate(sys.stdin, 1):
        text = line.rstrip("\r\n")
        if text.startswith("{"):
            yield from (row_item(f"standard input:{number}", row, Path()) for _, row in json_rows([text]))
        elif text:
            yield plain(text)


def names_pictures(argument: str) -> bool:
    """Whether an argument may name pictures: a file, a folder, an address, a pattern, or standard input."""
    return argument == STDIN or is_url(argument) or exists(argument) or glob.has_magic(argument)


def is_folder(name: str) -> bool:
    return exists(name) and Path(name).is_dir()


def exists(name: str) -> bool:
    """Whether a file or folder has this name; False for a text that cannot be a file name."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False
