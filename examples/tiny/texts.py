"""Prompts and answers about a scene, in PaliGemma's own prompt forms. Owns the wording and the mix of tasks.

Boxes and masks are known only once a scene is rendered. So texts have blanks, `<loc0000>` and `<seg000>`, instead of
numbers, and `Row.things` names their things in order.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from examples.tiny import shapes
from examples.tiny.chance import pick, weighted
from examples.tiny.scenes import Catalog, Scene, Thing, allowed

# task of the first prompt -> its share, in a scene with things and a sign; without a sign the other tasks share `ocr`'s
MIX = {"detect": 0.22, "caption": 0.18, "question": 0.12, "segment": 0.08, "ocr": 0.4}
PLACE, CODES = "<loc0000>" * 4, "<seg000>" * 16
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
NUMBERS = ("no", "one", "two", "three", "four")
PLURALS = {
    "mouse": "mice", "fish": "fish", "sheep": "sheep", "deer": "deer", "knife": "knives", "leaf": "leaves",
    "wolf": "wolves", "loaf": "loaves", "die": "dice", "snowman": "snowmen", "potato": "potatoes",
    "tomato": "tomatoes", "mango": "mangoes", "volcano": "volcanoes", "bow and arrow": "bows and arrows",
}  # fmt: skip
UNITS = {
    "bacon": "strip", "bread": "loaf", "broccoli": "head", "cheese": "piece", "corn": "ear", "french fries": "portion",
    "garlic": "bulb", "grapes": "bunch", "lightning": "bolt", "pancakes": "stack", "popcorn": "bucket",
    "spaghetti": "plate", "glasses": "pair", "headphones": "pair", "pants": "pair", "scissors": "pair",
    "sunglasses": "pair",
}  # fmt: skip


class Row(NamedTuple):
    task: str  # detect, caption, ocr, segment, region, or the kind of question
    prefix: str
    suffix: str
    things: tuple[int, ...] = ()  # the thing of each blank box (and mask); those of the prefix come first


def noun(name: str) -> str:
    """The name as a countable noun: `cat`, `pair of scissors`."""
    return f"{UNITS[name]} of {name}" if name in UNITS else name


def plural(name: str) -> str:
    if name in UNITS:
        return f"{plural(UNITS[name])} of {name}"
    if name in PLURALS or " " not in name:
        return PLURALS.get(name) or _regular(name)
    words, _, last = name.rpartition(" ")
    return f"{words} {plural(last)}"


def _regular(word: str) -> str:
    if word[-1] == "y" and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def article(name: str) -> str:
    words = noun(name)
    vowel = words.startswith(("a", "e", "i", "o", "u", "hour")) and not words.startswith("uni")
    return f"{'an' if vowel else 'a'} {words}"


def ordered(scene: Scene) -> list[int]:
    """The numbers of the things from left to right."""
    return sorted(range(len(scene.things)), key=lambda i: scene.things[i].centre[0])


def caption(scene: Scene) -> str:
    """Names things from left to right, equal ones together; relates two single things if their relation is clear."""
    names = [scene.things[i].name for i in ordered(scene)]
    counts = {name: names.count(name) for name in names}
    phrases = [article(name) if n == 1 else f"{NUMBERS[n]} {plural(name)}" for name, n in counts.items()]
    if len(names) == len(phrases) == 2:
        first, second = (scene.things[i] for i in ordered(scene))
        across, down = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
        if across > 1.4 * abs(down):
            return f"{phrases[0]} left of {phrases[1]}"
        if abs(down) > 1.4 * across:
            return f"{phrases[0]} above {phrases[1]}" if down > 0 else f"{phrases[1]} above {phrases[0]}"
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def description(scene: Scene) -> str:
    """The text of the contrastive stages: the caption, and the words on the sign."""
    parts = [caption(scene)] if scene.things else []
    return ", ".join([*parts, f'a sign that says "{scene.sign.text}"'] if scene.sign else parts)


def partly(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with some of its things and perhaps without its sign; never empty."""
    things = tuple(thing for thing in scene.things if rng.random() < 0.5)
    sign = scene.sign if rng.random() < 0.5 else None
    return scene._replace(things=things, sign=sign) if things or sign else scene


