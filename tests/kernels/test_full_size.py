"""The kernels at the sizes of published checkpoints, on a GPU: right, also in compiled code that a graph captured."""

import os

import pytest
import torch
from torch.utils import _pytree as pytree

import pgfunc as pg
from pgfunc import masks
from pgfunc.jit import cuda_graphs
from pgfunc.kernels import calls, reference
from pgfunc.quant import lowbit

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(interpreted or not torch.cuda.is_available(), reason="needs a CUDA device")

NAMES = ["paligemma-3b-224", "paligemma2-3b-224", "paligemma2-10b-224"]
# bf16, rounded three times: the norm, weights of attention or a product, the result; f16 has 3 bits more; in float32 a
# softcap of 50 makes of the last bit of a tanh an error of 1e-5 of a score
LIMITS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-4}


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    out = torch.randn(*shape, device="cuda", dtype=dtype)
    return out.mul_(shape[-1] ** -0.5) if len(shape) == 2 else out


def attention(name: str, dtype: torch.dtype, slots: int, length: int) -> tuple:
    """Arguments of `decode_attention`; the cache is nan behind its length."""
    c = pg.PUBLISHED[name].text
    k, v = (normal(slots, c.kv_heads, c.head_dim, dtype=dtype) for _ in "kv")
    k[length:], v[length:] = torch.nan, torch.nan
    q, seen = normal(c.heads, c.head_dim, dtype=dtype), torch.tensor([length - 1], device="cuda")
    return q, k, v, seen, c.query_scale, c.attention_softcap, c.window and 150


def prompt_attention(name: str, dtype: torch.dtype, rows: int, tokens: int) -> tuple:
    """Arguments of `prefill_attention`: in a prompt the last 9 tokens are padding, and the 20 before are causal."""
    c = pg.PUBLISHED[name].text
    q, k, v = (normal(rows * tokens, n, c.head_dim, dtype=dtype) for n in (c.heads, c.kv_heads, c.kv_heads))
    q, k, v = (x.unflatten(0, (rows, tokens)) for x in (q, k, v))
    place = torch.arange(tokens, device="cuda").expand(rows, -1)
    seen = masks.spans(masks.prompt(place < tokens - 9, place >= tokens - 29, c.window and 150))
    span = seen.window or seen.full
    return q, k, v, span.begin, span.end, c.query_scale, c.attention_softcap


def arguments_of(name: str, dtype: torch.dtype = torch.bfloat16, method: str = "") -> dict[str, tuple]:
    """Arguments of every function, for one layer and the head."""
    c = pg.PUBLISHED[name].text
    d, f, nh, kh = c.width, c.hidden, c.heads * c.head_dim, c.kv_heads * c.head_dim

    def matrix(o: int, i: int):
        w = normal(o, i, dtype=dtype)
        return lowbit.quantize(w, "int8" if o == c.vocab and lowbit.GROUPS[method] else method) if method else w

    x, scale, turn = normal(d, dtype=dtype), normal(d, dtype=dtype), torch.rand(1, 1, c.head_dim // 2, device="cuda")
    buffers = normal(2 * 700, c.kv_heads, c.head_dim, dtype=dtype).split(700)
    length = torch.tensor([333], device="cuda")
    return {
        "matvec": (normal(f, dtype=dtype), matrix(d, f), x),
        "norm_matvec": (x, scale, matrix(c.vocab, d), c.eps),
        "add_norm": (x, scale + 1, scale, c.eps),
        "norm_qkv_rope": (x, scale, matrix(nh, d), matrix(kh, d), matrix(kh, d), turn * 300, *buffers, length, c.eps),
        "norm_geglu": (x, scale, matrix(f, d), matrix(f, d), c.eps),
        "decode_attention": attention(name, dtype, 700, 333),
        "prefill_attention": prompt_attention(name, dtype, 2, 300),
        "rope_to_cache": (
            *(normal(2, 300, n, c.head_dim, dtype=dtype) for n in (c.heads, c.kv_heads, c.kv_heads)),
            torch.rand(2, 300, c.head_dim // 2, device="cuda") * 300, 100,
        ),
    }  # fmt: skip


def check(name: str, given: tuple) -> None:
    """The kernel and its formula in float64: the result, and the buffers that it writes."""
    limit = LIMITS[given[0].dtype]
    exact = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point()
        else lowbit.dequantize(x._replace(scale=x.scale.double())) if isinstance(x, lowbit.Quantized) else x
        for x in given
    ]  # fmt: skip
    if name == "decode_attention":  # a weight of 0 times nan is nan
        exact[1], exact[2] = (x.nan_to_num() for x in exact[1:3])
    results = [(getattr(calls, name)(*given), getattr(reference, name)(*exact))]
    if name == "norm_qkv_rope":
        results += zip(given[6:8], exact[6:8], strict=True)
    for found, expected in results:
        for one, other in zip(*map(pytree.tree_leaves, (found, expected)), strict=True):
            assert (one - other).norm() < limit * other.norm(), name


@pytest.mark.parametrize("method", ["", "int8", "fp8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_each_kernel_equals_its_formula_in_float64(name, method):
    for dtype in LIMITS:
        for part, given in arguments_of(name, dtype, method).items():
            check(part, given)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000, 5000])
@pytest.mark.parametrize("name", NAMES)
def test_attention_at_every_length_of_a_long_cache(name, length):
    for dtype in LIMITS:
        check("decode_attention", attention(name, dtype, 5000, length))


@pytest.mark.parametrize("name", NAMES)
def test_attention_of_long_prompts_and_of_many_rows(name):
    for dtype in LIMITS:
        for rows, tokens in ((1, 1050), (32, 272)):
            check("prefill_attention", prompt_attention(name, dtype, rows, tokens))


@pytest.mark.parametrize("name", NAMES[:2])
def test_captured_they_see_new_values_and_lengths(name):
    given = arguments_of(name)

    def every(given):
        return {part: getattr(calls, part)(*arguments) for part, arguments in given.items()}

    every(given)
    run, results = cuda_graphs.capture(lambda _: every(given), [given["matvec"][0]])
    for length in (1, 64, 333):
        for arguments in given.values():
            arguments[0].copy_(normal(*arguments[0].shape).to(arguments[0].dtype))
        given["decode_attention"][3].fill_(length - 1)
        run()
        torch.testing.assert_close(results, every(given), atol=0, rtol=0)
