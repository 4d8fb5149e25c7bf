"""The shipped checkpoint: transformers reads it as it stands, and it captions scenes that it has not seen."""

import pytest
import reference
import torch
from PIL import Image
from transformers import AutoProcessor

import pgfunc as pg
from examples.tiny import evaluate, scenes
from pgfunc.checkpoint import shipped as folder

PREFIXES = ["caption en", "answer en how many shapes are there?", "caption en\nand a newline"]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(folder())


def picture(index: int) -> Image.Image:
    return scenes.picture(scenes.sample("S0", index))


@pytest.mark.parametrize("prefix", PREFIXES[:2])
def test_tokens_and_pixels_equal_those_of_transformers_processor(shipped, processor, prefix):
    ours = pg.prepare(shipped, picture(0), prefix)
    theirs = processor(images=picture(0), text=f"<image>{prefix}", return_tensors="np")
    theirs = {name: torch.from_numpy(theirs[name]) for name in ("input_ids", "pixel_values")}
    marks = shipped.cfg.vision.tokens
    assert theirs["input_ids"][0, :marks].eq(shipped.cfg.image).all()
    assert torch.equal(theirs["input_ids"][:, marks:], ours.tokens)
    torch.testing.assert_close(
        theirs["pixel_values"][:, None], ours.pixels, atol=2.001 / 255, rtol=0
    )  # a grey level, rounded


def test_greedy_text_equals_that_of_transformers(shipped):
    other = reference.load(folder()).float()
    pictures = [picture(index) for index in range(6)]
    for prefix in PREFIXES:
        prompt = pg.prepare(shipped, pictures, prefix)
        marks = torch.full((len(pictures), shipped.cfg.vision.tokens), shipped.cfg.image)
        ids = torch.cat([marks, prompt.tokens], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        rows = other.generate(**given, pixel_values=prompt.pixels[:, 0], max_new_tokens=24, do_sample=False)
        texts = [pg.tokenizer.decode(shipped.tokenizer, row) for row in rows[:, ids.shape[1] :].tolist()]
        assert [done.text for done in pg.generate(shipped, pictures, prefix, max_new_tokens=24)] == texts


@pytest.mark.parametrize(("split", "least"), [("S0", 0.95), ("S1", 0.7)])
def test_captions_name_the_objects_of_unseen_scenes(shipped, split, least):
    drawn = [scenes.sample(split, index) for index in range(60)]
    done = pg.generate(shipped, [scenes.picture(scene) for scene in drawn], "caption en", max_new_tokens=32)
    pairs = [(scenes.caption(scene), completion.text) for scene, completion in zip(drawn, done, strict=True)]
    assert evaluate.f1(pairs) >= least
