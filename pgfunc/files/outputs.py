"""What may be written where: never over what is read, and over what exists only when that is said.

Checked before anything runs. Links are resolved: another name for a file is that file. Nothing here writes.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from pgfunc.errors import SettingError


def check_apart(targets: Iterable[Path], inputs: Iterable[str | Path | None], name: str = "") -> None:
    """Raise SettingError where a target is what is read, a folder around it, or a file in a folder that is read.

    `name` is what a message calls the target, such as `--out`. Inputs that are no files (a hub id, a published name)
    are left out, as is None.
    """
    read = {resolved(given): given for given in inputs if given is not None and os.path.lexists(given)}
    around = {folder: given for path, given in read.items() for folder in path.parents}
    for target in targets:
        said, out = f"{name} {target}".strip(), resolved(target)
        if out in read:
            raise SettingError(f"{said}: would replace {read[out]}, which is read; give another name")
        if out in around:
            raise SettingError(f"{said}: is the folder of {around[out]}, which is read; give another folder")
        if out.is_file() and (folders := [folder for folder in out.parents if folder in read]):
            raise SettingError(f"{said}: is a file of {read[folders[0]]}, which is read; give another name")


def check_folder(target: Path, name: str = "") -> None:
    """Raise SettingError for a folder that cannot be made, or has no name: `""` would be the current one."""
    said = f"{name} {target}".strip()
    if target == Path():
        raise SettingError(f"{said}: give the name of a folder; the current one is not written to")
    check_name(target, name)
    if target.exists() and not target.is_dir():
        raise SettingError(f"{said}: cannot be written, it is a file; expected the name of a folder")


def check_new(target: Path, force: bool) -> None:
    """Raise SettingError for a file that exists or a folder that is not empty, unless it may be replaced."""
    check_name(target)
    if not force and os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise SettingError(f"{target}: exists already; give another name, or replace it with force=")


def check_name(target: Path, name: str = "") -> None:
    """Raise SettingError for a name that no file can have here: too long, or below a file."""
    try:
        os.lstat(target)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingError(f"{name} {str(target)[-80:]}: cannot be written ({reason})".strip()) from error


def resolved(path: str | Path) -> Path:
    """The path without links."""
    return Path(os.path.realpath(path))
