"""A folder of compiled code: PyTorch's own caches, in a place of one's own choice.

What lies in such a folder is run: machine code, Python, and pickles, which may hold any code. So others must not be
able to write there, and a folder from elsewhere is as trustworthy as whoever made it. PyTorch reads the place from the
environment, which belongs to the whole process: it has one folder at a time.

    files.sha256    a line a file: what is not as it was written is thrown away, and made again
    torchinductor   PyTorch's files
    triton          Triton's

A truncated library would end the process when it is mapped (SIGBUS), so files are compared before they are used.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, get_ident
from typing import IO

from pgfunc.errors import SettingError

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "TRITON_CACHE_DIR": "triton"}  # read whenever code is compiled
FILES = "files.sha256"

_lock = Lock()
_users: dict[object, tuple[int, Path]] = {}  # by each entry its thread and folder, the innermost last
_outside: dict[str, str | None] = {}  # the variables, before the first came in


@contextmanager
def code_in(folder: Path) -> Iterator[None]:
    """In here compiled code is looked for in a folder, and left there. Raises SettingError where that cannot be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder)
        with (folder / FILES).open("a+") as register:
            mend(folder, register)
            with environment(folder):
                yield
            try:
                record(folder)
            except OSError as error:
                raise SettingError(f"{folder}: the code cannot be kept ({error.strerror})") from error
    except OSError as error:
        if error.filename is None or not Path(os.fsdecode(error.filename)).is_relative_to(folder):
            raise
        raise SettingError(f"{folder}: cannot be a folder for compiled code ({error.strerror})") from error


@contextmanager
def environment(folder: Path) -> Iterator[None]:
    """PyTorch's variables name places in the folder, until the last user of it leaves."""
    entry, me = object(), get_ident()
    with _lock:
        for thread, other in _users.values():
            if other != folder and thread != me:
                raise SettingError(f"{folder}: another thread has its compiled code in {other}, and a process has one")
        if not _users:
            _outside.update({name: os.environ.get(name) for name in VARIABLES})
        _users[entry] = me, folder
        _point()
    try:
        yield
    finally:
        with _lock:
            del _users[entry]
            _point()


def _point() -> None:
    """Set the variables for the innermost user, or as they were."""
    folder = [folder for _, folder in _users.values()][-1:]
    for name, place in VARIABLES.items():
        value = str(folder[0] / place) if folder else _outside[name]
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def check_private(folder: Path) -> None:
    """Raise SettingError for a folder in which others can write: what lies there is run."""
    if not hasattr(os, "getuid"):
        return
    closed = not folder.stat().st_mode & 0o011  # others cannot even enter
    for path in [folder] if closed else [folder, *folder.rglob("*")]:
        try:
            found = path.stat() if path == folder else path.lstat()
        except FileNotFoundError:  # another process may be compiling
            continue
        if found.st_uid not in (os.getuid(), 0):
            raise SettingError(f"{path}: belongs to another user, and what lies in a folder of code is run; copy it")
        if found.st_mode & 0o022 or stat.S_ISLNK(found.st_mode):
            raise SettingError(f"{path}: others can write it, and what lies there is run; chmod -R go-w {folder}")


def mend(folder: Path, register: IO[str]) -> None:
    """Throw away what a killed process left behind, and all code where some is not as it was written.

    A process that is in the folder shares a lock on its register. Nothing is done while there is another one, which has
    done so when it came; who comes meanwhile waits.
    """
    if os.name != "posix":
        clean(folder)
        return
    import fcntl

    try:
        fcntl.flock(register, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(register, fcntl.LOCK_SH)  # waits while another one is at it
        return
    clean(folder)
    fcntl.flock(register, fcntl.LOCK_SH)


def clean(folder: Path) -> None:
    """Remove code that is damaged, or was not finished."""
    known, there = registered(folder), contents(folder)
    if any(there.get(name) != digest for name, digest in known.items()):
        for place in VARIABLES.values():
            shutil.rmtree(folder / place, ignore_errors=True)
        (folder / FILES).write_text("")
    for name in there.keys() - known.keys():
        (folder / name).unlink(missing_ok=True)


def record(folder: Path) -> None:
    """Add to the register what is new."""
    known = registered(folder)
    new = {name: digest for name, digest in contents(folder).items() if known.get(name) != digest}
    with (folder / FILES).open("a") as file:
        file.write("".join(f"{digest}  {name}\n" for name, digest in new.items()))


def registered(folder: Path) -> dict[str, str]:
    """The digests of the files that were written, by their paths; the last line of a file counts."""
    lines = (folder / FILES).read_text(errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def contents(folder: Path) -> dict[str, str]:
    """The digests of the files of code that are there. Locks, and what is being written, are none."""
    found = {}
    for path in (path for place in VARIABLES.values() for path in (folder / place).rglob("*")):
        name = path.relative_to(folder)
        unfinished = any(part.startswith("tmp.") for part in name.parts) or path.suffix in (".lock", ".tmp")
        with suppress(FileNotFoundError):  # another process may be compiling
            if not unfinished and path.is_file():
                with path.open("rb") as file:
                    found[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
