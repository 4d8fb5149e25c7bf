"""Teach the shipped checkpoint a new class: make pictures to fine-tune on, and check how well it knows the class.

    python -m examples.tiny.newclass make                               # writes examples/helicopters, from runs/tiny
    pgfunc train examples/helicopters/train.jsonl --out helicopters --epochs 8      # fine-tunes
    python -m examples.tiny.newclass check helicopters                  # before and after

There are 200 pictures. 140 have a helicopter (one of three drawings) among things that the checkpoint knows. 60 have
none, so that the checkpoint learns what is not a helicopter and keeps what it knew. The check uses 60 pictures with a
fourth helicopter, and the held-out scenes to measure what was forgotten. The shipped weights have never seen a
helicopter, and the vocabulary was not learned from that word.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

import pgfunc as pg
from examples.tiny import heldout, scenes, world
from examples.tiny.evaluate import iou, named_f1, share, singular
from pgfunc.objects import detect
from pgfunc.objects.detect import Box, Detection

NAME, FOLDER = "helicopter", Path("examples/helicopters")
SPLITS = {
    "train": ("S0", 140, 60),
    "valid": ("S2", 60, 0),
}  # split of the scenes, number with the class, number without


def drawn(at: world.World, split: str, present: bool) -> Iterator[heldout.Example]:
    """Scenes of a split that have things; `present` says whether the new class is among them."""
    bank = at.bank("cpu")
    for index in itertools.count():
        names = [thing.name for thing in scenes.draw(at.catalog, split, index).things]
        if names and (NAME in names) == present:
            yield heldout.one(at.catalog, bank, split, index)


def lines(example: heldout.Example, image: str) -> Iterator[dict[str, str]]:
    """The prompts of a picture: a caption, the boxes of the new class, and the boxes of all things."""
    side, names = heldout.SIDE, list(dict.fromkeys(thing.name for thing in example.things))
    things = sorted(example.things, key=lambda thing: thing.box.xmin + thing.box.xmax)
    yield {
        "image": image,
        "prefix": "caption en",
        "suffix": next(row.suffix for row in example.rows if row.task == "caption"),
    }
    for labels in dict.fromkeys(((NAME,), tuple(names))):
        boxes = [Detection(thing.name, thing.box) for label in labels for thing in things if thing.name == label]
        suffix = detect.render(boxes, side, side)
        yield {"image": image, "prefix": f"detect {' ; '.join(labels)}", "suffix": suffix}


def make(data: Path, folder: Path) -> None:
    at = world.load(data, more=NAME)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (split, number, others) in SPLITS.items():
        examples = [*itertools.islice(drawn(at, split, True), number)]
        examples += itertools.islice(drawn(at, split, False), others)
        rows = []
        for i, example in enumerate(examples):
            image = f"{name}-{i:03d}.webp"
            example.picture.save(folder / image, quality=80, method=6)
            rows += lines(example, image)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def check(model: pg.Model, folder: Path, heldout_folder: Path) -> dict[str, float]:
    """The figures on pictures that have the class, and on the held-out scenes, which do not have it."""
    rows = [json.loads(line) for line in (folder / "valid.jsonl").read_text().splitlines()]
    captions, boxes = ([row for row in rows if row["prefix"] == asked] for asked in ("caption en", f"detect {NAME}"))
    without = [(e, row) for e in heldout.read(heldout_folder)["S0"] for row in e.rows if row.task == "caption"]
    others = [e.picture for e, _ in without]

    def answered(rows: list[dict[str, str]]) -> list[str]:
        return answers(model, [Image.open(folder / row["image"]) for row in rows], rows[0]["prefix"])

    old_captions = answers(model, others, "caption en")
    return {
        "captions that name it": share(singular(text, [NAME])[NAME] > 0 for text in answered(captions)),
        "things found, IoU > 0.5": share(hits(boxes, answered(boxes))),
        "captions that name it where there is none": share(NAME in text for text in old_captions),
        "boxes where there is none": share(bool(text) for text in answers(model, others, f"detect {NAME}")),
        "F1 of the old names": named_f1((e, row, text) for (e, row), text in zip(without, old_captions, strict=True)),
    }


def answers(model: pg.Model, pictures: Sequence[Image.Image], prefix: str) -> list[str]:
    return [done.text for done in pg.generate(model, list(pictures), prefix)]


def hits(rows: Sequence[dict[str, str]], texts: Sequence[str]) -> Iterator[bool]:
    """For each thing, whether a box overlaps it with an IoU above 0.5."""
    side = heldout.SIDE
    for row, text in zip(rows, texts, strict=True):
        boxes: list[Box] = [detection.box for detection in detect.parse(text, side, side)]
        for expected in detect.parse(row["suffix"], side, side):
            yield any(iou(box, expected.box) > 0.5 for box in boxes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making, checking = commands.add_parser("make"), commands.add_parser("check")
    making.add_argument("--data", type=Path, default=Path("runs/tiny"), help="folder written by examples.tiny.fetch")
    checking.add_argument("model", help="the folder of the fine-tuned model")
    checking.add_argument("--heldout", type=Path, default=Path("examples/tiny/heldout"))
    for each in (making, checking):
        each.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    if args.command == "make":
        return make(args.data, args.folder)
    for name, source in {"before": None, "after": args.model}.items():
        figures = check(pg.load(source, dtype="float32"), args.folder, args.heldout)
        print(name, *(f"  {value:.2f}  {figure}" for figure, value in figures.items()), sep="\n")


if __name__ == "__main__":
    main()
