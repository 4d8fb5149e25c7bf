"""The lab: edits are values, unknown names are errors, selections are masks, readings equal what they stand for."""

import inspect
import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import CONFIGS, VISION, params, prompt, text_model
from prose import ROOT
from torch.func import grad, jvp, vmap

import pgfunc as pg
from pgfunc import lab, paligemma, siglip_dual
from pgfunc.config import SiglipTextConfig
from pgfunc.errors import SettingError
from pgfunc.train.finetune import recomputed

CFG = CONFIGS["gemma2"]
TREE = params(CFG)
ROWS = prompt(CFG, [3, 1], [2, 4])
LENGTH = VISION.tokens + 5


# --- capture, edit and names


@pytest.mark.parametrize("name", CONFIGS)
def test_names_lists_what_a_call_names_with_its_shapes(name, monkeypatch):
    cfg, tree = CONFIGS[name], params(CONFIGS[name])
    listed = lab.names(pg.forward, tree, ROWS, cfg)
    _, seen = lab.capture(pg.forward, "*")(tree, ROWS, cfg)
    assert [*listed.items()] == [(name, tuple(x.shape)) for name, x in seen.items()]
    assert listed["language.1.pattern"].sizes == {"b": 2, "n": 4, "t": LENGTH, "s": LENGTH}
    assert repr(listed["language.0.k"]) == f"b=2 t={LENGTH} k={cfg.text.kv_heads} h=8"
    assert [*lab.names(partial(pg.prefill, size=3), tree, ROWS, cfg)] == [*listed]


def test_names_computes_nothing_even_for_the_largest_model():
    cfg = pg.PUBLISHED["paligemma2-28b-896"]
    rows = pg.tree.map(lambda x: x.to("meta"), prompt(CFG, [3], [2]))
    rows = rows._replace(pixels=torch.empty(1, 1, 3, 896, 896, device="meta"))
    listed = lab.names(pg.forward, paligemma.abstract(cfg), rows, cfg)
    assert listed["language.45.pattern"].sizes == {"b": 1, "n": 32, "t": 4101, "s": 4101}


def test_a_name_that_is_not_the_packages_has_numbered_axes():
    def own(x, tap):
        return tap("mine", x)

    assert repr(lab.names(own, torch.zeros(2, 3))["mine"]) == "axis0=2 axis1=3"


@pytest.mark.parametrize(("name", "similar"), [
    ("language.1.resid_pots", "language.1.resid_post"), ("vision.0.patern", "vision.0.pattern"), ("logit", "logits"),
])  # fmt: skip
def test_an_unknown_name_is_an_error_with_similar_names(name, similar):
    for fn in (lab.capture(pg.forward, name), lab.edit(pg.forward, {name: lab.put(0.0)})):
        with pytest.raises(SettingError, match=f"^{name!r} matches no activation of this call; similar: {similar}"):
            fn(TREE, ROWS, CFG)


def test_an_activation_that_the_call_does_not_compute_is_unknown():
    _, cache = pg.prefill(TREE, ROWS, CFG, 3)
    with pytest.raises(SettingError, match=r"'vision.0.z' matches no activation of this call; similar: language.0.z"):
        lab.capture(pg.decode, "vision.0.z")(TREE, torch.tensor([1, 2]), cache, CFG)
    with pytest.raises(SettingError, match=r"'vision.0.rot_q' matches no activation"):  # its positions are learned
        lab.capture(pg.forward, "vision.0.rot_q")(TREE, ROWS, CFG)


@pytest.mark.parametrize(("change", "wrong"), [
    (lambda x: x[:, 1:], f"float32 (2, {LENGTH - 1}, 16)"), (lambda x: x.double(), f"float64 (2, {LENGTH}, 16)"),
])  # fmt: skip
def test_an_edit_that_changes_shape_or_dtype_is_an_error(change, wrong):
    with pytest.raises(SettingError) as error:
        lab.edit(pg.forward, {"language.1.resid_mid": change})(TREE, ROWS, CFG)
    assert str(error.value) == f"the edit of language.1.resid_mid returns {wrong}, expected float32 (2, {LENGTH}, 16)"