def captions(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Row | None:
    return Row("caption", "caption en", caption(scene)) if scene.things else None


def ocr(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Row | None:
    return Row("ocr", "ocr", scene.sign.text) if scene.sign else None


def detect(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Row | None:
    """Ask for one name, two, or all; sometimes for an absent one, whose answer is empty."""
    present = list(dict.fromkeys(scene.things[i].name for i in ordered(scene)))
    if not present or rng.random() < 0.08:
        return Row("detect", f"detect {_absent(scene, cat, rng)}", "")
    if rng.random() < 0.15:
        return region(scene, cat, rng)
    count = weighted(rng, (1, 2, 4), (0.6, 0.2, 0.2))
    labels = [str(name) for name in rng.permutation(present)[:count]]
    return located("detect", scene, labels)


def region(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Row:
    number = int(rng.integers(len(scene.things)))
    return Row("region", f"{PLACE} caption en", article(scene.things[number].name), (number,))


def segment(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Row | None:
    """Ask for one or two names of at most two things, since three masks do not fit; rarely for an absent one."""
    if not scene.things or rng.random() < 0.05:
        return Row("segment", f"segment {_absent(scene, cat, rng)}", "")
    names = [thing.name for thing in scene.things]
    single = [name for name in names if names.count(name) == 1]
    if len(single) > 1 and rng.random() < 0.4:
        return located("segment", scene, [str(name) for name in rng.choice(single, 2, replace=False)])
    known = [name for name in names if names.count(name) < 3]
    return located("segment", scene, [pick(rng, known)]) if known else None


def located(task: str, scene: Scene, labels: list[str]) -> Row:
    """The prompt and answer for all things with these names, name by name and from left to right."""
    numbers = [i for label in labels for i in ordered(scene) if scene.things[i].name == label]
    blank = PLACE + CODES if task == "segment" else PLACE
    parts = [f"{blank} {scene.things[i].name}" for i in numbers]
    return Row(task, f"{task} {' ; '.join(labels)}", " ; ".join(parts), tuple(numbers))


def _absent(scene: Scene, cat: Catalog, rng: np.random.Generator) -> str:
    """A name that is not in the scene; sometimes a shape of the scene in another colour.

    `clock` does not count as absent beside an alarm clock, which is a clock.
    """
    present = {thing.name for thing in scene.things}
    kinds = {thing.name.split(" ")[-1] for thing in scene.things if not thing.colour}
    coloured = [thing for thing in scene.things if thing.colour]
    while True:
        if (coloured and rng.random() < 0.5) or rng.random() < 0.3:
            outline = coloured[0].name.split(" ")[1] if coloured else pick(rng, list(shapes.OUTLINES))
            name = f"{pick(rng, list(shapes.COLOURS))} {outline}"
        else:
            name = pick(rng, cat.names)
        if name not in present and name.split(" ")[-1] not in kinds and allowed(cat, [], name):
            return name


def question(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Row | None:
    """A question of a random kind among those that the scene allows."""
    asked = [ask(scene, cat, rng) for ask in QUESTIONS.values()]
    known = [row for row in asked if row is not None]
    return known[int(rng.integers(len(known)))] if known else None


def color(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Row | None:
    outlines = [thing.name.split(" ")[1] for thing in scene.things if thing.colour]
    single = [thing for thing in scene.things if thing.colour and outlines.count(thing.name.split(" ")[1]) == 1]
    if not single:
        return None
    thing = single[int(rng.integers(len(single)))]
    return Row("color", f"answer en what color is the {thing.name.split(' ')[1]}?", thing.colour)


def count(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Row | None:
    if rng.random() < 0.4:
        return Row("count", "answer en how many objects are there?", str(len(scene.things)))
    names = [thing.name for thing in scene.things]
    name = pick(rng, names) if names and rng.random() < 0.8 else _absent(scene, cat, rng)
    return Row("count", f"answer en how many {plural(name)} are there?", str(names.count(name)))


def existence(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Row | None:
    present = bool(scene.things) and rng.random() < 0.5
    name = scene.things[int(rng.integers(len(scene.things)))].name if present else _absent(scene, cat, rng)
    return Row("existence", f"answer en is there {article(name)}?", "yes" if present else "no")


def position(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Row | None:
    """Asks in which third of the picture, down and across, a thing's centre lies; never asks if that is unclear."""
    names = [thing.name for thing in scene.things]
    single = [thing for thing in scene.things if names.count(thing.name) == 1 and clear(thing)]
    if not single:
        return None
    thing = single[int(rng.integers(len(single)))]
    column, row = (int(3 * coordinate) for coordinate in thing.centre)
    where = " ".join(word for word in (ROWS[row], COLUMNS[column]) if word) or "center"
    return Row("position", f"answer en where is the {noun(thing.name)}?", where)


def clear(thing: Thing) -> bool:
    return all(abs(coordinate - edge) > 0.03 for coordinate in thing.centre for edge in (1 / 3, 2 / 3))


def sign(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Row | None:
    return Row("sign", "answer en what does the sign say?", scene.sign.text) if scene.sign else None


Maker = Callable[[Scene, Catalog, np.random.Generator], Row | None]
QUESTIONS: dict[str, Maker] = {
    "color": color, "count": count, "existence": existence, "position": position, "sign": sign,
}  # fmt: skip
TASKS: dict[str, Maker] = {
    "detect": detect, "caption": captions, "question": question, "segment": segment, "ocr": ocr,
}  # fmt: skip


def rows(scene: Scene, cat: Catalog, rng: np.random.Generator) -> Iterator[Row]:
    """An endless stream of different prompts of the training mix."""
    used = set()
    while True:
        task = weighted(rng, list(MIX), list(MIX.values()))
        row = TASKS[task](scene, cat, rng)
        if row and (row.prefix, row.things) not in used:
            used.add((row.prefix, row.things))
            yield row
