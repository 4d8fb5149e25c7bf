"""The lab: activations are captured and edited by name, under transforms and while generating."""

import inspect
import re
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
def test_names_lists_what_a_call_names_with_its_shapes(name):
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


def test_the_note_has_the_table_of_activations():
    assert lab.table() in (ROOT / "examples/notes/lab.md").read_text()
    named = {word for line in lab.table().splitlines() for word in re.findall(r"`((?:vision|language)\.[\w.]+)`", line)}
    names = paligemma.names(CONFIGS["rope2d"])
    listed = {re.sub(r"\.\d+\.", ".N.", name) for name in names} - {"logits", "projector"}
    assert named == listed


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
