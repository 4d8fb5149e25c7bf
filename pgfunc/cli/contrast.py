"""Commands of the dual encoder: embed, which prints vectors, and classify, which compares pictures with labels."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import pgfunc as pg
from pgfunc.cli import options
from pgfunc.cli.inputs import expand
from pgfunc.cli.options import OnError, app, check_distinct, check_file
from pgfunc.cli.running import Output, exit_if, results_output, run
from pgfunc.errors import SettingError
from pgfunc.files.outputs import check_apart

ARRAY = ".npy"
ModelName = Annotated[
    str | None, options.of_model("--model", help="SigLIP: a folder or a hub id. Default: the shipped checkpoint.")
]
Pictures = Annotated[list[str] | None, typer.Argument(help=options.PICTURES, metavar="IMAGE", show_default=False)]


@app.command()
def embed(
    images: Pictures = None,
    text: Annotated[list[str] | None, options.optional("--text", help="A text. Repeat it for several.")] = None,
    out: Annotated[
        Path | None,
        options.of_output(
            "--out",
            show_default=False,
            help="Write the vectors to this file, one per row, in place of text: .npy, or .jsonl, .csv or .parquet.",
        ),
    ] = None,
    resume: options.Resume = False,
    on_error: options.WhenBroken = OnError.skip,
    model: ModelName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Compute a unit vector for each picture, then for each --text. Similar contents have similar vectors."""
    texts = text or []
    if not images and not texts:
        raise SettingError("embed needs a picture or a text: pgfunc embed photo.jpg --text 'two cats'")
    inputs = expand(images or [])
    array = out if out and out.suffix == ARRAY else None
    if array:
        check_array(array, [*inputs.arguments, model], resume)
        output = Output(as_json, stop=on_error is OnError.stop, silent=not as_json)
    else:
        output = results_output(inputs, [model], out, resume, on_error, as_json, also=ARRAY)
        if out and texts:
            raise SettingError(f"--out {out}: --text goes to a .npy file or to standard output")
    from pgfunc.cli.comparing import embed_all

    embed_all(pg.load_siglip(model, dtype, device), inputs, texts, array, output)


def check_array(path: Path, inputs: Sequence[str | None], resume: bool) -> None:
    """Raise SettingError if a .npy file cannot be written, or cannot be continued."""
    if resume:
        raise SettingError(f"--out {path}: a .npy file is written at the end and cannot be resumed; give a .jsonl")
    from pgfunc.checkpoint import shipped

    check_file(path)
    check_apart([path], [*inputs, *([] if inputs[-1] else [shipped()])], "--out")


@app.command()
def classify(
    images: options.Images,
    label: Annotated[
        list[str], typer.Option("--label", help="Something that may be in the picture. Repeat it for several.")
    ],
    template: Annotated[
        str | None,
        options.optional(
            "--template",
            help="Sentence around a label, with {} for the label. Default: 'this is a photo of {}', "
            "or only the label for the shipped checkpoint.",
        ),
    ] = None,
    model: ModelName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: options.Results = None,
    resume: options.Resume = False,
    on_error: options.WhenBroken = OnError.skip,
    as_json: options.Json = False,
) -> None:
    """Rank labels by the probability that each is in the picture.

    The probabilities are independent: several labels may fit, or none, so they need not add up to 1.
    """
    # the default sentence is that of SigLIP's authors; the shipped model was trained on texts such as "a red star"
    inputs = expand(images)
    template = template or ("this is a photo of {}" if model else "{}")
    if "{}" not in template:
        raise SettingError(f"--template {template!r}: expected a {{}} where the label goes")
    if not all(name.strip() for name in label):
        raise SettingError("--label is empty; name what may be in the picture")
    check_distinct("--label", label)
    output = results_output(inputs, [model], out, resume, on_error, as_json)
    from pgfunc.cli.comparing import classify_each

    loaded = pg.load_siglip(model, dtype, device)
    exit_if(run(inputs, lambda item: template, partial(classify_each, loaded, label, template), output))
