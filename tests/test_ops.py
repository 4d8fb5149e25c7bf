"""The arithmetic, against formulas written out in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgfunc import masks, ops
from pgfunc.errors import TokenError
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
    out = ops.rotate(x, ops.rotation(ops.angles(torch.tensor([[position]]), 8, 10_000.0)))
    for plane in range(4):
        turn = torch.polar(torch.tensor(1.0), torch.tensor(position * 10_000.0 ** (-2 * plane / 8)))
        expected = torch.complex(x[..., plane], x[..., plane + 4]) * turn
        # float32 angles up to 8191 are right to 2**-11
        torch.testing.assert_close(torch.complex(out[..., plane], out[..., plane + 4]), expected, atol=5e-3, rtol=0)
    still = ops.rotation(ops.angles(torch.tensor([[0]]), 8, 10_000.0))
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
    assert (given[0].squeeze(1) == 0).tolist() == [[[True, True], [True, False]], [[True, True], [False, True]]]
    assert not out[0, 0].any()
    assert out.ne(0).sum() == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_upcast_never_narrows(dtype):
    assert ops.upcast(torch.zeros(1, dtype=dtype)).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("id", [-1, 5, 99])
def test_an_id_outside_the_table_is_an_error_or_nan(id):
    table, ids = torch.randn(5, 3), torch.tensor([[0, id, 4]])
    with pytest.raises(TokenError) as error:
        ops.embedding(ids, table)
    assert str(error.value) == f"token id {id} is outside 0..4; is it another model's?"
    (rows,) = torch.vmap(lambda each: ops.embedding(each, table))(ids[None])  # where no value can be read
    assert rows.isnan().all(-1).tolist() == [[False, True, False]]
    assert torch.equal(rows[0, ::2], table[[0, 4]])


def test_a_described_mask_gives_what_the_boolean_mask_gives():
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    described = masks.Span(torch.tensor([[0, 1, 2], [3, 0, 0]]), torch.tensor([[3, 6, 7], [4, 0, 5]]))
    expected = ops.attend(q, k, v, masks.dense(described, 7), 0.3)
    assert torch.equal(ops.attend(q, k, v, described, 0.3), expected)
    assert not expected[1, 1].any(), "a query that sees no key"


def test_a_bias_is_added_to_the_product_with_a_quantized_matrix():
    x, w, bias = torch.randn(2, 64), lowbit.quantize(torch.randn(32, 64), "int8"), torch.randn(32)
    torch.testing.assert_close(ops.linear(x, w, bias), ops.linear(x, w) + bias, rtol=0, atol=0)
