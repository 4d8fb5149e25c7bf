"""The work of a stage equals the FLOPs that PyTorch counts, the bytes of its tensors, and the published figures."""

from dataclasses import replace

import pytest
import torch
from cases import CONFIGS, params
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pgfunc as pg
from pgfunc import bench, paligemma
from pgfunc.bench import roofline
from pgfunc.bench.roofline import Machine, Work

CPU = torch.device("cpu")
UNWINDOWED = {name: replace(cfg, text=replace(cfg.text, window=0)) for name, cfg in CONFIGS.items()}


def counted(fn) -> int:
    """The FLOPs that PyTorch counts in a call, with attention as matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", UNWINDOWED)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 5)])
def test_flops_equal_those_that_pytorch_counts(name, batch, tokens):
    cfg = UNWINDOWED[name]
    tree, prompt = params(cfg), bench.random_prompt(cfg, batch, tokens, CPU)
    length = cfg.vision.tokens + tokens
    assert (
        counted(lambda: paligemma.encode_images(tree, prompt.pixels, cfg))
        == roofline.vision_work(tree, cfg, batch).flops
    )
    assert counted(lambda: pg.prefill(tree, prompt, cfg, 1)) == roofline.prefill_work(tree, cfg, batch, tokens).flops
    _, cache = pg.prefill(tree, prompt, cfg, 1)  # one step fills it, so no empty slot is computed
    token = torch.zeros(batch, dtype=torch.long)
    assert counted(lambda: pg.decode(tree, token, cache, cfg)) == roofline.decode_work(tree, cfg, batch, length).flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UNWINDOWED)
def test_bytes_equal_those_of_the_tensors_that_are_read(name, dtype):
    cfg = UNWINDOWED[name]
    tree = params(cfg, dtype=dtype)
    leaves = {path: leaf.numel() * leaf.element_size() for path, leaf in pg.tree.flatten(tree).items()}
    leaves["language.embed"] = cfg.text.vocab * cfg.text.width * dtype.itemsize
    language = sum(size for path, size in leaves.items() if path.startswith("language."))
    _, cache = pg.prefill(tree, bench.random_prompt(cfg, 2, 3, CPU), cfg, 1)
    cached = sum(buffer.numel() * buffer.element_size() for buffer in (*cache.k, *cache.v))
    assert roofline.decode_work(tree, cfg, 2, cfg.vision.tokens + 3).nbytes == language + cached
    vision = sum(size for path, size in leaves.items() if not path.startswith("language."))
    assert roofline.vision_work(tree, cfg, 2).nbytes == vision
    _, cache = pg.prefill(tree, bench.random_prompt(cfg, 2, 3, CPU), cfg, 0)
    written = sum(buffer.numel() * buffer.element_size() for buffer in (*cache.k, *cache.v))
    assert roofline.prefill_work(tree, cfg, 2, 3).nbytes == vision + language + written


@given(st.integers(0, 40), st.integers(1, 3))
def test_a_window_limits_the_keys_that_the_even_layers_read(length, batch):
    cfg, unwindowed = CONFIGS["gemma2"], UNWINDOWED["gemma2"]
    tree = paligemma.abstract(cfg)
    outside = max(0, length + 1 - cfg.text.window) * 2  # keys outside of the window, in the layers 0 and 2
    kv = 2 * cfg.text.kv_heads * cfg.text.head_dim * 4
    less, more = (roofline.decode_work(tree, each, batch, length) for each in (cfg, unwindowed))
    assert more.nbytes - less.nbytes == batch * outside * kv
    assert (more.flops > less.flops) == (outside > 0)


# bytes that one decode step reads in bf16: all weights of the language model, and those of each token of context
PUBLISHED = {"paligemma-3b-224": (5.02e9, 18_432), "paligemma2-3b-224": (5.23e9, 106_496),
             "paligemma2-10b-224": (18.5e9, 344_064)}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_bytes_of_a_step_are_the_published_ones_and_nothing_is_allocated(name):
    cfg, (weights, kv) = pg.PUBLISHED[name], PUBLISHED[name]
    tree = pg.tree.map(lambda leaf: leaf.to(torch.bfloat16), paligemma.abstract(cfg))
    read = [roofline.decode_work(tree, cfg, 1, length).nbytes for length in (271, 272)]
    assert read[0] - 272 * kv == pytest.approx(weights, rel=0.01)
    assert read[1] - read[0] == kv


@given(st.lists(st.builds(Work, st.integers(0, 10**12), st.integers(0, 10**12)), max_size=4))
def test_a_floor_is_the_sum_over_pieces_of_the_longer_of_reading_and_computing(pieces):
    expected = 0.0
    for flops, nbytes in pieces:
        expected += flops / 1e10 if flops / 1e10 > nbytes / 1e9 else nbytes / 1e9
    assert roofline.floor(pieces, Machine(bandwidth=1e9, rate=1e10)) == pytest.approx(expected)
