"""Where output may go: never over an input, and over an existing file only if the caller allows it.

These checks run before anything is computed. Links are resolved: another name of a file is the same file. Nothing here
writes; `write_errors` turns an error of writing into one line.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pgfunc.errors import PgfuncError, SettingError, first_line


@contextmanager
def write_errors(
    path: Path,
    raises: type[PgfuncError] = SettingError,
    option: str = "",
    also: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn an OSError in the block that writes `path` into a `raises` of one line, which names the path and the reason.

    option: what the message calls the path, such as `--out`. also: more exceptions to convert, from the encoder of the
    file.
    """
    try:
        yield
    except (OSError, *also) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise raises(f"{option} {path}: cannot be written ({reason})".strip()) from error


def check_output(target: Path, inputs: Iterable[str | Path | None], folder: bool, force: bool) -> None:
    """Raise SettingError if a new file or folder cannot be made: all checks of this module, in order."""
    if folder:
        check_folder(target)
    check_apart([target], inputs)
    check_new(target, force)


def check_apart(targets: Iterable[Path], inputs: Iterable[str | Path | None], name: str = "") -> None:
    """Raise SettingError if a target is an input, a folder that contains an input, or a file in an input folder.

    `name` is what the message calls the target, such as `--out`. Inputs that are not files (None, a hub id, a published
    name) are ignored.
    """
    read = {resolved(source): source for source in inputs if source is not None and os.path.lexists(source)}
    parents = {folder: source for path, source in read.items() for folder in path.parents}
    for target in targets:
        title, path = f"{name} {target}".strip(), resolved(target)
        if path in read:
            raise SettingError(f"{title}: would replace {read[path]}, which is read; give another name")
        if path in parents:
            raise SettingError(f"{title}: is the folder of {parents[path]}, which is read; give another folder")
        if path.is_file() and (folders := [folder for folder in path.parents if folder in read]):
            raise SettingError(f"{title}: is a file of {read[folders[0]]}, which is read; give another name")


def check_folder(target: Path, name: str = "") -> None:
    """Raise SettingError if a folder cannot be made, or has no name: `""` would be the current folder."""
    title = f"{name} {target}".strip()
    if target == Path():
        raise SettingError(f"{title}: give the name of a folder; the current one is not written to")
    check_name(target, name)
    if target.exists() and not target.is_dir():
        raise SettingError(f"{title}: cannot be written, it is a file; expected the name of a folder")


def check_new(target: Path, force: bool) -> None:
    """Raise SettingError if a file exists, or a folder that is not empty, unless `force` allows to replace it."""
    check_name(target)
    if not force and os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise SettingError(f"{target}: exists already; give another name, or replace it with force=")


def check_name(target: Path, name: str = "") -> None:
    """Raise SettingError if no file can have this name: it is too long, or its parent is a file."""
    try:
        os.lstat(target)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingError(f"{name} {str(target)[-80:]}: cannot be written ({reason})".strip()) from error


def resolved(path: str | Path) -> Path:
    """The absolute path, with all links followed."""
    return Path(os.path.realpath(path))
