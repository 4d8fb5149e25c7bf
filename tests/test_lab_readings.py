"""Readings equal what they stand for: resumed runs, the logit lens, attributions, integrated gradients."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import CONFIGS, VISION, params, prompt
from torch.func import grad

import pgfunc as pg
from pgfunc import lab
from pgfunc.errors import SettingError

CFG = CONFIGS["gemma2"]
TREE = params(CFG)
ROWS = prompt(CFG, [3, 1], [2, 4])
LENGTH = VISION.tokens + 5


@pytest.mark.parametrize("layer", range(4))
def test_a_run_resumes_at_a_layer_with_its_taps(layer):
    _, seen = lab.capture(pg.forward, "language.*.resid_pre", "language.2.resid_post")(TREE, ROWS, CFG)
    resid = seen["language.2.resid_post" if layer == 3 else f"language.{layer}.resid_pre"]
    logits, later = lab.capture(lab.resume, "logits", *["language.*.resid_pre"] * (layer < 3))(
        TREE, ROWS, CFG, layer, resid
    )
    assert torch.equal(logits, pg.forward(TREE, ROWS, CFG))
    assert [*later] == [*(f"language.{i}.resid_pre" for i in range(layer, 3)), "logits"]


@pytest.mark.parametrize("layer", range(4))
def test_a_resumed_run_computes_the_logits_of_chosen_positions(layer):
    _, seen = lab.capture(pg.forward, "language.*.resid_pre", "language.2.resid_post")(TREE, ROWS, CFG)
    resid = seen["language.2.resid_post" if layer == 3 else f"language.{layer}.resid_pre"]
    found = lab.resume(TREE, ROWS, CFG, layer, resid, queries=torch.tensor([[8, 5], [4, 6]]))
    logits = pg.forward(TREE, ROWS, CFG)  # of the text, behind 4 image tokens
    expected = torch.stack([logits[0, [4, 1]], logits[1, [0, 2]]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_run_does_not_resume_at_a_layer_that_is_not_there(layer):
    with pytest.raises(SettingError, match=f"layer is {layer}, expected 0 to 3"):
        lab.resume(TREE, ROWS, CFG, layer, torch.zeros(2, LENGTH, 16))


def test_a_patch_by_resuming_equals_the_edit_of_a_whole_run():
    other = prompt(CFG, [3, 1], [2, 4], seed=5)
    (_, clean), (_, corrupt) = (
        lab.capture(pg.forward, "language.1.resid_pre")(TREE, each, CFG) for each in (ROWS, other)
    )
    where, name = lab.tokens(2, n=LENGTH), "language.1.resid_pre"
    patch = lab.put(corrupt[name], where)
    expected = lab.edit(pg.forward, {name: patch})(TREE, ROWS, CFG)
    torch.testing.assert_close(lab.resume(TREE, ROWS, CFG, 1, patch(clean[name])), expected)


def test_the_lens_of_the_last_layer_is_the_logits():
    logits, seen = lab.capture(pg.forward, "language.*.resid_post")(TREE, ROWS, CFG)
    found = lab.lens(TREE, seen["language.2.resid_post"][:, VISION.tokens :], CFG)
    torch.testing.assert_close(found[ROWS.valid], logits[ROWS.valid])
    assert lab.lens(TREE, seen["language.0.resid_post"], CFG, allowed=range(3)).shape == (2, LENGTH, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_attributions_of_heads_are_what_the_logits_lose_without_them_before_the_final_norm(name):
    """Against an independent reference: the last layer's head is removed, and the norm's scale is kept."""
    cfg, tree = CONFIGS[name], params(CONFIGS[name])
    (logits, cache), seen = lab.capture(partial(pg.prefill, size=1), *lab.PARTS)(tree, ROWS, cfg)
    tokens, at = torch.tensor([[3, 7], [1, 2]]), cache.length - 1
    parts = lab.attribution(tree, seen, cfg, tokens, at)
    assert parts.heads.shape == (2, 3, 4, 2)
    torch.testing.assert_close(parts.total(), logits.gather(1, tokens), rtol=1e-4, atol=1e-5)
    # a run whose last MLP adds nothing, with the scale of the original norm
    last = seen["language.2.resid_post"][torch.arange(2), at]
    without = last - seen["language.2.mlp_out"][torch.arange(2), at]
    scale = torch.rsqrt(last.square().mean(-1, keepdim=True) + cfg.text.eps)
    read = lambda x: torch.einsum("bd,brd->br", x * scale * (1 + tree.language.norm), tree.language.embed[tokens])  # noqa: E731
    if not cfg.text.final_softcap:
        torch.testing.assert_close(parts.total() - parts.mlps[:, 2], read(without), rtol=1e-4, atol=1e-5)
    else:
        share = logits.gather(1, tokens) / read(last)
        torch.testing.assert_close(parts.mlps[:, 2], read(last - without) * share, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["int8", "int4-32"])
def test_attributions_of_quantized_models_add_up(method):
    cfg = replace(CFG, text=replace(CFG.text, width=64, hidden=64, head_dim=32, kv_heads=2))
    tree = pg.quant.quantize(params(cfg), method)
    (logits, cache), seen = lab.capture(partial(pg.prefill, size=1), *lab.PARTS)(tree, ROWS, cfg)
    tokens = torch.tensor([[3, 7], [1, 2]])
    parts = lab.attribution(tree, seen, cfg, tokens, cache.length - 1)
    torch.testing.assert_close(parts.total(), logits.gather(1, tokens), rtol=1e-3, atol=1e-4)


def test_attribution_patching_is_the_slope_of_patching():
    other = ROWS._replace(pixels=ROWS.pixels + 0.01 * torch.randn_like(ROWS.pixels))
    metric = lambda logits: logits[:, -1, 5].sum()  # noqa: E731
    names = ["language.1.z", "language.2.resid_pre"]
    found = lab.attribution_patching(pg.forward, metric, names, (TREE, ROWS, CFG), (TREE, other, CFG))
    _, corrupt = lab.capture(pg.forward, *names)(TREE, other, CFG)
    for name in names:
        patched = metric(lab.edit(pg.forward, {name: lab.put(corrupt[name])})(TREE, ROWS, CFG))
        exact = patched - metric(pg.forward(TREE, ROWS, CFG))
        torch.testing.assert_close(found[name].sum(), exact, rtol=0.05, atol=1e-3)


def test_runs_of_different_lengths_are_not_patched():
    longer = prompt(CFG, [4, 2], [2, 4])
    with pytest.raises(
        SettingError, match=r"language.1.z is float32 \(2, 9, 4, 8\) in one run and float32 \(2, 10, 4, 8"
    ):
        lab.attribution_patching(pg.forward, torch.sum, ["language.1.z"], (TREE, ROWS, CFG), (TREE, longer, CFG))
    found = lab.attribution_patching(
        pg.forward, torch.sum, ["language.1.*"], (TREE, ROWS, CFG), (TREE, prompt(CFG, [3, 1], [2, 4], seed=5), CFG)
    )
    assert "language.1.z" in found
    assert "language.1.mask" not in found


def test_a_run_does_not_resume_from_a_step_of_decode():
    with pytest.raises(SettingError, match="resid has 1 positions, fewer than the 5 of the text"):
        lab.resume(TREE, ROWS, CFG, 1, torch.zeros(2, 1, 16))


def test_the_gradient_of_an_attribution_of_zero_is_finite():
    _, seen = lab.capture(pg.forward, *lab.PARTS)(TREE, ROWS, CFG)
    zeros = {name: torch.zeros_like(x) for name, x in seen.items()}

    def total(seen):
        return lab.attribution(TREE, seen, CFG, torch.tensor([[1], [2]]), torch.tensor([5, 6])).total().sum()

    assert all(x.isfinite().all() for x in grad(total)(zeros).values())


def test_integrated_gradients_of_a_polynomial_are_exact():
    def fn(x):
        return (x[0] ** 3 * x[1]).sum()

    x, base = torch.tensor([2.0, 3.0], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    parts, gap = lab.integrated(fn, x, base, 3)
    assert abs(gap) < 1e-12
    torch.testing.assert_close(parts.sum(), fn(x) - fn(base))
    # x0 = 1 + s, x1 = -1 + 4 s: the integral of 3 x0² x1 over s from 0 to 1
    s = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    torch.testing.assert_close(parts[0], torch.trapezoid(3 * (1 + s) ** 2 * (-1 + 4 * s), s), rtol=1e-8, atol=1e-8)


def test_a_jacobian_predicts_the_effect_of_a_small_edit_and_is_the_gradient_of_each_logit():
    def read(logits):
        return logits[:, -1, 3:6].sum(0)

    found = lab.jacobian(pg.forward, read, "projector", (TREE, ROWS, CFG), chunk=2)
    assert found.shape == (3, 2, VISION.tokens, CFG.text.width)
    shift = torch.randn(2, VISION.tokens, CFG.text.width)
    small = 1e-3
    moved = lab.edit(pg.forward, {"projector": lab.add(small * shift)})(TREE, ROWS, CFG)
    change = (read(moved) - read(pg.forward(TREE, ROWS, CFG))) / small
    torch.testing.assert_close((found * shift).sum((1, 2, 3)), change, rtol=2e-2, atol=2e-3)  # float32 differences
    for i in range(3):
        own = grad(lambda x: read(lab.edit(pg.forward, {"projector": lab.add(x)})(TREE, ROWS, CFG))[i])  # noqa: B023
        torch.testing.assert_close(found[i], own(torch.zeros_like(shift)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 1])
def test_gradients_of_each_example_are_those_of_prompts_of_one_row(chunk):
    name = "language.layers.1.q"

    def loss(leaves, row):
        return pg.forward(pg.tree.replace(TREE, leaves), row, CFG)[0, -1].square().sum()

    leaves = {name: pg.tree.flatten(TREE)[name]}
    found = lab.per_example(loss, leaves, ROWS, chunk)
    for i in range(2):
        row = pg.tree.map(lambda x: x[i : i + 1], ROWS)  # noqa: B023
        torch.testing.assert_close(found[name][i], grad(loss)(leaves, row)[name], rtol=1e-3, atol=1e-5)


def test_a_function_of_rows_has_the_integrated_gradients_and_the_gap_of_each_row():
    x, baseline = torch.randn(3, 4, 5), torch.randn(3, 4, 5)

    def rows(x):
        return x.square().sum((1, 2)) * x[:, 0, 0].sin()

    parts, gap = lab.integrated(rows, x, baseline, nodes=3)
    for i in range(3):
        own, own_gap = lab.integrated(lambda x: rows(x[None])[0], x[i], baseline[i], nodes=3)
        torch.testing.assert_close(parts[i], own)
        torch.testing.assert_close(gap[i], own_gap, rtol=1e-3, atol=1e-4)
    _, each = lab.integrated(lambda x: x.square(), x[0], baseline[0], nodes=2)  # as many numbers as there are inputs
    assert each.abs().max() < 1e-5


@pytest.mark.parametrize("name", ["language.*.z", "language.0.mask"])
def test_a_jacobian_is_of_one_activation_of_floating_point(name):
    with pytest.raises(SettingError, match=r"^'language.*' is not the name of one activation of floating point"):
        lab.jacobian(pg.forward, lambda logits: logits[0, -1, :2], name, (TREE, ROWS, CFG))
