"""Evaluate `weights/tiny` on scenes that it has not seen, beside the same model without the picture.

    python -m examples.tiny.evaluate                                    # the scenes in examples/tiny/heldout
    python -m examples.tiny.evaluate --data runs/tiny --scenes 1000     # scenes drawn from the fetched pictures

Owns the figures. Decoding is greedy. `blind` is the same model on a grey picture; `majority` always gives the most
frequent answer of the split, and the median box.
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

Answers = Iterator[tuple[Example, Row, str]]  # (example, prompt, answer)


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
    """The most frequent answer to each task; for `detect` and `segment`, the median box, filled."""
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
    """All figures of one column."""
    answered = list(zip([(e, row) for e in examples for row in e.rows], texts, strict=True))

    def of(task: str) -> Answers:
        return ((example, row, text) for (example, row), text in answered if row.task == task)

    results = {"objects named, F1": named_f1(of("caption")), "exact caption": exact(of("caption"))}
    results |= {f"question: {kind}": exact(of(kind)) for kind in QUESTIONS}
    pairs = [matched(example, text) for example, _, text in of("detect")]
    results |= {"detect: IoU > 0.5": share(hit for things, _ in pairs for hit in things)}
    results |= {"detect: precision": share(right for _, boxes in pairs for right in boxes)}
    results |= {"segment: mean IoU": share(overlaps(of("segment"), vq))}
    results |= {"ocr: character error rate": error_rate(of("ocr")), "ocr: exact": exact(of("ocr"))}
    invalid = [bool(detect.malformed(text)) for _, _, text in of("detect")]
    invalid += [bool(segment.malformed(text)) for _, _, text in of("segment")]
    return results | {"invalid boxes or masks": share(invalid)}


def share(values) -> float:
    """The mean of the values; nan if there are none."""
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else float("nan")


def exact(answers: Answers) -> float:
    return share(row.suffix == text for _, row, text in answers)


def named_f1(answers: Answers) -> float:
    """F1 of the names in all captions together; a thing with its colour is one name."""
    hits = total = 0
    for example, _, text in answers:
        expected = Counter(thing.name for thing in example.things)
        named = singular(text, expected)
        hits += (expected & named).total()
        total += (expected + named).total()
    return 2 * hits / total if total else float("nan")


def singular(text: str, expected: Iterable[str]) -> Counter[str]:
    """The names in a caption with their counts; a phrase that fits no expected name counts as wrong things."""
    phrases = {article(name): (name, 1) for name in expected}
    phrases |= {f"{NUMBERS[n]} {plural(name)}": (name, n) for name in expected for n in range(2, 5)}
    named: Counter[str] = Counter()
    for phrase in filter(None, APART.split(text)):
        first = phrase.split(" ")[0]
        name, count = phrases.get(phrase, (phrase, NUMBERS.index(first) if first in NUMBERS else 1))
        named[name] += count
    return named


def iou(a: Box, b: Box) -> float:
    tall, wide = min(a.ymax, b.ymax) - max(a.ymin, b.ymin), min(a.xmax, b.xmax) - max(a.xmin, b.xmin)
    both = max(tall, 0) * max(wide, 0)
    either = sum((box.ymax - box.ymin) * (box.xmax - box.xmin) for box in (a, b)) - both
    return both / either if either else 0.0


def matched(example: Example, text: str) -> tuple[list[bool], list[bool]]:
    """For each thing and for each box: whether it has a partner of the same name with an IoU above 0.5."""
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


def overlaps(answers: Answers, vq: vqvae.Params) -> Iterator[float]:
    """For each requested thing, the IoU of its mask with the best mask of its name; 0 if there is none."""
    for example, row, text in answers:
        segments = segment.parse(text, heldout.SIDE, heldout.SIDE, vq)
        for thing in wanted(example, row):
            yield max((mask_iou(s.mask, thing.mask) for s in segments if s.label == thing.name), default=0.0)


def mask_iou(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def bound(examples: Sequence[Example], vq: vqvae.Params) -> float:
    """The mean IoU of masks that were encoded and decoded, in their true boxes: what 16 codes can say."""
    asked = [(e, row) for e in examples for row in e.rows if row.task == "segment"]
    texts = [segment.render([Segment(t.name, t.box, t.mask) for t in wanted(e, row)], vq) for e, row in asked]
    return share(overlaps(((e, row, text) for (e, row), text in zip(asked, texts, strict=True)), vq))


def error_rate(answers: Answers) -> float:
    """The number of edits over the number of characters, for all signs together."""
    pairs = [(row.suffix, text) for _, row, text in answers]
    length = sum(len(expected) for expected, _ in pairs)
    return sum(distance(*pair) for pair in pairs) / length if length else float("nan")


def distance(a: str, b: str) -> int:
    """The Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (left != right))
    return row[-1]


