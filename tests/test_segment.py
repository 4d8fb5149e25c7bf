"""Masks as text: a mask is pasted only inside its box, at the right position, and malformed pieces are reported."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from cases import text_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import pgfunc as pg
from pgfunc import tokenizer
from pgfunc.errors import PromptError, SettingError
from pgfunc.objects import detect, segment, vqvae
from pgfunc.objects.detect import Box
from pgfunc.objects.segment import Segment

VQ, MODEL = vqvae.init(3), text_model()
CODES = "".join(f"<seg{code:03d}>" for code in range(7, 23))
CAT = f"<loc0100><loc0200><loc0511><loc0767>{CODES} cat"
parse = partial(segment.parse, vq=VQ)


def half(along: str) -> torch.Tensor:
    """A map that is above 0 in its top or left half."""
    map = -torch.ones(64, 64)
    map[{"top": slice(0, 32), "left": slice(None)}[along], {"top": slice(None), "left": slice(0, 32)}[along]] = 1
    return map


@st.composite
def boxes(draw, width: int, height: int) -> Box:
    """Any box inside a picture, with edges between or within pixels."""
    (top, bottom), (left, right) = (
        sorted(draw(st.floats(0, side)) for _ in range(2)) for side in (height, width)
    )  # fmt: skip
    return Box(top, left, bottom, right)


@given(st.data(), st.integers(1, 90), st.integers(1, 90), st.integers(0, 99))
def test_a_map_is_resized_as_pillow_does_and_pasted_only_inside_the_box(data, width, height, seed):
    box = data.draw(boxes(width, height))
    map = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    mask = segment.paste(map, box, width, height)
    rows, columns = segment.pixels(box.ymin, box.ymax, height), segment.pixels(box.xmin, box.xmax, width)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    expected = np.array(Image.fromarray(map.numpy()).resize(size, Image.Resampling.BILINEAR))
    clear = np.abs(expected) > 1e-5  # where the map is 0, rounding decides
    assert np.array_equal(mask[rows, columns].numpy()[clear], expected[clear] > 0)
    mask[rows, columns] = False
    assert not mask.any()


@given(st.data(), st.integers(1, 3000))
def test_the_pixels_of_a_box_lie_within_half_a_pixel_of_its_edges(data, side):
    low, high = sorted((data.draw(st.floats(0, side)), data.draw(st.floats(0, side))))
    span = segment.pixels(low, high, side)
    assert 0 <= span.start < span.stop <= side
    if high - low >= 1:
        assert abs(span.start - low) <= 0.5
        assert abs(span.stop - high) <= 0.5


EDGES = {(3.2, 3.4): (3, 4), (9, 9): (8, 9), (-5, 99): (0, 9), (-5, -2): (0, 1), (20, 30): (8, 9)}


@pytest.mark.parametrize("edges", EDGES)
def test_a_box_has_at_least_one_pixel_and_none_outside_the_picture(edges):
    assert segment.pixels(*edges, side=9) == slice(*EDGES[edges])


def test_resizing_keeps_dtype_and_device_and_a_map_of_zeros_is_outside():
    map, box = torch.zeros(64, 64, dtype=torch.float64), Box(0, 0, 5, 5)
    assert segment.resize(map, 3, 4).dtype == torch.float64
    assert not segment.paste(map, box, 10, 8).any()
    assert segment.paste(map.to("meta"), box, 10, 8).is_meta


def test_a_map_is_pasted_upright():
    box = Box(10, 20, 30, 60)
    top, left = (segment.paste(half(along), box, 100, 50) for along in ("top", "left"))
    rows, columns = torch.arange(50)[:, None], torch.arange(100)
    inside = (rows >= 10) & (rows < 30) & (columns >= 20) & (columns < 60)
    assert torch.equal(top, inside & (rows < 20))
    assert torch.equal(left, inside & (columns < 40))


def test_a_mask_is_decoded_from_its_sixteen_codes():
    (parsed,) = parse(CAT, 300, 200)
    assert (parsed.label, parsed.box, parsed.confidence) == ("cat", *detect.parse(CAT, 300, 200)[0][1:])
    map = vqvae.decode(VQ, VQ.codebook[torch.arange(7, 23)][None])[0]
    assert torch.equal(parsed.mask, segment.paste(map, parsed.box, 300, 200))
    assert 0 < parsed.mask.sum() < parsed.mask.numel()
    assert parse("", 300, 200) == []


@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 900), st.integers(0, 900)), max_size=3))
def test_masks_in_one_text_equal_the_masks_parsed_alone(objects):
    pieces = list(dict.fromkeys(
        f"<loc{y:04d}><loc{x:04d}><loc{y + 99:04d}><loc{x + 99:04d}>" + f"<seg{code:03d}>" * 16 + f" cat {code}"
        for code, y, x in objects
    ))  # fmt: skip
    together = parse(" ; ".join(pieces), 80, 60)
    assert len(together) == len(pieces)
    for piece, parsed in zip(pieces, together, strict=True):
        (alone,) = parse(piece, 80, 60)
        assert parsed[:2] == alone[:2]
        # where a map crosses 0, a convolution of another batch size rounds differently
        assert (parsed.mask != alone.mask).sum() <= 2


MALFORMED = {
    "no codes": ("<loc0001><loc0002><loc0003><loc0004> dog", "0 mask codes, expected 16"),
    "cut off": (f"<loc0001><loc0002><loc0003><loc0004>{CODES[:-9]}", "14 mask codes, expected 16"),
    "too many": (f"<loc0001><loc0002><loc0003><loc0004>{CODES}<seg000> dog", "17 mask codes, expected 16"),
    "above 127": (f"<loc0001><loc0002><loc0003><loc0004>{'<seg128>' * 16} dog", "mask code 128 is above 127"),
    "no box": (f"{CODES} dog", "0 location tokens, expected 4"),
    "mirrored": (f"<loc0001><loc0004><loc0003><loc0002>{CODES} dog", "corners (1, 4) and (3, 2) are not"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_piece_is_reported_and_affects_no_other(case):
    piece, reason = MALFORMED[case]
    for joined in (f"{piece} ; {CAT}", f"{CAT} ; {piece}"):
        (parsed,) = parse(joined, 40, 30)
        assert torch.equal(parsed.mask, parse(CAT, 40, 30)[0].mask)
        (left_out,) = segment.malformed(joined)
        assert left_out.piece == piece
        assert left_out.reason.startswith(reason)
    assert segment.malformed(CAT) == []


def test_a_repeated_object_is_read_once_and_a_label_may_be_missing():
    unlabelled = CAT.removesuffix(" cat")
    parsed = parse(" ; ".join([CAT, CAT, unlabelled, CAT]), 40, 30)
    assert [item.label for item in parsed] == ["cat", ""]
    broken = CAT.replace("<seg007>", "")
    assert len(parse(f"{broken} ; {CAT}", 40, 30)) == 1, "the object with a mask is kept"


def blob(width: int, height: int, seed: int) -> torch.Tensor:
    """The mask of a random ellipse, at least one pixel large."""
    a, b, c, d = np.random.default_rng(seed).random(4)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cy, cx = int(a * height), int(b * width)
    return ((y - cy) / (1 + c * height / 2)) ** 2 + ((x - cx) / (1 + d * width / 2)) ** 2 < 1


@given(st.integers(1, 120), st.integers(1, 120), st.integers(0, 999))
def test_mask_to_text_to_mask_keeps_box_label_and_codes(width, height, seed):
    before = segment.from_mask("cat", blob(width, height, seed))
    rendered = segment.render([before], VQ)
    (after,) = parse(rendered, width, height)
    assert segment.malformed(rendered) == []
    assert after.label == "cat"
    for low, high, side in ((0, 2, height), (1, 3, width)):
        assert abs(after.box[low] - before.box[low]) <= side / 1023 / 2 * (1 + 1e-9)
        assert abs(after.box[high] - before.box[high]) <= side / 1023 / 2 * (1 + 1e-9)
    codes = segment.encode([before.mask], [before.box], VQ)
    assert [list(item.codes) for item in segment.well_formed(rendered)] == codes


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 999))
def test_the_box_of_a_mask_is_the_tightest(width, height, seed):
    mask = blob(width, height, seed)
    top, left, bottom, right = map(int, segment.from_mask("cat", mask).box)
    assert mask[top:bottom, left:right].sum() == mask.sum()
    assert all(edge.any() for edge in (mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]))


def test_a_crop_is_resized_as_pillow_does():
    mask = blob(200, 150, 5)
    box = segment.from_mask("cat", mask).box
    top, left, bottom, right = map(int, box)
    part = Image.fromarray(mask[top:bottom, left:right].numpy().astype(np.float32))
    expected = np.array(part.resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(segment.crop(mask, box), expected, atol=1e-5)  # float32
    soft = mask.float() * 0.25
    np.testing.assert_allclose(segment.crop(soft, box), expected / 4, atol=1e-5)


def test_encode_crops_encodes_and_quantizes():
    masks = [blob(200, 150, 5), blob(60, 70, 6)]
    segments = [segment.from_mask("cat", mask) for mask in masks]
    crops = torch.stack([segment.crop(item.mask, item.box) for item in segments])
    expected = vqvae.quantize(VQ.codebook, vqvae.encode(VQ, crops)).tolist()
    assert segment.encode(masks, [item.box for item in segments], VQ) == expected
    assert segment.encode([], [], VQ) == []
    assert segment.render([], VQ) == ""


def test_several_masks_are_rendered_as_each_one_alone():
    segments = [segment.from_mask(label, blob(60, 70, seed)) for label, seed in (("cat", 1), ("", 2), ("bus", 3))]
    assert segment.render(segments, VQ) == " ; ".join(segment.render([each], VQ) for each in segments)


def test_the_crop_of_a_transposed_mask_is_the_transposed_crop():
    mask, box = blob(20, 90, 3), Box(60, 5, 85, 15)
    transposed = segment.crop(mask.T, Box(box.xmin, box.ymin, box.xmax, box.ymax))
    torch.testing.assert_close(segment.crop(mask, box), transposed.T)


def test_empty_masks_and_bad_labels_are_refused():
    with pytest.raises(SettingError, match="the mask of 'cat' has no pixels"):
        segment.from_mask("cat", torch.zeros(3, 4, dtype=torch.bool))
    bad = Segment("cat;dog", Box(0, 0, 2, 2), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(PromptError, match=re.escape("'cat;dog'")):
        segment.render([bad], VQ)
    with pytest.raises(PromptError, match="what to look for"):
        segment.prefix("")
    assert segment.prefix("yellow bus") == "segment yellow bus"


def test_the_confidence_of_a_mask_is_that_of_its_box():
    text = "<loc0000><loc0001><loc0002><loc0003>" + "<seg001>" * 16 + " a"
    ids = tokenizer.encode(MODEL.tokenizer, text)
    done = pg.Completion(text, ids, [-0.1 * (i + 1) for i in range(len(ids))], "eos")
    (parsed,) = segment.with_confidence(done, MODEL.tokenizer, 40, 30, VQ)
    assert parsed.confidence == pytest.approx(math.exp(-0.25))
    assert torch.equal(parsed.mask, parse(text, 40, 30)[0].mask)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_are_on_the_device_of_the_decoder():
    vq = pg.tree.map(lambda leaf: leaf.cuda(), VQ)
    (parsed,) = segment.parse(CAT, 40, 30, vq)
    assert parsed.mask.is_cuda
    assert len(segment.encode([parsed.mask], [parsed.box], vq)[0]) == 16


def test_the_weights_of_a_resized_mask_do_not_depend_on_global_defaults():
    expected = segment.triangle(3, 5)
    assert expected.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = segment.triangle(3, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
