"""Each kernel against its formula in float64, with a bound for each element; nothing unwritten is read or left.

On the CPU in Triton's interpreter (TRITON_INTERPRET=1), else on a GPU. Each tensor that is made empty is full of nan.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

from pgfunc.errors import SettingError
from pgfunc.kernels import calls, reference, tuning
from pgfunc.kernels.tuning import Chunk, Share, Tile
from pgfunc.quant import lowbit

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device")

profile = os.environ.get("HYPOTHESIS_PROFILE", "dev")
# on a GPU every new size is compiled
cases = settings(
    max_examples=40 if profile == "deep" else 4 if profile == "ci" else 15, deadline=None, derandomize=profile == "ci"
)

if INTERPRETED:
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        """The interpreter keeps bf16 as its bits, and would multiply those."""
        a, b = (
            TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot
    patch_tensors = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        """A bound of a loop is an array of one element there, which numpy no longer takes for a number."""
        patch_tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


@pytest.fixture(autouse=True, scope="module")
def _poison() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is made empty: nan, or the largest integer
    yield
    torch.use_deterministic_algorithms(False)


seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
widths = st.sampled_from([1, 7, 16, 36, 64, 100, 144])
outputs = st.integers(1, 21)
kinds = st.sampled_from(["", *lowbit.GROUPS])
tiles = st.builds(
    Tile, st.sampled_from([1, 2, 8]), st.sampled_from([16, 32, 256]), st.sampled_from([1, 4]), st.booleans()
)
chunks = st.builds(
    Chunk, st.sampled_from([16, 32]), st.sampled_from([16, 64]), st.sampled_from([1, 4]), st.sampled_from([2, 4])
)
EPS = 1e-6
FLOAT32 = 2.0**-24  # half of the distance of neighbours, relative


def normal(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def wide(x: torch.Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


@contextmanager
def cut(name: str, share) -> Iterator[None]:
    """Let the work be shared out so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, name, lambda *sizes: share)
        yield


def unit(dtype: torch.dtype) -> float:
    """The relative error of a rounding to the dtype. The interpreter cuts bf16 off where a GPU rounds to nearest."""
    return torch.finfo(dtype).eps / (1 if INTERPRETED and dtype == torch.bfloat16 else 2)


def within(found: torch.Tensor, expected: np.ndarray, error: np.ndarray) -> None:
    """Equal but for the error before the last rounding, and that rounding."""
    info = torch.finfo(found.dtype)
    limit = error + unit(found.dtype) * (np.abs(expected) + error) + info.smallest_normal * info.eps
    over = np.abs(wide(found) - expected) / limit
    assert (over <= 1).all(), f"{over.max()} times the limit"  # and no nan


