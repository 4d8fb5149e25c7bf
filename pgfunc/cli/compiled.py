"""Compiled code for the commands: a compiler's error is one line, and a folder of code records its platform."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch

import pgfunc as pg
from pgfunc.bench import Case, hardware, random_prompt
from pgfunc.cli.options import print_note
from pgfunc.errors import SettingError
from pgfunc.files.atomic import write_text
from pgfunc.generate import complete
from pgfunc.jit.code_folder import paths_in
from pgfunc.sample import Settings

MADE_FOR = "made-for.json"  # in a folder of compiled code: the platform that the code is for, and its maker
NO_COMPILER = "check that a C++ compiler is installed, or leave out --compile"
MAKER = "maker"  # the key of the maker: a random number that stands for a user on a machine


@contextmanager
def compiler_errors(remedy: str) -> Iterator[None]:
    """Raise SettingError if torch.compile fails in the block, for example because there is no C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException  # takes half a second, which other commands need not wait

    try:
        yield
    except TorchDynamoException as error:
        raise SettingError(f"torch.compile fails here ({reason(error)}): {remedy}") from error


def reason(error: Exception) -> str:
    """The first complaint of a C++ compiler; otherwise the first line, and the next if the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line), " ".join(lines[: 1 + lines[0].endswith(":")]))


@contextmanager
def compiling(compile: bool, folder: Path | None, device: torch.device) -> Iterator[None]:
    """Let the block compile; with a folder, take code from it and add the code that it lacks.

    Raises SettingError if the folder was made for another kind of device or another PyTorch: a CPU must not run machine
    code that was made for another one.
    """
    if not compile:
        yield
        return
    if folder is not None:
        check_platform(folder, platform_of(device))
    before = set(compiled_files(folder)) if folder else set()
    code_folder = pg.compiled_in(folder) if folder else nullcontext()
    with compiler_errors(NO_COMPILER), code_folder:
        if folder is not None and is_foreign(folder):
            print_note(f"{folder} was made elsewhere, and its code is run: trust its author, or compile it here")
            remember_maker(folder)
        yield
    if folder and before and set(compiled_files(folder)) - before:
        print_note(f"{folder} had no code for this; the code was compiled and added")


def compile_all(model: pg.Model, case: Case, settings: Settings, device: torch.device) -> None:
    """Compile, or take from the folder in use, the code for prompts and answers of the case's sizes."""
    endless = model._replace(cfg=replace(model.cfg, eos=-1))  # no answer ends early
    prompt = random_prompt(model.cfg, case.batch, case.prompt_tokens, device)
    uniforms = torch.zeros(case.batch, case.tokens, dtype=torch.float64, device="cpu")
    complete(endless, prompt, settings, uniforms, compile=True)


def make_folder(folder: Path, device: torch.device) -> None:
    """Make a folder for code and record its platform and its maker. Only its owner may write there: the code is run."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if read_made_for(folder) is None:
            write_text(folder / MADE_FOR, json.dumps(platform_of(device) | {MAKER: makers()[0]}))
    except OSError as error:
        raise SettingError(f"{folder}: cannot be a folder for compiled code ({error.strerror})") from error


def platform_of(device: torch.device) -> dict[str, Any]:
    """What compiled code depends on: PyTorch, the kind of device, and on a CPU its capability and threads."""
    cpu = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return {"torch": torch.__version__, "hardware": hardware(device)} | (cpu if device.type == "cpu" else {})


def check_platform(folder: Path, platform: dict[str, Any]) -> None:
    """Raise SettingError if a folder has no code, or code for another platform."""
    record = read_made_for(folder)
    if record is None:
        raise SettingError(f"--compiled {folder}: no code there; `pgfunc compile {folder}` makes it")
    theirs = {name: value for name, value in record.items() if name != MAKER}
    if theirs != platform:
        names = sorted({*theirs, *platform})
        here, there = (", ".join(f"{name} {each.get(name)}" for name in names) for each in (platform, theirs))
        raise SettingError(f"--compiled {folder}: was made for {there}, and here is {here}; compile it here")


def read_made_for(folder: Path) -> dict[str, Any] | None:
    """The platform and the maker that a folder of code records; None if it has no readable record."""
    try:
        record = json.loads((folder / MADE_FOR).read_text())
    except (OSError, ValueError, RecursionError):
        record = None
    return record if isinstance(record, dict) else None


def is_foreign(folder: Path) -> bool:
    """Whether another user, or another machine, made a folder. A folder without a valid maker is foreign."""
    maker = maker_of(folder)
    return maker is None or maker not in makers()


def remember_maker(folder: Path) -> None:
    """Add the maker of a folder to the known makers, if it is valid: its folders are no longer foreign."""
    if maker := maker_of(folder):
        with suppress(OSError), makers_file().open("a") as file:
            file.write(f"{maker}\n")


def maker_of(folder: Path) -> str | None:
    """The maker that a folder of code records; None if that is not a valid number."""
    maker = str((read_made_for(folder) or {}).get(MAKER))
    return maker if re.fullmatch("[0-9a-f]{32}", maker) else None


def makers() -> list[str]:
    """The known makers. The first is this user on this machine, whose number is drawn at the first call."""
    try:
        if not makers_file().exists():
            makers_file().parent.mkdir(parents=True, exist_ok=True)
            write_text(makers_file(), token_hex(16) + "\n")
        return makers_file().read_text().split() or [""]
    except OSError:
        return [""]  # the number cannot be stored, so every folder counts as foreign


def makers_file() -> Path:
    """The file of known makers, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgfunc" / "makers"


def compiled_files(folder: Path) -> list[Path]:
    """The files of code in a folder, without the notes that PyTorch stores beside them."""
    return [path for path in paths_in(folder) if path.suffix in (".so", ".cpp", ".py", ".cubin")]
