"""Compiled steps on quantized trees return what the pure function returns."""

from dataclasses import replace

import pytest
import torch
from cases import CONFIGS, params, prompt

import pgfunc as pg
from pgfunc import ops
from pgfunc.kernels import rules

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
    rows = prompt(CFG, [4], [0])
    with torch.no_grad():
        _, cache = pg.prefill(weights, rows._replace(pixels=rows.pixels.to(dtype)), CFG, 4)
    pure = cache
    for token in torch.arange(3):
        with torch.no_grad():
            expected, pure = pg.decode(weights, token[None], pure, CFG)
        logits, cache = step(weights, token[None], cache, CFG)
        torch.testing.assert_close(logits, expected, **LIMIT[dtype])
    assert step.compilations == 1


@pytest.mark.parametrize("method", ["int8", "fp8", "int4-64"])
def test_without_a_cpu_kernel_a_compiled_product_equals_the_eager_one(method, monkeypatch):
    monkeypatch.setattr(pg.quant.lowbit, "cpu_kernel_applies", lambda x, w: False)
    w = pg.quant.lowbit.quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), method)
    product = pg.jit(lambda x, w: pg.quant.lowbit.multiply(x, w))
    for rows in (1, 130):
        x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows))
        expected = x @ pg.quant.lowbit.dequantize(w).T
        torch.testing.assert_close(product(x, w), expected, atol=1e-4, rtol=1e-4)  # float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("inputs", "amx"), [(7, False), (300, False), (6144, False), (300, True)])
def test_a_compiled_product_of_one_row_is_exact_with_and_without_amx(inputs, dtype, amx, monkeypatch):
    monkeypatch.setattr(rules, "AMX", amx)
    generator = torch.Generator().manual_seed(inputs)
    w = (torch.randn(40, inputs, generator=generator) * inputs**-0.5).to(dtype)
    x, bias = torch.randn(1, 1, inputs, generator=generator).to(dtype), torch.randn(40, generator=generator).to(dtype)
    assert rules.one_row_on_cpu(x, w, bias) is not amx
    product = pg.jit(ops.linear)(x, w, bias)
    assert product.dtype == dtype
    exact = x.double() @ w.double().T + bias.double()
    # the product and its sum with the bias are each rounded to the dtype; partial sums, of about 1, to float32
    limit = 2 * torch.finfo(dtype).eps + 8 * 2.0**-24 * inputs**0.5
    torch.testing.assert_close(product.double(), exact, atol=limit, rtol=limit)