def test_an_activation_that_passes_twice_is_an_error():
    def twice(tree, rows, cfg, tap):
        return [pg.forward(tree, rows, cfg, tap) for _ in range(2)]

    with pytest.raises(SettingError, match="logits passes twice in this call: capture a function that computes it"):
        lab.capture(twice, "logits")(TREE, ROWS, CFG)
    first, second = lab.edit(twice, {"logits": lab.put(0.0)})(TREE, ROWS, CFG)
    assert not first.any()
    assert not second.any()


def test_edits_of_one_name_are_applied_in_order_and_patterns_match_many():
    changes = {"language.*.resid_post": lab.put(1.0), "language.2.*": lambda x: 2 * x if x.is_floating_point() else x}
    _, seen = lab.capture(lab.edit(pg.forward, changes), "language.*.resid_post")(TREE, ROWS, CFG)
    assert [float(x.unique()) for x in seen.values()] == [1.0, 1.0, 2.0]


def test_an_edit_that_returns_no_tensor_is_an_error():
    with pytest.raises(SettingError, match="the edit of logits returns NoneType, expected float32"):
        lab.edit(pg.forward, {"logits": lambda x: None})(TREE, ROWS, CFG)


def test_tap_is_passed_by_name():
    def own(params, tap, cfg, *, scale=1.0):
        return scale * pg.forward(params, ROWS, cfg, tap)

    parameters = inspect.signature(lab.capture(own, "logits")).parameters
    assert str(inspect.Signature(parameters.values())).startswith("(params, *, cfg, scale=1.0, tap=<function identity")
    logits, _ = lab.capture(own, "logits")(TREE, cfg=CFG, scale=2.0)
    assert torch.equal(logits, 2 * pg.forward(TREE, ROWS, CFG))
    assert "tap" in inspect.signature(lab.edit(pg.decode, {})).parameters


def test_names_needs_all_tensors_as_arguments():
    for fn, args in ((partial(pg.forward, TREE), (ROWS, CFG)), (lambda tap: pg.forward(TREE, ROWS, CFG, tap), ())):
        with pytest.raises(SettingError, match="names needs every tensor as an argument; the function closes over"):
            lab.names(fn, *args)


def test_a_captured_function_keeps_its_name_and_its_arguments():
    fn = lab.capture(lab.edit(pg.decode, {"logits": lab.put(0.0)}), "logits")
    assert fn.__name__ == "decode"
    _, cache = pg.prefill(TREE, ROWS, CFG, 3)
    (logits, after), seen = fn(params=TREE, token=torch.tensor([1, 2]), cache=cache, cfg=CFG)
    assert not logits.any()
    assert torch.equal(seen["logits"][:, 0], logits)
    assert torch.equal(after.length, cache.length + 1)


def test_activations_of_the_dual_encoder_are_captured_too():
    cfg = siglip_dual.SiglipConfig(
        VISION, SiglipTextConfig(vocab=32, width=24, layers=2, heads=2, hidden=32, positions=6, out=24)
    )
    tree = siglip_dual.init(cfg)
    vectors, seen = lab.capture(pg.dual.embed_texts, "text.1.pattern")(tree, torch.ones(3, 6, dtype=torch.long), cfg)
    assert vectors.shape == (3, 24)
    torch.testing.assert_close(seen["text.1.pattern"].sum(-1), torch.ones(3, 2, 6))


# --- edits as values


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


# --- transforms


def steered(amount: torch.Tensor) -> torch.Tensor:
    return lab.edit(pg.forward, {"language.1.resid_post": lab.add(amount)})(TREE, ROWS, CFG)[:, -1, 5].sum()


