"""What the commands share: the app, the options that several of them take, how results are printed."""

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

import pgfunc as pg
from pgfunc.bench import hardware
from pgfunc.errors import SettingError, first_line
from pgfunc.lowbit import GROUPS

MADE_FOR = "made-for.json"  # in a folder of compiled code

app = typer.Typer(
    help="PaliGemma on pictures: caption, ask, read, detect, segment, train. SigLIP: embed, classify. "
    "And their checkpoints: inspect, convert, compile, bench.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

unset = partial(typer.Option, show_default=False)  # for options that may be left out

Images = Annotated[list[str], typer.Argument(help="Picture files.", metavar="IMAGE", show_default=False)]
ModelName = Annotated[str | None, unset("--model", help="Folder, .npz or hub id; without it the shipped checkpoint.")]
PromptText = Annotated[str | None, unset("--prompt", help="What to ask.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Stop after so many tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the most probable token.")]
TopK = Annotated[int | None, unset("--top-k", help="Sample among the k most probable tokens.")]
TopP = Annotated[float | None, unset("--top-p", help="Sample among the fewest tokens of total probability p.")]
MinP = Annotated[float | None, unset("--min-p", help="Sample among tokens p times as probable as the best.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the random numbers, when the temperature is not 0.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the decode step first: pays off for many tokens.")]
Compiled = Annotated[Path | None, unset("--compiled", help="The same with code from this folder: `pgfunc compile`.")]
Device = Annotated[str | None, unset("--device", help="cpu, cuda, cuda:1; without it CUDA where there is one.")]
Dtype = Annotated[str | None, unset("--dtype", help="float32, bfloat16 or float16; without it the files' own.")]
Quantize = Annotated[str | None, unset("--quantize", help=f"Language model in fewer bits: {', '.join(GROUPS)}.")]
Config = Annotated[str | None, unset("--config", help="For a .npz: a published name, a config.json or its folder.")]
Vocabulary = Annotated[str | None, unset("--tokenizer", help="For a .npz: a tokenizer.json.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def without(command: Callable[..., None], option: str) -> Callable[..., None]:
    """The command without an option, which then has its default: typer makes options from the signature."""
    whole = inspect.signature(command)
    kept = [parameter for name, parameter in whole.parameters.items() if name != option]
    setattr(command, "__signature__", whole.replace(parameters=kept))  # noqa: B010  pyright knows no such attribute
    return command


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """A SettingError that says what helps, where the memory of a GPU does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SettingError(f"not enough memory on the device: {remedy}") from error


def check_file(path: Path) -> None:
    """Raise SettingError for a file that cannot be made: before anything is computed, not after."""
    if path.is_dir():
        raise SettingError(f"{path}: is a folder; expected the name of a file to write")
    if not path.parent.is_dir():
        raise SettingError(f"{path}: there is no folder {path.parent} to write it to")


def progress(images: list[str]) -> Iterator[str]:
    """The pictures, with a bar on standard error when there are several and somebody watches."""
    yield from tqdm(images, unit="picture", leave=False, disable=None if len(images) > 1 else True)


def say(value: dict[str, Any], as_json: bool, text: str) -> None:
    """Print one result."""
    tqdm.write(json.dumps(value, ensure_ascii=False) if as_json else text)


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
    before = set(compiled_files(folder)) if folder else set()
    with compiles("is there a C++ compiler? It runs without --compile"):
        if folder is None:
            yield
            return
        check_made_for(folder, kind_of(device))
        with pg.compiled_in(folder):
            yield
    if before and set(compiled_files(folder)) - before:
        tqdm.write(f"pgfunc: {folder} had no code for this; it has now", file=sys.stderr)


def kind_of(device: torch.device) -> dict[str, Any]:
    """What compiled code is made for."""
    cpu = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return {"torch": torch.__version__, "hardware": hardware(device)} | (cpu if device.type == "cpu" else {})


def check_made_for(folder: Path, kind: dict[str, Any]) -> None:
    try:
        made = json.loads((folder / MADE_FOR).read_text())
    except (OSError, ValueError):
        raise SettingError(f"--compiled {folder}: no code there; `pgfunc compile {folder}` makes it") from None
    if made != kind:
        mine, its = (", ".join(f"{name} {each.get(name)}" for name in sorted({*made, *kind})) for each in (kind, made))
        raise SettingError(f"--compiled {folder}: was made for {its}, and here is {mine}; compile it here")


def compiled_files(folder: Path) -> list[Path]:
    """The files of code in a folder, not the notes that PyTorch keeps beside them."""
    return [path for path in folder.rglob("*") if path.suffix in (".so", ".cpp", ".py", ".cubin")]
