"""JSON Lines: files with one JSON object per line, read whole; every message names the file and the line."""

import json
from pathlib import Path
from typing import Any

from pgfunc.errors import DataError
from pgfunc.names import is_url


def read_lines(path: str | Path, keys: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file, in order, without blank lines; each with "file:line", which messages begin with.

    `keys` says in messages what a line has. Raises DataError if the file cannot be read or has no lines, or if a line
    is not UTF-8 or not a JSON object.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: cannot be read, it is not a file")
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    rows = [(f"{path}:{i}", parse_line(line, f"{path}:{i}", keys)) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: empty; expected one line of JSON per example, with {keys}")
    return rows


def parse_line(line: bytes, where: str, keys: str) -> dict[str, Any]:
    """The object in one line. Raises DataError as `read_lines` does."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON in UTF-8 ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with {keys}, found {short(row)}")
    return row


def pictures(row: dict[str, Any], where: str, folder: Path, reason: str) -> tuple[Path, ...]:
    """The picture or the pictures that the key `image` of a line names, in a folder.

    Raises DataError, naming the line, for what is no text, and for an address; `reason` says why that must be a file.
    """
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    check_texts(where, "image", images)
    if addresses := [image for image in images if is_url(image)]:
        raise DataError(f"{where}: image is {short(addresses[0])}; download it, {reason}")
    return tuple(folder / image for image in images)


def check_texts(where: str, key: str, values: list[Any]) -> None:
    """Raise DataError, naming line and key, if a value is not text."""
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise DataError(f"{where}: {key} is {short(wrong[0])}, expected text")


def short(value: Any) -> str:
    """A JSON value in at most 40 characters, for messages."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
