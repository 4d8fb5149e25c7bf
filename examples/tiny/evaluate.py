"""What `weights/tiny` gets right on scenes it has not seen, beside what it gets right without looking.

    python -m examples.tiny.evaluate --model weights/tiny --scenes 1000

Owns the figures: names found and wrongly given in captions, relations, exact captions, answers by kind of question.
All greedy. `blind` is the same model before a grey picture; `majority` always gives the most frequent answer.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from math import isnan

import numpy as np
from PIL import Image

import pgfunc as pg
from examples.tiny import scenes

ROWS = 128  # of a batch
PAIR = re.compile(rf"\b({'|'.join(scenes.COLOURS)}) ({'|'.join(scenes.OUTLINES)})\b")
RELATION = re.compile(r" (left of|right of|above|below) ")
GREY = Image.new("RGB", (240, 240), "gray")


def named(text: str) -> Counter[tuple[str, str]]:
    """The colour-shape combinations in a caption."""
    return Counter(PAIR.findall(text))


def f1(pairs: Sequence[tuple[str, str]]) -> float:
    """Of names, over (expected, given) captions: hits are counted over all captions together."""
    hits = sum((named(expected) & named(given)).total() for expected, given in pairs)
    return 2 * hits / max(1, sum(named(expected).total() + named(given).total() for expected, given in pairs))


def held_out_recall(pairs: Sequence[tuple[str, str]]) -> float:
    """The share of objects of a held-out combination that are named."""
    expected = [(pair, given) for text, given in pairs for pair in named(text) if pair in scenes.HELD_OUT]
    return share(pair in named(given) for pair, given in expected)


def relations(pairs: Sequence[tuple[str, str]]) -> float:
    """The share of two-object captions with both names and a true relation, whichever object comes first."""
    return share(_statement(expected) == _statement(given) for expected, given in pairs if RELATION.search(expected))


def _statement(text: str) -> frozenset[tuple[str, str]]:
    """`a above b` and `b below a` are one statement: who is at which end."""
    ends = {
        "left of": ("west", "east"),
        "right of": ("east", "west"),
        "above": ("north", "south"),
        "below": ("south", "north"),
    }
    found = RELATION.split(text)
    return frozenset(zip(ends[found[1]], (found[0], found[2]), strict=True)) if len(found) == 3 else frozenset()


def share(values) -> float:
    found = list(values)
    return sum(found) / len(found) if found else float("nan")


def complete(model: pg.Model, pictures: Sequence[Image.Image], prefixes: Sequence[str]) -> list[str]:
    """Greedy texts, in batches of like prefixes so that little is padding."""
    order = sorted(range(len(prefixes)), key=lambda i: prefixes[i])
    texts = {}
    for places in (order[i : i + ROWS] for i in range(0, len(order), ROWS)):
        found = pg.generate(model, [pictures[i] for i in places], [prefixes[i] for i in places], max_new_tokens=20)
        texts |= {i: completion.text for i, completion in zip(places, found, strict=True)}
    return [texts[i] for i in range(len(prefixes))]


def blindly(model: pg.Model, prefixes: Sequence[str]) -> list[str]:
    """Answers before a grey picture, which depend on the prefix alone."""
    once = sorted(set(prefixes))
    texts = dict(zip(once, complete(model, [GREY] * len(once), once), strict=True))
    return [texts[prefix] for prefix in prefixes]


def evaluate(model: pg.Model, split: str, count: int) -> dict[str, dict[str, float]]:
    """Figure -> model, blind, majority, for the first scenes of a split."""
    drawn = [scenes.sample(split, i) for i in range(count)]
    pictures = [scenes.picture(scene) for scene in drawn]
    asked = [(i, q) for i, scene in enumerate(drawn) for q in one_of_each(scene, i)]
    prefixes = [f"answer en {q.text}" for _, q in asked]
    captions = [scenes.caption(scene) for scene in drawn]
    texts = {
        "model": complete(model, pictures, ["caption en"] * count)
        + complete(model, [pictures[i] for i, _ in asked], prefixes),
        "blind": blindly(model, ["caption en"] * count + prefixes),
        "majority": [Counter(captions).most_common(1)[0][0]] * count + majority([q for _, q in asked]),
    }
    columns = {who: figures(captions, [q for _, q in asked], given) for who, given in texts.items()}
    asked_for = [name for name, value in columns["model"].items() if not isnan(value)]  # S0 has no held-out objects
    return {name: {who: column[name] for who, column in columns.items()} for name in asked_for}


def one_of_each(scene: scenes.Scene, index: int) -> list[scenes.Question]:
    """One question of each kind that the scene allows."""
    rng = np.random.default_rng((17, index))
    asked = scenes.questions(scene, rng)
    same = [[q for q in asked if q.kind == kind] for kind in sorted({q.kind for q in asked})]
    return [group[rng.integers(len(group))] for group in same]


def majority(asked: Sequence[scenes.Question]) -> list[str]:
    """For each question the answer that is most frequent for its kind."""
    common = {
        kind: Counter(q.answer for q in asked if q.kind == kind).most_common(1) for kind in {q.kind for q in asked}
    }
    return [common[q.kind][0][0] for q in asked]


def figures(captions: list[str], asked: Sequence[scenes.Question], given: list[str]) -> dict[str, float]:
    """All figures of one column; `given` holds captions, then answers."""
    pairs, answers = list(zip(captions, given, strict=False)), given[len(captions) :]
    found = {
        "objects named, F1": f1(pairs),
        "held-out objects named": held_out_recall(pairs),
        "exact caption": share(expected == text for expected, text in pairs),
        "relation": relations(pairs),
    }
    for kind in sorted({q.kind for q in asked}):
        hits = share(q.answer == text for q, text in zip(asked, answers, strict=True) if q.kind == kind)
        found[f"question: {kind}"] = hits
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="weights/tiny")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = pg.load(args.model)
    found = {split: evaluate(model, split, args.scenes) for split in ("S0", "S1")}
    if args.json:
        return print(json.dumps(found))
    for split, rows in found.items():
        print(f"{split:28}   model   blind  majority")
        for name, row in rows.items():
            print(f"  {name:26}  {row['model']:6.3f}  {row['blind']:6.3f}  {row['majority']:8.3f}")


if __name__ == "__main__":
    main()
