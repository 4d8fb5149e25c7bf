"""A small pi0, the robot policy on PaliGemma, with random weights: `python examples/pi0.py IMAGE INSTRUCTION`.

The action expert is a narrower Gemma that runs over the language model's cache (Black et al. 2024, arXiv 2410.24164).
Time is 1 at the noise and 0 at the actions, as in openpi (`src/openpi/models/pi0.py`). State is b c, actions are b t a.
"""

import sys
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

import pgfunc as pg
from pgfunc import gemma, masks, ops, tree
from pgfunc.cache import Cache, pad
from pgfunc.config import TextConfig


class Params(NamedTuple):
    expert: gemma.Params  # `embed` is (): the expert reads no text
    state: tuple[Tensor, Tensor]  # a matrix and a bias, here and below
    action: tuple[Tensor, Tensor]
    mix_in: tuple[Tensor, Tensor]  # from an action and the time
    mix_out: tuple[Tensor, Tensor]
    velocity: tuple[Tensor, Tensor]


def init(cfg: TextConfig, state: int, action: int, seed: int = 0) -> Params:
    """Random parameters. `cfg` is the language model's config with the expert's own width and hidden size."""
    shapes = *((cfg.width, inputs) for inputs in (state, action, 2 * cfg.width, cfg.width)), (action, cfg.width)
    maps = [(torch.empty(shape, device="meta"), torch.empty(shape[0], device="meta")) for shape in shapes]
    return tree.init(Params(gemma.abstract(cfg)._replace(embed=()), *maps), seed, torch.float32)


def block_causal(positions: Tensor, slots: int, window: int) -> masks.Masks:
    """The state sees the prefix and itself; each action sees the prefix, the state and all actions.

    prefix 2, actions 2, slots 6  sees  1 1 1 . . .
                                        1 1 1 1 1 .
                                        1 1 1 1 1 .
    """
    new = torch.arange(slots, device=positions.device) - positions[:, :1]  # 0 for the state, then the actions
    return gemma.pick(masks.prompt(new < positions.shape[1], (new == 0) | (new == 1), window), positions)


def velocity(p: Params, state: Tensor, noisy: Tensor, time: Tensor, cache: Cache, cfg: TextConfig) -> Tensor:
    """The predicted velocity, noise minus actions, after the prefix in `cache`, which needs no free slots."""
    periods = 0.004 * 1000 ** torch.linspace(0, 1, cfg.width // 2, dtype=torch.float64, device=time.device)
    angles = 2 * torch.pi * repeat(time.double(), "b -> b t 1", t=noisy.shape[1]) / periods
    x = torch.cat([ops.linear(noisy, *p.action), angles.sin().float(), angles.cos().float()], -1)
    x = torch.cat([ops.linear(state, *p.state)[:, None], ops.linear(F.silu(ops.linear(x, *p.mix_in)), *p.mix_out)], 1)
    positions = cache.length[:, None] + torch.arange(x.shape[1], device=x.device)
    cache = tree.map(lambda part: pad(part, x.shape[1]) if part.dim() > 1 else part, cache)
    x, _ = gemma.run(p.expert, x, positions, block_causal(positions, cache.slots, cfg.window), cfg, cache)
    return ops.linear(ops.rms_norm(x[:, 1:], p.expert.norm, cfg.eps), *p.velocity)


def loss(p: Params, state: Tensor, actions: Tensor, noise: Tensor, time: Tensor, cache: Cache, cfg: TextConfig):
    """Flow matching (Lipman et al. 2022, arXiv 2210.02747): the mean squared error of the velocity at these times."""
    return F.mse_loss(velocity(p, state, actions.lerp(noise, time[:, None, None]), time, cache, cfg), noise - actions)


def integrate(field, x: Tensor, steps: int) -> Tensor:
    """Euler's method from time 1 to time 0: `field(x, time)` is the velocity."""
    for i in range(steps):
        x = x - field(x, x.new_full(x.shape[:1], 1 - i / steps)) / steps
    return x


if __name__ == "__main__":
    model, step = pg.load(dtype="float32", device="cpu"), pg.jit(velocity)
    cfg = replace(model.cfg.text, width=64, hidden=128)
    p, state, noise = init(cfg, state=8, action=7), torch.zeros(1, 8), torch.randn(1, 50, 7)
    _, cache = pg.prefill(model.params, pg.prepare(model, *sys.argv[1:]), model.cfg, size=0)
    actions = integrate(lambda x, time: step(p, state, x, time, cache, cfg), noise, steps=10)
    print("actions:", *actions.shape, "compilations:", step.compilations)
