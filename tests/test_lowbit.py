"""Matrices in 8 and 4 bits: what the bytes mean is written out here in numpy and float64, one output at a time."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from pgfunc import ops
from pgfunc.quant import lowbit
from pgfunc.quant.lowbit import BLOCK, GROUPS, Float8, Int4, Int8

ROWS = " in rows"  # 4 bits in the order for GPUs
METHODS = [*sorted(GROUPS), *(f"{method}{ROWS}" for method in sorted(GROUPS) if GROUPS[method])]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
methods, dtypes, seeds = st.sampled_from(METHODS), st.sampled_from(DTYPES), st.integers(0, 2**31)


def place(w: torch.Tensor) -> torch.Tensor:
    """The place of each row."""
    return torch.arange(len(w))[:, None]


KINDS = {
    "normal": lambda w: w * 0.05,
    "off centre": lambda w: w * 0.01 + 3,
    "outliers": lambda w: torch.where(w > 2.5, w * 1000, w),
    "tiny": lambda w: w * 1e-6,
    "subnormal": lambda w: w * 1e-41,
    "large": lambda w: w * 1e3,
    "zeros and constants": lambda w: w * (place(w) % 3 == 0) + place(w) % 2,
    "one number": lambda w: torch.zeros_like(w).index_fill(1, torch.tensor([7]), -1.0),
}  # fmt: skip


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def quantized(w: torch.Tensor, method: str):
    """A matrix in few bits, in either order."""
    small = lowbit.quantize(w, method.removesuffix(ROWS))
    return lowbit.ordered(small, rows=True) if method.endswith(ROWS) else small


def meaning(w) -> np.ndarray:
    """The weights that a quantized matrix stands for."""
    return grid(w)[0]


def grid(w) -> tuple[np.ndarray, np.ndarray]:
    """The weights and, for each, the step between levels."""
    scale = w.scale.double().numpy()
    if isinstance(w, Float8):  # sign, 4 bits of an exponent, 3 of a mantissa; where the exponent is 0 as where it is 1
        byte = w.values.view(torch.uint8).numpy().astype(np.int64)
        exponent, mantissa = byte >> 3 & 15, byte & 7
        step = 2.0 ** (np.maximum(exponent, 1) - 10) * scale[:, None]
        return np.where(byte >> 7, -1, 1) * (mantissa + 8 * (exponent > 0)) * step, step
    values = w.values.numpy()
    if isinstance(w, Int8):
        return values * scale[:, None], np.broadcast_to(scale[:, None], values.shape)
    blocked = values.ndim == 3
    scale = scale if blocked else scale.swapaxes(0, 1)
    size = w.inputs // len(scale)
    weights, steps = [], []
    for output in range(scale.shape[1]):
        i = np.arange(w.inputs)
        group, at = i // size, i % size
        if blocked:
            byte, high = values[output // 64, :, output % 32], output % 64 >= 32
        else:
            byte, high = values[output, group * size // 2 + at % (size // 2)], at >= size // 2
        level = np.where(high, byte >> 4, byte & 15)
        steps.append(scale[group, output, 0])
        weights.append((level.astype(np.float64) - 8) * steps[-1] + scale[group, output, 1])
    return np.stack(weights), np.stack(steps)


@pytest.mark.parametrize("kind", KINDS)
@given(seeds, methods, dtypes)
def test_no_weight_moves_by_more_than_half_a_step(kind, seed, method, dtype):
    w = KINDS[kind](normal(seed, 2 * BLOCK, 256)).to(dtype)
    found, step = grid(quantized(w, method))
    assert (np.abs(found - w.double().numpy()) <= step / 2).all()  # exact: float64 holds the difference of the two


@given(seeds, st.sampled_from(["int4", "int4-64", "int4-32"]), dtypes)
def test_either_order_is_the_other_to_the_bit(seed, method, dtype):
    w = lowbit.quantize(normal(seed, 2 * BLOCK, 256, dtype=dtype), method)
    rows = lowbit.ordered(w, rows=True)
    assert w.blocked
    assert not rows.blocked
    assert lowbit.method(rows) == lowbit.method(w) == method
    assert np.array_equal(meaning(rows), meaning(w))
    back = lowbit.to_device_layout(rows, torch.device("cpu"))
    assert torch.equal(back.values, w.values)
    assert torch.equal(back.scale, w.scale)
    assert lowbit.ordered(rows, rows=True) is rows
    for each in (w, rows, back):
        assert all(part.is_contiguous() for part in each), "as kernels ask for"


@given(seeds, methods, dtypes)
def test_dequantized_weights_are_what_the_bytes_mean_rounded_once(seed, method, dtype):
    w = quantized(normal(seed, BLOCK, 256, dtype=dtype), method)
    found = lowbit.dequantize(w)
    assert found.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 2.0**-23)  # a sum is made in float32 before it is rounded
    torch.testing.assert_close(found.double(), torch.from_numpy(meaning(w)), rtol=eps, atol=1e-7)


@given(seeds, methods, st.sampled_from([torch.float32, torch.float64]))
@example(140, "int4", torch.float32)  # a zero of 3e-5, whose neighbour is nearer than the weights' last bits
def test_what_was_quantized_once_does_not_move_again(seed, method, dtype):
    # in bf16 and f16 the weights between the two are rounded once more, and a scale may change by its last bit
    once = quantized(normal(seed, BLOCK, 256, dtype=dtype), method)
    again = quantized(lowbit.dequantize(once), method)
    assert torch.equal(again.values.view(torch.uint8), once.values.view(torch.uint8))
    if isinstance(once, Int4):
        largest = lowbit.dequantize(once).abs().max().item()
        steps, zeros = ([w.scale[..., part] for w in (again, once)] for part in (0, 1))
        assert torch.equal(*steps)
        torch.testing.assert_close(*zeros, rtol=0, atol=largest * torch.finfo(dtype).eps)  # the weights' own rounding
    else:
        assert torch.equal(again.scale, once.scale)


@given(seeds, methods)
def test_quantization_halves_and_quarters_bytes_and_the_error_is_that_of_rounding(seed, method):
    w = normal(seed, BLOCK, 1024, dtype=torch.bfloat16)
    small = quantized(w, method)
    size = small.values.nbytes / w.nbytes
    assert size == (0.25 if GROUPS[method.removesuffix(ROWS)] else 0.5)
    error = (lowbit.dequantize(small) - w).float().norm() / w.float().norm()
    # steps of about 2 · 3.3 / 254 and 2 · 2.6 / 15 standard deviations, and a 12th of a number, which round by
    # 1/sqrt(12) of them
    assert error < {"int8": 0.012, "fp8": 0.03}.get(method, 0.12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_constants_stay_what_they_are(method, dtype):
    w = torch.zeros(BLOCK, 256, dtype=dtype)
    assert torch.equal(lowbit.dequantize(quantized(w, method)), w)
    if GROUPS[method.removesuffix(ROWS)]:
        for number in (1.0, -0.03125, 240.0):  # bfloat16 holds them
            assert torch.equal(lowbit.dequantize(quantized(w + number, method)), w + number)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3e38, 3.4e38])
def test_levels_of_numbers_that_are_not_finite_or_too_large_are_not_finite(method, number):
    w = normal(0, BLOCK, 128)
    assert lowbit.finite(quantized(w, method))
    w[3, 5], w[3, 6] = number, -number
    small = quantized(w, method)
    if number != 3.4e38:
        assert lowbit.finite(small) == (number == 3e38)
    assert lowbit.dequantize(small).isfinite().all() or not lowbit.finite(small)


def test_both_ends_of_a_grid_must_be_finite():
    values = torch.zeros(1, 32, 32, dtype=torch.uint8)
    for zero, ends in ((0.0, True), (-1e38, False), (1e38, False)):
        scale = torch.tensor([4e37, zero]).expand(1, BLOCK, 2)
        assert lowbit.finite(Int4(values, scale)) == ends


def check_product(x: torch.Tensor, w, found: torch.Tensor) -> None:
    """Within the rounding of weights and results to the dtype, and of a float32 sum in any order: parts of the sum of
    magnitudes, not of the sum."""
    assert found.dtype == x.dtype
    wide, weights = x.double().numpy(), meaning(w)
    part = 2 * torch.finfo(x.dtype).eps + (x.shape[-1] + 1) * 2.0**-24
    limit = part * (np.abs(wide) @ np.abs(weights).T)
    assert (np.abs(found.double().numpy() - wide @ weights.T) <= limit).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (1,), (2, 1), (16,), (17,), (2, 64), (130,), (0,), (3, 0)], ids=str)
def test_linear_multiplies_by_what_the_bytes_mean(method, dtype, batch):
    x, w = normal(1, *batch, 256, dtype=dtype), quantized(normal(2, 3 * BLOCK, 256, dtype=dtype), method)
    check_product(x, w, ops.linear(x, w))
    bias = normal(3, 3 * BLOCK, dtype=dtype)
    assert torch.equal(ops.linear(x, w, bias), ops.linear(x, w) + bias)


@given(
    seeds, st.sampled_from(["int8", "fp8"]), dtypes, st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 5, 20])
)
def test_8_bits_take_any_size(seed, method, dtype, outputs, inputs, rows):
    x, w = (
        normal(seed, rows, inputs, dtype=dtype),
        lowbit.quantize(normal(seed + 1, outputs, inputs, dtype=dtype), method),
    )
    check_product(x, w, ops.linear(x, w))


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_that_is_cut_in_pieces_gives_the_same(method):
    w = quantized(normal(2, 2 * BLOCK, 2**15), method)
    pieces = list(lowbit.pieces(w))
    assert len(pieces) == 2, "2**21 weights a piece"
    assert torch.equal(torch.cat([lowbit.dequantize(piece) for piece in pieces]), lowbit.dequantize(w))
    x = normal(1, 130, 2**15)
    assert torch.equal(ops.linear(x, w)[:, BLOCK:], ops.linear(x, pieces[1]))


@pytest.mark.parametrize("method", METHODS)
def test_products_are_differentiable_in_both_modes_and_map_over_matrices(method):
    x, w = normal(1, 3, 256), quantized(normal(2, BLOCK, 256), method)
    plain, weight = lowbit.dequantize(w), normal(3, 3, BLOCK)
    limit = {"atol": 1e-4, "rtol": 1e-5}  # float32, sums of 256

    def value(x):
        return (ops.linear(x, w) * weight).sum()

    (slope,) = torch.autograd.grad(value(x := x.requires_grad_()), x)
    torch.testing.assert_close(slope, weight @ plain, **limit)
    torch.testing.assert_close(torch.func.grad(value)(x.detach()), weight @ plain, **limit)
    along = normal(4, 3, 256)
    expected = (along @ plain.T * weight).sum()
    torch.testing.assert_close(torch.func.jvp(value, (x.detach(),), (along,))[1], expected, **limit)
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(value(forward_ad.make_dual(x.detach(), along))).tangent
        torch.testing.assert_close(moved, expected, **limit)
    several = [w, quantized(normal(5, BLOCK, 256), method)]
    stacked = type(w)(*(torch.stack(parts) for parts in zip(*several, strict=True)))
    mapped = torch.func.vmap(ops.linear, in_dims=(None, 0))(x.detach(), stacked)
    for found, each in zip(mapped, several, strict=True):
        torch.testing.assert_close(found, x.detach() @ lowbit.dequantize(each).T, **limit)
    scale = w.scale.clone().requires_grad_()
    assert torch.autograd.grad(ops.linear(x.detach(), w._replace(scale=scale)).sum(), scale)[0].any()


def test_kernels_serve_where_they_can_and_nowhere_else():
    x, w = normal(1, 2, 256, dtype=torch.bfloat16), lowbit.quantize(normal(2, BLOCK, 256, dtype=torch.bfloat16), "int8")
    assert lowbit.cpu_kernel_applies(x, w)
    assert not lowbit.cpu_kernel_applies(x.float(), w), "dtypes differ"
    assert not lowbit.cpu_kernel_applies(x[:, :250], w), "a row that the kernel would read past"
    assert not lowbit.cpu_kernel_applies(x.double(), w._replace(scale=w.scale.double())), "float64 has no kernel"
    assert not lowbit.cpu_kernel_applies(x.clone().requires_grad_(), w)
    with torch.no_grad():
        assert lowbit.cpu_kernel_applies(x.clone().requires_grad_(), w)
    seen = []
    torch.func.vmap(lambda row: seen.append(lowbit.cpu_kernel_applies(row, w)) or row)(x)
    assert seen == [False]


@given(seeds, st.sampled_from(["int8", "fp8"]), dtypes)
def test_looking_up_makes_the_rows_of_the_table(seed, method, dtype):
    table = lowbit.quantize(normal(seed, 20, 12, dtype=dtype), method)
    ids = torch.randint(0, 20, (2, 3), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ops.embedding(ids, table), lowbit.dequantize(table)[ids])
    assert prod(ops.embedding(ids[:0], table).shape) == 0


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="another CPU packs differently")
def test_the_layout_is_that_of_pytorch_on_avx512():
    assert lowbit.BLOCKED
