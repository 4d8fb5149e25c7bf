"""The texts about the tiny checkpoint's scenes are true and are correct English."""

import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny import heldout, scenes, shapes, sprites, texts, world
from examples.tiny.scenes import Scene, Thing
from examples.tiny.texts import Row

CAT = world.small().catalog
CLASSES = sprites.class_names(sprites.read_table())
NUMBERS = {"no": 0, "a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
places, seeds = st.integers(0, 2**40), st.integers(0, 2**32)


def thing(name: str, x: float, y: float) -> Thing:
    colour = name.split(" ")[0] if name.split(" ")[-1] in shapes.OUTLINES else ""
    theta, tint = np.eye(2, 3, dtype=np.float32), np.eye(3, dtype=np.float32)
    return Thing(name, colour, 0, (x, y), (0.1, 0.1), theta, np.zeros((2, 5, 5), np.float32), tint)


def scene(*things: tuple[str, float, float]) -> Scene:
    return scenes.draw(CAT, "train", 0)._replace(things=tuple(thing(*each) for each in things), sign=None)


def many(make, count: int = 300, split: str = "train") -> list[tuple[Scene, Row]]:
    """Rows of one task about many scenes."""
    rng, found = np.random.default_rng(0), []
    for index in range(count):
        at = scenes.draw(CAT, split, index)
        if row := make(at, CAT, rng):
            found.append((at, row))
    assert len(found) > count / 12
    return found


def names(at: Scene) -> Counter[str]:
    return Counter(thing.name for thing in at.things)


def counted(phrase: str) -> tuple[str, int]:
    """`two boxes` -> box, 2; by the forms of every name."""
    number, _, said = phrase.partition(" ")
    forms = {texts.plural(name) if NUMBERS[number] != 1 else texts.noun(name): name for name in every_name()}
    return forms[said], NUMBERS[number]


def asked(pattern: str, row: Row) -> str:
    """The name that a question asks for."""
    found = re.fullmatch(pattern, row.prefix)
    assert found
    return found[1]


def every_name() -> list[str]:
    return [*CAT.names, *(f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.OUTLINES)]


# --- English ----------------------------------------------------------------------------------------------------------

FORMS = {  # looked up in a dictionary, all that a rule would get wrong
    "sheep": "sheep", "deer": "deer", "fish": "fish", "mouse": "mice", "computer mouse": "computer mice",
    "die": "dice", "knife": "knives", "leaf": "leaves", "wolf": "wolves", "snowman": "snowmen", "potato": "potatoes",
    "tomato": "tomatoes", "mango": "mangoes", "volcano": "volcanoes", "radio": "radios", "piano": "pianos",
    "taco": "tacos", "kangaroo": "kangaroos", "flamingo": "flamingos", "cactus": "cactuses", "octopus": "octopuses",
    "bow and arrow": "bows and arrows", "scissors": "pairs of scissors", "glasses": "pairs of glasses",
    "glass": "glasses", "grapes": "bunches of grapes", "pants": "pairs of pants", "bread": "loaves of bread",
    "monkey": "monkeys", "key": "keys", "turkey": "turkeys", "cherry": "cherries", "butterfly": "butterflies",
    "paintbrush": "paintbrushes", "peach": "peaches", "fox": "foxes", "dress": "dresses", "bus": "buses",
    "watch": "watches", "magnifying glass": "magnifying glasses", "axe": "axes", "hourglass": "hourglasses",
    "red cross": "red crosses", "green box": "green boxes", "white moon": "white moons",
}  # fmt: skip


@pytest.mark.parametrize(("name", "form"), FORMS.items())
def test_plurals_are_correct(name, form):
    assert texts.plural(name) == form


@pytest.mark.parametrize(
    "said",
    ["an hourglass", "a unicorn", "an umbrella", "an orange circle", "an axe", "a yellow heart", "an ear of corn",
     "a pair of scissors", "a strip of bacon", "a house", "an eagle", "a horse"],
)  # fmt: skip
def test_articles_follow_the_sound(said):
    assert texts.article(re.sub(r"^an? (.* of )?", "", said)) == said


def test_every_class_has_forms_of_its_own():
    for forms in (texts.plural, texts.noun, texts.article):
        assert len({forms(name) for name in CLASSES}) == len(CLASSES)
    # a plural ends like one, but for the few words that have none
    odd = [name for name in CLASSES if not texts.plural(name).split(" of ")[0].endswith("s")]
    assert odd == ["computer mouse", "deer", "die", "fish", "mouse", "sheep", "snowman"]


def test_uncountable_names_have_a_unit():
    ends = {name for name in CLASSES if name.endswith("s") and not name.endswith("ss")} - set(texts.UNITS)
    assert ends == {"bus", "cactus", "hippopotamus", "octopus", "rhinoceros"}, "these are singular"
    assert {"bacon", "bread", "broccoli", "corn", "popcorn", "spaghetti", "lightning", "garlic"} <= set(texts.UNITS)
    assert set(texts.UNITS) <= set(CLASSES)


# --- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("things", "said"),
    [
        ([("cup", 0.5, 0.5)], "a cup"),
        ([("cup", 0.8, 0.5), ("red star", 0.2, 0.4)], "a red star left of a cup"),
        ([("cup", 0.5, 0.2), ("orange ring", 0.6, 0.8)], "a cup above an orange ring"),
        ([("cup", 0.5, 0.8), ("orange ring", 0.6, 0.2)], "an orange ring above a cup"),
        ([("cup", 0.2, 0.2), ("kite", 0.6, 0.6)], "a cup and a kite"),  # the diagonal is neither
        ([("box", 0.2, 0.2), ("box", 0.8, 0.2)], "two boxes"),
        ([("leaf", 0.9, 0.1), ("cup", 0.5, 0.5), ("leaf", 0.1, 0.9)], "two leaves and a cup"),
        ([("kite", 0.7, 0.1), ("cup", 0.5, 0.5), ("box", 0.1, 0.9)], "a box, a cup and a kite"),
    ],
)
def test_captions_of_handmade_scenes(things, said):
    assert texts.caption(scene(*things)) == said


