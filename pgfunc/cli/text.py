"""Commands whose result is text: caption, ask, ocr, generate; and score, which compares texts."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import typer
from PIL.Image import Image

import pgfunc as pg
from pgfunc.checkpoint import as_device
from pgfunc.cli import options
from pgfunc.cli.compiled import compiling
from pgfunc.cli.options import (
    app,
    check_distinct,
    check_pictures,
    exit_if_skipped,
    note_if_cut_off,
    optional,
    print_result,
    read_each,
    without_option,
)
from pgfunc.errors import ImageError, PromptError, SettingError, escape_controls
from pgfunc.image import open_image
from pgfunc.prompt import TASKS, unmarked
from pgfunc.sample import Settings


def add_text_command(name: str, template: str | None, help: str, prompt_help: str) -> None:
    """Add a command that completes one prefix for each picture. A template that contains {} needs --prompt.

    Only `caption` has --box: the prefixes of the other commands are about the whole picture.
    """

    def command(
        images: options.Images,
        prompt: Annotated[str | None, optional("--prompt", help=prompt_help)] = None,
        box: Annotated[
            str | None,
            optional("--box", metavar="XMIN,YMIN,XMAX,YMAX", help="Caption only this part of each picture, in pixels."),
        ] = None,
        model: options.ModelName = None,
        adapter: options.Adapter = None,
        max_new_tokens: options.MaxNewTokens = 64,
        temperature: options.Temperature = 0.0,
        top_k: options.TopK = None,
        top_p: options.TopP = None,
        min_p: options.MinP = None,
        seed: options.Seed = 0,
        compile: options.Compile = False,
        compiled: options.Compiled = None,
        device: options.Device = None,
        dtype: options.Dtype = None,
        quantize: options.Quantize = None,
        config: options.Config = None,
        tokenizer: options.Tokenizer = None,
        as_json: options.Json = False,
    ) -> None:
        check_pictures(images)
        Settings(temperature, top_k, top_p, min_p)  # raises SettingError for a value outside its range
        prefix = as_prefix(name, template, prompt)
        prefix_for = partial(region_prefix, parse_box(box), prefix) if box is not None else lambda *picture: prefix
        if box is not None:
            check_regions(images, prefix_for)
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
                                    "top_p": top_p, "min_p": min_p, "seed": seed,
                                    "compile": compile or compiled is not None}  # fmt: skip
        where, skipped = as_device(device), list[str]()
        with compiling(sampling["compile"], compiled, where):
            loaded = pg.load(model, dtype, where, config, tokenizer, quantize, adapter=adapter)
            answer_each(loaded, images, prefix_for, sampling, as_json, skipped)
        exit_if_skipped(skipped)

    app.command(name, help=help)(command if name == "caption" else without_option(command, "box"))


def answer_each(
    model: pg.Model, images: Sequence[str], prefix_for: Callable[[str, Image], str], sampling: dict[str, Any],
    as_json: bool, skipped: list[str],
) -> None:  # fmt: skip
    """Print the model's answer about each picture; the answer about a single picture is printed as it is generated."""
    for image, picture in read_each(images, partial(open_image, side=model.cfg.vision.image_size), skipped):
        prefix = prefix_for(image, picture)
        if len(images) == 1 and not as_json:
            finish = print_stream(pg.stream(model, picture, prefix, **sampling))
        else:
            (answer,) = pg.generate(model, picture, prefix, **sampling)
            print_result({"image": image, "prompt": prefix} | answer._asdict(), as_json, f"{image}: {answer.text}")
            finish = answer.finish
        if not as_json:
            note_if_cut_off(image, finish, sampling["max_new_tokens"])


def print_stream(pieces: Iterable[str]) -> Any:
    """Print the pieces of a text as they come; returns the return value of the generator."""
    iterator = iter(pieces)
    while True:
        try:
            print(escape_controls(next(iterator), keep="\n\t"), end="", flush=True)
        except StopIteration as stop:
            print()
            return stop.value


def as_prefix(command: str, template: str | None, prompt: str | None) -> str:
    """The prefix for the model: --prompt, inserted in the command's template if that contains {}."""
    if template and "{}" not in template:
        return template if prompt is None else unmarked(prompt, 1)
    if not prompt:
        raise PromptError(f"{command} needs a question: --prompt 'what color is the car?'" if template else
                          f"{command} needs a prefix: --prompt 'caption en'")  # fmt: skip
    return (template or "{}").format(unmarked(prompt, 1))


def parse_box(text: str) -> pg.detect.Box:
    """The box that XMIN,YMIN,XMAX,YMAX describes, in pixels."""
    try:
        left, top, right, bottom = (float(edge) for edge in text.split(","))
    except ValueError:
        raise SettingError(f"--box {text}: expected four numbers XMIN,YMIN,XMAX,YMAX, in pixels") from None
    return pg.detect.Box(top, left, bottom, right)


def region_prefix(box: pg.detect.Box, prefix: str, image: str, picture: Image) -> str:
    """The prefix about a part of a picture. Raises SettingError if the part is empty or not inside the picture."""
    top, left, bottom, right = box
    width, height = picture.size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        text = ",".join(f"{edge:g}" for edge in (left, top, right, bottom))
        raise SettingError(f"--box {text}: is not XMIN,YMIN,XMAX,YMAX inside {image}, of {width} x {height} pixels")
    return pg.detect.region(box, width, height, prefix)


def check_regions(images: Sequence[str], prefix_for: Callable[[str, Image], str]) -> None:
    """Raise SettingError if --box is not inside every picture; called before anything is loaded."""
    for image in images:
        with suppress(ImageError):  # `read_each` reports it
            prefix_for(image, open_image(image))


add_text_command(
    "caption", TASKS["caption"], "Describe each picture.",
    "Prefix for the model, in place of 'caption en'.",
)  # fmt: skip
add_text_command(
    "ask", TASKS["ask"], "Answer a question about each picture.",
    "The question, such as 'what color is the car?'. Required.",
)  # fmt: skip
add_text_command(
    "ocr", TASKS["ocr"], "Read the text in each picture.",
    "Prefix for the model, in place of 'ocr'.",
)  # fmt: skip
add_text_command(
    "generate", None, "Complete any prefix for each picture, for models with prefixes of their own.",
    "The prefix, exactly as the model gets it, such as 'caption en'. Required.",
)  # fmt: skip


@app.command()
def score(
    images: options.Images,
    prompt: Annotated[str, typer.Option("--prompt", help="The prefix, as for `pgfunc generate`.")],
    candidate: Annotated[list[str], typer.Option("--candidate", help="A possible answer. Repeat it for several.")],
    model: options.ModelName = None,
    adapter: options.Adapter = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    config: options.Config = None,
    tokenizer: options.Tokenizer = None,
    as_json: options.Json = False,
) -> None:
    """Rank possible answers by their log-probability, for each picture."""
    check_pictures(images)
    check_distinct("--candidate", candidate)
    loaded = pg.load(model, dtype, device, config, tokenizer, quantize, adapter=adapter)
    skipped: list[str] = []
    for image, picture in read_each(images, partial(open_image, side=loaded.cfg.vision.image_size), skipped):
        (scores,) = pg.score(loaded, picture, prompt, candidate).tolist()
        ranked = sorted(zip(candidate, scores, strict=True), key=lambda pair: -pair[1])
        lines = [f"{image}: {answer}\t{logprob:.4f}" for answer, logprob in ranked]
        print_result({"image": image, "prompt": prompt, "scores": dict(ranked)}, as_json, *lines)
    exit_if_skipped(skipped)
