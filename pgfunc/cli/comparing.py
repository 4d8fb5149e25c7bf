"""What embed and classify do with each picture and text: vectors, and the probabilities of labels."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pgfunc as pg
from pgfunc.cli.options import print_result, read_each
from pgfunc.errors import NumericalError
from pgfunc.files.atomic import replacing
from pgfunc.files.outputs import write_errors


def embed_each(
    model: pg.SiglipModel, images: Sequence[str], texts: list[str], out: Path | None, as_json: bool, skipped: list[str]
) -> None:
    """Print the vectors of pictures and then of texts, or write them to a file; with JSON, do both."""
    rows = [({"image": name}, vector) for name, vector in read_each(images, partial(image_vector, model), skipped)]
    vectors = pg.dual.embed_texts(model.params, pg.dual_prompt.text_ids(model, texts), model.cfg) if texts else []
    rows += [({"text": one}, vector) for one, vector in zip(texts, vectors, strict=True)]
    check_finite(torch.stack([vector for _, vector in rows]) if rows else torch.zeros(0), "a vector")
    if out and rows:
        write_array(out, np.stack([vector.cpu().numpy() for _, vector in rows]))
    for source, vector in rows if as_json or not out else []:
        (title,) = source.values()
        numbers = vector.tolist()
        print_result(source | {"vector": numbers}, as_json, f"{title}: {' '.join(f'{x:.4f}' for x in numbers)}")


def classify_each(
    model: pg.SiglipModel, images: Sequence[str], labels: list[str], template: str, as_json: bool, skipped: list[str]
) -> None:
    """Print the labels for each picture, the most probable first."""
    ids = pg.dual_prompt.text_ids(model, [template.replace("{}", name) for name in labels])
    texts = pg.dual.embed_texts(model.params, ids, model.cfg)
    for image, vector in read_each(images, partial(image_vector, model), skipped):
        logits = pg.dual.logits(model.params, vector[None], texts)[0]
        check_finite(logits, "a probability")
        ranked = sorted(zip(labels, logits.sigmoid().tolist(), strict=True), key=lambda pair: -pair[1])
        lines = [f"{image}: {name}\t{probability:.4f}" for name, probability in ranked]
        print_result({"image": image, "template": template, "probabilities": dict(ranked)}, as_json, *lines)


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
