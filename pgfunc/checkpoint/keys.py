"""Names of arrays in files that people have: prefixes that wrappers add, and arrays that no model uses.

This module knows nothing about file formats. A wrapper (torch.compile, DDP, FSDP) adds a segment to the name of every
array that it wraps. Old versions and conversions also saved buffers that are computed rather than loaded; those are
ignored with a warning.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypeVar

from pgfunc.errors import CheckpointError, printable

T = TypeVar("T")

WRAPPER = re.compile(r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
UNUSED = re.compile(
    r"(.+\.)?(position_ids|rotary_emb\.\w+|masked_bias|causal_mask|embed_scale)"
    r"|(.+\.)?vision_(tower|model)\.head\..+|img/MAPHead_0/.+"  # SigLIP's pooling head beside PaliGemma, both layouts
    r"|(opt|chrono)/.+"  # the state of big_vision's training
)


def unwrapped(arrays: Mapping[str, T], where: str) -> dict[str, T]:
    """The arrays by their names in the model itself, without the segments that wrappers added.

    Raises CheckpointError if a name occurs both with and without them.
    """
    by_name = {WRAPPER.sub("", key): array for key, array in arrays.items()}
    if len(by_name) < len(arrays):
        twice = next(key for key in arrays if WRAPPER.sub("", key) != key and WRAPPER.sub("", key) in arrays)
        raise CheckpointError(f"{where}: {twice} occurs with and without a wrapper's prefix; save the model unwrapped")
    return by_name


def without_unused(arrays: Mapping[str, T], expected: Iterable[str], where: str) -> dict[str, T]:
    """The arrays without those that no model uses, unless they are expected."""
    unused = {key for key in arrays if UNUSED.fullmatch(key)} - set(expected)
    warn_unused(unused, where)
    return {key: array for key, array in arrays.items() if key not in unused}


def warn_unused(names: Iterable[str], where: str) -> None:
    """Warn that these arrays are ignored, if there are any."""
    if names := sorted(names):
        warn_once(f"{where}: {first_of(names)} is ignored: no model uses it")


@lru_cache
def warn_once(message: str) -> None:
    """Log a warning through the logger `pgfunc`, once per message; Python prints it unless logging is configured."""
    logging.getLogger("pgfunc").warning("%s", printable(message))


def first_of(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