def test_edits_go_through_grad_jvp_and_vmap():
    amount, step = torch.zeros(CFG.text.width), torch.randn(CFG.text.width)
    slope = grad(steered)(amount) @ step
    torch.testing.assert_close(jvp(steered, (amount,), (step,))[1], slope, rtol=1e-3, atol=1e-5)
    difference = (steered(1e-2 * step) - steered(-1e-2 * step)) / 2e-2
    torch.testing.assert_close(difference, slope, rtol=3e-2, atol=1e-3)
    many = torch.randn(3, CFG.text.width)
    torch.testing.assert_close(vmap(steered)(many), torch.stack([*map(steered, many)]), rtol=1e-4, atol=1e-5)


def test_captured_activations_have_gradients():
    def size(tree):
        _, seen = lab.capture(pg.forward, "language.1.z")(tree, ROWS, CFG)
        return seen["language.1.z"].square().sum()

    assert grad(size)(TREE).language.layers[1].v.abs().sum() > 0
    assert not grad(size)(TREE).language.layers[2].v.any()


def test_activations_that_a_backward_pass_recomputes_are_not_captured_again():
    tree = pg.tree.map(lambda leaf: leaf.detach().requires_grad_(), TREE)
    capture = lab.capture(pg.forward, "language.1.z")
    grads = []
    for options in ({}, {"wrap": recomputed}):
        logits, seen = capture(tree, ROWS, CFG, **options)
        assert [*seen] == ["language.1.z"]
        grads.append(torch.autograd.grad(logits[..., 0].sum(), tree.language.layers[0].q)[0])
    torch.testing.assert_close(*grads)


# --- readings


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


# --- while generating


def test_generation_is_steered_and_equals_a_loop_of_edited_calls():
    model, vector = text_model(), torch.randn(16)
    changes = {"language.1.resid_post": lab.add(vector)}
    (found,) = pg.generate(model, [[]], "ab", max_new_tokens=5, tap=lab.edits(changes))
    prompt = pg.prepare(model, [[]], "ab")
    logits, cache = lab.edit(pg.prefill, changes)(model.params, prompt, model.cfg, 5)
    expected = []
    for _ in range(5):
        expected.append(int(pg.sample.greedy(logits)))
        logits, cache = lab.edit(pg.decode, changes)(model.params, torch.tensor(expected[-1:]), cache, model.cfg)
    assert found.tokens == expected
    assert lab.edit(pg.generate, changes)(model, [[]], "ab", max_new_tokens=5) == [found]
    assert "".join(pg.stream(model, [], "ab", max_new_tokens=5, tap=lab.edits(changes))) == found.text
    assert "".join(lab.edit(pg.stream, changes)(model, [], "ab", max_new_tokens=5)) == found.text
    assert found != pg.generate(model, [[]], "ab", max_new_tokens=5)[0]


def test_scores_are_steered():
    model = text_model()
    changes = {"language.2.resid_post": lab.put(0.0)}
    found = pg.score(model, [[]], "ab", ["a", "b"], tap=lab.edits(changes))
    assert torch.equal(found, lab.edit(pg.score, changes)(model, [[]], "ab", ["a", "b"]))
    torch.testing.assert_close(found[0, 0], found[0, 1])  # without activations, all tokens have the same logit
    assert not torch.allclose(*pg.score(model, [[]], "ab", ["a", "b"])[0])


def test_in_a_loop_unknown_names_are_errors_and_nothing_is_captured():
    model = text_model()
    for tap in (lab.edits({"language.8.z": lab.put(0.0)}), lab.edits({"logits": lab.put(0.0)}, lab.edits({"x": abs}))):
        for run in (pg.generate, lambda *args, **kw: [*pg.stream(*args, **kw)]):
            with pytest.raises(SettingError, match="matches no activation"):
                run(model, [[]] if run is pg.generate else [], "ab", max_new_tokens=2, tap=tap)
    for fn, images in ((pg.generate, [[]]), (pg.stream, [])):
        with pytest.raises(SettingError, match=r"a loop computes each activation many times: capture pg.prefill"):
            lab.capture(fn, "logits")(model, images, "ab", max_new_tokens=2)
    with pytest.raises(SettingError, match=r"'vision.0.rot_q' matches no activation"):  # its positions are learned
        lab.edit(pg.generate, {"vision.0.rot_q": lab.put(0.0)})(model, [[]], "ab", max_new_tokens=2)


