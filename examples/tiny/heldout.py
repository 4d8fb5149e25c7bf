"""Scenes to evaluate on, with their true labels: drawn anew from the fetched pictures, or read from a folder.

    python -m examples.tiny.heldout --scenes 100 --out examples/tiny/heldout      # 100 scenes each of S0, S1 and S2

Owns the questions about a scene, and the layout of the folder: one WebP for each scene, and `scenes.json`.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from examples.tiny import fetch, render, scenes, texts, world
from examples.tiny.scenes import Catalog, Scene
from examples.tiny.texts import Row
from pgfunc.objects.detect import Box

AT_ONCE, SIDE = 50, 224


class Truth(NamedTuple):
    name: str
    box: Box  # in pixels
    mask: Bool[Tensor, "y x"]


class Example(NamedTuple):
    picture: Image.Image
    things: list[Truth]
    rows: list[Row]
    description: str


def draw(at: world.World, split: str, count: int, device: str = "cpu") -> list[Example]:
    """The first scenes of a split."""
    bank, examples = at.bank(device), []
    for first in range(0, count, AT_ONCE):
        drawn = [scenes.draw(at.catalog, split, i, SIDE) for i in range(first, min(first + AT_ONCE, count))]
        layout = render.Layout(*(leaf.to(device) for leaf in render.layout(drawn)))
        painted = render.Rendered(*(leaf.cpu() for leaf in render.render(bank, layout, SIDE, seed=first)))
        examples += [
            example(scene, at.catalog, painted, i, np.random.default_rng((17, first + i)))
            for i, scene in enumerate(drawn)
        ]
    return examples


def one(cat: Catalog, bank: render.Bank, split: str, index: int) -> Example:
    """One scene of a split."""
    scene = scenes.draw(cat, split, index, SIDE)
    painted = render.render(bank, render.layout([scene]), SIDE, seed=index)
    return example(scene, cat, painted, 0, np.random.default_rng((17, index)))


def example(scene: Scene, cat: Catalog, painted: render.Rendered, i: int, rng: np.random.Generator) -> Example:
    """One scene of a rendered batch."""
    things = [
        Truth(thing.name, Box(*(painted.boxes[i, j] * SIDE).tolist()), painted.masks[i, j])
        for j, thing in enumerate(scene.things)
    ]
    picture = Image.fromarray(painted.pixels[i].permute(1, 2, 0).numpy())
    return Example(picture, things, asked(scene, cat, rng), texts.description(scene))


def asked(scene: Scene, cat: Catalog, rng: np.random.Generator) -> list[Row]:
    """Each task and each kind of question that the scene allows, once; `detect` asks for all things."""
    names = list(dict.fromkeys(scene.things[i].name for i in texts.ordered(scene)))
    rows = [texts.captions(scene, cat, rng), texts.ocr(scene, cat, rng), texts.segment(scene, cat, rng)]
    rows += [ask(scene, cat, rng) for kind, ask in texts.QUESTIONS.items() if kind != "sign"]
    rows += [texts.located("detect", scene, names)] if names else []
    return [row for row in rows if row is not None]


def photographs(path: Path) -> list[tuple[str, Image.Image]]:
    """S4: whole photographs, each with the name of its main thing."""
    photos = fetch.load_photos(path)
    return [(photos.classes[label], Image.fromarray(rgb)) for label, rgb in zip(photos.label, photos.rgb, strict=True)]


# --- the folder ------------------------------------------------------------------------------------------------------


def write(folder: Path, split: str, examples: Iterable[Example]) -> list[dict[str, Any]]:
    """Save the pictures; return the entries for `scenes.json`."""
    entries = []
    for i, example in enumerate(examples):
        name = f"{split}-{i:03d}.webp"
        example.picture.save(folder / name, quality=85, method=6)
        things = [{"name": t.name, "box": [round(x, 2) for x in t.box], "mask": runs(t.mask)} for t in example.things]
        rows = [row._asdict() for row in example.rows]
        entries.append(
            {"split": split, "image": name, "things": things, "rows": rows, "description": example.description}
        )
    return entries


def read(folder: Path) -> dict[str, list[Example]]:
    """Split -> examples."""
    splits: dict[str, list[Example]] = {}
    for entry in json.loads((folder / "scenes.json").read_text()):
        things = [Truth(t["name"], Box(*t["box"]), unrun(t["mask"])) for t in entry["things"]]
        rows = [Row(**row | {"things": tuple(row["things"])}) for row in entry["rows"]]
        with Image.open(folder / entry["image"]) as picture:
            example = Example(picture.convert("RGB"), things, rows, entry["description"])
        splits.setdefault(entry["split"], []).append(example)
    return splits


def runs(mask: Bool[Tensor, "y x"]) -> list[int]:
    """The lengths of runs of equal pixels, row by row; the first run is outside the mask."""
    flat = torch.cat([torch.tensor([False]), mask.flatten()]).int()
    edges = flat.diff().nonzero().flatten().tolist()
    return [b - a for a, b in zip([0, *edges], [*edges, mask.numel()], strict=True)]


def unrun(lengths: list[int]) -> Bool[Tensor, "y x"]:
    inside = torch.arange(len(lengths)) % 2 == 1
    return inside.repeat_interleave(torch.tensor(lengths)).reshape(SIDE, SIDE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--out", type=Path, default=Path("examples/tiny/heldout"))
    parser.add_argument("--scenes", type=int, default=100)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    at = world.load(args.data)
    entries = [entry for split in ("S0", "S1", "S2") for entry in write(args.out, split, draw(at, split, args.scenes))]
    (args.out / "scenes.json").write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")


if __name__ == "__main__":
    main()
