"""Commands whose result is text: caption, ask, ocr, generate; and score, which compares texts."""

from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import typer
from PIL.Image import Image

import pgfunc as pg
from pgfunc.checkpoint import as_device
from pgfunc.cli import options
from pgfunc.cli.compiled import compiling
from pgfunc.cli.options import app, check_pictures, each, end, say, say_length, unset, without
from pgfunc.errors import ImageError, PromptError, SettingError, harmless
from pgfunc.image import open_image
from pgfunc.prompt import TASKS, unmarked
from pgfunc.sample import Settings


def completing(name: str, template: str | None, about: str) -> None:
    """Add a command that completes one prefix on each picture; a template with a hole needs --prompt.

    Only `caption` has --box: the other prefixes are about the whole picture.
    """

    def command(
        images: options.Images,
        prompt: options.PromptText = None,
        box: Annotated[
            str | None,
            unset("--box", metavar="XMIN,YMIN,XMAX,YMAX", help="Caption this part: pixels."),
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
        tokenizer: options.Vocabulary = None,
        as_json: options.Json = False,
    ) -> None:
        check_pictures(images)
        Settings(temperature, top_k, top_p, min_p)  # raises for what is out of range
        asked = as_prefix(name, template, prompt)
        part = None if box is None else edges(box)

        def about(image: str, picture: Image) -> str:
            return asked if part is None else region(part, image, picture, asked)

        for image in images if part else ():
            with suppress(ImageError):  # which is named when its turn comes
                about(image, open_image(image))
        where = as_device(device)
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
                                    "top_p": top_p, "min_p": min_p, "seed": seed,
                                    "compile": compile or compiled is not None}  # fmt: skip
        with compiling(sampling["compile"], compiled, where):
            loaded = pg.load(model, dtype, where, config, tokenizer, quantize, adapter=adapter)
            unread: list[str] = []
            for image, picture in each(images, partial(open_image, side=loaded.cfg.vision.image_size), unread):
                prefix = about(image, picture)
                if len(images) == 1 and not as_json:
                    finish = show(pg.stream(loaded, picture, prefix, **sampling))
                else:
                    (done,) = pg.generate(loaded, picture, prefix, **sampling)
                    say({"image": image, "prompt": prefix} | done._asdict(), as_json, f"{image}: {done.text}")
                    finish = done.finish
                if not as_json:
                    say_length(image, finish, max_new_tokens)
        end(unread)

    app.command(name, help=about)(command if name == "caption" else without(command, "box"))


def show(pieces: Iterable[str]) -> Any:
    """Print a text as it comes; returns what its generator returns."""
    coming = iter(pieces)
    while True:
        try:
            print(harmless(next(coming), keep="\n\t"), end="", flush=True)
        except StopIteration as stop:
            print()
            return stop.value


def as_prefix(command: str, template: str | None, prompt: str | None) -> str:
    """What the model is asked: the given text, in the command's form if that has a hole for it."""
    if template and "{}" not in template:
        return template if prompt is None else unmarked(prompt, 1)
    if not prompt:
        raise PromptError(f"{command} needs a question: --prompt 'what colour is the car?'" if template else
                          f"{command} needs a prefix: --prompt 'caption en'")  # fmt: skip
    return (template or "{}").format(unmarked(prompt, 1))


def edges(box: str) -> pg.detect.Box:
    """The part of a picture that XMIN,YMIN,XMAX,YMAX says, in pixels."""
    try:
        left, top, right, bottom = (float(edge) for edge in box.split(","))
    except ValueError:
        raise SettingError(f"--box {box}: expected four numbers XMIN,YMIN,XMAX,YMAX, in pixels") from None
    return pg.detect.Box(top, left, bottom, right)


def region(box: pg.detect.Box, name: str, picture: Image, task: str) -> str:
    """The prompt about a part of a picture."""
    top, left, bottom, right = box
    width, height = picture.size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        said = ",".join(f"{edge:g}" for edge in (left, top, right, bottom))
        raise SettingError(f"--box {said}: is not XMIN,YMIN,XMAX,YMAX inside {name}, of {width} x {height} pixels")
    return pg.detect.region(box, width, height, task)


completing("caption", TASKS["caption"], "Say what is in each picture. --prompt replaces 'caption en', the question.")
completing("ask", TASKS["ask"], "Answer a question, given with --prompt, about each picture.")
completing("ocr", TASKS["ocr"], "Read the text in each picture. --prompt replaces 'ocr', the question.")
completing("generate", None, "Complete any prefix, given with --prompt, on each picture.")


@app.command()
def score(
    images: options.Images,
    prompt: Annotated[str, typer.Option("--prompt", help="The prefix, as for generate.")],
    candidate: Annotated[list[str], typer.Option("--candidate", help="An answer; give several.")],
    model: options.ModelName = None,
    adapter: options.Adapter = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    config: options.Config = None,
    tokenizer: options.Vocabulary = None,
    as_json: options.Json = False,
) -> None:
    """Compare given answers by their log-probability, most probable first."""
    check_pictures(images)
    loaded = pg.load(model, dtype, device, config, tokenizer, quantize, adapter=adapter)
    unread: list[str] = []
    for image, picture in each(images, partial(open_image, side=loaded.cfg.vision.image_size), unread):
        (scores,) = pg.score(loaded, picture, prompt, candidate).tolist()
        ranked = sorted(zip(candidate, scores, strict=True), key=lambda pair: -pair[1])
        lines = [f"{image}: {answer}\t{value:.4f}" for answer, value in ranked]
        say({"image": image, "prompt": prompt, "scores": dict(ranked)}, as_json, *lines)
    end(unread)