# --- pictures and tables


def test_the_note_has_the_table_of_activations():
    assert lab.table() in (ROOT / "examples/notes/lab.md").read_text()
    named = {word for line in lab.table().splitlines() for word in re.findall(r"`((?:vision|language)\.[\w.]+)`", line)}
    names = paligemma.names(CONFIGS["rope2d"])
    listed = {re.sub(r"\.\d+\.", ".N.", name) for name in names} - {"logits", "projector"}
    assert named == listed


@pytest.mark.parametrize("side", [224, 896])
def test_a_heat_map_shows_the_values_of_its_patches(side):
    values = torch.randn(16, generator=torch.Generator().manual_seed(0))
    drawing = lab.heat(torch.zeros(3, side, side), values, "title")
    assert drawing.data.tolist() == values.double().reshape(4, 4).tolist()
    _, right, _ = drawing.figure.axes
    (gray, colours) = right.get_images()
    assert gray.get_extent() == [-0.5, side - 0.5, side - 0.5, -0.5]
    assert colours.get_extent() == [0, side, side, 0]
    assert colours.norm.vmin == -colours.norm.vmax == -values.abs().max().item()
    assert drawing._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(SettingError, match="there are 15 values, which is not a square grid of patches"):
        lab.heat(torch.zeros(3, side, side), values[:15])


def test_values_of_one_sign_begin_at_white_and_a_limit_is_kept():
    (_, colours) = lab.heat(torch.zeros(3, 28, 28), torch.ones(4), limit=2.0).figure.axes[1].get_images()
    assert (colours.norm.vmin, colours.norm.vmax) == (0, 2)


def test_a_grid_has_its_first_row_at_the_bottom_and_labels():
    drawing = lab.grid(torch.tensor([[1.0, -2.0], [0.5, torch.nan]]), columns=["a", "\n"], title="t")
    axes = drawing.figure.axes[0]
    assert axes.get_ylim() == (-0.5, 1.5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "↵"]
    assert {text.get_text() for text in axes.texts} == {"1", "-2", "0.5", "nan"}
    assert axes.get_ylabel() == "layer"
    wide = lab.grid(torch.zeros(3, 1000)).figure.axes[0]
    assert len(wide.get_xticks()) <= 24
    assert not wide.texts
    with pytest.raises(SettingError, match="the table is 3 x 0, which leaves nothing to draw"):
        lab.grid(torch.zeros(3, 0))
    with pytest.raises(SettingError, match="there are 3 labels for 2 columns"):
        lab.grid(torch.zeros(1, 2), columns=["a", "b", "c"])


def test_a_strip_has_each_token_with_its_probability():
    words = [" a", "\n", " ", "\x1b[0m", *"0123456789"]
    drawing = lab.strip(words, torch.linspace(0, 1, 14))
    assert drawing.data.tolist() == torch.linspace(0, 1, 14).double().tolist()
    texts = [text.get_text() for text in drawing.figure.axes[0].texts]
    assert texts[::2] == [" a", "↵", "␣", "?[0m", *"0123456789"]
    assert texts[1::2] == [f"{x:.2f}" for x in torch.linspace(0, 1, 14)]
    with pytest.raises(SettingError, match=r"there are 2 tokens and probabilities of shape \(3,\)"):
        lab.strip(["a", "b"], torch.zeros(3))


def test_pictures_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingError, match=r'pictures need matplotlib, .* pip install "pgfunc\[plot\]"'):
        lab.grid(torch.zeros(1, 1))
