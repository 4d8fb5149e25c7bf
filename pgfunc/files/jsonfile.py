"""JSON files: read whole, limited in size, in any encoding that JSON allows."""

import json
from pathlib import Path
from typing import Any

from pgfunc.errors import CheckpointError

MAX_BYTES = 2**22  # the largest index file of a published checkpoint has a thirtieth of this size


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if the file is missing, too large, or not a JSON object."""
    try:
        check_regular_file(path, MAX_BYTES)
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def check_regular_file(path: Path, max_bytes: int | None = None) -> None:
    """Raise CheckpointError if a path is not a file, or the file is larger than `max_bytes`. Reads nothing."""
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file" if path.exists() else f"{path}: missing")
    if max_bytes is not None and (size := path.stat().st_size) > max_bytes:
        raise CheckpointError(f"{path}: has {size:,} bytes, expected at most {max_bytes:,}")