def test_a_caption_names_exactly_the_things_of_the_scene_from_left_to_right():
    for at, row in many(texts.captions):
        parts = re.split(r", | and | left of | above ", row.suffix)
        found = dict(counted(part) for part in parts)
        assert found == dict(names(at))
        if " above " not in row.suffix:
            left = [min(t.centre[0] for t in at.things if t.name == name) for name in found]
            assert left == sorted(left)


def test_a_caption_states_a_relation_only_if_it_is_clear_and_true():
    said = Counter()
    for at, row in many(texts.captions, 600):
        for word, axis in ((" left of ", 0), (" above ", 1)):
            if word in row.suffix:
                first, second = (
                    next(t for t in at.things if t.name == counted(part)[0]) for part in row.suffix.split(word)
                )
                apart = np.subtract(second.centre, first.centre)
                assert apart[axis] > 1.4 * abs(apart[1 - axis])
                said[word] += 1
    assert min(said[" left of "], said[" above "]) > 20


def test_a_description_is_the_caption_and_the_words_on_the_sign():
    for index in range(200):
        at = scenes.draw(CAT, "train", index)
        parts = [texts.caption(at)] if at.things else []
        parts += [f'a sign that says "{at.sign.text}"'] if at.sign else []
        assert texts.description(at) == ", ".join(parts) != ""


# --- questions --------------------------------------------------------------------------------------------------------


def test_a_count_is_the_number_of_things():
    answers = Counter()
    for at, row in many(texts.count):
        said = asked(r"answer en how many (.*) are there\?", row)
        of = {texts.plural(name): names(at)[name] for name in every_name()} | {"objects": len(at.things)}
        assert row.suffix == str(of[said])
        answers[row.suffix] += 1
    assert set(answers) == set("01234"), "every answer occurs"


