"""Compiled code for the commands: what cannot compile says so, and a folder of code knows for what it was made."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import pgfunc as pg
from pgfunc.bench import hardware
from pgfunc.cli.options import say_aside
from pgfunc.errors import SettingError, first_line

MADE_FOR = "made-for.json"  # in a folder of compiled code


@contextmanager
def compiles(remedy: str) -> Iterator[None]:
    """A SettingError where torch.compile cannot do its work: there may be no C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException  # half a second, which other commands need not wait

    try:
        yield
    except TorchDynamoException as error:
        raise SettingError(f"torch.compile fails here ({first_line(error)}): {remedy}") from error


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
        yield
    if folder and before and set(compiled_files(folder)) - before:
        say_aside(f"{folder} had no code for this; it has now")


def kind_of(device: torch.device) -> dict[str, Any]:
    """What compiled code is made for."""
    cpu = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return {"torch": torch.__version__, "hardware": hardware(device)} | (cpu if device.type == "cpu" else {})


def check_made_for(folder: Path, kind: dict[str, Any]) -> None:
    try:
        made = json.loads((folder / MADE_FOR).read_text())
    except (OSError, ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise SettingError(f"--compiled {folder}: no code there; `pgfunc compile {folder}` makes it")
    if made != kind:
        mine, its = (", ".join(f"{name} {each.get(name)}" for name in sorted({*made, *kind})) for each in (kind, made))
        raise SettingError(f"--compiled {folder}: was made for {its}, and here is {mine}; compile it here")


def compiled_files(folder: Path) -> list[Path]:
    """The files of code in a folder, not the notes that PyTorch keeps beside them."""
    return [path for path in folder.rglob("*") if path.suffix in (".so", ".cpp", ".py", ".cubin")]
