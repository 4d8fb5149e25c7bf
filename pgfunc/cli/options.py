"""What the commands share: the app, the options that several of them take, how results are printed.

Text for people has no character that commands a terminal, and a line begins with what it is about, whatever the name of
a file or the answer of a model holds. JSON is exact.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from tqdm import tqdm

from pgfunc.errors import COMMANDS, ImageError, NumericalError, SettingError, harmless
from pgfunc.files.outputs import check_name
from pgfunc.quant.lowbit import GROUPS

T = TypeVar("T")

ON_PICTURES = ("caption", "ask", "ocr", "generate", "score", "detect", "segment", "embed", "classify")
SAMPLING = {"top_k": "--top-k", "top_p": "--top-p", "min_p": "--min-p", "seed": "--seed"}


def remarks(command: str, given: dict[str, Any]) -> Iterator[str]:
    """What one might not expect of these options."""
    idle = [option for name, option in SAMPLING.items() if given.get(name) not in (None, 0)]
    if given.get("temperature") == 0 and idle:
        yield f"{', '.join(idle)}: no effect without --temperature, decoding is greedy; --temperature 1 samples"
    if command in ON_PICTURES and given["model"] is None and sys.stderr.isatty():
        another = "--model" if command in ("embed", "classify") else "--model or PGFUNC_MODEL"
        yield (
            "the shipped checkpoint knows drawn scenes of 201 things, and coloured shapes, but no photographs; "
            f"{another} names another, --quiet leaves this out"
        )


class App(typer.Typer):
    """A program whose commands have --quiet: without it, they make their remarks."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
        def add(command: Callable[..., None]) -> Callable[..., None]:
            super(App, self).command(name, **options)(remarking(name or command.__name__, command))
            return command

        return add


def remarking(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """The command, with another option: typer makes options from the signature."""

    @wraps(command)
    def run(quiet: bool, **given: Any) -> None:
        command(**given)
        for remark in () if quiet else remarks(name, given):  # after the command: a mistake prints its line alone
            say_aside(remark)

    whole = inspect.signature(command)
    last = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    setattr(run, "__signature__", whole.replace(parameters=[*whole.parameters.values(), last]))  # noqa: B010
    return run


app = App(
    help="PaliGemma on pictures: caption, ask, ocr, detect, segment, train. SigLIP: embed, classify. "
    "And their checkpoints: inspect, convert, compile, bench, laws.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

unset = partial(typer.Option, show_default=False)  # for options that may be left out

Images = Annotated[list[str], typer.Argument(help="Picture files.", metavar="IMAGE", show_default=False)]
NAMED = "Folder, .npz or hub id; without it the shipped checkpoint."
ModelName = Annotated[str | None, unset("--model", envvar="PGFUNC_MODEL", help=NAMED)]
Named = Annotated[str | None, unset("--model", help=NAMED)]  # where something else may name what is meant
Adapter = Annotated[str | None, unset("--adapter", help="A LoRA adapter of the model, to run with: folder or hub id.")]
PromptText = Annotated[str | None, unset("--prompt", help="What to ask.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Stop after so many tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the most probable token.")]
TopK = Annotated[int | None, unset("--top-k", help="Sample among the k most probable tokens.")]
TopP = Annotated[float | None, unset("--top-p", help="Sample among the fewest tokens of total probability p.")]
MinP = Annotated[float | None, unset("--min-p", help="Sample among tokens p times as probable as the best.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the random numbers, when the temperature is not 0.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the decode step first: pays off for many tokens.")]
Compiled = Annotated[
    Path | None,
    unset("--compiled", help="The same with code from this folder, which is run: `pgfunc compile` makes one."),
]
Device = Annotated[str | None, unset("--device", help="cpu, cuda, cuda:1; without it CUDA where there is one.")]
Dtype = Annotated[str | None, unset("--dtype", help="float32, bfloat16 or float16; without it the files' own.")]
Quantize = Annotated[str | None, unset("--quantize", help=f"Language model in fewer bits: {', '.join(GROUPS)}.")]
Config = Annotated[str | None, unset("--config", help="For a .npz: a published name, a config.json or its folder.")]
Vocabulary = Annotated[str | None, unset("--tokenizer", help="For a .npz: a tokenizer.json.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No remarks on the options and the shipped checkpoint.")]
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
    """A SettingError that says what helps, where the memory of a device does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise  # a CPU's allocator raises a plain RuntimeError
        raise SettingError(f"not enough memory on the device: {remedy}") from error


def check_file(path: Path) -> None:
    """Raise SettingError for a file that cannot be made: before anything is computed, not after."""
    check_name(path)
    if path.is_dir():
        raise SettingError(f"{path}: is a folder; expected the name of a file to write")
    if not path.parent.is_dir():
        raise SettingError(f"{path}: there is no folder {path.parent} to write it to")


def check_pictures(images: list[str]) -> None:
    """Raise ImageError for a picture that is not there: before anything is loaded, not when its turn comes."""
    for image in images:
        if not exists(image):
            raise ImageError(f"{image}: no such file")
        if Path(image).is_dir():
            raise ImageError(f"{image}: cannot be read as a picture, it is a folder; name those in it: {image}/*.jpg")


def exists(name: str) -> bool:
    """Whether something has this name, which need not be one that a file can have."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def each(images: Sequence[str], read: Callable[[str], T], left_out: list[str]) -> Iterator[tuple[str, T]]:
    """Each picture, and what `read` makes of it. If there are several, one that cannot be read is named and left out.

    `end` tells of it at the end.
    """
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


def say_length(image: str, finish: str | None, tokens: int) -> None:
    """Say on standard error that an answer ended at its limit."""
    if finish == "length":
        say_aside(f"{image}: stopped at {tokens} tokens, perhaps within the answer; --max-new-tokens allows more")


def say(value: dict[str, Any], as_json: bool, *lines: str) -> None:
    """Print one result: a JSON object, or lines for people."""
    if as_json:  # those that JSON does not escape by itself
        text = to_json(value, ensure_ascii=False)
        tqdm.write(COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
    else:
        tqdm.write("\n".join(harmless(line, keep="\t") for line in lines))


def say_aside(remark: str) -> None:
    """Print a line on standard error, if it can be."""
    with suppress(OSError):
        tqdm.write(harmless(f"pgfunc: {remark}"), file=sys.stderr)


def to_json(value: Any, ensure_ascii: bool = True) -> str:
    """A value as a line of JSON. Raises NumericalError for a number that is none: JSON has neither nan nor infinity."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError as error:
        raise NumericalError("a result is nan or infinite, which JSON cannot say; try another --dtype") from error
