"""The shipped checkpoint: transformers reads it unchanged, and it reaches the figures of its card on held-out scenes.

The scenes are in the repository.
"""

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
SCENES = 100 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 60  # scenes whose prompts are all answered
IMAGE_PATHS = [str(IMAGES / f"{name}.png") for name in ("scene", "cars", "shapes")]


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
def test_tokens_and_pixels_equal_those_of_the_transformers_processor(shipped, processor, prefix):
    ours = pg.prepare(shipped, IMAGE_PATHS[0], prefix)
    theirs = processor(images=Image.open(IMAGE_PATHS[0]), text=f"<image>{prefix}", return_tensors="np")
    theirs = {name: torch.from_numpy(theirs[name]) for name in ("input_ids", "pixel_values")}
    image_tokens = shipped.cfg.vision.tokens
    assert theirs["input_ids"][0, :image_tokens].eq(shipped.cfg.image).all()
    assert torch.equal(theirs["input_ids"][:, image_tokens:], ours.tokens)
    # one grey level of 255 is 2 / 255 in [-1, 1]: the two may round differently
    torch.testing.assert_close(theirs["pixel_values"][:, None], ours.pixels, atol=2.001 / 255, rtol=0)


def test_greedy_text_equals_transformers_on_50_held_out_prompts(shipped, scenes):
    all_prompts = [(e.picture, row) for examples in scenes.values() for e in examples for row in e.rows]
    prompts = all_prompts[:: len(all_prompts) // 50][:50]
    assert {row.task for _, row in prompts} >= {"caption", "detect", "segment", "ocr", "count", "position"}
    other, expected = reference.load(folder()).float(), []
    for picture, row in prompts:
        prompt = pg.prepare(shipped, picture, row.prefix)
        ids = torch.cat([torch.full((1, shipped.cfg.vision.tokens), shipped.cfg.image), prompt.tokens], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        output = other.generate(**inputs, pixel_values=prompt.pixels[:, 0], max_new_tokens=48, do_sample=False)
        expected.append(pg.tokenizer.decode(shipped.tokenizer, output[0, ids.shape[1] :].tolist()))
    pictures, rows = zip(*prompts, strict=True)
    completions = pg.generate(shipped, list(pictures), [row.prefix for row in rows], max_new_tokens=48)
    assert [completion.text for completion in completions] == expected


# --- accuracy on held-out scenes --------------------------------------------------------------------------------------


def test_new_scenes_are_captioned_counted_located_and_masked(shipped, scenes, vq):
    examples = scenes["S0"][:SCENES]
    figures = evaluate.figures(examples, evaluate.answers(shipped, examples), vq)
    assert figures["objects named, F1"] > 0.88
    assert min(figures[f"question: {kind}"] for kind in evaluate.QUESTIONS) > 0.9
    assert figures["detect: IoU > 0.5"] > 0.8
    assert figures["detect: precision"] > 0.8
    assert figures["segment: mean IoU"] > 0.65
    assert figures["invalid boxes or masks"] < 0.01
    assert figures["ocr: character error rate"] < 0.12


def test_answers_depend_on_the_image(shipped, scenes, vq):
    examples = scenes["S0"][:20]
    figures = evaluate.figures(examples, evaluate.answers(shipped, examples, blind=True), vq)
    assert figures["objects named, F1"] < 0.1
    assert figures["detect: IoU > 0.5"] < 0.1


def test_unseen_drawings_are_detected(shipped, scenes, vq):
    examples = [e._replace(rows=[row for row in e.rows if row.task == "detect"]) for e in scenes["S2"]]
    figures = evaluate.figures(examples, evaluate.answers(shipped, examples), vq)
    assert figures["detect: IoU > 0.5"] > 0.7


def test_images_and_texts_retrieve_each_other(scenes):
    siglip = pg.load_siglip(folder() / "siglip", dtype="float32")
    retrieval = evaluate.retrieval(siglip, scenes["S0"])
    assert min(row["model"] for row in retrieval.values()) > 0.85


def test_masks_of_new_scenes_are_preserved_by_their_codes(scenes, vq):
    assert evaluate.bound(scenes["S0"], vq) > 0.9


# --- the example images -----------------------------------------------------------------------------------------------


def test_captions_name_the_objects_in_the_images(shipped):
    completions = pg.generate(shipped, IMAGE_PATHS, "caption en", max_new_tokens=32)
    scene, cars, shapes = (completion.text for completion in completions)
    assert scene == "an apple and two strawberries"
    assert "car" in cars  # it calls the turkey a tree
    assert "red moon" in shapes


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_the_cat_and_the_bus_are_located_where_they_were_drawn(shipped, task):
    (completion,) = pg.generate(shipped, IMAGES / "cat-and-bus.png", f"{task} cat ; bus", max_new_tokens=64)
    cat, bus = detect.parse(completion.text, 224, 224)
    assert (cat.label, bus.label) == ("cat", "bus")
    assert evaluate.iou(cat.box, Box(137, 130, 190, 180)) > 0.85
    assert evaluate.iou(bus.box, Box(57, 126, 134, 202)) > 0.9
