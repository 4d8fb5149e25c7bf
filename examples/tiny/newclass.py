"""A new class for the shipped checkpoint: pictures to fine-tune it on, and how well it then knows the class.

    python -m examples.tiny.newclass make                               # writes examples/helicopters, from runs/tiny
    pgfunc train examples/helicopters/train.jsonl --out helicopters --epochs 8      # fine-tunes
    python -m examples.tiny.newclass check helicopters                  # before and after

Of 200 pictures, 140 have a helicopter, drawn in three ways, among things that the checkpoint knows; 60 have none, so
that it learns what is no helicopter, and keeps what it knew. It is checked on 60 pictures with a fourth helicopter and,
for what it forgot, on the held-out scenes. The weights have never seen any helicopter, nor the vocabulary the word.
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
SPLITS = {"train": ("S0", 140, 60), "valid": ("S2", 60, 0)}  # the scenes, how many with the class, how many without


def drawn(at: world.World, split: str, present: bool) -> Iterator[heldout.Example]:
    """Scenes of a split that have things, the new class among them or not."""
    bank = at.bank("cpu")
    for index in itertools.count():
        names = [thing.name for thing in scenes.draw(at.catalog, split, index).things]
        if names and (NAME in names) == present:
            yield heldout.one(at.catalog, bank, split, index)


def lines(example: heldout.Example, image: str) -> Iterator[dict[str, str]]:
    """The prompts of a picture: a caption, boxes of the new class, boxes of all that is there."""
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
        made = [*itertools.islice(drawn(at, split, True), number), *itertools.islice(drawn(at, split, False), others)]
        written = []
        for i, example in enumerate(made):
            image = f"{name}-{i:03d}.webp"
            example.picture.save(folder / image, quality=80, method=6)
            written += lines(example, image)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))


def check(model: pg.Model, folder: Path, known: Path) -> dict[str, float]:
    """What is said of pictures that have the class, and of the held-out scenes, which do not."""
    rows = [json.loads(line) for line in (folder / "valid.jsonl").read_text().splitlines()]
    captions, boxes = ([row for row in rows if row["prefix"] == asked] for asked in ("caption en", f"detect {NAME}"))
    without = [(e, row) for e in heldout.read(known)["S0"] for row in e.rows if row.task == "caption"]
    others = [e.picture for e, _ in without]

    def told(asked: list[dict[str, str]]) -> list[str]:
        return answers(model, [Image.open(folder / row["image"]) for row in asked], asked[0]["prefix"])

    still = answers(model, others, "caption en")
    return {
        "captions that name it": share(singular(text, [NAME])[NAME] > 0 for text in told(captions)),
        "things found, IoU > 0.5": share(found(boxes, told(boxes))),
        "captions that name it where there is none": share(NAME in text for text in still),
        "boxes where there is none": share(bool(text) for text in answers(model, others, f"detect {NAME}")),
        "F1 of the old names": named_f1((e, row, text) for (e, row), text in zip(without, still, strict=True)),
    }


def answers(model: pg.Model, pictures: Sequence[Image.Image], prefix: str) -> list[str]:
    return [done.text for done in pg.generate(model, list(pictures), prefix)]


def found(rows: Sequence[dict[str, str]], texts: Sequence[str]) -> Iterator[bool]:
    """For each thing, whether a box overlaps it by more than half."""
    side = heldout.SIDE
    for row, text in zip(rows, texts, strict=True):
        boxes: list[Box] = [given.box for given in detect.parse(text, side, side)]
        for expected in detect.parse(row["suffix"], side, side):
            yield any(iou(box, expected.box) > 0.5 for box in boxes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making, checking = commands.add_parser("make"), commands.add_parser("check")
    making.add_argument("--data", type=Path, default=Path("runs/tiny"), help="what examples.tiny.fetch left")
    checking.add_argument("model", help="the folder of the fine-tuned model")
    checking.add_argument("--heldout", type=Path, default=Path("examples/tiny/heldout"))
    for each in (making, checking):
        each.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    if args.command == "make":
        return make(args.data, args.folder)
    for name, source in {"before": None, "after": args.model}.items():
        figures = check(pg.load(source, dtype="float32"), args.folder, args.heldout)
        print(name, *(f"  {value:.2f}  {what}" for what, value in figures.items()), sep="\n")


if __name__ == "__main__":
    main()
