"""The shipped checkpoint: transformers reads it as it stands, and it does what its card says on scenes that it has not
seen, which are committed."""

import os
from pathlib import Path

import pytest
import reference
import torch
from PIL import Image
from transformers import AutoProcessor

import pgfunc as pg
from examples.tiny import evaluate, heldout
from pgfunc.checkpoint import shipped as folder
from pgfunc.objects import detect, segment
from pgfunc.objects.detect import Box

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "examples/images"
ASKED = 100 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 60  # scenes whose every prompt is answered
PICTURES = [str(IMAGES / f"{name}.png") for name in ("scene", "cars", "shapes")]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(folder())


@pytest.fixture(scope="module")
def vq():
    return pg.tree.map(lambda leaf: leaf.float(), segment.load(folder() / "masks.safetensors"))


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[heldout.Example]]:
    """100 scenes of each split."""
    return heldout.read(ROOT / "examples/tiny/heldout")


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["caption en", "answer en how many objects are there?", "detect cat ; red star"])
def test_tokens_and_pixels_equal_those_of_transformers_processor(shipped, processor, prefix):
    ours = pg.prepare(shipped, PICTURES[0], prefix)
    theirs = processor(images=Image.open(PICTURES[0]), text=f"<image>{prefix}", return_tensors="np")
    theirs = {name: torch.from_numpy(theirs[name]) for name in ("input_ids", "pixel_values")}
    marks = shipped.cfg.vision.tokens
    assert theirs["input_ids"][0, :marks].eq(shipped.cfg.image).all()
    assert torch.equal(theirs["input_ids"][:, marks:], ours.tokens)
    torch.testing.assert_close(
        theirs["pixel_values"][:, None], ours.pixels, atol=2.001 / 255, rtol=0
    )  # a grey level, rounded


def test_greedy_text_equals_that_of_transformers_on_50_held_out_prompts(shipped, scenes):
    every = [(e.picture, row) for examples in scenes.values() for e in examples for row in e.rows]
    asked = every[:: len(every) // 50][:50]
    assert {row.task for _, row in asked} >= {"caption", "detect", "segment", "ocr", "count", "position"}
    other, expected = reference.load(folder()).float(), []
    for picture, row in asked:
        prompt = pg.prepare(shipped, picture, row.prefix)
        ids = torch.cat([torch.full((1, shipped.cfg.vision.tokens), shipped.cfg.image), prompt.tokens], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        found = other.generate(**given, pixel_values=prompt.pixels[:, 0], max_new_tokens=48, do_sample=False)
        expected.append(pg.tokenizer.decode(shipped.tokenizer, found[0, ids.shape[1] :].tolist()))
    pictures, rows = zip(*asked, strict=True)
    done = pg.generate(shipped, list(pictures), [row.prefix for row in rows], max_new_tokens=48)
    assert [each.text for each in done] == expected


# --- what it can do ---------------------------------------------------------------------------------------------------


def test_new_scenes_are_captioned_counted_located_and_masked(shipped, scenes, vq):
    examples = scenes["S0"][:ASKED]
    found = evaluate.figures(examples, evaluate.answers(shipped, examples), vq)
    assert found["objects named, F1"] > 0.88
    assert min(found[f"question: {kind}"] for kind in evaluate.QUESTIONS) > 0.9
    assert found["detect: IoU > 0.5"] > 0.8
    assert found["detect: precision"] > 0.8
    assert found["segment: mean IoU"] > 0.65
    assert found["invalid boxes or masks"] < 0.01
    assert found["ocr: character error rate"] < 0.12


def test_it_looks_before_it_speaks(shipped, scenes, vq):
    examples = scenes["S0"][:20]
    found = evaluate.figures(examples, evaluate.answers(shipped, examples, blind=True), vq)
    assert found["objects named, F1"] < 0.1
    assert found["detect: IoU > 0.5"] < 0.1


def test_drawings_that_it_has_not_seen_are_found(shipped, scenes, vq):
    examples = [e._replace(rows=[row for row in e.rows if row.task == "detect"]) for e in scenes["S2"]]
    found = evaluate.figures(examples, evaluate.answers(shipped, examples), vq)
    assert found["detect: IoU > 0.5"] > 0.7


def test_pictures_and_texts_find_each_other(scenes):
    siglip = pg.load_siglip(folder() / "siglip", dtype="float32")
    found = evaluate.retrieval(siglip, scenes["S0"])
    assert min(row["model"] for row in found.values()) > 0.85


def test_masks_of_new_scenes_survive_their_codes(scenes, vq):
    assert evaluate.bound(scenes["S0"], vq) > 0.9


# --- the example pictures ---------------------------------------------------------------------------------------------


def test_captions_name_what_is_in_the_pictures(shipped):
    done = pg.generate(shipped, PICTURES, "caption en", max_new_tokens=32)
    scene, cars, shapes = (completion.text for completion in done)
    assert scene == "an apple and two strawberries"
    assert "car" in cars  # the turkey is a tree to it
    assert "red moon" in shapes


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_the_cat_and_the_bus_are_where_they_were_drawn(shipped, task):
    (done,) = pg.generate(shipped, IMAGES / "cat-and-bus.png", f"{task} cat ; bus", max_new_tokens=64)
    cat, bus = detect.parse(done.text, 224, 224)
    assert (cat.label, bus.label) == ("cat", "bus")
    assert evaluate.iou(cat.box, Box(137, 130, 190, 180)) > 0.85
    assert evaluate.iou(bus.box, Box(57, 126, 134, 202)) > 0.9
