"""Commands of the dual encoder: embed, which prints vectors, and classify, which compares pictures with labels."""

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

import pgfunc as pg
from pgfunc.checkpoint import shipped
from pgfunc.cli import options
from pgfunc.cli.options import app, check_distinct, check_file, check_pictures, exit_if_skipped, print_result, read_each
from pgfunc.errors import NumericalError, SettingError
from pgfunc.files.atomic import replacing
from pgfunc.files.outputs import check_apart, write_errors

ModelName = Annotated[
    str | None, options.of_model("--model", help="SigLIP: a folder or a hub id. Default: the shipped checkpoint.")
]
Pictures = Annotated[list[str] | None, typer.Argument(help="Picture files.", metavar="IMAGE", show_default=False)]


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
    if out:
        check_file(out)
        check_apart([out], [*images, model or shipped()], "--out")
        if out.suffix != ".npy":
            raise SettingError(f"--out {out}: expected a name that ends in .npy")
    loaded = pg.load_siglip(model, dtype, device)
    skipped: list[str] = []
    rows = [({"image": name}, vector) for name, vector in read_each(images, partial(image_vector, loaded), skipped)]
    vectors = pg.dual.embed_texts(loaded.params, pg.dual_prompt.text_ids(loaded, texts), loaded.cfg) if texts else []
    rows += [({"text": one}, vector) for one, vector in zip(texts, vectors, strict=True)]
    check_finite(torch.stack([vector for _, vector in rows]) if rows else torch.zeros(0), "a vector")
    if out and rows:
        write_array(out, np.stack([vector.cpu().numpy() for _, vector in rows]))
    for source, vector in rows if as_json or not out else []:
        (title,) = source.values()
        numbers = vector.tolist()
        print_result(source | {"vector": numbers}, as_json, f"{title}: {' '.join(f'{x:.4f}' for x in numbers)}")
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
    loaded = pg.load_siglip(model, dtype, device)
    ids = pg.dual_prompt.text_ids(loaded, [template.replace("{}", name) for name in label])
    texts = pg.dual.embed_texts(loaded.params, ids, loaded.cfg)
    skipped: list[str] = []
    for image, vector in read_each(images, partial(image_vector, loaded), skipped):
        logits = pg.dual.logits(loaded.params, vector[None], texts)[0]
        check_finite(logits, "a probability")
        ranked = sorted(zip(label, logits.sigmoid().tolist(), strict=True), key=lambda pair: -pair[1])
        lines = [f"{image}: {name}\t{probability:.4f}" for name, probability in ranked]
        print_result({"image": image, "template": template, "probabilities": dict(ranked)}, as_json, *lines)
    exit_if_skipped(skipped)


def check_finite(values: Tensor, name: str) -> None:
    """Raise NumericalError if a result is nan or infinite."""
    if not values.isfinite().all():
        raise NumericalError(f"{name} is nan or infinite: the weights are, or --dtype is too small for them")


def image_vector(model: pg.SiglipModel, image: str) -> Tensor:
    """The unit vector of one picture."""
    return pg.dual.embed_images(model.params, pg.dual_prompt.pixels(model, [image]), model.cfg)[0]


def write_array(path: Path, vectors: np.ndarray) -> None:
    """Write a .npy file, for --out."""
    with write_errors(path, option="--out"), replacing(path) as file:
        np.save(file, vectors, allow_pickle=False)
