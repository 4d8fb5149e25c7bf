"""Decoding by the kernels equals decoding without them, in whole models. In Triton's interpreter, else on a GPU."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pgfunc as pg
from pgfunc import bench
from pgfunc.config import TextConfig, VisionConfig
from pgfunc.kernels import block

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device")
profile = os.environ.get("HYPOTHESIS_PROFILE", "dev")
cases = settings(max_examples=200 if profile == "deep" else 8, deadline=None, derandomize=profile == "ci")


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
@given(configs(), st.integers(1, 12), st.integers(0, 99))
@torch.no_grad()
def test_decoding_by_the_kernels_equals_decoding_without(cfg, tokens, seed):
    params = bench.random_params(cfg, torch.float32, torch.device(DEVICE), seed)
    prompt = bench.random_prompt(cfg, 1, tokens, torch.device(DEVICE), seed)
    logits, cache = pg.prefill(params, prompt, cfg, 5)
    token = pg.sample.greedy(logits)
    called, by_kernels = [], block.block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "block", lambda *given: called.append(given) or by_kernels(*given))
        mine, other = cache, cache
        for step in range(3):
            patch.setattr(block, "serves", lambda x, tap, weights: True)
            fast, mine = pg.decode(params, token, mine, cfg)
            assert len(called) == cfg.text.layers * (step + 1)
            patch.setattr(block, "serves", lambda x, tap, weights: False)
            slow, other = pg.decode(params, token, other, cfg)
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
            token = pg.sample.greedy(slow)
