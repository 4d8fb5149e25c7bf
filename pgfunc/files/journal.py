"""A folder whose files change at once, by a journal: a list of renames that is itself put in place by one rename.

Before that the folder is the old one, and after it the new one: whoever finds a journal, the next reader or writer,
carries it out. The folder is locked (`locks`) meanwhile; readers share the lock while they open its files. Nothing here
knows what the files are, or how they were written: see `atomic`.
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
TEMPORARY = re.compile(r"\.pgfunc-([0-9a-f]{16})(\.\d+)?\.tmp")  # short: the target's name may have all of 255 bytes

PATIENCE = 0.5  # seconds in which a writer that lives has renamed its files


def placed(journal: Path) -> bool:
    """Put a journal in its place, unless there is one: the commit.

    Readers that come from now on wait for it, so that they cannot keep a writer from its lock for ever.
    """
    target = journal.with_name(JOURNAL)
    try:
        os.link(journal, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        with locked(journal.parent, exclusive=True):
            if target.exists():
                return False
            journal.replace(target)
    return True


def settle(folder: Path) -> None:
    """Carry out the journal of a folder, if there is one, or wait until another has done so."""
    while interrupted(folder):
        with locked(folder, exclusive=True, wait=False) as held:
            if held is not False:
                finish(folder)
                return
        time.sleep(0.002)


def finish(folder: Path) -> None:
    """Carry out the journal of a folder, which is locked; again where that was interrupted.

    Hidden files (a model's config.json) go first and are back last: meanwhile a program that asks for no lock finds no
    model, rather than half of one and half of another.
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
    for target in superseded(folder, plan):
        target.unlink(missing_ok=True)
    for temporary in hidden:
        move(temporary, renames[temporary])
    for place in {target.parent for target in renames.values()}:
        flush(place)
    (folder / JOURNAL).unlink(missing_ok=True)
    flush(folder)


def superseded(folder: Path, plan: dict[str, Any]) -> list[Path]:
    """The files that a journal says go: those whose names match, but for the new ones."""
    new = {folder / name for name in plan["rename"].values()}
    return [folder / inner / name for inner, pattern in plan["supersede"] for name in names(folder / inner)
            if re.fullmatch(pattern, name) and folder / inner / name not in new]  # fmt: skip


def move(temporary: Path, target: Path) -> None:
    """Rename a file, unless that is done."""
    target.parent.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):
        temporary.replace(target)


def read_journal(folder: Path) -> dict[str, Any]:
    """The journal of a folder, empty where there is none.

    It is not obeyed where it names what lies outside, or a stranger wrote it: in /tmp anybody may.
    """
    try:
        owner = (folder / JOURNAL).stat().st_uid
        if owner not in (folder.stat().st_uid, getattr(os, "geteuid", lambda: owner)()):
            raise ValueError("it belongs to another user")
        plan = json.loads((folder / JOURNAL).read_bytes())
        places = [*((folder / name).parent for name in plan["rename"].values()),
                  *(folder / inner for inner, _ in plan["supersede"])]  # fmt: skip
        inside = all(place.resolve().is_relative_to(folder.resolve()) for place in places)
        known = {*plan["hidden"]} <= {*plan["rename"].values()} and all(map(TEMPORARY.fullmatch, plan["rename"]))
        if not (plan["rename"] and inside and known):
            raise ValueError("it names other files than those of a save")
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: an incomplete save, whose list {JOURNAL} cannot be used ({error}); remove "
                              "that file, and save again") from error  # fmt: skip
    return plan


def planned(folder: Path) -> set[str]:
    """The temporary files that the journal of a folder still needs."""
    try:
        return {*read_journal(folder).get("rename", {})}
    except CheckpointError:
        return set()


def interrupted(folder: Path) -> bool:
    """Whether a commit of a folder was interrupted, or is under way."""
    with suppress(OSError, ValueError):  # of names that no folder can have
        return (folder / JOURNAL).exists()
    return False


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Hold off those who change a folder, while its files are opened; an interrupted commit is finished before.

    Raises CheckpointError for one that cannot be finished, as in a folder that is read-only.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            settle(folder)
        except OSError as error:
            if time.monotonic() < deadline:  # another process may finish it soon
                time.sleep(0.01)
                continue
            raise CheckpointError(
                f"{folder}: an incomplete save, which cannot be finished here ({error}); make the folder writable and "
                "load it once, or save again"
            ) from error
        with locked(folder, exclusive=False):
            if not interrupted(folder):  # as it may be again by now
                yield
                return


def flush(folder: Path) -> None:
    """Bring what was renamed in a folder to the disk, where folders can be."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def names(folder: Path) -> list[str]:
    """The names in a folder, none where there is none."""
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
