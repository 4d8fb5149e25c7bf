"""Commands whose result is text: caption, ask, ocr, generate; and score, which compares texts."""

from functools import partial
from typing import Annotated, Any

import typer

import pgfunc as pg
from pgfunc.cli import options
from pgfunc.cli.options import app, check_distinct, check_pictures, exit_if_skipped, optional, without_option
from pgfunc.errors import PromptError
from pgfunc.names import TASKS


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
        from pgfunc.checkpoint import as_device
        from pgfunc.cli.answering import answer_each, check_regions, parse_box, region_prefix
        from pgfunc.cli.compiled import compiling
        from pgfunc.sample import Settings

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


def as_prefix(command: str, template: str | None, prompt: str | None) -> str:
    """The prefix for the model: --prompt, inserted in the command's template if that contains {}."""
    from pgfunc.prompt import unmarked

    if template and "{}" not in template:
        return template if prompt is None else unmarked(prompt, 1)
    if not prompt:
        raise PromptError(f"{command} needs a question: --prompt 'what color is the car?'" if template else
                          f"{command} needs a prefix: --prompt 'caption en'")  # fmt: skip
    return (template or "{}").format(unmarked(prompt, 1))


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
    from pgfunc.cli.answering import rank_each

    loaded = pg.load(model, dtype, device, config, tokenizer, quantize, adapter=adapter)
    skipped: list[str] = []
    rank_each(loaded, images, prompt, candidate, as_json, skipped)
    exit_if_skipped(skipped)
