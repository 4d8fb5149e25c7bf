"""The names of arrays in files as people have them: what a wrapper put into them, and what no model reads.

Nothing here knows about formats. A wrapper (torch.compile, DDP, FSDP) adds a segment to each name of what it wraps.
Old versions and conversions also wrote buffers, which are computed and not read; they are left out, and named.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypeVar

from pgfunc.errors import CheckpointError, printable

T = TypeVar("T")

WRAPPER = re.compile(r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
UNREAD = re.compile(
    r"(.+\.)?(position_ids|rotary_emb\.\w+|masked_bias|causal_mask|embed_scale)"
    r"|(.+\.)?vision_(tower|model)\.head\..+|img/MAPHead_0/.+"  # SigLIP's pooling head beside PaliGemma, twice
    r"|(opt|chrono)/.+"  # of big_vision's training
)


def unwrapped(arrays: Mapping[str, T], where: str) -> dict[str, T]:
    """The arrays under the names that they have in the model itself."""
    found = {WRAPPER.sub("", key): array for key, array in arrays.items()}
    if len(found) < len(arrays):
        first, *_ = (key for key in arrays if WRAPPER.sub("", key) != key and WRAPPER.sub("", key) in arrays)
        raise CheckpointError(f"{where}: {first} is there with and without what a wrapper added to its name")
    return found


def read(arrays: Mapping[str, T], expected: Iterable[str], where: str) -> dict[str, T]:
    """The arrays without the known ones that the model does not have."""
    unread = {key for key in arrays if UNREAD.fullmatch(key)} - set(expected)
    leave_out(unread, where)
    return {key: array for key, array in arrays.items() if key not in unread}


def leave_out(names: Iterable[str], where: str) -> None:
    """Say, if there are any, that these arrays are not read."""
    if names := sorted(names):
        note(f"{where}: {first_of(names)} is left out: no model reads it")


@lru_cache
def note(message: str) -> None:
    """Tell what is no error, once, through the logger `pgfunc`; unless it is told otherwise Python prints it."""
    logging.getLogger("pgfunc").warning("%s", printable(message))


def first_of(names: list[str]) -> str:
    """A name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
