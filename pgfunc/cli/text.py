"""Commands whose result is text: caption, ask, ocr, generate; and score, which compares texts."""

from functools import partial
from typing import Annotated, Any

import typer

import pgfunc as pg
from pgfunc.cli import options
from pgfunc.cli.inputs import Item, check_inputs, expand
from pgfunc.cli.options import OnError, app, check_distinct, optional, without_option
from pgfunc.cli.running import exit_if, results_output, run
from pgfunc.errors import PromptError, SettingError
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
        batch: options.Batch = None,
        ray: options.Ray = None,
        ray_workers: options.RayWorkers = None,
        out: options.Results = None,
        resume: options.Resume = False,
        on_error: options.WhenBroken = OnError.skip,
        as_json: options.Json = False,
    ) -> None:
        inputs = expand(images)
        asked = partial(prefix_of, name, template, prompt)
        check_inputs(inputs, asked)
        output = results_output(inputs, [model, adapter, config, tokenizer], out, resume, on_error, as_json)
        from pgfunc.checkpoint import as_device
        from pgfunc.cli.answering import Query, answer_each, check_region, parse_box, stream_answer
        from pgfunc.cli.compiled import compiling
        from pgfunc.cli.machines import Loading, completer
        from pgfunc.sample import Settings

        Settings(temperature, top_k, top_p, min_p)  # raises SettingError for a value outside its range
        part = None if box is None else parse_box(box)
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
                                    "top_p": top_p, "min_p": min_p, "seed": seed,
                                    "compile": compile or compiled is not None}  # fmt: skip
        if part:
            check_region(part, inputs)
        if ray and compiled:
            raise SettingError("--compiled does not work with --ray, whose workers compile their own code: --compile")
        where = as_device("cpu" if ray else device)
        loading = Loading(model, dtype, device, config, tokenizer, quantize, adapter)
        with compiling(sampling["compile"], compiled, where), completer(loading, ray, ray_workers) as backend:
            query = Query(backend, asked, part, sampling, batch)
            if inputs.single and backend.here and not as_json and not out:
                stream_answer(query, *inputs.items)
            else:
                exit_if(run(inputs, asked, partial(answer_each, query, inputs), output))

    app.command(name, help=help)(command if name == "caption" else without_option(command, "box"))


def prefix_of(command: str, template: str | None, prompt: str | None, item: Item) -> str:
    """The prefix about a picture: that of a table as it is; or a prompt, inserted in the template if that contains {}.

    The prompt is that of the table, or else --prompt. Raises PromptError if there must be one and is none.
    """
    if item.prefix is not None:
        return item.prefix
    prompt = prompt if item.prompt is None else item.prompt
    frame = template or "{}"
    if prompt is None and "{}" not in frame:
        return frame
    if not prompt and "{}" in frame:
        raise PromptError(f"{command} needs a question: --prompt 'what color is the car?'" if template else
                          f"{command} needs a prefix: --prompt 'caption en'")  # fmt: skip
    from pgfunc.prompt import unmarked

    words = unmarked(prompt or "", 1)
    return frame.format(words) if "{}" in frame else words


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
    candidate: Annotated[list[str], typer.Option("--candidate", help="A possible answer. Repeat it for several.")],
    prompt: Annotated[
        str | None, optional("--prompt", help="The prefix, as for `pgfunc generate`. Required, unless a table has it.")
    ] = None,
    model: options.ModelName = None,
    adapter: options.Adapter = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    config: options.Config = None,
    tokenizer: options.Tokenizer = None,
    out: options.Results = None,
    resume: options.Resume = False,
    on_error: options.WhenBroken = OnError.skip,
    as_json: options.Json = False,
) -> None:
    """Rank possible answers by their log-probability, for each picture."""
    inputs = expand(images)
    check_distinct("--candidate", candidate)
    asked = partial(prefix_of, "score", None, prompt)
    check_inputs(inputs, asked)
    output = results_output(inputs, [model, adapter, config, tokenizer], out, resume, on_error, as_json)
    from pgfunc.cli.comparing import rank_each

    loaded = pg.load(model, dtype, device, config, tokenizer, quantize, adapter=adapter)
    exit_if(run(inputs, asked, partial(rank_each, loaded, asked, candidate), output))
