"""The command line: `pgfunc caption photo.jpg`. It parses, calls the package and prints; it decides nothing else.

A mistake of the user's is one line on standard error and exit status 2. With `--json` each picture gives one line of
JSON on standard output; progress goes to standard error.
"""

import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

import pgfunc as pg
from pgfunc.errors import PgfuncError, PromptError, SettingError
from pgfunc.prompt import TASKS

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


def completing(name: str, template: str | None, about: str) -> None:
    """Add a command that completes one prefix on each picture; a template with a hole needs --prompt."""

    def command(
        images: Images, prompt: PromptText = None, model: ModelName = None, max_new_tokens: MaxNewTokens = 64,
        temperature: Temperature = 0.0, top_k: TopK = None, top_p: TopP = None, min_p: MinP = None, seed: Seed = 0,
        device: Device = None, dtype: Dtype = None, config: Config = None, tokenizer: Vocabulary = None,
        as_json: Json = False,
    ) -> None:  # fmt: skip
        prefix = as_prefix(name, template, prompt)
        loaded = pg.load(model, dtype, device, config, tokenizer)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
                                   "top_p": top_p, "min_p": min_p, "seed": seed}  # fmt: skip
        if len(images) == 1 and not as_json:
            for piece in pg.stream(loaded, images[0], prefix, **options):
                print(piece, end="", flush=True)
            print()
            return
        for image in progress(images):
            (done,) = pg.generate(loaded, image, prefix, **options)
            say({"image": image, "prompt": prefix} | done._asdict(), as_json, f"{image}: {done.text}")

    app.command(name, help=about)(command)


def as_prefix(command: str, template: str | None, prompt: str | None) -> str:
    """What the model is asked: the given text, in the command's form if that has a hole for it."""
    if template and "{}" not in template:
        return template if prompt is None else prompt
    if not prompt:
        raise PromptError(f"{command} needs a question: --prompt 'what colour is the car?'" if template else
                          f"{command} needs a prefix: --prompt 'caption en'")  # fmt: skip
    return template.format(prompt) if template else prompt


completing("caption", TASKS["caption"], "Say what is in each picture. --prompt replaces 'caption en'.")
completing("ask", TASKS["ask"], "Answer a question, given with --prompt, about each picture.")
completing("ocr", TASKS["ocr"], "Read the text in each picture.")
completing("generate", None, "Complete any prefix, given with --prompt, on each picture.")


@app.command()
def score(
    images: Images,
    prompt: Annotated[str, typer.Option("--prompt", help="The prefix, as for generate.")],
    candidate: Annotated[list[str], typer.Option("--candidate", help="An answer; give several.")],
    model: ModelName = None, device: Device = None, dtype: Dtype = None, config: Config = None,
    tokenizer: Vocabulary = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Compare given answers by their log-probability, most probable first."""
    loaded = pg.load(model, dtype, device, config, tokenizer)
    for image in progress(images):
        (scores,) = pg.score(loaded, image, prompt, candidate).tolist()
        ranked = sorted(zip(candidate, scores, strict=True), key=lambda pair: -pair[1])
        lines = [f"{image}: {answer}\t{value:.4f}" for answer, value in ranked]
        say({"image": image, "prompt": prompt, "scores": dict(ranked)}, as_json, "\n".join(lines))


@app.command()
def inspect(
    source: Annotated[str | None, typer.Argument(help="Folder, .npz or hub id.", show_default=False)] = None,
    model: ModelName = None, config: Config = None, as_json: Json = False,
) -> None:  # fmt: skip
    """List the parameters: path, shape, dtype, bytes. Only the headers of the files are read."""
    if source and model:
        raise SettingError(f"inspect takes one checkpoint, found {source} and --model {model}")
    params = pg.load(source or model, device="meta", config=config).params
    rows = [(path, tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."), leaf.numel() * leaf.element_size())
            for path, leaf in pg.tree.flatten(params).items()]  # fmt: skip
    if as_json:
        keys = ("path", "shape", "dtype", "bytes")
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    width = max(len(path) for path, *_ in rows)
    for path, shape, dtype, size in rows:
        print(f"{path:<{width}}  {' x '.join(map(str, shape)):<16}  {dtype:<8}  {size:>13,}")
    print(f"{pg.tree.count(params):,} parameters, {pg.tree.nbytes(params):,} bytes")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder, .npz or hub id.")],
    target: Annotated[Path, typer.Argument(help="A folder for Hugging Face layout, or a .npz for big_vision's.")],
    config: Config = None, tokenizer: Vocabulary = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Write a checkpoint in the other format."""
    pg.convert(source, target, dtype, config, tokenizer)


def progress(images: list[str]) -> Iterator[str]:
    """The pictures, with a bar on standard error when there are several and somebody watches."""
    yield from tqdm(images, unit="picture", leave=False, disable=None if len(images) > 1 else True)


def say(value: dict[str, Any], as_json: bool, text: str) -> None:
    """Print one result."""
    tqdm.write(json.dumps(value, ensure_ascii=False) if as_json else text)


def main() -> None:
    """Run the command line; a PgfuncError is its message and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        app()
    except PgfuncError as error:
        print(f"pgfunc: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
