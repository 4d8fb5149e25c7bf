"""Everything that is written: a file or a folder's files change at once, from the old to the new.

A file is written under a temporary name beside its target, flushed to disk, and renamed. Several files of a folder are
committed by a journal, a list of renames that is itself put in place by one rename. Before that the folder is the old
one, and after it the new one: whoever finds a journal, the next reader or writer, carries it out.

    .pgfunc-TOKEN.tmp       says that a writer lives, which holds a lock on it; it becomes the journal
    .pgfunc-TOKEN.0.tmp     its new files; the next writer in the folder removes those of a writer that was killed
    .pgfunc-journal         a commit under way, or one that was interrupted

A folder is locked (`locks`) while its files are renamed, and by readers, who share the lock, while they open them.
Nothing is written in place, so what is mapped never changes, and a link at a target is replaced. Nothing here knows
what the files are.
"""

import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pgfunc.errors import CheckpointError
from pgfunc.locks import AS_IT_IS, lock, locked, unlocked

JOURNAL = ".pgfunc-journal"
TEMPORARY = re.compile(r"\.pgfunc-([0-9a-f]{16})(\.\d+)?\.tmp")  # short: the target's name may have all of 255 bytes


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write in place of another: the old is there until the block ends well. Raises OSError.

    It has the mode of the file that it replaces, else the umask's. A device or a pipe is written as it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with path.open("wb") as file:  # a folder is an OSError here
            yield file
        return
    with staged(path.parent) as change:
        with change.new(path.name) as file:
            yield file
        settle(path.parent)
        for temporary in change.renames:
            (path.parent / temporary).replace(path)
    flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of text, in UTF-8. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode())


class Change:
    """What is to happen to a folder at once: files that are new, by their names, and files that go."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder, self.token = folder, token
        self.renames: dict[str, str] = {}
        self.stale: list[tuple[str, str]] = []

    @contextmanager
    def new(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write. The one asked for last is put in place last; a name may lie in a folder of the folder."""
        temporary, target = f".pgfunc-{self.token}.{len(self.renames)}.tmp", self.folder / name
        self.renames[temporary] = name
        with os.fdopen(create(self.folder / temporary), "w+b") as file:
            if target.is_file() and not target.is_symlink():
                (self.folder / temporary).chmod(stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())

    def write(self, name: str, text: str) -> None:
        """A file of text."""
        with self.new(name) as file:
            file.write(text.encode())

    def supersede(self, pattern: re.Pattern[str], inner: str = "") -> None:
        """Files whose whole names match go, unless they are new; `inner` is a folder in the folder."""
        self.stale.append((inner, pattern.pattern))


@contextmanager
def changing(folder: str | Path) -> Iterator[Change]:
    """Files of a folder that all change when the block ends well, and none when it does not. Raises OSError.

    Two that change one folder at a time leave it as the later of them does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with staged(folder) as change:
        yield change
        commit(change)


@contextmanager
def staged(folder: Path) -> Iterator[Change]:
    """Temporary files, which are gone when the block ends, unless they were renamed or a journal names them."""
    sweep(folder)
    with alive(folder) as token:
        change = Change(folder, token)
        try:
            yield change
        finally:
            pending = read_journal(folder)
            for name in change.renames.keys() - pending.get("rename", {}).keys():
                (folder / name).unlink(missing_ok=True)


def commit(change: Change) -> None:
    """Change the folder: from the moment that the journal is in its place, whoever carries it out."""
    folder = change.folder
    for name in change.renames.values():
        check_target(folder / name)
    journal = folder / f".pgfunc-{change.token}.tmp"
    with journal.open("wb") as file:
        file.write(json.dumps({"rename": change.renames, "supersede": change.stale}).encode())
        file.flush()
        os.fsync(file.fileno())
    while not placed(journal):
        settle(folder)
    flush(folder)
    settle(folder)


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

    The last of the new files (for a model its config.json) goes first and is back last: meanwhile a program that asks
    for no lock finds no model, rather than half of one and half of another.
    """
    if not (plan := read_journal(folder)):
        return
    *others, (last, name) = plan["rename"].items()
    if others and (folder / last).exists():
        (folder / name).unlink(missing_ok=True)
    for temporary, target in others:
        move(folder / temporary, folder / target)
    for target in superseded(folder, plan):
        target.unlink(missing_ok=True)
    move(folder / last, folder / name)
    for place in {(folder / target).parent for target in plan["rename"].values()}:
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
        if not (plan["rename"] and inside and all(TEMPORARY.fullmatch(name) for name in plan["rename"])):
            raise ValueError("it names other files than those of a save")
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: an incomplete save, whose list {JOURNAL} is damaged ({error}); remove the "
                              "folder and save again") from error  # fmt: skip
    return plan


def check_target(path: Path) -> None:
    """Raise the OSError of a name that no file can have here, before the commit, which could not be finished then."""
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            raise IsADirectoryError(f"{path} is a folder")


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
    while True:
        try:
            settle(folder)
        except OSError as error:
            raise CheckpointError(f"{folder}: an incomplete save, which cannot be finished here ({error}); make the "
                                  "folder writable and load it once, or save again") from error  # fmt: skip
        with locked(folder, exclusive=False):
            if not interrupted(folder):  # as it may be again by now
                yield
                return


@contextmanager
def alive(folder: Path) -> Iterator[str]:
    """The token of a writer's temporary files, whose first is locked while the block runs, and gone after it."""
    while True:
        token = secrets.token_hex(8)
        path = folder / f".pgfunc-{token}.tmp"
        descriptor = create(path)
        lock(descriptor, exclusive=True)
        if path.exists():
            break
        os.close(descriptor)  # a sweep came between the two
    try:
        yield token
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; not those that a journal names."""
    found = {match[1] for name in names(folder) if (match := TEMPORARY.fullmatch(name))}
    for token in found:
        with unlocked(folder / f".pgfunc-{token}.tmp") as dead:
            if dead and not interrupted(folder):
                left = [name for name in names(folder) if name.startswith(f".pgfunc-{token}.")]
                for name in sorted(left):  # the locked one last
                    (folder / name).unlink(missing_ok=True)


def create(path: Path) -> int:
    """A new file, open for writing, with the umask's mode."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | AS_IT_IS, 0o666)


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
