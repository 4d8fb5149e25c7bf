"""The lab in compiled code: captured and edited functions are compiled, and an edit's tensors are arguments."""

import pytest
import torch
from cases import CONFIGS, params, prompt, text_model

import pgfunc as pg
from pgfunc import lab
from pgfunc.errors import SettingError
from pgfunc.generate import compiled_decode_step

CFG = CONFIGS["gemma2"]
TREE = params(CFG)


@pytest.fixture
def start():
    """A token and a cache of free slots."""
    logits, cache = pg.prefill(TREE, prompt(CFG, [3, 1], [2, 0]), CFG, 20)
    return pg.sample.greedy(logits), cache


def test_a_captured_step_is_compiled_with_a_donated_cache(start):
    token, cache = start
    captured = lab.capture(pg.decode, "language.1.resid_post", "language.0.pattern")
    step, pure = pg.jit(captured, donate="cache"), cache
    for _ in range(3):
        (logits, cache), seen = step(TREE, token, cache, CFG)
        (expected, pure), pure_seen = captured(TREE, token, pure, CFG)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
        assert seen.keys() == pure_seen.keys()
        slots = pure.slots  # the compiled cache has more
        torch.testing.assert_close(seen["language.0.pattern"][..., :slots], pure_seen["language.0.pattern"])
        torch.testing.assert_close(seen["language.1.resid_post"], pure_seen["language.1.resid_post"])
        token = pg.sample.greedy(expected)
    assert (step.compilations, step.copies) == (1, 1)


def test_one_compilation_serves_all_vectors(start):
    token, cache = start

    def steered(params, token, cache, cfg, vector):
        return lab.edit(pg.decode, {"language.1.resid_post": lab.add(vector)})(params, token, cache, cfg)

    def given(params, token, cache, cfg, tap):
        return pg.decode(params, token, cache, cfg, tap)

    step, with_tap = pg.jit(steered, donate="cache"), pg.jit(given, donate="cache")
    for _ in range(3):
        vector = torch.randn(CFG.text.width)
        expected, _ = steered(TREE, token, cache, CFG, vector)
        torch.testing.assert_close(step(TREE, token, cache, CFG, vector)[0], expected, atol=1e-5, rtol=1e-4)
        tap = lab.edits({"language.1.resid_post": lab.add(vector)})
        torch.testing.assert_close(with_tap(TREE, token, cache, CFG, tap)[0], expected, atol=1e-5, rtol=1e-4)
    assert step.compilations == with_tap.compilations == 1


@pytest.mark.parametrize("donate", ["cache", None])
def test_an_unknown_name_is_an_error_when_it_is_compiled(start, donate):
    token, cache = start
    step = pg.jit(lab.edit(pg.decode, {"language.9.z": lab.put(0.0)}), donate)
    with pytest.raises(
        SettingError, match=r"^'language.9.z' matches no activation of this call; similar: language.2.z"
    ):
        step(TREE, token, cache, CFG)


def test_generation_is_steered_in_compiled_code_that_serves_all_vectors():
    model, before = text_model(), compiled_decode_step.compilations
    for _ in range(3):
        tap = lab.edits({"language.1.resid_post": lab.add(torch.randn(model.cfg.text.width))})
        (found,) = pg.generate(model, [[]], "ab", max_new_tokens=6, tap=tap, compile=True)
        (expected,) = pg.generate(model, [[]], "ab", max_new_tokens=6, tap=tap)
        assert found.tokens == expected.tokens
    assert compiled_decode_step.compilations == before + 1


def test_a_name_that_is_added_to_a_module_does_not_compile_again(start):
    """A notebook adds names to its module in every cell."""
    token, cache = start

    def ablated(params, token, cache, cfg):
        return lab.edit(pg.decode, {"language.1.z": lab.put(0.0, lab.heads(0, n=4))})(params, token, cache, cfg)

    step = pg.jit(ablated, donate="cache")
    for name in ("first_name", "second_name"):
        step(TREE, token, cache, CFG)
        globals()[name] = 1
    assert step.compilations == 1
    expected, _ = ablated(TREE, token, cache, CFG)
    torch.testing.assert_close(step(TREE, token, cache, CFG)[0], expected, atol=1e-5, rtol=1e-4)


def test_integrated_gradients_are_compiled():
    x = torch.tensor([1.0, 2.0])
    parts, _ = pg.jit(lambda x: lab.integrated(lambda y: (y**3).sum(), x, torch.zeros_like(x), 4))(x)
    torch.testing.assert_close(parts, x**3)
