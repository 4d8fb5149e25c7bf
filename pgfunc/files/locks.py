"""Locks on files and folders, by `flock`: they leave no files behind, end with the process, and exclude threads too.

On systems without `flock` (Windows, some network drives) locks do nothing, and leftovers of killed writers stay. This
module knows nothing about the files that it locks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

OPEN_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # no links are followed, no line ends changed


@contextmanager
def unlocked(path: Path) -> Iterator[bool]:
    """Try to hold the lock of a file for the block. Yields True if that works, or if the file is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | OPEN_FLAGS)
    except OSError as error:
        yield isinstance(error, FileNotFoundError)
        return
    try:
        yield lock(descriptor, exclusive=True, wait=False) is True
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, exclusive: bool, wait: bool = True) -> Iterator[bool | None]:
    """Hold the lock of a folder. Yields False if another holder has it, None if locks do not exist here."""
    try:
        descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    except (OSError, ValueError):  # for example a folder that may not be listed
        descriptor = None
    if descriptor is None:
        yield None
        return
    try:
        yield lock(descriptor, exclusive, wait)
    finally:
        if fcntl:  # closing is not enough: a forked child has a copy of the descriptor
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


_own: set[int] = set()  # descriptors that a forked child closes at once


@contextmanager
def not_inherited(descriptor: int) -> Iterator[None]:
    """Let no process that is forked in the block keep the descriptor, and with it the lock."""
    _own.add(descriptor)
    try:
        yield
    finally:
        _own.discard(descriptor)


def _close_in_child() -> None:
    for descriptor in _own:
        with suppress(OSError):
            os.close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def lock(descriptor: int, exclusive: bool, wait: bool = True) -> bool | None:
    """Take a lock. Returns False if another holder has it, None if locks do not exist here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if isinstance(error, BlockingIOError) else None
    return True
