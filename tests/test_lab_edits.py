"""Edits are values that do what they say, and selections are masks."""

from functools import partial

import pytest
import torch
from cases import CONFIGS, VISION, params, prompt

import pgfunc as pg
from pgfunc import lab
from pgfunc.errors import SettingError

CFG = CONFIGS["gemma2"]
TREE = params(CFG)
ROWS = prompt(CFG, [3, 1], [2, 4])
LENGTH = VISION.tokens + 5


def test_put_add_and_block_do_what_they_say():
    x, where = torch.arange(6.0).reshape(1, 3, 2), lab.tokens(-1, n=3)
    assert lab.put(9.0, where)(x).tolist() == [[[0, 1], [2, 3], [9, 9]]]
    assert lab.put(torch.tensor([7.0, 8.0]))(x).tolist() == [[[7, 8]] * 3]
    assert lab.add(torch.tensor([10.0, 20.0]), where)(x).tolist() == [[[0, 1], [2, 3], [14, 25]]]
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    blind = lab.block(torch.tensor([True, False]), torch.tensor([False, True, True]))(mask)
    assert blind.tolist() == [[[True, False, False], [True, True, True]]]
    assert lab.put(1, where)(x.bfloat16()).dtype == torch.bfloat16


def test_a_knockout_of_all_image_tokens_equals_a_prompt_whose_text_sees_none():
    image = torch.arange(LENGTH) < VISION.tokens
    knockout = lab.edit(pg.forward, {"language.*.mask": lab.block(~image, image)})
    other = ROWS._replace(pixels=torch.zeros_like(ROWS.pixels))
    torch.testing.assert_close(knockout(TREE, ROWS, CFG), knockout(TREE, other, CFG))
    assert not torch.allclose(pg.forward(TREE, ROWS, CFG), pg.forward(TREE, other, CFG))


def test_a_head_that_is_ablated_equals_a_head_with_output_weights_of_zero():
    where = lab.heads(1, 3, n=CFG.text.heads)
    found = lab.edit(pg.forward, {"language.1.z": lab.put(0.0, where)})(TREE, ROWS, CFG)
    layer = TREE.language.layers[1]
    out = layer.out.unflatten(1, (CFG.text.heads, -1)).clone()
    out[:, [1, 3]] = 0
    layers = (*TREE.language.layers[:1], layer._replace(out=out.flatten(1)), *TREE.language.layers[2:])
    expected = pg.forward(TREE._replace(language=TREE.language._replace(layers=layers)), ROWS, CFG)
    torch.testing.assert_close(found, expected)


def test_an_edit_of_rot_k_or_v_is_in_the_cache():
    _, plain = pg.prefill(TREE, ROWS, CFG, 3)
    for name, part in (("rot_k", "k"), ("v", "v")):
        _, cache = lab.edit(partial(pg.prefill, size=3), {f"language.1.{name}": lab.put(0.0)})(TREE, ROWS, CFG)
        for i in range(2):
            kept = torch.equal(getattr(cache, part)[i], getattr(plain, part)[i])
            assert kept == (i == 0)
        assert not getattr(cache, part)[1].any()


def test_selections_are_masks():
    assert lab.tokens(0, -1, n=4).tolist() == [[True], [False], [False], [True]]
    assert lab.heads(2, n=3).tolist() == [[False], [False], [True]]
    image = torch.tensor([False, True])
    assert lab.tokens(image, 3, n=4).tolist() == [[False], [True], [False], [True]]
    for wrong in (4, -5):
        with pytest.raises(SettingError, match=f"^{wrong} is not one of 4"):
            lab.tokens(wrong, n=4)


def test_patches_are_the_image_tokens_that_a_mask_covers():
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[:14, :7] = True  # half of the first patch
    mask[14:, 14:] = True
    assert lab.patches(mask, CFG).tolist() == [True, False, False, True]
    assert lab.patches(mask, CFG, share=0.6).tolist() == [False, False, False, True]
    assert lab.patches(torch.stack([mask, ~mask]), CFG).tolist() == [
        [True, False, False, True],
        [True, True, True, False],
    ]
    with pytest.raises(SettingError, match="the mask has 28 x 27 pixels, expected 28 x 28"):
        lab.patches(mask[:, :27], CFG)


@pytest.mark.parametrize("where", [torch.tensor([0]), torch.tensor(5), 3])
def test_an_index_is_not_a_mask(where):
    for change in (lab.Put(0.0, where), lab.Add(1.0, where), lab.Block(where, torch.tensor([True, True]))):
        with pytest.raises(SettingError, match=r"a selection is int(64)?, expected a mask of bool, see lab.tokens"):
            change(torch.zeros(1, 2, 2, dtype=torch.bool))
    with pytest.raises(SettingError, match=r"a selection is bool \(5,\), expected a mask of at most 3 bool"):
        lab.tokens(torch.ones(5, dtype=torch.bool), n=3)