# --- the table -------------------------------------------------------------------------------------------------------


def evaluate(model: pg.Model, vq: vqvae.Params, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Figure -> column (model, blind, majority) -> value."""
    texts = {"model": answers(model, examples), "blind": answers(model, examples, blind=True)}
    texts["majority"] = majority(examples, vq)
    columns = {who: figures(examples, column, vq) for who, column in texts.items()}
    table = {name: {who: column[name] for who, column in columns.items()} for name in columns["model"]}
    return table | {"segment: what the codes can say": {"model": bound(examples, vq)}}


def retrieval(siglip: pg.SiglipModel, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """How often the nearest of 100 texts is the picture's own, and the nearest of 100 pictures the text's own."""
    recalls = []
    for start in range(0, len(examples) - len(examples) % 100, 100):
        part = examples[start : start + 100]
        with torch.no_grad():
            pixels = dual_prompt.pixels(siglip, [e.picture for e in part])
            ids = dual_prompt.text_ids(siglip, [e.description for e in part])
            images = siglip_dual.embed_images(siglip.params, pixels, siglip.cfg)
            recalls.append(contrastive.recall(images, siglip_dual.embed_texts(siglip.params, ids, siglip.cfg)))
    return {
        "retrieval: text, R@1": {"model": share(recall.texts for recall in recalls)},
        "retrieval: picture, R@1": {"model": share(recall.images for recall in recalls)},
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
    parser.add_argument("--data", type=Path, help="folder written by examples.tiny.fetch, to draw scenes from")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--splits", nargs="+", default=["S0", "S1", "S2", "style", "S3"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = pg.load(args.model, dtype=args.dtype)
    vq = pg.tree.map(lambda leaf: leaf.float(), segment.load(args.model / "masks.safetensors"))
    source = sets(args, str(model.params.projector.device))
    siglip = pg.load_siglip(args.model / "siglip", dtype=args.dtype)
    tables = {split: evaluate(model, vq, examples) | retrieval(siglip, examples) for split, examples in source}
    if args.data and (args.data / "photos.npz").exists():
        tables["S4"] = photographs(model, args.data / "photos.npz")
    print(json.dumps(numbers(tables)) if args.json else "\n".join(lines(tables)))


def sets(args: argparse.Namespace, device: str) -> Iterator[tuple[str, list[Example]]]:
    """Each split and its examples: the committed ones, or drawn anew with --data."""
    if not args.data:
        yield from heldout.read(args.heldout).items()
        return
    at = world.load(args.data)
    for split in args.splits:
        yield split, heldout.draw(at, split, args.scenes, device)


def numbers(tables: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """The tables without nan, which JSON does not have: figures that do not apply to a split."""
    finite = {s: {f: {w: x for w, x in row.items() if not isnan(x)} for f, row in t.items()} for s, t in tables.items()}
    return {split: {figure: row for figure, row in table.items() if row} for split, table in finite.items()}


def lines(tables: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    for split, rows in tables.items():
        yield f"{split:34}   model   blind  majority"
        for name, row in rows.items():
            yield f"  {name:32}" + "".join(f"  {row[who]:6.3f}" for who in ("model", "blind", "majority") if who in row)


if __name__ == "__main__":
    main()
