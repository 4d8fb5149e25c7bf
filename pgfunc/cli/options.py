"""What the commands share: the app, the options that several of them take, how results are printed."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import typer
from tqdm import tqdm

app = typer.Typer(
    help="PaliGemma on pictures: caption, ask, read; inspect and convert checkpoints.",
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
Device = Annotated[str | None, unset("--device", help="cpu, cuda, cuda:1; without it CUDA where there is one.")]
Dtype = Annotated[str | None, unset("--dtype", help="float32, bfloat16 or float16; without it the files' own.")]
Config = Annotated[str | None, unset("--config", help="For a .npz: a published name, a config.json or its folder.")]
Vocabulary = Annotated[str | None, unset("--tokenizer", help="For a .npz: a tokenizer.json.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def progress(images: list[str]) -> Iterator[str]:
    """The pictures, with a bar on standard error when there are several and somebody watches."""
    yield from tqdm(images, unit="picture", leave=False, disable=None if len(images) > 1 else True)


def say(value: dict[str, Any], as_json: bool, text: str) -> None:
    """Print one result."""
    tqdm.write(json.dumps(value, ensure_ascii=False) if as_json else text)
