"""What the commands share: the app, the options that several of them take, how results are printed."""

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from tqdm import tqdm

from pgfunc.errors import ImageError, NumericalError, SettingError
from pgfunc.lowbit import GROUPS
from pgfunc.outputs import check_name

T = TypeVar("T")

app = typer.Typer(
    help="PaliGemma on pictures: caption, ask, ocr, detect, segment, train. SigLIP: embed, classify. "
    "And their checkpoints: inspect, convert, compile, bench, laws.",
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
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]
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
    check_name(path)
    if path.is_dir():
        raise SettingError(f"{path}: is a folder; expected the name of a file to write")
    if not path.parent.is_dir():
        raise SettingError(f"{path}: there is no folder {path.parent} to write it to")


def each(images: Sequence[str], read: Callable[[str], T], left_out: list[str]) -> Iterator[tuple[str, T]]:
    """Each picture, and what `read` makes of it. Of several, one that cannot be read is left out, and said so."""
    for image in progress(images):
        try:
            value = read(image)
        except ImageError as error:
            if len(images) == 1:
                raise
            left_out.append(image)
            say_aside(str(error))
            continue
        yield image, value


def end(left_out: Sequence[str]) -> None:
    """Leave with status 1 where pictures were left out, once the results of the others are written."""
    if left_out:
        raise typer.Exit(1)


def progress(images: Sequence[str]) -> Iterator[str]:
    """The pictures, with a bar on standard error when there are several and somebody watches."""
    yield from tqdm(images, unit="picture", leave=False, disable=None if len(images) > 1 else True)


def say_aside(text: str) -> None:
    """A line on standard error."""
    tqdm.write(f"pgfunc: {text}", file=sys.stderr)


def say(value: dict[str, Any], as_json: bool, text: str) -> None:
    """Print one result. Raises NumericalError for a number that is none: JSON has neither nan nor infinity."""
    tqdm.write(to_json(value, ensure_ascii=False) if as_json else text)


def to_json(value: Any, ensure_ascii: bool = True) -> str:
    """A value as a line of JSON."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError as error:
        raise NumericalError("a result is nan or infinite, which JSON cannot say; try another --dtype") from error
