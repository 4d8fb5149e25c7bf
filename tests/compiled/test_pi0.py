"""The velocity of `examples/pi0.py` is compiled once for all steps, equals the eager one, and only reads the cache."""

from dataclasses import replace

import torch
from cases import CONFIGS, bits, params, prompt

import pgfunc as pg
from examples import pi0


def test_the_compiled_velocity_equals_the_eager_one_and_is_compiled_once_for_all_steps():
    cfg = CONFIGS["gemma"]
    narrow, tree = replace(cfg.text, width=12, hidden=20), params(cfg)
    p, state, noise = pi0.init(narrow, 5, 3), torch.randn(2, 5), torch.randn(2, 4, 3)
    step = pg.jit(pi0.velocity)
    for seed, steps in ((0, 10), (1, 3)):
        _, cache = pg.prefill(tree, prompt(cfg, [3, 1], [0, 0], seed=seed, padding=2), cfg, size=0)
        before = bits(cache)
        found, expected = (
            pi0.integrate(lambda x, time, fn=fn, cache=cache: fn(p, state, x, time, cache, narrow), noise, steps)
            for fn in (step, pi0.velocity)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # float32, at most 10 steps
        assert bits(cache) == before
    assert step.compilations == 1
