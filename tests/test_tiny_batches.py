"""The tiny checkpoint's batches: what training reads is what inference writes, token by token."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pgfunc as pg
from examples.tiny import batches, masks, recipe, render, scenes, shapes, sprites, texts, tokenizer, world
from examples.tiny.batches import BLANK, NUMBERS, Stream
from pgfunc import paligemma, siglip_dual, tree
from pgfunc.objects import detect, segment
from pgfunc.siglip_dual import prompt as dual_prompt

WORLD = world.small()
CAT, BANK = WORLD.catalog, WORLD.bank("cpu")
SIDE, WIDTH = 224, 64
RECIPE = recipe.small()


@pytest.fixture(scope="module")
def vocab() -> batches.Vocabulary:
    return batches.vocabulary(pg.tokenizer.wrap(tokenizer.build(CAT.names), "the tokenizer"))


@pytest.fixture(scope="module")
def model(vocab) -> pg.Model:
    return pg.Model(RECIPE.model, paligemma.abstract(RECIPE.model)._replace(projector=torch.zeros(1)), vocab.tokenizer)


def stream(vocab, written: str, size: int = 6, prompts: int = 4, start: int = 0) -> Stream:
    return Stream(CAT, vocab, written, size, prompts, WIDTH, SIDE, start)


def rows_of(count: int = 120) -> list[tuple[scenes.Scene, texts.Row]]:
    rng = np.random.default_rng(1)
    drawn = [scenes.draw(CAT, "train", index) for index in range(count)]
    return [(scene, row) for scene in drawn for row in islice(texts.rows(scene, CAT, rng), 4)]


def equal(a, b) -> bool:
    pairs = zip(tree.flatten(tuple(a)).values(), tree.flatten(tuple(b)).values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_ids_stand_in_the_order_of_googles(vocab):
    ids = vocab.tokenizer.backend.get_vocab()
    assert [ids[name] for name in ("<pad>", "<eos>", "<bos>", "<unk>")] == [0, 1, 2, 3]
    assert (ids["<loc0000>"], ids["<loc1023>"], ids["<seg000>"], ids["<seg127>"]) == (2048, 3071, 3072, 3199)
    assert ids["<image>"] == RECIPE.model.image == RECIPE.model.text.vocab == 3200
    assert (vocab.pad, vocab.bos, vocab.eos) == (RECIPE.model.pad, RECIPE.model.bos, RECIPE.model.eos)
    assert max(id for name, id in ids.items() if not name.startswith("<")) < RECIPE.siglip.text.vocab


def test_the_tokenizer_is_learned_the_same_again(vocab):
    assert tokenizer.build(CAT.names).get_vocab() == vocab.tokenizer.backend.get_vocab()


def test_the_words_of_every_class_and_prompt_are_one_token_each():
    names = sprites.class_names(sprites.read_table())
    learned = pg.tokenizer.wrap(tokenizer.build(names), "the tokenizer")
    forms = [form(name) for name in names for form in (texts.article, texts.plural)]
    said = [f"caption en {form}" for form in forms] + [f"detect {name}" for name in names]
    said += ["answer en where is the pair of scissors", "two red stars left of a gray ring", "center", "top right"]
    said += [*shapes.COLOURS, "yes", "no", "four kites", "bottom", "left"]
    split = [text for text in said if len(pg.tokenizer.encode(learned, text)) != len(text.split(" "))]
    assert not split


# --- templates --------------------------------------------------------------------------------------------------------


def test_a_template_is_the_prompt_of_its_text_once_its_blanks_are_filled(vocab, model):
    generator = np.random.default_rng(0)
    for _, row in rows_of():
        if row.task in batches.SPELLED:
            continue
        places = [generator.integers(0, 1024, 4).tolist() for _ in range(4)]
        codes = [generator.integers(0, 128, 16).tolist() for _ in range(4)]
        prefix, suffix = written(row, places, codes)
        expected = pg.prepare(model, [[]], [prefix], [suffix])
        numbers = torch.tensor([[*box, *code] for box, code in zip(places, codes, strict=True)])
        packed = batches.pack([batches.template(vocab, row)], [0], WIDTH * 2)
        filled = batches.fill(packed, numbers[None, :, :4] / 1023, numbers[None, :, 4:], vocab)
        length = expected.tokens.shape[1]
        for ours, theirs in zip((filled, packed.valid, packed.causal), expected[1:], strict=True):
            assert torch.equal(ours[:, :length], theirs)
            assert not ours[:, length:].any(), "padding"


def written(row: texts.Row, places: list[list[int]], codes: list[list[int]]) -> tuple[str, str]:
    """A row's texts as pgfunc writes them: each thing's box and mask in place of its blank."""
    known = iter(row.things)

    def fill(text: str) -> str:
        pieces = text.split("<loc0000>" * 4)
        out = pieces[0]
        for piece in pieces[1:]:
            i = next(known)
            masked = piece.startswith("<seg000>")
            out += detect.token_text(places[i], codes[i] if masked else ()) + piece.removeprefix("<seg000>" * 16)
        return out

    return fill(row.prefix), fill(row.suffix)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=26))
def test_what_is_read_is_learned_letter_by_letter(vocab, text):
    _, suffix = batches.template(vocab, texts.Row("ocr", "ocr", text))
    assert len(suffix) == len(text) + 1
    assert suffix[-1] == vocab.eos
    assert pg.tokenizer.decode(vocab.tokenizer, suffix[:-1]) == text


def test_a_blank_names_its_thing_and_the_place_of_the_number(vocab):
    row = texts.Row("segment", "segment cup", " ; ".join([f"{texts.PLACE}{texts.CODES} cup"] * 2), (3, 1))
    _, suffix = batches.template(vocab, row)
    found = [id - BLANK for id in suffix if id >= BLANK]
    assert found == [*range(3 * NUMBERS, 4 * NUMBERS), *range(NUMBERS, 2 * NUMBERS)]


# --- batches ----------------------------------------------------------------------------------------------------------


def decoded(vocab, filled, packed) -> list[tuple[str, str]]:
    """Prefix and suffix of each row as text."""
    found = []
    for tokens, valid, causal in zip(filled, packed.valid, packed.causal, strict=True):
        parts = tokens[valid & ~causal][1:-1], tokens[causal][:-1]
        found.append(tuple(pg.tokenizer.decode(vocab.tokenizer, part.tolist()) for part in parts))
    return found


def test_boxes_and_codes_of_a_batch_are_those_of_what_was_rendered(vocab):
    layout, packed = stream(vocab, "prompts", size=12, prompts=8)[3]
    drawn = render.render(BANK, layout, SIDE, 0)
    codes = torch.randint(0, 128, (12, 4, 16))
    found = decoded(vocab, batches.fill(packed, drawn.boxes, codes, vocab), packed)
    seen = {"detect": 0, "segment": 0}
    for (prefix, suffix), number in zip(found, packed.scene.tolist(), strict=True):
        scene = scenes.draw(CAT, "train", 36 + number)
        task = prefix.split(" ")[0]
        if task not in seen or not suffix:
            continue
        seen[task] += 1
        assert not detect.malformed(suffix)
        for item in detect.well_formed(suffix):
            matches = [
                j for j, thing in enumerate(scene.things)
                if thing.name == item.label
                and np.abs(np.array(item.locations) / 1023 - drawn.boxes[number, j].numpy()).max() <= 0.5001 / 1023
            ]  # fmt: skip
            assert matches, "half a step"
            if task == "segment":
                assert item.codes in [tuple(codes[number, j].tolist()) for j in matches]
        labels = prefix.partition(" ")[2].split(" ; ")
        assert len(detect.well_formed(suffix)) == sum(thing.name in labels for thing in scene.things)
    assert seen["detect"] > 10
    assert seen["segment"] > 5


def test_rows_hold_what_the_stream_was_asked_for(vocab):
    packed = stream(vocab, "prompts", size=6, prompts=4)[0].texts
    assert packed.tokens.shape == (24, WIDTH)
    assert packed.scene.tolist() == [i for i in range(6) for _ in range(4)]
    assert (packed.tokens[:, 0] == vocab.bos).all()
    assert not (packed.causal & ~packed.valid).any()
    assert (packed.valid.sum(1) <= WIDTH).all()
    for tokens, valid, causal in zip(*packed[:3], strict=True):
        assert tokens[valid][-1] == vocab.eos
        assert tokens[valid & ~causal][-1] == vocab.tokenizer.newline
        assert causal.int().diff().abs().sum() <= 2, "one stretch"


def test_a_batch_is_a_function_of_its_number_and_the_stages_start(vocab):
    first = stream(vocab, "prompts")[2]
    assert equal(first, stream(vocab, "prompts")[2])
    assert equal(first, stream(vocab, "prompts", start=12)[0])
    assert not equal(first, stream(vocab, "prompts")[3])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns where torch has threads
@pytest.mark.parametrize("written", ["prompts", "description", ""])
def test_worker_processes_make_the_same_batches_in_the_same_order(vocab, written):
    at = stream(vocab, written, size=3)
    alone, shared = (list(batches.loader(at, 1, 5, workers)) for workers in (0, 2))
    assert len(alone) == len(shared) == 4
    assert all(equal(*pair) for pair in zip(alone, shared, strict=True))


def test_descriptions_are_what_the_text_encoder_is_given_at_inference(vocab):
    params = siglip_dual.init(RECIPE.siglip)
    siglip = dual_prompt.SiglipModel(RECIPE.siglip, params, dual_prompt.wrap(vocab.tokenizer.backend, "the tokenizer"))
    packed = stream(vocab, "description", size=80)[0].texts
    drawn = [scenes.draw(CAT, "train", index) for index in range(80)]
    whole = dual_prompt.text_ids(siglip, [texts.description(scene) for scene in drawn])
    same = (packed.tokens == whole).all(-1)
    assert 0.7 < same.float().mean() < 0.95, "some speak of a part"
    assert packed.scene.tolist() == list(range(80))


# --- masks, as training and inference crop them -----------------------------------------------------------------------


def test_training_and_inference_crop_a_mask_nearly_alike():
    drawn = render.render(BANK, render.layout([scenes.draw(CAT, "train", i) for i in range(30)]), SIDE, 0)
    there = drawn.masks.flatten(2).any(-1)
    found, boxes = drawn.masks[there], drawn.boxes[there]
    ours = masks.crops(found, boxes)
    places = [detect.Box(*box) for box in (boxes * SIDE).tolist()]
    theirs = torch.stack([segment.crop(*pair) for pair in zip(found, places, strict=True)])
    assert (ours - theirs).abs().mean() < 0.01  # two filters, which differ along edges
    assert ((ours > 0.5) != (theirs > 0.5)).float().mean() < 0.01


def test_a_crop_is_the_part_in_the_box_not_its_mirror_image():
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, 100:164, 32:96] = True
    mask[0, 100:132, 32:64] = False
    (found,) = masks.crops(mask, torch.tensor([[100, 32, 164, 96]]) / SIDE)
    expected = torch.ones(64, 64)
    expected[:32, :32] = 0
    assert ((found - expected).abs() > 0.3).float().mean() < 0.04  # the seam, one pixel wide
