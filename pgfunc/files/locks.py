"""Locks on files and folders, by `flock`: they leave nothing behind, end with the process, and hold between threads.

Without locks (Windows, some network drives) nobody waits, and no writer is taken for dead. Nothing here knows what is
locked.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

AS_IT_IS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # no link is followed, no end of line changed


@contextmanager
def unlocked(path: Path) -> Iterator[bool]:
    """Whether nobody holds the lock of a file, which the block then holds; a file that is gone has nobody."""
    try:
        descriptor = os.open(path, os.O_RDWR | AS_IT_IS)
    except OSError as error:
        yield isinstance(error, FileNotFoundError)
        return
    try:
        yield lock(descriptor, exclusive=True, wait=False) is True
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, exclusive: bool, wait: bool = True) -> Iterator[bool | None]:
    """Hold a folder's lock; False where another has it, None where there is none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    except (OSError, ValueError):  # such as a folder whose files may be read by name alone
        descriptor = None
    if descriptor is None:
        yield None
        return
    try:
        yield lock(descriptor, exclusive, wait)
    finally:
        if fcntl:  # closing is not enough: a forked child has a copy
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def lock(descriptor: int, exclusive: bool, wait: bool = True) -> bool | None:
    """Take a lock; False where another has it, None where there are none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if isinstance(error, BlockingIOError) else None
    return True
