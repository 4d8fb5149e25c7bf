"""A folder for compiled code: PyTorch's own caches, in a folder that the user chooses.

PyTorch runs the content of such a folder: machine code, Python, and pickles, which may execute any code. So other users
must not be able to write there, and a folder from elsewhere is as trustworthy as its author. PyTorch reads the location
from environment variables, which belong to the whole process, so a process uses one folder at a time.

    files.sha256    one line per file; if a file differs from its line, all code is deleted and compiled again
    torchinductor   PyTorch's files
    triton          Triton's files

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

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "TRITON_CACHE_DIR": "triton"}  # read at each compilation
REGISTER = "files.sha256"

_lock = Lock()
_users: dict[object, tuple[int, Path]] = {}  # entry -> (thread, folder), the innermost last
_original: dict[str, str | None] = {}  # the variables before the first user entered


@contextmanager
def compiled_in(folder: str | Path) -> Iterator[None]:
    """A context in which PyTorch looks for compiled code in a folder, and stores new code there.

        with pg.compiled_in("code"):
            pg.generate(model, images, prefixes, compile=True)

    The folder holds PyTorch's own caches. Another process, or another machine with the same PyTorch and the same kind
    of device, starts with a copy of it in seconds. The content is executed: use a folder only if you trust its author.
    Damaged files are deleted and compiled again. Raises SettingError if other users can write in the folder, or if
    another thread uses a different folder: PyTorch has one for the whole process, set in `os.environ`.
    """
    folder = Path(folder).absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder)
        with (folder / REGISTER).open("a+") as register:
            repair(folder, register)
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
    """Set PyTorch's variables to subfolders of the folder until its last user leaves."""
    entry, thread = object(), get_ident()
    with _lock:
        for other_thread, other_folder in _users.values():
            if other_folder != folder and other_thread != thread:
                raise SettingError(
                    f"{folder}: another thread has its compiled code in {other_folder}, and a process has one folder; "
                    "use the same folder in all threads"
                )
        if not _users:
            _original.update({name: os.environ.get(name) for name in VARIABLES})
        _users[entry] = thread, folder
        _set_variables()
    try:
        yield
    finally:
        with _lock:
            del _users[entry]
            _set_variables()


def _set_variables() -> None:
    """Set the variables for the innermost user, or restore them if there is none."""
    innermost = [folder for _, folder in _users.values()][-1:]
    for name, subfolder in VARIABLES.items():
        value = str(innermost[0] / subfolder) if innermost else _original[name]
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def check_private(folder: Path) -> None:
    """Raise SettingError if other users can write in the folder, because its content is executed.

    A symbolic link in it is refused too: who can write its target is not checked.
    """
    if not hasattr(os, "getuid"):
        return
    closed = not folder.stat().st_mode & 0o011  # others cannot even enter
    for path in [folder] if closed else [folder, *paths_in(folder)]:
        try:
            status = path.stat() if path == folder else path.lstat()
        except FileNotFoundError:  # another process may be compiling
            continue
        if status.st_uid not in (os.getuid(), 0):
            raise SettingError(f"{path}: belongs to another user, and the content of a code folder is run; copy it")
        if stat.S_ISLNK(status.st_mode):
            raise SettingError(
                f"{path}: is a symbolic link, and the content of a code folder is run; replace it by a copy"
            )
        if status.st_mode & 0o022:
            raise SettingError(f"{path}: others can write it, and its content is run; chmod -R go-w {folder}")


def repair(folder: Path, register: IO[str]) -> None:
    """Delete what killed processes left, and all code if a file is damaged.

    Each process holds a shared lock on the register while it uses the folder. A process that arrives while others use
    the folder repairs nothing: the first of them did. One that arrives during the repair waits. On Windows, which
    has no such lock, unfinished files stay: another process may be writing them.
    """
    if os.name != "posix":
        clean(folder)
        return
    import fcntl

    try:
        fcntl.flock(register, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(register, fcntl.LOCK_SH)  # waits while another process repairs
        return
    clean(folder)
    delete_unfinished(folder)
    fcntl.flock(register, fcntl.LOCK_SH)


def clean(folder: Path) -> None:
    """Delete unregistered files, and all code if a registered file is missing or different."""
    registered, present = registered_digests(folder), present_digests(folder)
    if any(present.get(name) != digest for name, digest in registered.items()):
        for subfolder in VARIABLES.values():
            shutil.rmtree(folder / subfolder, ignore_errors=True)
        (folder / REGISTER).write_text("")
    for name in present.keys() - registered.keys():
        (folder / name).unlink(missing_ok=True)


def delete_unfinished(folder: Path) -> None:
    """Delete files and folders that a process had not finished writing; PyTorch and Triton rename finished ones."""
    for path in code_paths(folder):
        if is_unfinished(path):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def record(folder: Path) -> None:
    """Append new and changed files to the register."""
    registered = registered_digests(folder)
    new = {name: digest for name, digest in present_digests(folder).items() if registered.get(name) != digest}
    with (folder / REGISTER).open("a") as file:
        file.write("".join(f"{digest}  {name}\n" for name, digest in new.items()))


def registered_digests(folder: Path) -> dict[str, str]:
    """path -> digest, from the register; the last line of a path counts."""
    lines = (folder / REGISTER).read_text(errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def present_digests(folder: Path) -> dict[str, str]:
    """path -> digest of the code files in the folder. Skips locks and files that are being written."""
    digests = {}
    for path in code_paths(folder):
        name = path.relative_to(folder)
        skipped = path.suffix == ".lock" or any(is_unfinished(Path(part)) for part in name.parts)
        with suppress(FileNotFoundError):  # another process may be compiling
            if not skipped and path.is_file():
                with path.open("rb") as file:
                    digests[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def code_paths(folder: Path) -> list[Path]:
    """All files and folders in the subfolders for code."""
    return [path for subfolder in VARIABLES.values() for path in paths_in(folder / subfolder)]


def paths_in(folder: Path) -> list[Path]:
    """All files and folders in a folder, but not those in links.

    PyTorch's compile workers make folders and delete them. Python 3.11's `Path.rglob` raises FileNotFoundError if a
    folder disappears before it is read; `os.walk` leaves it out.
    """
    return [Path(parent, name) for parent, folders, files in os.walk(folder) for name in (*folders, *files)]


def is_unfinished(path: Path) -> bool:
    """Whether a file or folder has a temporary name: `<...>.tmp`, or Triton's `tmp.<...>`."""
    return path.name.startswith("tmp.") or path.suffix == ".tmp"
