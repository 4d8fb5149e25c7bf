"""Atomic writes: a reader sees the old content of a file, or of a whole folder, or the new one, never a mixture.

A file is written under a temporary name beside its target, flushed to disk, and renamed. If several files of a folder
change together, a `journal` lists the renames.

    .pgfunc-TOKEN.tmp       its writer is alive while it holds the lock on this file; the file becomes the journal
    .pgfunc-TOKEN.0.tmp     the writer's new files; if the writer was killed, the next writer in the folder removes them
    .pgfunc-journal         a commit in progress, or one that was interrupted

No file is written in place, so a memory-mapped file never changes, and a symbolic link at the target is replaced. This
module knows nothing about the content of the files.
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

from pgfunc.files.journal import (
    TEMPORARY,
    apply_journal,
    flush_folder,
    has_journal,
    journal_temporaries,
    list_names,
    publish_journal,
)
from pgfunc.files.locks import OPEN_FLAGS, lock, unlocked

MAX_LINKS = 40  # Linux follows no more symbolic links than that


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write; it replaces the file at `path` when the block ends without an exception.

    The new file has the mode of the file that it replaces, otherwise the mode of the umask. A device or a pipe is
    written directly. Raises OSError, and CheckpointError if an interrupted commit in the folder cannot be completed.
    """
    path = Path(path)
    if (path.exists() and not path.is_file()) or is_stream(path):
        with path.open("wb") as file:  # raises OSError for a folder
            yield file
        return
    with staged(path.parent) as change:
        with change.new(path.name) as file:
            yield file
        apply_journal(path.parent)
        for temporary in change.renames:
            (path.parent / temporary).replace(path)
    flush_folder(path.parent)


def is_stream(path: Path) -> bool:
    """Whether a path is a stream of a process, such as /dev/stdout, or a link to one."""
    for _ in range(MAX_LINKS):
        if path.absolute().is_relative_to("/dev") or path.absolute().is_relative_to("/proc"):
            return True
        if not path.is_symlink():
            return False
        path = path.parent / path.readlink()
    return False


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, atomically. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode())


class Change:
    """A set of changes to one folder that happen together: new files by name, and old files to delete."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder, self.token = folder, token
        self.renames: dict[str, str] = {}  # temporary name -> final name
        self.superseded: list[tuple[str, str]] = []  # (subfolder, pattern) of files to delete
        self.hidden: list[str] = []

    @contextmanager
    def new(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write; `name` may contain a subfolder."""
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
        """Add a new text file."""
        with self.new(name) as file:
            file.write(text.encode())

    def hide(self, name: str) -> None:
        """Mark the file by which programs recognize the folder, such as config.json.

        It is removed first and put back last, so that other programs never load a half-changed folder.
        """
        self.hidden.append(name)

    def supersede(self, pattern: re.Pattern[str], inner: str = "") -> None:
        """Delete the files whose full names match, except the new ones; `inner` is a subfolder."""
        self.superseded.append((inner, pattern.pattern))


@contextmanager
def changing(folder: str | Path) -> Iterator[Change]:
    """Collect changes to a folder; all of them happen when the block ends without an exception, otherwise none.

    If two writers change the folder at the same time, the later one wins as a whole. Raises OSError, and
    CheckpointError as `replacing` does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with staged(folder) as change:
        yield change
        commit(change)


@contextmanager
def staged(folder: Path) -> Iterator[Change]:
    """A change whose temporary files are deleted when the block ends, unless they were renamed or are in a journal."""
    remove_leftovers(folder)
    with writer_token(folder) as token:
        change = Change(folder, token)
        try:
            yield change
        finally:
            for name in change.renames.keys() - journal_temporaries(folder):
                (folder / name).unlink(missing_ok=True)


def commit(change: Change) -> None:
    """Change the folder. Once the journal has its final name, the change happens, whoever completes it."""
    folder = change.folder
    for name in change.renames.values():
        check_target(folder, folder / name)
    journal = writer_file(folder, change.token)
    plan = {"rename": change.renames, "supersede": change.superseded, "hidden": change.hidden}
    with journal.open("wb") as file:
        file.write(json.dumps(plan).encode())
        file.flush()
        os.fsync(file.fileno())
    while not publish_journal(journal):
        apply_journal(folder)
    flush_folder(folder)
    apply_journal(folder)


def check_target(folder: Path, path: Path) -> None:
    """Raise OSError if no file can have this name: the commit could not be completed, so this is checked before it."""
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"{path.parent} is a link to another folder")
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            raise IsADirectoryError(f"{path} is a folder")


@contextmanager
def writer_token(folder: Path) -> Iterator[str]:
    """The token in the names of a writer's temporary files. The first file is locked while the block runs."""
    while True:
        token = secrets.token_hex(8)
        path = writer_file(folder, token)
        descriptor = create(path)
        lock(descriptor, exclusive=True)
        if path.exists():
            break
        os.close(descriptor)  # another writer removed the file before it was locked
    try:
        yield token
    finally:
        try:
            path.unlink(missing_ok=True)
        finally:  # again, in case Ctrl-C came before the file was deleted
            path.unlink(missing_ok=True)
            os.close(descriptor)


def writer_file(folder: Path, token: str) -> Path:
    """The file that a writer locks while it is alive."""
    return folder / f".pgfunc-{token}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed, except those that a journal needs."""
    tokens = {match[1] for name in list_names(folder) if (match := TEMPORARY.fullmatch(name))}
    for token in tokens:
        with unlocked(writer_file(folder, token)) as abandoned:
            if abandoned and not has_journal(folder):
                leftovers = [name for name in list_names(folder) if name.startswith(f".pgfunc-{token}.")]
                for name in sorted(leftovers):  # the locked file is the last
                    (folder / name).unlink(missing_ok=True)


def create(path: Path) -> int:
    """Create a file with the mode of the umask, and open it for writing. It must not exist yet."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | OPEN_FLAGS, 0o666)
