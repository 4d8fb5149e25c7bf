"""What the commands share: the app, common options, reading pictures one by one, printing results and notes.

Text for people contains no characters that control a terminal, and each line starts with its picture, whatever a file
name or a model's answer contains. JSON output is exact.

Modules that define commands do not import PyTorch, so that `--help` and mistakes are quick: what computes is imported
inside the commands.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from tqdm import tqdm

from pgfunc.cli.examples import epilog
from pgfunc.errors import CONTROL_CHARACTERS, NumericalError, SettingError, escape_controls
from pgfunc.files.outputs import check_name
from pgfunc.names import GROUPS

T = TypeVar("T")

ON_PICTURES = ("caption", "ask", "ocr", "generate", "score", "detect", "segment", "embed", "classify")
SAMPLING = {"top_k": "--top-k", "top_p": "--top-p", "min_p": "--min-p", "seed": "--seed"}


def hints(command: str, arguments: dict[str, Any]) -> Iterator[str]:
    """What may surprise a user about these options."""
    unused = [option for name, option in SAMPLING.items() if arguments.get(name) not in (None, 0)]
    if arguments.get("temperature") == 0 and unused:
        yield f"{', '.join(unused)}: no effect, because decoding is greedy; add --temperature 1 to sample"
    if command in ON_PICTURES and arguments["model"] is None and sys.stderr.isatty():
        option = "--model" if command in ("embed", "classify") else "--model or PGFUNC_MODEL"
        yield (
            "the shipped checkpoint knows drawn scenes of 201 things and colored shapes, but no photographs; "
            f"choose another with {option}, or hide this hint with --quiet"
        )


class App(typer.Typer):
    """A program whose commands print hints, unless --quiet is given, and have examples in --help."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
        def add(command: Callable[..., None]) -> Callable[..., None]:
            text = options.pop("help", None) or inspect.getdoc(command) or ""
            help = re.sub(r"(?<!\n)\n(?!\n)", " ", text)  # the terminal breaks the lines of a paragraph
            title = name or command.__name__
            super(App, self).command(name, help=help, epilog=epilog(title), **options)(with_hints(title, command))
            return command

        return add


