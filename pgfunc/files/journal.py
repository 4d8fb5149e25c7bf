"""The journal of a folder: a list of renames, which one rename puts in place. It makes several changes one commit.

Before that rename the folder counts as old, and after it as new: the next reader or writer that sees a journal
completes it. Meanwhile the folder is locked (see `locks`); readers share the lock while they open files. This module
knows neither what the files are nor how they were written (see `atomic`).
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pgfunc.errors import CheckpointError
from pgfunc.files.locks import locked

JOURNAL = ".pgfunc-journal"
# does not contain the target's name, which may already have the maximum of 255 bytes
TEMPORARY = re.compile(r"\.pgfunc-([0-9a-f]{16})(\.\d+)?\.tmp")

PATIENCE = 0.5  # seconds; a writer that is alive completes its renames in less


def publish_journal(temporary: Path) -> bool:
    """Give a journal its final name, which is the commit. Returns False if the folder has a journal already.

    From then on, new readers wait until the commit is complete, so that a writer always gets its lock.
    """
    journal = temporary.with_name(JOURNAL)
    try:
        os.link(temporary, journal)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        with locked(temporary.parent, exclusive=True):
            if journal.exists():
                return False
            temporary.replace(journal)
    return True


def apply_journal(folder: Path) -> None:
    """Complete the journal of a folder, if there is one, or wait until another process has completed it."""
    while has_journal(folder):
        with locked(folder, exclusive=True, wait=False) as held:
            if held is not False:
                apply_locked(folder)
                return
        time.sleep(0.002)


def apply_locked(folder: Path) -> None:
    """Complete the journal of a locked folder; an interrupted run is repeated safely.

    Hidden files (a model's config.json) are removed first and put back last: meanwhile a program that takes no lock
    finds no model, instead of parts of two models.
    """
    if not (plan := read_journal(folder)):
        return
    renames = {folder / temporary: folder / name for temporary, name in plan["rename"].items()}
    hidden = [folder / temporary for temporary, name in plan["rename"].items() if name in plan["hidden"]]
    for temporary in hidden:
        if temporary.exists():
            renames[temporary].unlink(missing_ok=True)
    for temporary in [name for name in renames if name not in hidden]:
        move(temporary, renames[temporary])
    for target in superseded_files(folder, plan):
        target.unlink(missing_ok=True)
    for temporary in hidden:
        move(temporary, renames[temporary])
    for parent in {target.parent for target in renames.values()}:
        flush_folder(parent)
    (folder / JOURNAL).unlink(missing_ok=True)
    flush_folder(folder)


def superseded_files(folder: Path, plan: dict[str, Any]) -> list[Path]:
    """The files that a journal deletes: those whose names match one of its patterns, except the new ones."""
    new = {folder / name for name in plan["rename"].values()}
    return [folder / inner / name for inner, pattern in plan["supersede"] for name in list_names(folder / inner)
            if re.fullmatch(pattern, name) and folder / inner / name not in new]  # fmt: skip


def move(temporary: Path, target: Path) -> None:
    """Rename a file, unless an interrupted run has renamed it already."""
    target.parent.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):
        temporary.replace(target)


def read_journal(folder: Path) -> dict[str, Any]:
    """The journal of a folder; empty if there is none.

    Raises CheckpointError if it names files outside the folder, or belongs to another user: in /tmp anybody may write.
    """
    try:
        owner = (folder / JOURNAL).stat().st_uid
        if owner not in (folder.stat().st_uid, getattr(os, "geteuid", lambda: owner)()):
            raise ValueError("it belongs to another user")
        plan = json.loads((folder / JOURNAL).read_bytes())
        parents = [*((folder / name).parent for name in plan["rename"].values()),
                   *(folder / inner for inner, _ in plan["supersede"])]  # fmt: skip
        inside = all(parent.resolve().is_relative_to(folder.resolve()) for parent in parents)
        well_formed = {*plan["hidden"]} <= {*plan["rename"].values()} and all(map(TEMPORARY.fullmatch, plan["rename"]))
        if not (plan["rename"] and inside and well_formed):
            raise ValueError("it names other files than those of a save")
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: an incomplete save, whose list {JOURNAL} cannot be used ({error}); remove "
                              "that file, and save again") from error  # fmt: skip
    return plan


def journal_temporaries(folder: Path) -> set[str]:
    """The temporary files that the journal of a folder still needs."""
    try:
        return {*read_journal(folder).get("rename", {})}
    except CheckpointError:
        return set()


def has_journal(folder: Path) -> bool:
    """Whether a commit in a folder is in progress or was interrupted."""
    with suppress(OSError, ValueError):  # for names that no folder can have
        return (folder / JOURNAL).exists()
    return False


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep writers from changing a folder while its files are opened. Completes an interrupted commit first.

    Raises CheckpointError if the commit cannot be completed, for example because the folder is read-only.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            apply_journal(folder)
        except OSError as error:
            if time.monotonic() < deadline:  # another process may complete it soon
                time.sleep(0.01)
                continue
            raise CheckpointError(
                f"{folder}: an incomplete save, which cannot be finished here ({error}); make the folder writable and "
                "load it once, or save again"
            ) from error
        with locked(folder, exclusive=False):
            if not has_journal(folder):  # a new commit may have begun before the lock was taken
                yield
                return


def flush_folder(folder: Path) -> None:
    """Write the renames in a folder to disk, on systems where a folder can be flushed."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def list_names(folder: Path) -> list[str]:
    """The names in a folder; empty if it does not exist or cannot be listed."""
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