def normed(x: torch.Tensor, scale: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The normalized vector, and how wrong it may be in float32, where x and x · scale are added."""
    x, scale = wide(x) / np.sqrt(np.square(wide(x)).mean() + EPS), wide(scale)
    return x * (1 + scale), np.abs(x) * (1 + np.abs(scale)) * (len(x) + 16) * FLOAT32


def matrix(seed: int, dtype: torch.dtype, o: int, i: int, kind: str) -> calls.Matrix:
    """A matrix that keeps lengths, more or less."""
    if not (group := lowbit.GROUPS.get(kind)):
        w = normal(seed, dtype, o, i) * i**-0.5
        return lowbit.quantize(w, kind) if kind else w  # pyright: ignore[reportReturnType]
    whole = lowbit.quantize(normal(seed, dtype, -(-o // lowbit.BLOCK) * lowbit.BLOCK, i) * i**-0.5, kind)
    w = lowbit.ordered(whole, rows=True)  # pyright: ignore[reportArgumentType]
    assert w.group == group
    return w._replace(values=w.values[:o], scale=w.scale[:o])


def width(i: int, kind: str) -> int:
    """So many inputs, or as many more as the kind needs."""
    group = lowbit.GROUPS.get(kind) or 1
    return -(-i // group) * group


def exact(w: calls.Matrix) -> np.ndarray:
    """The matrix in float64; in the dtype of the scales it would be rounded."""
    return wide(w if isinstance(w, torch.Tensor) else lowbit.dequantize(w._replace(scale=w.scale.double())))


def product(w: calls.Matrix, x: np.ndarray, wrong: float | np.ndarray = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """w · x, and how wrong a float32 sum of it may be in any order, where the elements of x may be so wrong."""
    terms, rounded = np.abs(exact(w)), len(x) + 1
    if isinstance(w, lowbit.Int4):  # 128 and a level stand for a weight, and what is too much is subtracted, with a sum
        terms, rounded = terms + 280 * np.abs(wide(w.scale[..., 0])).repeat(w.group, 1), len(x) + 16
    return exact(w) @ x, terms @ (np.abs(x) * rounded * FLOAT32 + wrong)


@cases
@given(seeds, dtypes, widths, outputs, tiles, kinds)
def test_matvec_and_its_sum_with_a_residual(seed, dtype, i, o, tile, kind):
    i = width(i, kind)
    x, w, residual = normal(seed, dtype, i), matrix(seed + 1, dtype, o, i, kind), normal(seed + 2, dtype, o)
    expected, error = product(w, wide(x))
    with cut("tile", tile):
        within(calls.matvec(x, w), expected, error)
        error = error + FLOAT32 * np.abs(expected + wide(residual))
        within(calls.matvec(x, w, residual), expected + wide(residual), error)


@cases
@given(seeds, dtypes, widths, outputs, tiles, kinds)
def test_norm_matvec(seed, dtype, d, o, tile, kind):
    d = width(d, kind)
    x, scale, w = normal(seed, dtype, d), normal(seed + 1, dtype, d), matrix(seed + 2, dtype, o, d, kind)
    with cut("tile", tile):
        within(calls.norm_matvec(x, scale, w, EPS), *product(w, *normed(x, scale)))


@cases
@given(seeds, dtypes, widths)
def test_add_norm(seed, dtype, d):
    x, residual, scale = (normal(seed + i, dtype, d) for i in range(3))
    expected, wrong = normed(x, scale)
    error = wrong + FLOAT32 * np.abs(wide(residual) + expected)
    within(calls.add_norm(x, residual, scale, EPS), wide(residual) + expected, error)


@cases
@given(
    seeds, dtypes, widths, st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([1, 2, 6, 8]), tiles,
    kinds, st.integers(0, 5),
)  # fmt: skip
def test_norm_qkv_rope_and_its_append(seed, dtype, d, heads, half, tile, kind, length):
    (n, kv), d = heads, width(d, kind)
    x, scale = normal(seed, dtype, d), normal(seed + 1, dtype, d)
    q, k, v = (matrix(seed + i, dtype, count * 2 * half, d, kind) for i, count in ((2, n), (3, kv), (4, kv)))
    angles = normal(seed + 5, torch.float32, 1, 1, half) * 1000
    expected, errors = zip(*(product(w, *normed(x, scale)) for w in (q, k, v)), strict=True)
    one, two = (np.concatenate(expected).reshape(-1, 2, half)[:, i] for i in (0, 1))
    error = np.concatenate(errors).reshape(-1, 2, half).sum(1)
    turn = np.where(np.arange(n + 2 * kv)[:, None] < n + kv, wide(angles)[0], 0.0)
    turned = np.concatenate([one * np.cos(turn) - two * np.sin(turn), two * np.cos(turn) + one * np.sin(turn)], 1)
    error += 4 * FLOAT32 * (np.abs(one) + np.abs(two))  # of the cosine, the sine and the sum
    slots, where = 5, torch.tensor([length], device=DEVICE)  # the last length has no slot
    buffers = [normal(seed + i, dtype, slots, kv, 2 * half) for i in (6, 7)]
    before = [buffer.clone() for buffer in buffers]
    with cut("tile", tile):
        found = calls.norm_qkv_rope(x, scale, q, k, v, angles, *buffers, where, EPS)
    new = [buffer[length] if length < slots else None for buffer in buffers]
    for part, rows in zip((found, *new), np.split(np.arange(n + 2 * kv), [n, n + kv]), strict=True):
        if part is not None:
            within(part, turned[rows], np.concatenate([error, error], 1)[rows])
    for old, after in zip(before, buffers, strict=True):
        old[length : length + 1] = after[length : length + 1]
        assert torch.equal(old, after)


@cases
@given(seeds, dtypes, widths, outputs, tiles, kinds)
def test_norm_geglu(seed, dtype, d, f, tile, kind):
    d = width(d, kind)
    x, scale = normal(seed, dtype, d), normal(seed + 1, dtype, d)
    gate, up = (matrix(seed + i, dtype, f, d, kind) for i in (2, 3))
    (g, g_error), (u, u_error) = (product(w, *normed(x, scale)) for w in (gate, up))
    gelu = g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    # the slope of GELU is at most 1.13; exp and a division in float32 are good to 2**-20
    error = 1.13 * g_error * (np.abs(u) + u_error) + np.abs(gelu) * u_error + 2.0**-20 * np.abs(g * u)
    with cut("tile", tile):
        within(calls.norm_geglu(x, scale, gate, up, EPS), gelu * u, error)


def test_the_gate_has_the_tanh_form_of_gelu():
    x, gate = torch.ones(1, device=DEVICE), torch.linspace(-5, 5, 41, device=DEVICE)[:, None]
    found = calls.norm_geglu(x, x * 0, gate, torch.ones_like(gate), 0.0)
    expected = torch.nn.functional.gelu(gate[:, 0].double(), approximate="tanh")
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)  # float32


@st.composite
def queries(draw):
    """(n, k, h, slots, length, cap, window)"""
    k, group, slots = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 8])), draw(st.integers(1, 90))
    sizes = k * group, k, draw(st.sampled_from([8, 16, 20])), slots, draw(st.integers(1, slots))
    return *sizes, draw(st.sampled_from([0.0, 2.0, 50.0])), draw(st.sampled_from([0, 1, 5, 33]))


def attention(q, k, v, length: int, scale: float, cap: float, window: int) -> tuple[np.ndarray, np.ndarray]:
    first = max(0, length - window) if window else 0
    out, error = np.zeros(q.shape), np.zeros(q.shape)
    for head in range(q.shape[0]):
        kv = head // (q.shape[0] // k.shape[1])
        query, keys, values = wide(q[head]), wide(k[first:length, kv]), wide(v[first:length, kv])
        scores = keys @ query * scale
        wrong = (np.abs(keys) @ np.abs(query)).max() * scale * (len(query) + 4) * FLOAT32
        if cap:
            scores, wrong = cap * np.tanh(scores / cap), wrong + cap * 2.0**-20
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[head] = weights @ values
        # the weights are rounded to v's dtype (in f16 the smallest to multiples of 2**-24); their sum is float32's
        relative = 2 * wrong + unit(v.dtype) + (len(keys) + 64) * FLOAT32
        error[head] = relative * (weights @ np.abs(values)) + 2.0**-25 * np.abs(values).sum(0)
    return out, error


@cases
@given(seeds, dtypes, queries(), chunks)
def test_attention_sees_the_first_length_slots_or_a_window_of_them(seed, dtype, sizes, chunk):
    n, kv, h, slots, length, cap, window = sizes
    q, k, v = (normal(seed + i, dtype, *shape) for i, shape in enumerate([(n, h), (slots, kv, h), (slots, kv, h)]))
    for buffer in (k, v):  # what is not seen must not matter
        buffer[length:] = torch.nan
        buffer[: max(0, length - window) if window else 0] = torch.nan
    with cut("chunk", chunk):
        found = calls.decode_attention(q, k, v, torch.tensor([length - 1], device=DEVICE), h**-0.5, cap, window)
    within(found, *attention(q, k, v, length, h**-0.5, cap, window))


@cases
@given(
    st.lists(st.integers(0, 100_000), min_size=1, max_size=4), st.integers(1, 140),
    st.sampled_from([100.0, 10_000.0, 1e6]),
)  # fmt: skip
def test_angles_are_rounded_once(positions, half, theta):
    found = calls.angles(torch.tensor(positions, device=DEVICE), 2 * half, theta)
    exact = np.array(positions)[:, None] * theta ** (-np.arange(half) / half)
    assert (np.abs(wide(found) - exact) <= exact * 2.0**-24 * (1 + 1e-6)).all()


def test_attention_to_nothing_gives_zeros():
    q, k = normal(0, torch.float32, 2, 8), normal(1, torch.float32, 20, 1, 8)
    assert not calls.decode_attention(q, k, k, torch.tensor([-1], device=DEVICE), 1.0).any()


@cases
@given(seeds, dtypes, queries(), st.integers(1, 3), st.integers(1, 9), st.data())
def test_attention_of_many_tokens_sees_what_their_spans_hold(seed, dtype, sizes, rows, tokens, data):
    n, kv, h, slots, _, cap, _ = sizes
    shapes = [(rows, tokens, n, h), (rows, slots, kv, h), (rows, slots, kv, h)]
    q, k, v = (normal(seed + i, dtype, *shape) for i, shape in enumerate(shapes))
    q = torch.cat([q, q], 2)[:, :, :n]  # a part of a product
    numbers = st.lists(st.integers(0, slots), min_size=rows * tokens, max_size=rows * tokens)
    begin, end = (torch.tensor(data.draw(numbers), device=DEVICE).view(rows, tokens) for _ in range(2))
    for row in range(rows):  # what nobody sees must not matter
        for buffer in (k, v):
            buffer[row, int(end[row].max()) :] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "SHARES", [(0, Share(16, data.draw(st.sampled_from([16, 32])), 4, 2))])
        found = calls.prefill_attention(q, k, v, begin, end, h**-0.5, cap)
    for row in range(rows):
        for token in range(tokens):
            first, last = int(begin[row, token]), int(end[row, token])
            if first >= last:
                assert not found[row, token].any()
                continue
            parts = q[row, token], k[row].nan_to_num(), v[row].nan_to_num()
            within(found[row, token], *attention(*parts, last, h**-0.5, cap, last - first))


@cases
@given(seeds, dtypes, st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([1, 2, 6, 8]), st.integers(0, 3))
def test_a_prompt_is_turned_and_begins_a_cache(seed, dtype, heads, half, room):
    (n, kv), rows, tokens = heads, 2, 3
    joint = normal(seed, dtype, rows, tokens, n + 2 * kv, 2 * half)  # one product made them, as in the model
    q, k, v = joint.split([n, kv, kv], 2)
    angles = normal(seed + 3, torch.float32, rows, tokens, half) * 1000
    turn, found = wide(angles)[:, :, None], calls.rope_to_cache(q, k, v, angles, room)
    for before, after in ((q, found[0]), (k, found[1][:, :tokens])):
        one, two = wide(before)[..., :half], wide(before)[..., half:]
        turned = [one * np.cos(turn) - two * np.sin(turn), two * np.cos(turn) + one * np.sin(turn)]
        error = 4 * FLOAT32 * (np.abs(one) + np.abs(two))  # of the cosine, the sine and the sum
        within(after, np.concatenate(turned, -1), np.concatenate([error, error], -1))
    assert torch.equal(found[2][:, :tokens], v)
    assert not any(buffer[:, tokens:].any() for buffer in found[1:])
    assert found[1].shape == found[2].shape == (rows, tokens + room, kv, 2 * half)


def test_counters_are_0_for_the_attention_that_follows():
    given = arguments_of()["norm_qkv_rope"]
    counters = calls.counters(given[6]).fill_(7)
    calls.norm_qkv_rope(*given, counters)
    assert not counters.any()


def arguments_of(kind: str = "", dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Arguments of every function."""
    d = width(40, kind)
    x, scale, residual = (normal(i, dtype, size) for i, size in enumerate((d, d, 9)))
    q, k, v, w, up = (matrix(3 + i, dtype, o, d, kind) for i, o in enumerate((8, 4, 4, 9, 9)))
    query, *buffers = (normal(8 + i, dtype, *shape) for i, shape in enumerate([(4, 8), (30, 2, 8), (30, 2, 8)]))
    small, length = [buffer[:, :1, :4].contiguous() for buffer in buffers], torch.tensor([22], device=DEVICE)
    return {
        "matvec": (x, w, residual),
        "norm_matvec": (x, scale, w, EPS),
        "add_norm": (x, scale + 1, scale, EPS),
        "norm_geglu": (x, scale, w, up, EPS),
        "angles": (torch.tensor([22, 7, 300], device=DEVICE), 20, 10_000.0),
        "norm_qkv_rope": (x, scale, q, k, v, normal(11, torch.float32, 1, 1, 2), *small, length, EPS),
        "decode_attention": (query, *buffers, length, 0.3, 5.0, 12),
        "prefill_attention": (
            query.view(1, 2, 2, 8),
            *(buffer[None] for buffer in buffers),
            torch.tensor([[0, 5]], device=DEVICE),
            torch.tensor([[30, 9]], device=DEVICE),
            0.3,
            5.0,
        ),
        "rope_to_cache": (
            *(normal(12 + i, dtype, 2, 3, count, 12) for i, count in enumerate((3, 1, 1))),
            normal(15, torch.float32, 2, 3, 6) * 1000,
            2,
        ),
    }


@pytest.mark.parametrize("kind", ["", "int8", "fp8", "int4-32"])
@pytest.mark.parametrize("name", arguments_of())
def test_the_formula_equals_the_kernel_also_for_rows_cut_from_wider_matrices(name, kind):
    given = arguments_of(kind)[name]
    for mine in (given, tuple(map(cut_out, given))):
        other = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, mine)
        found, expected = getattr(calls, name)(*mine), getattr(reference, name)(*other)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)  # float32, products of sums of 40
        # what is written in place; weights in 8 bits are compared as bytes
        mine, other = (
            tree_map(lambda x: x.view(torch.uint8) if isinstance(x, torch.Tensor) and x.itemsize == 1 else x, side)
            for side in (mine, other)
        )
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-5)


def cut_out(x):
    """The matrix as a part of a wider one: its rows are dense, and lie apart."""
    if isinstance(x, lowbit.Quantized):
        return x._replace(values=cut_out(x.values))
    return torch.cat([x, x], -1)[..., : x.shape[-1]] if isinstance(x, torch.Tensor) and x.dim() == 2 else x


def test_4_bit_matrices_in_blocks_are_refused():
    x, w = normal(0, torch.float32, 128), lowbit.quantize(normal(1, torch.float32, 64, 128), "int4")
    with pytest.raises(SettingError, match=r"read 4 bits in rows: see lowbit\.to_device_layout"):
        calls.matvec(x, lowbit.ordered(w, rows=False))  # pyright: ignore[reportArgumentType]


def test_rows_that_are_not_dense_are_an_error_of_one_line():
    x, w, _ = arguments_of()["matvec"]
    with pytest.raises(SettingError, match=r"strides \(1, 40\) of a tensor of shape \(40, 9\), expected dense"):
        calls.matvec(x[:9], w.T)