def test_the_answer_is_yes_exactly_if_the_thing_is_present():
    answers = Counter()
    for at, row in many(texts.existence):
        said = asked(r"answer en is there (.*)\?", row)
        assert row.suffix == ("yes" if names(at)[counted(said)[0]] else "no")
        answers[row.suffix] += 1
    assert answers["yes"] == pytest.approx(150, abs=40), "blind answers are worth a half"


def test_an_absent_name_never_covers_a_present_thing():
    cat = CAT._replace(names=("clock", "alarm clock", "cup", "polar bear"))
    at = scene(("alarm clock", 0.5, 0.5), ("polar bear", 0.2, 0.2))
    rows = [texts.existence(at, cat, np.random.default_rng(seed)) for seed in range(200)]
    said = {row.prefix for row in rows if row}
    assert "answer en is there a clock?" not in said
    assert {f"answer en is there {known}?" for known in ("an alarm clock", "a polar bear", "a cup")} <= said


def test_a_question_of_colour_is_about_the_only_shape_of_its_outline():
    for at, row in many(texts.color):
        outline = asked(r"answer en what color is the (.*)\?", row)
        (only,) = [t for t in at.things if t.colour and t.name.split(" ")[1] == outline]
        assert only.name == f"{row.suffix} {outline}"


def test_a_position_is_the_third_of_the_picture_with_the_centre_of_a_single_thing():
    answers = Counter()
    for at, row in many(texts.position, 600):
        said = asked(r"answer en where is the (.*)\?", row)
        (only,) = [t for t in at.things if texts.noun(t.name) == said]
        down = ["top", "middle", "bottom"][int(only.centre[1] // (1 / 3))]
        across = ["left", "middle", "right"][int(only.centre[0] // (1 / 3))]
        both = " ".join(word for word in (down, across) if word != "middle")
        assert row.suffix == (both or "center")
        answers[row.suffix] += 1
    assert len(answers) == 9


def test_the_answer_to_ocr_is_the_text_of_the_sign():
    for make, prefix in ((texts.ocr, "ocr"), (texts.sign, "answer en what does the sign say?")):
        for at, row in many(make):
            assert at.sign
            assert (row.prefix, row.suffix) == (prefix, at.sign.text)


# --- boxes and masks --------------------------------------------------------------------------------------------------


def blanks(text: str) -> int:
    return text.count("<loc0000>") // 4


def check_located(at: Scene, row: Row) -> None:
    """Checks that the pieces name the requested things in order, name by name and from left to right."""
    task, _, asked = row.prefix.partition(" ")
    labels = asked.split(" ; ")
    mask = "<seg000>" * 16 if task == "segment" else ""
    assert row.suffix == " ; ".join(f"{'<loc0000>' * 4}{mask} {at.things[i].name}" for i in row.things)
    where = [(labels.index(at.things[i].name), at.things[i].centre[0]) for i in row.things]
    assert where == sorted(where)
    assert Counter(at.things[i].name for i in row.things) == Counter({label: names(at)[label] for label in labels})


def test_detect_has_a_box_for_each_thing_of_each_name_and_is_empty_for_an_absent_name():
    kinds = Counter()
    for at, row in many(texts.detect, 1200):
        kinds[row.task if row.things else "empty"] += 1
        if row.task == "region":
            assert row.prefix == "<loc0000>" * 4 + " caption en"
            assert row.suffix == texts.article(at.things[row.things[0]].name)
        elif not row.things:
            assert not row.suffix
            assert not names(at)[row.prefix.removeprefix("detect ")]
        else:
            check_located(at, row)
            kinds[row.prefix.count(";")] += 1
    assert min(kinds[kind] for kind in ("detect", "region", "empty", 0, 1, 2)) > 20


def test_segment_has_all_masks_of_one_name_or_of_two_single_things_or_is_empty():
    kinds = Counter()
    for at, row in many(texts.segment, 800):
        labels = row.prefix.removeprefix("segment ").split(" ; ")
        if row.things:
            check_located(at, row)
            assert len(row.things) <= 2
            kinds[len(labels), len(row.things)] += 1
        else:
            assert (row.suffix, len(labels), names(at)[labels[0]]) == ("", 1, 0)
            kinds["empty"] += 1
    assert min(kinds[kind] for kind in ("empty", (1, 1), (1, 2), (2, 2))) > 10


def test_a_part_of_a_scene_has_some_of_its_things_and_is_never_empty():
    rng, kinds = np.random.default_rng(0), Counter()
    for index in range(400):
        at = scenes.draw(CAT, "train", index)
        part = texts.partly(at, rng)
        assert set(map(id, part.things)) <= set(map(id, at.things))
        assert part.sign in (None, at.sign)
        assert texts.description(part)
        kinds["less"] += len(part.things) < len(at.things)
        kinds["signless"] += at.sign is not None and part.sign is None
    assert min(kinds.values()) > 50


@given(places, seeds, st.sampled_from(list(scenes.SPLITS)))
def test_there_is_one_thing_for_each_blank(index, seed, split):
    at = scenes.draw(CAT, split, index)
    for row in islice(texts.rows(at, CAT, np.random.default_rng(seed)), 6):
        assert blanks(row.prefix + row.suffix) == len(row.things)
        assert all(0 <= i < len(at.things) for i in row.things)
        codes = 16 * len(row.things) if row.task == "segment" else 0
        assert row.suffix.count("<seg000>") == codes


@given(places, seeds)
def test_no_text_of_a_training_scene_mentions_a_held_out_coloured_shape(index, seed):
    at = scenes.draw(CAT, "train", index)
    rows = islice(texts.rows(at, CAT, np.random.default_rng(seed)), 8)
    said = " | ".join(row.prefix + " " + row.suffix for row in rows)
    for colour, shape in CAT.coloured:
        assert not re.search(rf"\b{colour} {shape}\b", said)
        assert not re.search(rf"\b{texts.plural(f'{colour} {shape}')}\b", said)


def test_tasks_have_the_shares_of_the_mix():
    """The scenes have things and a sign, so that every task is possible."""
    rng, made = np.random.default_rng(0), Counter()
    for index in range(1200):
        at = scenes.draw(CAT, "train", index)
        for _ in range(8 if at.things and at.sign else 0):
            made[next(texts.rows(at, CAT, rng)).task] += 1
    groups = {"region": "detect"} | dict.fromkeys(texts.QUESTIONS, "question")
    found = Counter()
    for task, count in made.items():
        found[groups.get(task, task)] += count
    for task, share in texts.MIX.items():
        assert found[task] / found.total() == pytest.approx(share, abs=0.03)  # 3 sigma of 2,400 rows


@given(places, seeds)
def test_the_prompts_of_a_scene_all_differ(index, seed):
    asked = list(islice(texts.rows(scenes.draw(CAT, "train", index), CAT, np.random.default_rng(seed)), 6))
    assert len({(row.prefix, row.things) for row in asked}) == 6


# --- what is asked of held-out scenes ---------------------------------------------------------------------------------


def test_a_held_out_scene_has_each_question_once_and_detect_asks_for_all_things():
    for index in range(100):
        at = scenes.draw(CAT, "S1", index)
        rows = heldout.asked(at, CAT, np.random.default_rng(index))
        tasks = Counter(row.task for row in rows)
        assert max(tasks.values()) == 1
        assert {"caption", "segment", "detect", "count", "existence"} <= set(tasks)
        assert ("ocr" in tasks) == bool(at.sign)
        (row,) = (row for row in rows if row.task == "detect")
        check_located(at, row)
        assert sorted(row.things) == list(range(len(at.things)))
