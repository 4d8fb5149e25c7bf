"""The shipped checkpoint: transformers reads it as it stands, and it captions pictures that it has not seen."""

import pytest
import reference
import torch
from PIL import Image
from transformers import AutoProcessor

import pgfunc as pg
from pgfunc.checkpoint import shipped as folder

PREFIXES = ["caption en", "answer en how many shapes are there?", "caption en\nand a newline"]
CAPTIONS = {
    "examples/images/scene.png": "a yellow moon, a red triangle and a black cross",
    "examples/images/square-and-heart.png": "a black square right of a blue heart",
    "examples/images/heart.jpg": "a large green heart",
    "examples/images/moon.png": "a small red moon",
}
PICTURES = list(CAPTIONS)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(folder())


@pytest.mark.parametrize("prefix", PREFIXES[:2])
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


def test_greedy_text_equals_that_of_transformers(shipped):
    other = reference.load(folder()).float()
    for prefix in PREFIXES:
        prompt = pg.prepare(shipped, PICTURES, prefix)
        marks = torch.full((len(PICTURES), shipped.cfg.vision.tokens), shipped.cfg.image)
        ids = torch.cat([marks, prompt.tokens], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        rows = other.generate(**given, pixel_values=prompt.pixels[:, 0], max_new_tokens=24, do_sample=False)
        texts = [pg.tokenizer.decode(shipped.tokenizer, row) for row in rows[:, ids.shape[1] :].tolist()]
        assert [done.text for done in pg.generate(shipped, PICTURES, prefix, max_new_tokens=24)] == texts


def test_captions_name_what_is_in_the_pictures(shipped):
    done = pg.generate(shipped, list(CAPTIONS), "caption en", max_new_tokens=32)
    assert [completion.text for completion in done] == list(CAPTIONS.values())
