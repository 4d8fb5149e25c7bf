"""The figures of the tiny checkpoint, on answers made by hand; and the folder of held-out scenes, there and back."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import pgfunc as pg
from examples.tiny import evaluate, heldout, recipe, scenes, texts, tokenizer, world
from examples.tiny.evaluate import figures
from examples.tiny.heldout import Example, Truth
from examples.tiny.texts import Row
from pgfunc import paligemma, siglip_dual
from pgfunc.checkpoint.siglip import save_siglip
from pgfunc.objects import detect, segment, vqvae
from pgfunc.objects.detect import Box, Detection
from pgfunc.siglip_dual import prompt as dual_prompt

SIDE = heldout.SIDE
WORLD = world.small()
VQ = vqvae.init(0)
GREY = Image.new("RGB", (SIDE, SIDE), "gray")


def truth(name: str, *box: float) -> Truth:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[int(box[0]) : int(box[2]), int(box[1]) : int(box[3])] = True
    return Truth(name, Box(*box), mask)


CAT, DOG, STAR = truth("cat", 0, 0, 100, 100), truth("dog", 100, 100, 200, 200), truth("red star", 0, 120, 50, 224)


def example(*things: Truth, rows: list[Row]) -> Example:
    return Example(GREY, list(things), rows, "")


def boxes(*found: tuple[Truth, float]) -> str:
    """Detections of things, moved to the right by so many pixels."""
    moved = [Detection(t.name, t.box._replace(xmin=t.box.xmin + by, xmax=t.box.xmax + by)) for t, by in found]
    return detect.render(moved, SIDE, SIDE)


def caption_f1(things: list[Truth], text: str) -> float:
    return figures([example(*things, rows=[Row("caption", "caption en", "")])], [text], VQ)["objects named, F1"]


def located(things: list[Truth], text: str) -> tuple[float, float]:
    """Recall and precision of boxes."""
    found = figures([example(*things, rows=[Row("detect", "detect cat ; dog", "")])], [text], VQ)
    return found["detect: IoU > 0.5"], found["detect: precision"]


# --- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "f1"),
    [
        ("a cat, a dog and a red star", 1.0),
        ("a red star, a cat and a dog", 1.0),  # in any order
        ("a cat left of a dog", 2 * 2 / 5),
        ("a cat above a dog", 2 * 2 / 5),
        ("a cat, a dog and a blue star", 2 * 2 / 6),  # the colour belongs to the name
        ("a cat, a dog and a bow and arrow", 2 * 2 / 6),  # which is one thing
        ("two cats and a dog", 2 * 2 / 6),
        ("three birds", 0.0),
        ("a cat, a cat, a cat", 2 * 1 / 6),
        ("", 0.0),
        ("cat dog", 0.0),
    ],
)
def test_f1_of_the_names_in_a_caption_of_a_cat_a_dog_and_a_red_star(text, f1):
    assert caption_f1([CAT, DOG, STAR], text) == pytest.approx(f1)


def test_f1_counts_plurals_units_and_articles():
    pair, bow = truth("scissors", 0, 0, 9, 9), truth("bow and arrow", 20, 20, 29, 29)
    assert caption_f1([pair, pair, bow], "two pairs of scissors and a bow and arrow") == 1
    assert caption_f1([bow, bow], "two bows and arrows") == 1
    assert caption_f1([bow, pair], "a bow and arrow left of a pair of scissors") == 1
    assert caption_f1([bow], "bow and arrow") == 1, "the bare name will do"


def test_f1_is_taken_over_all_captions_together():
    asked = Row("caption", "caption en", "")
    found = figures([example(CAT, rows=[asked]), example(DOG, STAR, rows=[asked])], ["a cat", "a cup"], VQ)
    assert found["objects named, F1"] == pytest.approx(2 * 1 / (2 + 3))


@given(st.integers(0, 500), st.sampled_from(["S0", "S2"]))
def test_a_true_caption_names_everything(index, split):
    scene = scenes.draw(WORLD.catalog, split, index)
    things = [truth(thing.name, 0, 0, 9, 9) for thing in scene.things]
    if things:
        assert caption_f1(things, texts.caption(scene)) == 1


@pytest.mark.parametrize(("name", "text", "named"), [
    ("cat", "a cat left of a dog", True), ("cat", "a caterpillar", False), ("ant", "an elephant", False),
    ("scissors", "a cup and a pair of scissors", True), ("cat", "two cats", True), ("bear", "a teddy bear", False),
])  # fmt: skip
def test_a_thing_is_named_by_whole_phrases_only(name, text, named):
    assert (evaluate.singular(text, [name])[name] > 0) == named


# --- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "recall", "precision"),
    [
        (boxes((CAT, 0), (DOG, 0)), 1, 1),
        (boxes((DOG, 0), (CAT, 0)), 1, 1),
        (boxes((CAT, 30), (DOG, 0)), 1, 1),  # 70 of 130: IoU 0.54
        (boxes((CAT, 40), (DOG, 0)), 1 / 2, 1 / 2),  # 60 of 140: 0.43
        (boxes((CAT, 0)), 1 / 2, 1),
        (boxes((CAT, 0), (CAT, 3), (DOG, 0)), 1, 2 / 3),  # a thing counts once
        (boxes((CAT, 0)).replace("cat", "dog"), 0, 0),  # the right place by the wrong name
        ("", 0, math.nan),
        ("a cat", 0, math.nan),
    ],
)
def test_recall_and_precision_of_boxes_of_a_cat_and_a_dog(text, recall, precision):
    assert located([CAT, DOG], text) == pytest.approx((recall, precision), nan_ok=True)


def test_each_of_two_alike_things_needs_a_box_of_its_own():
    near = truth("cat", 0, 20, 100, 120)
    assert located([CAT, near], boxes((CAT, 0), (CAT, 0)))[0] == 0.5, "one box, said twice"
    assert located([CAT, near], boxes((near, 0), (CAT, 0))) == (1, 1), "in any order"


@given(st.lists(st.tuples(*[st.integers(0, 20)] * 4), min_size=2, max_size=2))
def test_iou_is_that_of_the_pixels(corners):
    a, b = (Box(min(y), min(x), max(y) + 1, max(x) + 1) for y, x in ((c[:2], c[2:]) for c in corners))
    filled = [torch.zeros(24, 24, dtype=torch.bool) for _ in range(2)]
    for mask, box in zip(filled, (a, b), strict=True):
        mask[int(box.ymin) : int(box.ymax), int(box.xmin) : int(box.xmax)] = True
    assert evaluate.iou(a, b) == evaluate.iou(b, a) == pytest.approx(evaluate.mask_iou(*filled))


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full() -> vqvae.Params:
    """A mask VQ-VAE of which every code says: all of the box."""
    p = vqvae.init(0)
    return p._replace(to_map=vqvae.Conv(torch.zeros_like(p.to_map.weight), torch.ones_like(p.to_map.bias)))


def masked(*found: tuple[str, Box]) -> str:
    return " ; ".join(detect.write(detect.to_locations(box, SIDE, SIDE), name, [0] * 16) for name, box in found)


@pytest.mark.parametrize(
    ("text", "mean"),
    [
        (masked(("cat", CAT.box)), 1.0),
        (masked(("cat", Box(0, 0, 100, 50))), 0.5),
        (masked(("cat", DOG.box), ("cat", CAT.box)), 1.0),  # the best of its name
        (masked(("dog", CAT.box)), 0.0),
        ("", 0.0),
        (boxes((CAT, 0)), 0.0),  # a box without a mask
    ],
)
def test_the_iou_of_masks_where_codes_say_the_whole_box(full, text, mean):
    row = Row("segment", "segment cat", "", (0,))
    assert figures([example(CAT, rows=[row])], [text], full)["segment: mean IoU"] == pytest.approx(mean, abs=0.02)


def test_the_bound_is_what_the_true_boxes_and_the_codes_give(full):
    half = CAT._replace(mask=CAT.mask & (torch.arange(SIDE) < 30))
    row = Row("segment", "segment cat", "", (0,))
    examples = [example(CAT, rows=[row]), example(half, rows=[row])]
    assert evaluate.bound(examples, full) == pytest.approx((1 + 0.3) / 2)


# --- text, and the whole table ----------------------------------------------------------------------------------------


def reference_distance(a: str, b: str) -> int:
    """The definition, without a table."""
    if not a or not b:
        return len(a) + len(b)
    change = reference_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(change, reference_distance(a[1:], b) + 1, reference_distance(a, b[1:]) + 1)


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_distance_is_levenshteins(a, b):
    assert evaluate.distance(a, b) == reference_distance(a, b)


def test_character_errors_are_counted_over_all_signs_together():
    signs = [Row("ocr", "ocr", "STOP"), Row("ocr", "ocr", "ab"), Row("ocr", "ocr", "1234")]
    found = figures([example(rows=signs)], ["STOP", "abc", ""], VQ)
    assert found["ocr: character error rate"] == pytest.approx((0 + 1 + 4) / 10)
    assert found["ocr: exact"] == pytest.approx(1 / 3)


def test_questions_are_right_or_wrong_by_kind():
    rows = [Row("color", "?", "red"), Row("color", "?", "blue"), Row("count", "?", "2"), Row("existence", "?", "no")]
    found = figures([example(rows=rows)], ["red", "red", "2 ", "no"], VQ)
    assert [found[f"question: {kind}"] for kind in ("color", "count", "existence")] == [0.5, 0, 1]
    assert math.isnan(found["question: position"]), "nothing was asked"


def test_what_cannot_be_read_is_counted_by_answer():
    rows = [Row("detect", "detect cat", "")] * 3 + [Row("segment", "segment cat", "")] * 2
    given = [boxes((CAT, 0)), "", "<loc0001> cat", masked(("cat", CAT.box)), boxes((CAT, 0))]
    assert figures([example(CAT, rows=rows)], given, VQ)["invalid boxes or masks"] == pytest.approx(2 / 5)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return heldout.draw(WORLD, "S1", 24)


def test_true_answers_are_worth_one_and_no_error(examples, full):
    given = []
    for at in examples:
        for row in at.rows:
            things = [at.things[i] for i in row.things]
            if row.task == "detect":
                given.append(detect.render([Detection(t.name, t.box) for t in things], SIDE, SIDE))
            elif row.task == "segment":
                given.append(segment.render([segment.Segment(*t) for t in things], full))
            else:
                given.append(row.suffix)
    found = figures(examples, given, full)
    mean = [(t.mask.sum() / area(t.box)).item() for e in examples for r in e.rows if r.task == "segment"
            for t in evaluate.wanted(e, r)]  # fmt: skip
    assert found.pop("segment: mean IoU") == pytest.approx(sum(mean) / len(mean), abs=0.03)  # the whole box, rounded
    assert found.pop("ocr: character error rate") == found.pop("invalid boxes or masks") == 0
    assert set(found.values()) == {1.0}


def area(box: Box) -> float:
    return (box.ymax - box.ymin) * (box.xmax - box.xmin)


def test_the_majority_gives_the_most_frequent_answer_and_the_median_box():
    rows = [[Row("count", "?", n), Row("detect", "detect cat ; dog", "", (0,))] for n in ("1", "2", "2")]
    things = [truth("cat", 0, 0, 90, 90), truth("cat", 20, 0, 100, 100), truth("cat", 60, 0, 220, 120)]
    given = evaluate.majority([example(t, rows=r) for t, r in zip(things, rows, strict=True)], VQ)
    assert given[::2] == ["2"] * 3
    median = detect.render([Detection(name, Box(20, 0, 100, 100)) for name in ("cat", "dog")], SIDE, SIDE)
    assert given[1::2] == [median] * 3


# --- the folder -------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(0, 2**32))
def test_runs_and_back(start, seed):
    mask = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask.view(-1)[: len(start)] = torch.tensor(start)
    for each in (mask, torch.zeros_like(mask), torch.ones_like(mask)):
        lengths = heldout.runs(each)
        assert sum(lengths) == SIDE**2
        assert all(length > 0 for length in lengths[1:])
        assert torch.equal(heldout.unrun(lengths), each)


def test_what_is_written_is_read_again(tmp_path, examples):
    entries = heldout.write(tmp_path, "S1", examples)
    (tmp_path / "scenes.json").write_text(json.dumps(entries))
    (found,) = heldout.read(tmp_path).values()
    for ours, theirs in zip(found, examples, strict=True):
        assert (ours.rows, ours.description) == (theirs.rows, theirs.description)
        for a, b in zip(ours.things, theirs.things, strict=True):
            assert a.name == b.name
            assert a.box == pytest.approx(b.box, abs=0.01)
            assert torch.equal(a.mask, b.mask)
        small = [np.asarray(at.picture.resize((14, 14), Image.Resampling.BOX), float) for at in (ours, theirs)]
        assert np.abs(small[0] - small[1]).mean() < 4  # WebP loses fine grain, not tones


def test_the_first_scenes_are_the_same_however_many_are_drawn(examples):
    for ours, theirs in zip(heldout.draw(WORLD, "S1", 5), examples, strict=False):
        assert (ours.rows, ours.description) == (theirs.rows, theirs.description)
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(ours.things, theirs.things, strict=True))


def test_the_boxes_of_held_out_things_are_those_of_their_masks(examples):
    for at in examples:
        for thing in at.things:
            assert segment.from_mask("", thing.mask).box == pytest.approx(thing.box, abs=0.01)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_of_the_folder(tmp_path, examples, monkeypatch, capsys):
    save_checkpoint(tmp_path / "weights")
    (tmp_path / "heldout").mkdir()
    entries = heldout.write(tmp_path / "heldout", "S1", examples[:2])
    (tmp_path / "heldout" / "scenes.json").write_text(json.dumps(entries))
    words = ["evaluate", "--model", str(tmp_path / "weights"), "--heldout", str(tmp_path / "heldout"), "--json"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(evaluate, "TOKENS", 4)
    evaluate.main()
    table = json.loads(capsys.readouterr().out)["S1"]
    for figure in ("objects named, F1", "detect: IoU > 0.5", "segment: mean IoU", "invalid boxes or masks"):
        assert table[figure].keys() == {"model", "blind", "majority"}
    assert table["question: count"].keys() == {"model", "blind", "majority"}


def save_checkpoint(folder) -> None:
    at, words = recipe.small(), tokenizer.build(WORLD.catalog.names)
    params = paligemma.init(at.model)
    pg.save(pg.Model(at.model, params, pg.tokenizer.wrap(words, "the tokenizer")), folder)
    segment.save(folder / "masks.safetensors", VQ)
    both = siglip_dual.init(at.siglip)._replace(vision=params.vision)
    siglip = dual_prompt.SiglipModel(at.siglip, both, dual_prompt.wrap(words, "the tokenizer"))
    save_siglip(siglip, folder / "siglip", vision=False)