def with_hints(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """The command with hints and the option --quiet. typer reads the options from the signature."""

    @wraps(command)
    def run(quiet: bool, **arguments: Any) -> None:
        command(**arguments)
        for hint in () if quiet else hints(name, arguments):  # last: a mistake prints its own line alone
            print_note(hint)

    signature = inspect.signature(command)
    last = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    setattr(run, "__signature__", signature.replace(parameters=[*signature.parameters.values(), last]))  # noqa: B010
    return run


app = App(
    help="Ask PaliGemma about pictures: caption, ask, ocr, detect, segment; in a browser: demo. "
    "Compare pictures with texts by SigLIP: embed, classify. Fine-tune: train. Measure: evaluate. "
    "Work with checkpoints: inspect, convert, merge, compile, bench, laws.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

MODEL, DECODING, OUTPUT = "Model", "Decoding", "Output"  # groups of options in --help

optional = partial(typer.Option, show_default=False)  # an option without a default value
of_model = partial(optional, rich_help_panel=MODEL)
of_decoding = partial(typer.Option, rich_help_panel=DECODING)
of_output = partial(typer.Option, rich_help_panel=OUTPUT)

PICTURES = (
    "Pictures: files, http(s) addresses, folders, patterns such as 'photos/**/*.jpg', tables (.jsonl or .csv with a "
    "column image, and prompt if you like), or - for names on standard input."
)
Images = Annotated[list[str], typer.Argument(help=PICTURES, metavar="IMAGE", show_default=False)]
NAMED = "Checkpoint: a folder, a .npz file or a Hugging Face hub id. Default: the shipped checkpoint."
ModelName = Annotated[str | None, of_model("--model", envvar="PGFUNC_MODEL", help=NAMED)]
CheckpointName = Annotated[str | None, of_model("--model", help=NAMED)]  # does not read PGFUNC_MODEL
Adapter = Annotated[str | None, of_model("--adapter", help="LoRA adapter for the model: a folder or a hub id.")]
DEVICES = "cpu, cuda or cuda:1. Default: cuda if there is a GPU, otherwise cpu."
Device = Annotated[str | None, of_model("--device", envvar="PGFUNC_DEVICE", help=DEVICES)]
MeasuredDevice = Annotated[str | None, of_model("--device", help=DEVICES)]  # does not read PGFUNC_DEVICE
Dtype = Annotated[
    str | None, of_model("--dtype", help="float32, bfloat16 or float16. Default: the dtype of the checkpoint.")
]
Quantize = Annotated[
    str | None, of_model("--quantize", help=f"Store the language model in fewer bits: {', '.join(GROUPS)}.")
]
Config = Annotated[
    str | None,
    of_model(
        "--config",
        help="Configuration of a .npz: a published name such as paligemma2-3b-224, a config.json or its folder.",
    ),
]
Tokenizer = Annotated[str | None, of_model("--tokenizer", help="A tokenizer.json, for a .npz or a folder without one.")]

MaxNewTokens = Annotated[int, of_decoding("--max-new-tokens", help="Largest number of tokens in an answer.")]
Temperature = Annotated[
    float, of_decoding("--temperature", help="0 always takes the most probable token; above 0 tokens are sampled.")
]
TopK = Annotated[
    int | None, of_decoding("--top-k", show_default=False, help="Sample among the k most probable tokens.")
]
TopP = Annotated[
    float | None,
    of_decoding(
        "--top-p",
        show_default=False,
        help="Sample among the smallest set of most probable tokens whose probabilities add up to p or more.",
    ),
]
MinP = Annotated[
    float | None,
    of_decoding(
        "--min-p",
        show_default=False,
        help="Sample among the tokens at least p times as probable as the most probable one.",
    ),
]
Seed = Annotated[int, of_decoding("--seed", help="Random seed; used when the temperature is above 0.")]
Compile = Annotated[
    bool, of_decoding("--compile", help="Compile the decode step first. This pays off when there are many tokens.")
]
Compiled = Annotated[
    Path | None,
    of_decoding(
        "--compiled",
        show_default=False,
        help="As --compile, with the code in this folder (see `pgfunc compile`). The code is run: trust its author.",
    ),
]

Results = Annotated[
    Path | None,
    of_output(
        "--out",
        show_default=False,
        help="Write a row for each picture to this file, in place of text: .jsonl, .csv or .parquet.",
    ),
]
Resume = Annotated[
    bool, of_output("--resume", help="Continue the file of --out: pictures that have a row in it are left out.")
]


class OnError(StrEnum):
    """What to do if a picture cannot be read."""

    skip = "skip"
    stop = "stop"


WhenBroken = Annotated[
    OnError,
    of_output(
        "--on-error",
        help="If one of several pictures cannot be read: skip it (its row has an error, and the exit status is 1), or "
        "stop.",
    ),
]
Batch = Annotated[
    int | None,
    of_decoding(
        "--batch", show_default=False, help="Pictures that are answered together. Default: 16 on a CPU, 64 on a GPU."
    ),
]

of_machines = partial(optional, rich_help_panel="Many machines")
Ray = Annotated[
    str | None,
    of_machines(
        "--ray",
        metavar="ADDRESS",
        help="Answer on the Ray cluster at this address, such as 10.0.0.1:6379; or local, which starts one on this "
        "machine. Files must have the same names on all of its machines.",
    ),
]
RayWorkers = Annotated[
    int | None,
    of_machines(
        "--ray-workers",
        metavar="N",
        help="Processes with a model each. Default: one for each GPU of the cluster, or one for each 2 CPUs.",
    ),
]

Json = Annotated[bool, of_output("--json", help="Print JSON instead of text.")]
Quiet = Annotated[bool, of_output("--quiet", help="Print no hints about options and the shipped checkpoint.")]
Force = Annotated[bool, of_output("--force", help="Replace existing files.")]


def without_option(command: Callable[..., None], name: str) -> Callable[..., None]:
    """The command without one of its options, which then has its default. typer reads options from the signature."""
    signature = inspect.signature(command)
    parameters = [parameter for key, parameter in signature.parameters.items() if key != name]
    setattr(command, "__signature__", signature.replace(parameters=parameters))  # noqa: B010  unknown to pyright
    return command


def check_distinct(option: str, texts: Sequence[str]) -> None:
    """Raise SettingError if two texts of an option are equal: results are listed by text, so one would be lost."""
    for text in texts:
        if texts.count(text) > 1:
            raise SettingError(f"{option} {text!r:.80} is repeated; name it once")


def check_file(path: Path) -> None:
    """Raise SettingError if an output file cannot be made; called before anything is computed."""
    check_name(path)
    if path.is_dir():
        raise SettingError(f"{path}: is a folder; expected the name of a file to write")
    if not path.parent.is_dir():
        raise SettingError(f"{path}: there is no folder {path.parent} to write it to")


def print_result(value: dict[str, Any], as_json: bool, *lines: str) -> None:
    """Print one result: a JSON object, or lines for people."""
    if as_json:
        text = to_json(value, ensure_ascii=False)
        # JSON itself does not escape all of these characters
        tqdm.write(CONTROL_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", text))
    else:
        tqdm.write("\n".join(escape_controls(line, keep="\t") for line in lines))


def print_note(note: str) -> None:
    """Print a line on standard error, if that is open."""
    with suppress(OSError):
        tqdm.write(escape_controls(f"pgfunc: {note}"), file=sys.stderr)


def to_json(value: Any, ensure_ascii: bool = True) -> str:
    """A value as one line of JSON. Raises NumericalError for nan and infinity, which JSON does not have."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError as error:
        raise NumericalError("a result is nan or infinite, which JSON cannot hold; try another --dtype") from error
