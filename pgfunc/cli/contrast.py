"""Commands of the dual encoder: embed, which prints vectors, and classify, which compares pictures with labels."""

from pathlib import Path
from typing import Annotated

import typer

import pgfunc as pg
from pgfunc.cli import options
from pgfunc.cli.options import app, check_distinct, check_file, check_pictures, exit_if_skipped
from pgfunc.errors import SettingError
from pgfunc.files.outputs import check_apart

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
        options.optional("--out", help="Write the vectors to this .npy file, one per row, in place of text."),
    ] = None,
    model: ModelName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Compute a unit vector for each picture, then for each --text. Similar contents have similar vectors."""
    images, texts = images or [], text or []
    check_pictures(images)
    if not images and not texts:
        raise SettingError("embed needs a picture or a text: pgfunc embed photo.jpg --text 'two cats'")
    from pgfunc.checkpoint import shipped
    from pgfunc.cli.comparing import embed_each

    if out:
        check_file(out)
        check_apart([out], [*images, model or shipped()], "--out")
        if out.suffix != ".npy":
            raise SettingError(f"--out {out}: expected a name that ends in .npy")
    loaded = pg.load_siglip(model, dtype, device)
    skipped: list[str] = []
    embed_each(loaded, images, texts, out, as_json, skipped)
    exit_if_skipped(skipped)


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
    as_json: options.Json = False,
) -> None:
    """Rank labels by the probability that each is in the picture.

    The probabilities are independent: several labels may fit, or none, so they need not add up to 1.
    """
    # the default sentence is that of SigLIP's authors; the shipped model was trained on texts such as "a red star"
    check_pictures(images)
    template = template or ("this is a photo of {}" if model else "{}")
    if "{}" not in template:
        raise SettingError(f"--template {template!r}: expected a {{}} where the label goes")
    if not all(name.strip() for name in label):
        raise SettingError("--label is empty; name what may be in the picture")
    check_distinct("--label", label)
    from pgfunc.cli.comparing import classify_each

    loaded = pg.load_siglip(model, dtype, device)
    skipped: list[str] = []
    classify_each(loaded, images, label, template, as_json, skipped)
    exit_if_skipped(skipped)
