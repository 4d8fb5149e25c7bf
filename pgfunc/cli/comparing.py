"""What score, embed and classify do with each picture: ranks of candidates, vectors, and the probabilities of labels.

Pictures are read ahead and computed in groups. A group is filled up to a multiple of `MULTIPLE` rows, so that a result
does not depend on the other pictures.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

import pgfunc as pg
from pgfunc.cli.inputs import Inputs, Item
from pgfunc.cli.options import print_result
from pgfunc.cli.running import Outcome, Output, exit_if, run
from pgfunc.config import Config, SiglipConfig
from pgfunc.errors import NumericalError
from pgfunc.files.atomic import replacing
from pgfunc.files.outputs import write_errors
from pgfunc.many import read_many
from pgfunc.many.prefilling import MULTIPLE

Levels = np.ndarray  # uint8 [y x 3], which is a picture too


def each_group(
    cfg: Config | SiglipConfig,
    items: Iterable[Item],
    compute: Callable[[list[Item], list[Levels]], Iterable[Outcome]],
    asked: Callable[[Item], dict[str, Any]],
) -> Iterator[Outcome]:
    """The outcomes of all pictures: `compute` gets those of a group that can be read, as many as it returns or more."""
    named: dict[int, Item] = {}

    def rows() -> Iterator[tuple[str, str, int]]:
        for item in items:
            named[item.number] = item
            yield item.source, "", item.number

    for group in read_many(rows(), cfg):
        part = [(named.pop(request.number), *request.pictures) for request in group]
        good = [(item, picture.levels) for item, picture in part if picture.levels is not None]
        yield from (Outcome(item, asked(item), error=picture.error) for item, picture in part if picture.error)
        if good:
            filled = good + good[-1:] * (-len(good) % MULTIPLE)
            outcomes = compute([item for item, _ in filled], [levels for _, levels in filled])
            yield from (outcome for outcome, _ in zip(outcomes, good, strict=False))


def rank_each(
    model: pg.Model, prefix: Callable[[Item], str], candidates: list[str], items: Iterable[Item]
) -> Iterator[Outcome]:
    """The candidates for each picture, the most probable first."""

    def rank(part: list[Item], pictures: list[Levels]) -> Iterator[Outcome]:
        scores = pg.score(model, pictures, [prefix(item) for item in part], candidates)
        for item, row in zip(part, scores.tolist(), strict=True):
            yield ranking(item, {"prompt": prefix(item)}, "scores", dict(zip(candidates, row, strict=True)))

    return each_group(model.cfg, items, rank, lambda item: {"prompt": prefix(item)})


def ranking(item: Item, asked: dict[str, Any], name: str, values: dict[str, float]) -> Outcome:
    """Texts with a value each, the largest first, as a result; `name` is the name of the values in JSON."""
    ranked = sorted(values.items(), key=lambda pair: -pair[1])
    return Outcome(item, asked | {name: dict(ranked)}, [f"{text}\t{value:.4f}" for text, value in ranked])


def embed_each(model: pg.SiglipModel, items: Iterable[Item]) -> Iterator[Outcome]:
    """The unit vector of each picture."""

    def embed(part: list[Item], pictures: list[Levels]) -> Iterator[Outcome]:
        for item, vector in zip(part, vectors(model, pictures), strict=True):
            numbers = vector.tolist()
            yield Outcome(item, {"vector": numbers}, [as_line(numbers)])

    return each_group(model.cfg, items, embed, lambda item: {})


def embed_all(model: pg.SiglipModel, inputs: Inputs, texts: list[str], array: Path | None, output: Output) -> None:
    """Print or write the vectors of pictures, then those of texts. Exits with status 1 if there were errors."""
    rows: list[list[float]] = []

    def compute(items: Iterable[Item]) -> Iterator[Outcome]:
        for outcome in embed_each(model, items):
            if array and not outcome.error:
                rows.append(outcome.record["vector"])
            yield outcome

    errors = run(inputs, lambda item: "", compute, output)
    for text, vector in zip(texts, text_vectors(model, texts) if texts else [], strict=True):
        rows.append(vector.tolist())
        if not output.silent:
            print_result({"text": text, "vector": rows[-1]}, output.as_json, f"{text}: {as_line(rows[-1])}")
    if array and rows:
        write_array(array, np.array(rows, np.float32))
    exit_if(errors)


def as_line(numbers: list[float]) -> str:
    """A vector for people."""
    return " ".join(f"{x:.4f}" for x in numbers)


def text_vectors(model: pg.SiglipModel, texts: list[str]) -> Float[Tensor, "n d"]:
    """The unit vector of each text."""
    found = pg.dual.embed_texts(model.params, pg.dual_prompt.text_ids(model, texts), model.cfg)
    check_finite(found, "a vector")
    return found


def vectors(model: pg.SiglipModel, pictures: list[Levels]) -> Float[Tensor, "n d"]:
    """The unit vector of each picture."""
    found = pg.dual.embed_images(model.params, pg.dual_prompt.pixels(model, pictures), model.cfg)
    check_finite(found, "a vector")
    return found


def classify_each(model: pg.SiglipModel, labels: list[str], template: str, items: Iterable[Item]) -> Iterator[Outcome]:
    """The labels for each picture, the most probable first."""
    texts = text_vectors(model, [template.replace("{}", name) for name in labels])

    def classify(part: list[Item], pictures: list[Levels]) -> Iterator[Outcome]:
        logits = pg.dual.logits(model.params, vectors(model, pictures), texts)
        check_finite(logits, "a probability")
        for item, row in zip(part, logits.sigmoid().tolist(), strict=True):
            yield ranking(item, {"template": template}, "probabilities", dict(zip(labels, row, strict=True)))

    return each_group(model.cfg, items, classify, lambda item: {"template": template})


def check_finite(values: Tensor, name: str) -> None:
    """Raise NumericalError if a result is nan or infinite."""
    if not values.isfinite().all():
        raise NumericalError(f"{name} is nan or infinite: the weights are, or --dtype is too small for them")


def write_array(path: Path, rows: np.ndarray) -> None:
    """Write a .npy file, for --out."""
    with write_errors(path, option="--out"), replacing(path) as file:
        np.save(file, rows, allow_pickle=False)
