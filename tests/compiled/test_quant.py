"""Compiled steps on quantized trees mean what the pure function means."""

from dataclasses import replace

import pytest
import torch
from cases import CONFIGS, params, prompt

import pgfunc as pg

TEXT = replace(CONFIGS["gemma2"].text, width=64, heads=2, kv_heads=1, head_dim=64, hidden=128, layers=1)
CFG = replace(CONFIGS["gemma2"], text=TEXT)
LIMIT = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-4},
    torch.bfloat16: {"atol": 0.1, "rtol": 0.02},
}  # sums in another order


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("method", ["int8", "int4-64"])
def test_a_compiled_decode_of_a_quantized_tree_equals_the_pure_one(method, dtype):
    weights = pg.quant.quantize(params(CFG, dtype=dtype), method)
    step = pg.jit(pg.decode, donate="cache")
    asked = prompt(CFG, [4], [0])
    with torch.no_grad():
        _, cache = pg.prefill(weights, asked._replace(pixels=asked.pixels.to(dtype)), CFG, 4)
    own = cache
    for token in torch.arange(3):
        with torch.no_grad():
            expected, cache = pg.decode(weights, token[None], cache, CFG)
        found, own = step(weights, token[None], own, CFG)
        torch.testing.assert_close(found, expected, **LIMIT[dtype])
    assert step.compilations == 1


@pytest.mark.parametrize("method", ["int8", "int4-64"])
def test_a_compiled_product_equals_the_plain_one_where_no_kernel_serves(method, monkeypatch):
    monkeypatch.setattr(pg.quant.lowbit, "kernel_serves", lambda x, w: False)
    w = pg.quant.lowbit.quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), method)
    product = pg.jit(lambda x, w: pg.quant.lowbit.multiply(x, w))
    for rows in (1, 130):
        x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows))
        expected = x @ pg.quant.lowbit.dequantize(w).T
        torch.testing.assert_close(product(x, w), expected, atol=1e-4, rtol=1e-4)  # float32
