"""What `weights/tiny` gets right on scenes it has not seen, beside what it gets right without looking.

    python -m examples.tiny.evaluate                                    # the scenes in examples/tiny/heldout
    python -m examples.tiny.evaluate --data runs/tiny --scenes 1000     # any number, drawn from the fetched pictures

Owns the figures. All greedy. `blind` is the same model before a grey picture; `majority` always gives the most frequent
answer of the split, and the median box.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import isnan
from pathlib import Path

import torch
from PIL import Image

import pgfunc as pg
from examples.tiny import heldout, world
from examples.tiny.heldout import Example, Truth
from examples.tiny.texts import NUMBERS, Row, article, plural
from pgfunc import siglip_dual
from pgfunc.objects import detect, segment, vqvae
from pgfunc.objects.detect import Box
from pgfunc.objects.segment import Segment
from pgfunc.siglip_dual import prompt as dual_prompt
from pgfunc.train import contrastive

AT_ONCE, TOKENS = 64, 80
GREY = Image.new("RGB", (heldout.SIDE, heldout.SIDE), "gray")
QUESTIONS = ("color", "count", "existence", "position")

APART = re.compile(r", | and (?=(?:an?|two|three|four) )| left of | above ")  # `bow and arrow` is one thing

Said = Iterator[tuple[Example, Row, str]]  # what was asked of which scene, and the answer


# --- answers ---------------------------------------------------------------------------------------------------------


def answers(model: pg.Model, examples: Sequence[Example], blind: bool = False) -> list[str]:
    """The model's text for every row, in the order of the examples and their rows."""
    texts = []
    for start in range(0, len(examples), AT_ONCE):
        part = examples[start : start + AT_ONCE]
        asked = [(GREY if blind else e.picture, row.prefix) for e in part for row in e.rows]
        images, prefixes = zip(*asked, strict=True)
        texts += [done.text for done in pg.generate(model, list(images), list(prefixes), max_new_tokens=TOKENS)]
    return texts


def majority(examples: Sequence[Example], vq: vqvae.Params) -> list[str]:
    """The most frequent answer to each kind of row; where things are asked for, the median box, filled."""
    common = Counter[tuple[str, str]]((row.task, row.suffix) for e in examples for row in e.rows)
    best = {task: suffix for (task, suffix), _ in reversed(common.most_common())}
    box = Box(*torch.tensor([thing.box for e in examples for thing in e.things]).median(0).values.tolist())
    side = heldout.SIDE
    filled = torch.zeros(side, side, dtype=torch.bool)
    filled[segment.pixels(box.ymin, box.ymax, side), segment.pixels(box.xmin, box.xmax, side)] = True
    texts = []
    for row in (row for e in examples for row in e.rows):
        labels = row.prefix.partition(" ")[2].split(" ; ")
        if row.task == "detect":
            texts.append(detect.render([detect.Detection(label, box) for label in labels], side, side))
        elif row.task == "segment":
            texts.append(segment.render([Segment(label, box, filled) for label in labels], vq))
        else:
            texts.append(best[row.task])
    return texts


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(examples: Sequence[Example], texts: Sequence[str], vq: vqvae.Params) -> dict[str, float]:
    """Every figure of one column."""
    said = list(zip([(e, row) for e in examples for row in e.rows], texts, strict=True))

    def of(task: str) -> Said:
        return ((example, row, text) for (example, row), text in said if row.task == task)

    found = {"objects named, F1": named_f1(of("caption")), "exact caption": exact(of("caption"))}
    found |= {f"question: {kind}": exact(of(kind)) for kind in QUESTIONS}
    pairs = [matched(example, text) for example, _, text in of("detect")]
    found |= {"detect: IoU > 0.5": share(hit for things, _ in pairs for hit in things)}
    found |= {"detect: precision": share(right for _, boxes in pairs for right in boxes)}
    found |= {"segment: mean IoU": share(overlaps(of("segment"), vq))}
    found |= {"ocr: character error rate": error_rate(of("ocr")), "ocr: exact": exact(of("ocr"))}
    invalid = [bool(detect.malformed(text)) for _, _, text in of("detect")]
    invalid += [bool(segment.malformed(text)) for _, _, text in of("segment")]
    return found | {"invalid boxes or masks": share(invalid)}


def share(values) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found) if found else float("nan")


def exact(said: Said) -> float:
    return share(row.suffix == text for _, row, text in said)


def named_f1(said: Said) -> float:
    """Over all captions together, a thing and its colour being one name."""
    hits = total = 0
    for example, _, text in said:
        expected = Counter(thing.name for thing in example.things)
        given = singular(text, expected)
        hits += (expected & given).total()
        total += (expected + given).total()
    return 2 * hits / total if total else float("nan")


def singular(text: str, expected: Iterable[str]) -> Counter[str]:
    """What a caption names; a phrase that fits no expected name is one wrong thing, or as many as it says."""
    phrases = {article(name): (name, 1) for name in expected}
    phrases |= {f"{NUMBERS[n]} {plural(name)}": (name, n) for name in expected for n in range(2, 5)}
    given: Counter[str] = Counter()
    for phrase in filter(None, APART.split(text)):
        first = phrase.split(" ")[0]
        name, count = phrases.get(phrase, (phrase, NUMBERS.index(first) if first in NUMBERS else 1))
        given[name] += count
    return given


def iou(a: Box, b: Box) -> float:
    tall, wide = min(a.ymax, b.ymax) - max(a.ymin, b.ymin), min(a.xmax, b.xmax) - max(a.xmin, b.xmin)
    both = max(tall, 0) * max(wide, 0)
    either = sum((box.ymax - box.ymin) * (box.xmax - box.xmin) for box in (a, b)) - both
    return both / either if either else 0.0


