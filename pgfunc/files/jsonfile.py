"""JSON files, read whole: bounded before they are read, and in whatever encoding JSON may be written."""

import json
from pathlib import Path
from typing import Any

from pgfunc.errors import CheckpointError

MOST_BYTES = 2**22  # of a JSON file: the largest index of a published checkpoint has a thirtieth of it


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, in UTF-8 or whatever else JSON may be written in."""
    try:
        check_file(path, MOST_BYTES)
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def check_file(path: Path, most: int | None = None) -> None:
    """Raise CheckpointError for what is no file, or a larger one than its kind has: before any of it is read."""
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file" if path.exists() else f"{path}: missing")
    if most is not None and (size := path.stat().st_size) > most:
        raise CheckpointError(f"{path}: has {size:,} bytes, expected at most {most:,}")
