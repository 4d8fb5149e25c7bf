"""Compiled code for the commands: what cannot compile says so, and a folder of code knows for what it was made."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch

import pgfunc as pg
from pgfunc.bench import hardware
from pgfunc.cli.options import say_aside
from pgfunc.errors import SettingError
from pgfunc.files.atomic import write_text

MADE_FOR = "made-for.json"  # in a folder of compiled code
MAKER = "maker"  # in it: who made the folder, a random number that stands for a user on a machine


@contextmanager
def compiles(remedy: str) -> Iterator[None]:
    """A SettingError where torch.compile cannot do its work: there may be no C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException  # half a second, which other commands need not wait

    try:
        yield
    except TorchDynamoException as error:
        raise SettingError(f"torch.compile fails here ({reason(error)}): {remedy}") from error


def reason(error: Exception) -> str:
    """What a C++ compiler complains of first; else the first line, with another if that only names who raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line), " ".join(lines[: 1 + lines[0].endswith(":")]))


@contextmanager
def compiling(compile: bool, folder: Path | None, device: torch.device) -> Iterator[None]:
    """What a command may compile in here comes from the folder that `pgfunc compile` made, if one is named.

    Code that it lacks is compiled, added, and said on standard error. Raises SettingError where the folder was made for
    another kind of device or PyTorch: machine code must not run on a CPU that it was not made for.
    """
    if not compile:
        yield
        return
    if folder is not None:
        check_made_for(folder, kind_of(device))
    before = set(compiled_files(folder)) if folder else set()
    inside = pg.compiled_in(folder) if folder else nullcontext()
    with compiles("is there a C++ compiler? It runs without --compile"), inside:
        if folder is not None and foreign(folder):
            say_aside(f"{folder} was made elsewhere, and is run: trust whoever made it, or compile it here")
        yield
    if folder and before and set(compiled_files(folder)) - before:
        say_aside(f"{folder} had no code for this; it has now")


def kind_of(device: torch.device) -> dict[str, Any]:
    """What compiled code is made for."""
    cpu = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return {"torch": torch.__version__, "hardware": hardware(device)} | (cpu if device.type == "cpu" else {})


def check_made_for(folder: Path, kind: dict[str, Any]) -> None:
    """Raise SettingError for a folder without code, or with code for something else."""
    found = made_for(folder)
    if found is None:
        raise SettingError(f"--compiled {folder}: no code there; `pgfunc compile {folder}` makes it")
    made = {name: value for name, value in found.items() if name != MAKER}
    if made != kind:
        mine, its = (", ".join(f"{name} {each.get(name)}" for name in sorted({*made, *kind})) for each in (kind, made))
        raise SettingError(f"--compiled {folder}: was made for {its}, and here is {mine}; compile it here")


def made_for(folder: Path) -> dict[str, Any] | None:
    """What a folder says of itself."""
    try:
        made = json.loads((folder / MADE_FOR).read_text())
    except (OSError, ValueError, RecursionError):
        made = None
    return made if isinstance(made, dict) else None


def foreign(folder: Path) -> bool:
    """Whether a folder comes from somebody else, of whom this was not said before, or does not say from whom."""
    maker, known = str((made_for(folder) or {}).get(MAKER)), makers()
    if re.fullmatch("[0-9a-f]{32}", maker) is None:
        return True
    if maker not in known:
        with suppress(OSError), makers_file().open("a") as file:
            file.write(f"{maker}\n")
    return maker not in known


def makers() -> list[str]:
    """The makers that are known: first this user on this machine, who is given a number here."""
    try:
        if not makers_file().exists():
            makers_file().parent.mkdir(parents=True, exist_ok=True)
            write_text(makers_file(), token_hex(16) + "\n")
        return makers_file().read_text().split() or [""]
    except OSError:
        return [""]  # without a place to keep a number all folders come from elsewhere


def makers_file() -> Path:
    """Where they are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgfunc" / "makers"


def compiled_files(folder: Path) -> list[Path]:
    """The files of code in a folder, not the notes that PyTorch keeps beside them."""
    return [path for path in folder.rglob("*") if path.suffix in (".so", ".cpp", ".py", ".cubin")]