def matched(example: Example, text: str) -> tuple[list[bool], list[bool]]:
    """For each thing and for each box: whether it has its own among the others, of its name, with an IoU above 0.5."""
    boxes = detect.parse(text, heldout.SIDE, heldout.SIDE)
    hit, used = [], [False] * len(boxes)
    for thing in example.things:
        free = [i for i, box in enumerate(boxes) if box.label == thing.name and not used[i]]
        best, chosen = max(((iou(boxes[i].box, thing.box), i) for i in free), default=(0.0, 0))
        hit.append(best > 0.5)
        if hit[-1]:
            used[chosen] = True
    return hit, used


def wanted(example: Example, row: Row) -> list[Truth]:
    return [example.things[i] for i in row.things]


def overlaps(said: Said, vq: vqvae.Params) -> Iterator[float]:
    """For each thing asked for, the IoU of its mask with the best of its name; 0 where there is none."""
    for example, row, text in said:
        found = segment.parse(text, heldout.SIDE, heldout.SIDE, vq)
        for thing in wanted(example, row):
            yield max((mask_iou(s.mask, thing.mask) for s in found if s.label == thing.name), default=0.0)


def mask_iou(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def bound(examples: Sequence[Example], vq: vqvae.Params) -> float:
    """The mean IoU of masks that were encoded and decoded, in their true boxes: what 16 codes can say."""
    asked = [(e, row) for e in examples for row in e.rows if row.task == "segment"]
    texts = [segment.render([Segment(t.name, t.box, t.mask) for t in wanted(e, row)], vq) for e, row in asked]
    return share(overlaps(((e, row, text) for (e, row), text in zip(asked, texts, strict=True)), vq))


def error_rate(said: Said) -> float:
    """Edits over characters, all signs together."""
    pairs = [(row.suffix, text) for _, row, text in said]
    length = sum(len(expected) for expected, _ in pairs)
    return sum(distance(*pair) for pair in pairs) / length if length else float("nan")


def distance(a: str, b: str) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (left != right))
    return row[-1]


# --- the table -------------------------------------------------------------------------------------------------------


def evaluate(model: pg.Model, vq: vqvae.Params, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Figure -> model, blind, majority."""
    given = {"model": answers(model, examples), "blind": answers(model, examples, blind=True)}
    given["majority"] = majority(examples, vq)
    columns = {who: figures(examples, texts, vq) for who, texts in given.items()}
    table = {name: {who: column[name] for who, column in columns.items()} for name in columns["model"]}
    return table | {"segment: what the codes can say": {"model": bound(examples, vq)}}


def retrieval(siglip: pg.SiglipModel, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """How often the nearest of 100 texts is the picture's own, and of 100 pictures the text's; over all hundreds."""
    found = []
    for start in range(0, len(examples) - len(examples) % 100, 100):
        part = examples[start : start + 100]
        with torch.no_grad():
            pixels = dual_prompt.pixels(siglip, [e.picture for e in part])
            ids = dual_prompt.text_ids(siglip, [e.description for e in part])
            images = siglip_dual.embed_images(siglip.params, pixels, siglip.cfg)
            found.append(contrastive.recall(images, siglip_dual.embed_texts(siglip.params, ids, siglip.cfg)))
    return {
        "retrieval: text, R@1": {"model": share(each.texts for each in found)},
        "retrieval: picture, R@1": {"model": share(each.images for each in found)},
    }


def photographs(model: pg.Model, path: Path) -> dict[str, dict[str, float]]:
    """S4: how often the caption names the main thing of a photograph."""
    labelled = heldout.photographs(path)
    images = [image for _, image in labelled]
    texts = [done.text for done in pg.generate(model, images, "caption en", max_new_tokens=TOKENS)]
    right = share(singular(text, [name])[name] > 0 for (name, _), text in zip(labelled, texts, strict=True))
    return {"photographs whose thing is named": {"model": right}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("weights/tiny"))
    parser.add_argument("--heldout", type=Path, default=Path("examples/tiny/heldout"))
    parser.add_argument("--data", type=Path, help="what examples.tiny.fetch left, to draw scenes from")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--splits", nargs="+", default=["S0", "S1", "S2", "style", "S3"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = pg.load(args.model, dtype=args.dtype)
    vq = pg.tree.map(lambda leaf: leaf.float(), segment.load(args.model / "masks.safetensors"))
    source = sets(args, str(model.params.projector.device))
    siglip = pg.load_siglip(args.model / "siglip", dtype=args.dtype)
    found = {split: evaluate(model, vq, examples) | retrieval(siglip, examples) for split, examples in source}
    if args.data and (args.data / "photos.npz").exists():
        found["S4"] = photographs(model, args.data / "photos.npz")
    print(json.dumps(numbers(found)) if args.json else "\n".join(lines(found)))


def sets(args: argparse.Namespace, device: str) -> Iterator[tuple[str, list[Example]]]:
    if not args.data:
        yield from heldout.read(args.heldout).items()
        return
    at = world.load(args.data)
    for split in args.splits:
        yield split, heldout.draw(at, split, args.scenes, device)


def numbers(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """The table without what a split does not have, which JSON has no number for."""
    kept = {s: {f: {w: x for w, x in row.items() if not isnan(x)} for f, row in t.items()} for s, t in found.items()}
    return {split: {figure: row for figure, row in table.items() if row} for split, table in kept.items()}


def lines(found: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    for split, rows in found.items():
        yield f"{split:34}   model   blind  majority"
        for name, row in rows.items():
            yield f"  {name:32}" + "".join(f"  {row[who]:6.3f}" for who in ("model", "blind", "majority") if who in row)


if __name__ == "__main__":
    main()
