"""Commands of the dual encoder: embed, which gives vectors, and classify, which compares pictures with labels."""

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
from pgfunc.cli.options import app, check_file, check_pictures, each, end, say
from pgfunc.errors import NumericalError, SettingError
from pgfunc.files.atomic import replacing
from pgfunc.files.outputs import check_apart

ModelName = Annotated[
    str | None, options.unset("--model", help="SigLIP: a folder or hub id; without it the shipped one.")
]
Pictures = Annotated[list[str] | None, typer.Argument(help="Picture files.", metavar="IMAGE", show_default=False)]


@app.command()
def embed(
    images: Pictures = None,
    text: Annotated[list[str] | None, options.unset("--text", help="A text; give several.")] = None,
    out: Annotated[Path | None, options.unset("--out", help="Write all vectors to a .npy, a row each.")] = None,
    model: ModelName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Give the unit vector of each picture, then of each --text."""
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
    unread: list[str] = []
    rows = [({"image": name}, vector) for name, vector in each(images, partial(image_vector, loaded), unread)]
    vectors = pg.dual.embed_texts(loaded.params, pg.dual_prompt.text_ids(loaded, texts), loaded.cfg) if texts else []
    rows += [({"text": one}, vector) for one, vector in zip(texts, vectors, strict=True)]
    check_numbers(torch.stack([vector for _, vector in rows]) if rows else torch.zeros(0), "a vector")
    if out and rows:
        save(out, np.stack([vector.cpu().numpy() for _, vector in rows]))
    for name, vector in rows if as_json or not out else []:
        (shown,) = name.values()
        say(name | {"vector": vector.tolist()}, as_json, f"{shown}: {' '.join(f'{x:.4f}' for x in vector.tolist())}")
    end(unread)


@app.command()
def classify(
    images: options.Images,
    label: Annotated[list[str], typer.Option("--label", help="What may be in the picture; give several.")],
    template: Annotated[
        str | None,
        options.unset("--template", help="The label's sentence: 'this is a photo of {}'; '{}' for the shipped model."),
    ] = None,
    model: ModelName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Rank labels by the probability that each is in the picture; they need not add up to 1."""
    # SigLIP's authors prompt so; the shipped model was trained on descriptions such as "a red star"
    check_pictures(images)
    template = template or ("this is a photo of {}" if model else "{}")
    if "{}" not in template:
        raise SettingError(f"--template {template!r}: expected a {{}} where the label goes")
    if not all(name.strip() for name in label):
        raise SettingError("--label is empty; name what may be in the picture")
    loaded = pg.load_siglip(model, dtype, device)
    ids = pg.dual_prompt.text_ids(loaded, [template.replace("{}", name) for name in label])
    texts = pg.dual.embed_texts(loaded.params, ids, loaded.cfg)
    unread: list[str] = []
    for image, vector in each(images, partial(image_vector, loaded), unread):
        logits = pg.dual.logits(loaded.params, vector[None], texts)[0]
        check_numbers(logits, "a probability")
        ranked = sorted(zip(label, logits.sigmoid().tolist(), strict=True), key=lambda pair: -pair[1])
        lines = [f"{image}: {name}\t{value:.4f}" for name, value in ranked]
        say({"image": image, "template": template, "probabilities": dict(ranked)}, as_json, *lines)
    end(unread)


def check_numbers(values: Tensor, what: str) -> None:
    """Raise NumericalError where a result is no number."""
    if not values.isfinite().all():
        raise NumericalError(f"{what} is nan or infinite: the weights are, or --dtype is too small for them")


def image_vector(model: pg.SiglipModel, image: str) -> Tensor:
    """The unit vector of one picture."""
    return pg.dual.embed_images(model.params, pg.dual_prompt.pixels(model, [image]), model.cfg)[0]


def save(path: Path, vectors: np.ndarray) -> None:
    """Write a .npy."""
    try:
        with replacing(path) as file:
            np.save(file, vectors, allow_pickle=False)
    except OSError as error:
        raise SettingError(f"--out {path}: cannot be written ({error.strerror})") from error
