"""Decoding by the kernels equals decoding without them, in whole models. In Triton's interpreter, else on a GPU."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch.utils import _pytree as pytree

import pgfunc as pg
from pgfunc import bench, ops
from pgfunc.config import TextConfig, VisionConfig
from pgfunc.jit import compilation
from pgfunc.kernels import operators, rules, tuning
from pgfunc.quant import lowbit

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device")
profile = os.environ.get("HYPOTHESIS_PROFILE", "dev")
cases = settings(
    max_examples=12 if profile == "deep" else 2 if profile == "ci" else 4, deadline=None, derandomize=profile == "ci"
)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """In the interpreter a program takes as long as any other: few of them, with many rows."""
    if INTERPRETED:
        monkeypatch.setattr(tuning, "tile", lambda *sizes: tuning.Tile(8, 256, 1))


@st.composite
def configs(draw) -> pg.Config:
    heads, kv_heads = draw(st.sampled_from([(4, 1), (4, 2), (3, 3)]))
    newer = {"post_norms": True, "attention_softcap": 5.0, "final_softcap": 3.0, "window": draw(st.integers(1, 9))}
    text = TextConfig(
        vocab=96, width=draw(st.sampled_from([32, 48])), layers=2, heads=heads, kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 24])), hidden=40, query_scale=0.3, **draw(st.sampled_from([{}, newer])),
    )  # fmt: skip
    vision = VisionConfig(width=16, layers=1, heads=2, hidden=16, image_size=28, patch=14)
    return pg.Config(vision, text, image=96)


@cases
@given(configs(), st.integers(1, 12), st.integers(0, 99), st.sampled_from([(), ("*",), ("*.down", "*.q", "*.[kv]")]))
@torch.no_grad()
def test_decoding_by_the_kernels_equals_decoding_without(cfg, tokens, seed, quantized):
    params = bench.random_params(cfg, torch.float32, torch.device(DEVICE), seed)
    if quantized:
        params = pg.quant.quantize(params, "int8", [f"language.{pattern}" for pattern in quantized])
    decode_both_ways(cfg, params, tokens, seed)


@pytest.mark.parametrize("method", ["int4", "int4-32"])
@torch.no_grad()
def test_decoding_in_4_bits_by_the_kernels_equals_decoding_without(method):
    vision = VisionConfig(width=16, layers=1, heads=2, hidden=16, image_size=28, patch=14)
    text = TextConfig(128, width=128, layers=1, heads=2, kv_heads=1, head_dim=64, hidden=128, query_scale=0.1)
    cfg = pg.Config(vision, text, image=128)
    params = bench.random_params(cfg, torch.float32, torch.device(DEVICE))
    small = pg.quant.quantize(params, method)
    rows = pytree.tree_map(
        lambda w: lowbit.ordered(w, rows=True) if isinstance(w, lowbit.Int4) else w, small,
        is_leaf=lambda w: isinstance(w, lowbit.Int4),
    )  # fmt: skip
    decode_both_ways(cfg, rows, 3, 0)


def decode_both_ways(cfg: pg.Config, params: pg.Params, tokens: int, seed: int) -> None:
    prompt = bench.random_prompt(cfg, 1, tokens, torch.device(DEVICE), seed)
    logits, cache = pg.prefill(params, prompt, cfg, 5)
    token = pg.sample.greedy(logits)
    blocks, by_kernels = [], operators.block
    fast_cache = slow_cache = cache
    for step in range(3):
        slow, slow_cache = pg.decode(params, token, slow_cache, cfg)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operators, "block", lambda *given: blocks.append(given) or by_kernels(*given))
            patch.setattr(rules, "on_gpu", lambda x: True)
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            fast, fast_cache = pg.decode(params, token, fast_cache, cfg)
        assert len(blocks) == cfg.text.layers * (step + 1)
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast_cache, slow_cache, rtol=1e-4, atol=1e-4)
        token = pg.sample.greedy(slow)


@torch.no_grad()
def test_compiled_each_layer_is_one_operator_that_writes_the_buffers_where_they_lie(monkeypatch):
    cfg = pg.Config(
        VisionConfig(width=16, layers=1, heads=2, hidden=16, image_size=28, patch=14),
        TextConfig(96, width=32, layers=2, heads=4, kv_heads=1, head_dim=8, hidden=40, query_scale=0.3), image=96,
    )  # fmt: skip
    params = bench.random_params(cfg, torch.float32, torch.device(DEVICE))
    prompt = bench.random_prompt(cfg, 1, 3, torch.device(DEVICE))
    logits, cache = pg.prefill(params, prompt, cfg, 5)
    token = pg.sample.greedy(logits)
    expected, _ = pg.decode(params, token, cache, cfg)
    monkeypatch.setattr(rules, "on_gpu", lambda x: True)
    step, proved, appends = pg.jit(pg.decode, donate="cache"), [], compilation.appends
    monkeypatch.setattr(compilation, "appends", lambda graph: proved.append(appends(graph)) or proved[-1])
    (found, _), code = run_and_get_code(step, params, token, cache, cfg)
    assert proved == [(True, True)], "the operator writes at the cache's length"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert code[0].count("torch.ops.pgfunc.block.default(") == cfg.text.layers
    assert code[0].count("torch.ops.pgfunc.angles.default(") == 1
    assert "copy" not in code[0].partition("def call")[2].partition("def get_args")[0]
    rewinding = pg.jit(lambda cache, length: pg.decode(params, token, pg.rewind(cache, length), cfg), donate="cache")
    rewinding(cache, cache.length)
    assert proved[1:] == [(False, False)], "an argument decides where the operator writes"


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_the_operators_say_what_they_do(quantized):
    def weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        made = [torch.randn(shape, device=DEVICE) for shape in shapes]
        small = [lowbit.quantize(w, "int8") if quantized and w.dim() == 2 else w for w in made]
        return pytree.tree_leaves(small)

    x, (k, v) = torch.randn(1, 1, 16, device=DEVICE), torch.randn(2, 1, 6, 2, 8, device=DEVICE)
    positions = torch.tensor([[4]], device=DEVICE)
    angles = operators.angles(positions, 8, 1e4)
    layer = weights((16,), (32, 16), (16, 16), (16, 16), (16, 32), (16,), (24, 16), (24, 16), (16, 24))
    check = torch.library.opcheck
    check(operators.block, (x, layer, angles, k.clone(), v.clone(), positions[0], 1e-6, 0.3, 0.0, 0))
    check(operators.head, (x, *weights((16,)), weights((96, 16)), 1e-6, False))
    q, begin, end = torch.randn(1, 3, 4, 8, device=DEVICE), torch.zeros_like(positions), positions + 1
    check(operators.prefill_attention, (q, k, v, begin.expand(1, 3), end.expand(1, 3), 0.3, 0.0))
    check(operators.rope_to_cache, (q, q[:, :, :2], q[:, :, 2:], torch.randn(1, 3, 4, device=DEVICE), 2))
    for where in (positions, torch.tensor([[4, 5, 6], [0, 1, 2]], device=DEVICE)):
        check(operators.angles, (where, 8, 1e4))
        torch.testing.assert_close(operators.angles(where, 8, 1e4), ops.angles(where, 8, 1e4))
