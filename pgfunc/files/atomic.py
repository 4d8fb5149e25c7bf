"""Everything that is written: a file or a folder's files change at once, from the old to the new.

A file is written under a temporary name beside its target, flushed to disk, and renamed; several files of a folder are
renamed by a `journal`.

    .pgfunc-TOKEN.tmp       says that a writer lives, which holds a lock on it; it becomes the journal
    .pgfunc-TOKEN.0.tmp     its new files; the next writer in the folder removes those of a writer that was killed
    .pgfunc-journal         a change under way, or one that was interrupted

Nothing is written in place, so what is mapped never changes, and a link at a target is replaced. Nothing here knows
what the files are.
"""

import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pgfunc.files.journal import TEMPORARY, flush, interrupted, names, placed, planned, settle
from pgfunc.files.locks import AS_IT_IS, lock, unlocked


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write in place of another: the old is there until the block ends well.

    Raises OSError, and CheckpointError where an interrupted change of its folder cannot be carried out.

    It has the mode of the file that it replaces, else the umask's. A device or a pipe is written as it is.
    """
    path = Path(path)
    if (path.exists() and not path.is_file()) or is_stream(path):
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


def is_stream(path: Path) -> bool:
    """Whether a name stands for a stream of a process, as /dev/stdout does, wherever that leads now."""
    for _ in range(40):  # links, of which systems follow no more
        if path.absolute().is_relative_to("/dev") or path.absolute().is_relative_to("/proc"):
            return True
        if not path.is_symlink():
            return False
        path = path.parent / path.readlink()
    return False


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
        self.hidden: list[str] = []

    @contextmanager
    def new(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write; a name may lie in a folder of the folder."""
        temporary, target = f".pgfunc-{self.token}.{len(self.renames)}.tmp", self.folder / name
        self.renames[temporary] = name
        with os.fdopen(create(self.folder / temporary), "w+b") as file:
            with suppress(FileNotFoundError):
                mode = target.lstat().st_mode
                if stat.S_ISREG(mode):
                    (self.folder / temporary).chmod(stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(file.fileno())

    def write(self, name: str, text: str) -> None:
        """A file of text."""
        with self.new(name) as file:
            file.write(text.encode())

    def hide(self, name: str) -> None:
        """Mark a file by which programs find the others, such as config.json: it is removed first, and back last."""
        self.hidden.append(name)

    def supersede(self, pattern: re.Pattern[str], inner: str = "") -> None:
        """Files whose whole names match go, unless they are new; `inner` is a folder in the folder."""
        self.stale.append((inner, pattern.pattern))


@contextmanager
def changing(folder: str | Path) -> Iterator[Change]:
    """Files of a folder that all change when the block ends well, and none when it does not.

    Raises OSError, and CheckpointError as `replacing`.

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
            for name in change.renames.keys() - planned(folder):
                (folder / name).unlink(missing_ok=True)


def commit(change: Change) -> None:
    """Change the folder: from the moment that the journal is in its place, whoever carries it out."""
    folder = change.folder
    for name in change.renames.values():
        check_target(folder, folder / name)
    journal = folder / f".pgfunc-{change.token}.tmp"
    with journal.open("wb") as file:
        file.write(json.dumps({"rename": change.renames, "supersede": change.stale, "hidden": change.hidden}).encode())
        file.flush()
        os.fsync(file.fileno())
    while not placed(journal):
        settle(folder)
    flush(folder)
    settle(folder)


def check_target(folder: Path, path: Path) -> None:
    """Raise the OSError of a name that no file can have here, before the commit, which could not be finished then."""
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"{path.parent} is a link to another folder")
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            raise IsADirectoryError(f"{path} is a folder")


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
        try:
            path.unlink(missing_ok=True)
        finally:  # again, if Ctrl-C came before the file was gone
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
