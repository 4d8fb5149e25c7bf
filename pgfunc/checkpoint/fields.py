"""Checks of the fields of a JSON object such as `config.json`. They raise KeyError or ValueError.

The bounds are there so that a file of a kilobyte cannot ask for gigabytes of layers, or for a shape that no tensor has.
Published checkpoints have at most 46 layers, 257,216 rows of embedding and images of 896 pixels.
"""

from collections.abc import Mapping
from typing import Any

MAX_COUNT = 2**20
MAX_COUNTS = {"num_hidden_layers": 1000, "image_size": 2**12}  # instead of MAX_COUNT


def section(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object in a field."""
    if not isinstance(raw[key], dict):
        raise ValueError(f"{key} is {raw[key]!r}, expected an object")
    return raw[key]


def integer(raw: Mapping[str, Any], key: str) -> int:
    """A count (at least 1) or a token id (at least 0)."""
    value, least, most = raw[key], 0 if key.endswith("token_id") else 1, MAX_COUNTS.get(key, MAX_COUNT)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} is {value!r}, expected a whole number from {least} to {most}")
    return value


def positive(raw: Mapping[str, Any], key: str) -> float:
    """A number above 0 and below 1e30, such as a softcap."""
    value = raw[key]
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{key} is {value!r}, expected a number above 0 and below 1e30")
    return float(value)


def require(raw: Mapping[str, Any], key: str, value: Any) -> None:
    """Raise a ValueError if a field has another value than the default, which is the only one implemented."""
    if raw.get(key, value) != value:
        raise ValueError(f"{key} is {raw[key]!r}, expected {value!r}")
