"""The arithmetic, against formulas written out in float64."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from watched import Watched

from pgfunc import ops
from pgfunc.quant import lowbit

seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(seeds, st.floats(0.01, 100))
def test_rms_norm_is_its_formula_and_does_not_see_the_scale_of_its_input(seed, factor):
    x, scale = normal(seed, 3, 8), normal(seed + 1, 8)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale.double())
    torch.testing.assert_close(ops.rms_norm(x, scale, 1e-6).double(), expected, atol=1e-5, rtol=1e-5)  # float32
    torch.testing.assert_close(ops.rms_norm(x * factor, scale, 0.0), ops.rms_norm(x, scale, 0.0), atol=1e-5, rtol=1e-5)


def test_rms_norm_adds_one_in_float32():
    # 1 + 2**-9 rounds to 1 in bf16, which has 8 bits; in float32 the scale survives until the final cast
    x = torch.full((1, 256), 129.0, dtype=torch.bfloat16)
    scale = torch.full((256,), 2.0**-7, dtype=torch.bfloat16)
    assert (ops.rms_norm(x, scale, 0.0) == 1.0078125).all()
    assert ops.rms_norm(x, scale, 0.0).dtype == torch.bfloat16


@given(seeds, st.integers(0, 8191))
def test_rope_is_a_rotation_of_each_half_split_plane(seed, position):
    x = normal(seed, 1, 1, 2, 8)
    out = ops.rotate(x, ops.angles(torch.tensor([[position]]), 8, 10_000.0))
    for plane in range(4):
        turn = torch.polar(torch.tensor(1.0), torch.tensor(position * 10_000.0 ** (-2 * plane / 8)))
        expected = torch.complex(x[..., plane], x[..., plane + 4]) * turn
        # float32 angles up to 8191 are right to 2**-11
        torch.testing.assert_close(torch.complex(out[..., plane], out[..., plane + 4]), expected, atol=5e-3, rtol=0)
    still = ops.angles(torch.tensor([[0]]), 8, 10_000.0)
    for same in (x, x.bfloat16(), x.double()):
        turned = ops.rotate(same, still)
        assert torch.equal(turned, same)
        assert turned.dtype == same.dtype


@given(st.integers(0, 8191), st.sampled_from([8, 36, 256]), st.sampled_from([100.0, 10_000.0]))
def test_an_angle_is_rounded_once(position, dim, theta):
    exact = [position * theta ** (-2 * plane / dim) for plane in range(dim // 2)]
    found = ops.angles(torch.tensor([position]), dim, theta)[0]
    assert found.dtype == torch.float32
    rounded = torch.tensor(exact)  # but for a power that lies in the middle of two numbers
    assert (found == rounded).sum() >= len(exact) - 1
    torch.testing.assert_close(found, rounded, atol=0, rtol=2**-23)


@given(seeds, st.floats(0.5, 100))
def test_softcap_is_bounded_monotone_and_close_to_the_identity_near_zero(seed, cap):
    x = (normal(seed, 50) * 3 * cap).sort().values
    y = ops.softcap(x, cap)
    assert (y.abs() <= cap).all()
    assert (y.diff() >= 0).all()
    small = x / x.abs().max() * cap * 1e-2
    torch.testing.assert_close(ops.softcap(small, cap), small, atol=cap * 1e-6, rtol=1e-4)  # x - x³/3c²


def attend_loop(q, k, v, mask, scale, cap):
    """Attention one query at a time, in float64."""
    b, t, n, h = q.shape
    out = torch.zeros(b, t, n, h, dtype=torch.float64)
    for i in range(b):
        for j in range(t):
            for head in range(n):
                kv = head // (n // k.shape[2])
                scores = k[i, :, kv].double() @ q[i, j, head].double() * scale
                scores = torch.tanh(scores / cap) * cap if cap else scores
                seen = mask[i, j]
                if seen.any():
                    out[i, j, head] = scores[seen].softmax(0) @ v[i, seen, kv].double()
    return out


@pytest.mark.parametrize("attend", [ops.attend, ops.attend_explicit])
@given(seeds, st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 1.5]))
def test_attention_equals_a_loop_and_a_query_that_sees_nothing_gives_zeros(attend, seed, kv_heads, cap):
    q, k, v = normal(seed, 2, 3, 4, 8), normal(seed + 1, 2, 5, kv_heads, 8), normal(seed + 2, 2, 5, kv_heads, 8)
    mask = normal(seed + 3, 2, 3, 5) > 0
    mask[0, 1] = False
    out = attend(q, k, v, mask, 0.5, cap)
    torch.testing.assert_close(out.double(), attend_loop(q, k, v, mask, 0.5, cap), atol=1e-5, rtol=1e-5)  # float32
    assert not out[0, 1].any()


@pytest.mark.parametrize("attend", [ops.attend, ops.attend_explicit])
@given(seeds)
def test_grouped_queries_equal_repeated_keys(attend, seed):
    q, k, v = normal(seed, 1, 3, 4, 8), normal(seed + 1, 1, 5, 2, 8), normal(seed + 2, 1, 5, 2, 8)
    repeated = (x.repeat_interleave(2, dim=2) for x in (k, v))
    expected = ops.attend(q, *repeated, None, 0.3)
    torch.testing.assert_close(attend(q, k, v, None, 0.3), expected, atol=1e-6, rtol=1e-5)


def test_a_query_that_sees_nothing_has_finite_gradients():
    q = normal(0, 1, 2, 1, 4).requires_grad_()
    mask = torch.tensor([[[False, False], [True, True]]])
    for attend in (ops.attend, ops.attend_explicit):
        (slope,) = torch.autograd.grad(attend(q, q, q, mask, 1.0).sum(), q)
        assert slope.isfinite().all()


def test_fused_attention_is_given_no_query_without_keys(monkeypatch):
    """cuDNN's gradient of one is nan."""
    given, fused = [], torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, mask, **options):
        given.append(mask)
        return fused(q, k, v, mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    q, mask = torch.randn(2, 2, 1, 4), torch.tensor([[[False, False], [True, False]], [[True, True], [False, True]]])
    out = ops.attend(q, q, q, mask, 1.0)
    assert given[0].squeeze(1).tolist() == [[[True, True], [True, False]], [[True, True], [False, True]]]
    assert not out[0, 0].any()
    assert out.ne(0).sum() == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_widen_never_narrows(dtype):
    assert ops.widen(torch.zeros(1, dtype=dtype)).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@given(st.booleans(), st.booleans(), st.booleans())
def test_one_product_for_several_matrices_is_their_products(beside, together, biased):
    """The operator that compiled code for GPUs calls, wherever the matrices and the biases lie."""
    weights, biases = [torch.randn(rows, 5) for rows in (3, 1, 4)], [torch.randn(rows) for rows in (3, 1, 4)]
    x, here = torch.randn(2, 3, 5), torch.device("cpu")
    given = ops.beside(weights, here) if beside else weights
    added = (ops.beside(biases, here) if together else biases) if biased else []
    found = torch.ops.pgfunc.linears(x, given, added).split([3, 1, 4], -1)
    torch.testing.assert_close(found, ops.linears(x, weights, biases if biased else ()))
    torch.library.opcheck(torch.ops.pgfunc.linears.default, (x, weights, added))


def test_a_tap_of_a_part_has_the_names_of_its_place_and_the_default_stays_what_it_is():
    assert ops.within("a", ops.identity) is ops.identity
    assert ops.within("a", ops.within("b", lambda name, value: (name, value)))("c", 5) == ("b.a.c", 5)


@pytest.mark.parametrize("amx", [False, True])
def test_one_row_is_written_out_on_cpus_without_amx_alone(amx, monkeypatch):
    monkeypatch.setattr(ops, "AMX", amx)
    w = torch.randn(4, 3)
    for one in (torch.randn(3), torch.randn(1, 3), torch.randn(1, 1, 3)):
        assert ops.written_out(one, w) is not amx
        assert not ops.written_out(one.double(), w)
        assert not ops.written_out(one.double(), w.double())
        assert not ops.written_out(one.to("meta"), w.to("meta"))
    for several in (torch.randn(2, 3), torch.randn(1, 2, 3), torch.randn(2, 1, 3), torch.randn(0, 3)):
        assert not ops.written_out(several, w)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_the_loop_of_one_row_is_for_compiled_code_alone_and_changes_no_product(compiling, rows, biased, monkeypatch):
    monkeypatch.setattr(ops, "AMX", False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    asked, loop = [], lowbit.one_row
    monkeypatch.setattr(lowbit, "one_row", lambda x, w: asked.append(len(x)) or loop(x, w))
    x, w, bias = torch.randn(rows, 5), torch.randn(4, 5), torch.randn(4) if biased else None
    torch.testing.assert_close(ops.linear(x, w, bias), torch.nn.functional.linear(x, w, bias))
    assert asked == ([1] if compiling and rows == 1 else [])


@contextmanager
def told(compiling: bool = True, cuda: bool = True):
    """What runs in here is told that it is being compiled, and that its tensors are a GPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "AMX", True)  # or one row is written out
        patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        patch.setattr(torch.Tensor, "is_cuda", cuda)
        yield


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@given(st.booleans(), st.booleans(), st.sampled_from([(5,), (1, 5), (2, 3, 5)]))
def test_in_compiled_code_for_gpus_matrices_that_lie_together_are_one_product(
    compiling, cuda, grad, together, biased, shape
):
    weights, x = [torch.randn(rows, 5) for rows in (3, 1, 4)], torch.randn(shape)
    biases = [torch.randn(rows) for rows in (3, 1, 4)] if biased else []
    weights = ops.beside(weights, x.device) if together else weights
    expected, product, products = ops.linears(x, weights, biases), torch.nn.functional.linear, []
    with told(compiling, cuda), torch.set_grad_enabled(grad), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", lambda *parts: products.append(parts) or product(*parts))
        torch.testing.assert_close(ops.linears(x, weights, biases), expected)
    assert len(products) == (1 if together and compiling and cuda and not grad else 3)


def test_in_compiled_code_for_gpus_quantized_and_transformed_products_stay_apart():
    weights, x = ops.beside([torch.randn(rows, 5) for rows in (3, 1, 4)], torch.device("cpu")), torch.randn(2, 5)
    small = [lowbit.quantize(w, "int8") for w in weights]
    expected, quantized = ops.linears(x, weights), ops.linears(x, small)
    with told(), torch.no_grad(), Watched() as watched:
        torch.testing.assert_close(ops.linears(x, small), quantized)
        torch.testing.assert_close(torch.vmap(lambda row: ops.linears(row, weights))(x), expected)
    assert "pgfunc::linears" not in watched.names


@given(st.booleans(), st.booleans())
def test_in_compiled_code_for_gpus_a_bias_is_added_to_the_product(compiling, cuda):
    x, w, bias = torch.randn(2, 5), torch.randn(4, 5), torch.randn(4)
    expected = torch.nn.functional.linear(x, w, bias)
    with told(compiling, cuda), Watched() as watched:
        torch.testing.assert_close(ops.linear(x, w, bias), expected)
        torch.testing.assert_close(ops.linear(x, w), expected - bias)
    assert ("aten::addmm" in watched.names) is not (compiling and cuda)


@given(st.booleans(), st.booleans(), st.sampled_from([1, 3]), st.sampled_from([0.0, 50.0]))
def test_attention_is_written_out_for_softcaps_and_for_one_query_in_compiled_code_for_gpus(
    compiling, cuda, queries, cap
):
    written, explicit = [], ops.attend_explicit
    q, k = torch.randn(1, queries, 2, 8), torch.randn(1, 5, 1, 8)
    expected = explicit(q, k, k, None, 0.3, cap)
    with told(compiling, cuda), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "attend_explicit", lambda *parts: written.append(parts[-1]) or explicit(*parts))
        torch.testing.assert_close(ops.attend(q, k, k, None, 0.3, cap), expected)
    assert written == ([cap] if cap or (compiling and cuda and queries == 1) else [])


def test_tensors_beside_one_another_are_one_and_others_are_not():
    parts = [torch.randn(rows, 3) for rows in (2, 1, 4)]
    beside = ops.beside(parts, torch.device("cpu"))
    together = ops.together(beside)
    assert together is not None
    assert torch.equal(together, torch.cat(parts))
    assert together.data_ptr() == beside[0].data_ptr()
    assert all(torch.equal(*pair) for pair in zip(parts, beside, strict=True))
    assert all(x.is_meta for x in ops.beside(parts, torch.device("meta")))
    whole = torch.randn(6, 3)
    assert torch.equal(ops.together([whole[::2][:1], whole[1:3]]), whole[:3])  # a row alone may have any stride
    others = [
        parts,
        beside[::-1],
        beside[::2],
        [whole[:2], whole[3:]],
        [whole.T[:1], whole.T[1:]],
        [whole[0], whole[1:]],
    ]
    for other in others:
        assert ops.together(other) is None
