"""Write the committed scenes as pictures and JSON Lines, which `pgfunc evaluate` reads: one file per split.

    python -m examples.tiny.export_heldout runs/heldout
    pgfunc evaluate runs/heldout/S0.jsonl --task detect --dtype float32

The pictures are PNG, so that the model sees the pixels that `examples.tiny.evaluate` shows it. The true boxes and masks
are in pixels. The lines have all tasks; `--task` chooses among them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from examples.tiny import heldout
from examples.tiny.heldout import Example, Truth
from examples.tiny.texts import Row
from pgfunc.objects import coco


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heldout", type=Path, default=Path("examples/tiny/heldout"))
    parser.add_argument("--scenes", type=int, help="only the first scenes of each split")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for split, examples in heldout.read(args.heldout).items():
        export(args.folder, split, examples[: args.scenes])


def export(folder: Path, split: str, examples: list[Example]) -> Path:
    """Write the pictures of a split and its file of lines; returns the path of the file."""
    lines = []
    for i, example in enumerate(examples):
        name = f"{split}-{i:03d}.png"
        example.picture.save(folder / name)
        lines += [line(name, example, row) for row in example.rows]
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def line(name: str, example: Example, row: Row) -> dict[str, Any]:
    """A prompt about a scene and its answer; `kind` tells the kind of a question, which `pgfunc evaluate` ignores."""
    one: dict[str, Any] = {"image": name, "prefix": row.prefix, "kind": row.task}
    if row.task == "detect":
        return one | {"objects": [as_object(thing, False) for thing in example.things]}
    if row.task == "segment":
        return one | {"objects": [as_object(example.things[i], True) for i in row.things]}
    return one | {"suffix": row.suffix}


def as_object(thing: Truth, masked: bool) -> dict[str, Any]:
    mask = {"mask": coco.rle(thing.mask)} if masked else {}
    return {"label": thing.name, "box": thing.box._asdict()} | mask


if __name__ == "__main__":
    main()
