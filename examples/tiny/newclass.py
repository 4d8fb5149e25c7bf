"""A new class for the shipped checkpoint: pictures to fine-tune it on, and how well it then knows the class.

    python -m examples.tiny.newclass make                               # writes examples/helicopters, from runs/tiny
    pgfunc train examples/helicopters/train.jsonl --out helicopters     # fine-tunes
    python -m examples.tiny.newclass check helicopters                  # before and after

200 pictures have a helicopter, drawn in three ways, among things that the checkpoint knows; those it is checked on have
a fourth helicopter. Its weights have never seen any, nor its vocabulary the word.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

from PIL import Image

import pgfunc as pg
from examples.tiny import heldout, scenes, world
from examples.tiny.evaluate import iou, share, singular
from pgfunc import detect
from pgfunc.detect import Box, Detection

NAME, FOLDER = "helicopter", Path("examples/helicopters")
SPLITS = {"train": ("S0", 200), "valid": ("S2", 60)}


def drawn(at: world.World, split: str) -> Iterator[heldout.Example]:
    """Scenes of a split that have the new class."""
    bank = at.bank("cpu")
    for index in count():
        if any(thing.name == NAME for thing in scenes.draw(at.catalog, split, index).things):
            yield heldout.one(at.catalog, bank, split, index)


def lines(example: heldout.Example, image: str) -> Iterator[dict[str, str]]:
    """The prompts of a picture: a caption, and boxes of the new class."""
    side = heldout.SIDE
    caption = next(row.suffix for row in example.rows if row.task == "caption")
    boxes = [Detection(thing.name, thing.box) for thing in example.things if thing.name == NAME]
    boxes.sort(key=lambda found: found.box.xmin + found.box.xmax)
    yield {"image": image, "prefix": "caption en", "suffix": caption}
    yield {"image": image, "prefix": f"detect {NAME}", "suffix": detect.render(boxes, side, side)}


def make(data: Path, folder: Path) -> None:
    at = world.load(data, more=NAME)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (split, number) in SPLITS.items():
        written = []
        for i, example in enumerate(islice(drawn(at, split), number)):
            image = f"{name}-{i:03d}.webp"
            example.picture.save(folder / image, quality=80, method=6)
            written += lines(example, image)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))


def check(model: pg.Model, folder: Path) -> dict[str, float]:
    """The share of held-out pictures whose caption names the class, and of its things that are found."""
    rows = [json.loads(line) for line in (folder / "valid.jsonl").read_text().splitlines()]
    pictures = {row["image"]: Image.open(folder / row["image"]) for row in rows}
    said = pg.generate(model, [pictures[row["image"]] for row in rows], [row["prefix"] for row in rows])
    pairs = [(row, done.text) for row, done in zip(rows, said, strict=True)]
    named = [singular(text, [NAME])[NAME] > 0 for row, text in pairs if row["prefix"] == "caption en"]
    return {
        "captions that name it": share(named),
        "captions that are exact": share(row["suffix"] == text for row, text in pairs if row["prefix"] == "caption en"),
        "things found, IoU > 0.5": share(found(pairs)),
    }


def found(pairs: Sequence[tuple[dict[str, str], str]]) -> Iterator[bool]:
    """For each thing, whether a box overlaps it by more than half."""
    side = heldout.SIDE
    for row, text in pairs:
        boxes: list[Box] = [given.box for given in detect.parse(text, side, side)]
        for expected in detect.parse(row["suffix"], side, side):
            if row["prefix"] != "caption en":
                yield any(iou(box, expected.box) > 0.5 for box in boxes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making, checking = commands.add_parser("make"), commands.add_parser("check")
    making.add_argument("--data", type=Path, default=Path("runs/tiny"), help="what examples.tiny.fetch left")
    checking.add_argument("model", help="the folder of the fine-tuned model")
    for each in (making, checking):
        each.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    if args.command == "make":
        return make(args.data, args.folder)
    for name, source in {"before": None, "after": args.model}.items():
        figures = check(pg.load(source, dtype="float32"), args.folder)
        print(name, ", ".join(f"{what} {value:.2f}" for what, value in figures.items()))


if __name__ == "__main__":
    main()
