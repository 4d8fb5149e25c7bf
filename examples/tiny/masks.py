"""The stage `masks`: train the VQ-VAE that writes a mask as sixteen codes, on the masks of rendered scenes.

The first steps do not quantize. Then the codes start as features of the encoder and follow, as running means, the
features that choose them (van den Oord et al. 2017, appendix A.1). A code that no feature chooses moves to a random
feature.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from examples.tiny.fit import note
from examples.tiny.recipe import Plan
from pgfunc import tree
from pgfunc.objects import vqvae
from pgfunc.train import finetune, optim

DECAY, COMMIT, DEAD = 0.99, 0.25, 0.05
FREE = 0.05  # the share of the steps without quantization


class Codes(NamedTuple):
    """The codebook as two running means: how many features choose each code, and the sum of these features."""

    chosen: Float[Tensor, "c"]
    total: Float[Tensor, "c d"]

    @property
    def book(self) -> Float[Tensor, "c d"]:
        return self.total / rearrange(self.chosen, "c -> c 1").clamp(min=1e-5)


def crops(masks: Bool[Tensor, "n y x"], boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 64 64"]:
    """The part of each mask inside its box, resized to 64 x 64."""
    low, high = boxes[:, :2].flip(-1), boxes[:, 2:].flip(-1)  # x, y
    theta = torch.cat([torch.diag_embed(high - low), rearrange(low + high - 1, "n c -> n c 1")], -1)
    grid = F.affine_grid(theta, [len(masks), 1, 128, 128], align_corners=False)
    fine = F.grid_sample(rearrange(masks, "n y x -> n 1 y x").float(), grid, align_corners=False)
    return rearrange(F.avg_pool2d(fine, 2), "n 1 y x -> n y x")


def loss(params: vqvae.Params, masks: Tensor, codes: Codes | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the decoded masks, plus that of features far from their codes; and the features and the IoU."""
    features = vqvae.encode(params, masks)
    inputs, commit = features, features.new_zeros(())
    if codes is not None:
        near = vqvae.lookup(codes.book, vqvae.quantize(codes.book, features.detach()))
        commit = (features - near).square().mean()
        inputs = features + (near - features).detach()  # straight through
    out = vqvae.decode(params, inputs)
    target = masks.round()
    error = F.binary_cross_entropy_with_logits(4 * out, target) + 0.1 * (out - (2 * target - 1)).square().mean()
    return error + COMMIT * commit, {"features": features.detach(), "iou": iou(out.detach() > 0, target > 0.5).mean()}


def iou(a: Bool[Tensor, "n y x"], b: Bool[Tensor, "n y x"]) -> Float[Tensor, "n"]:
    both, either = (reduce(x.float(), "n y x -> n", "sum") for x in (a & b, a | b))
    return both / either.clamp(min=1)


def start(features: Float[Tensor, "m d"], generator: torch.Generator) -> Codes:
    """Codes that start at random features."""
    chosen = features[torch.randint(len(features), (vqvae.CODES,), generator=generator).to(features.device)]
    return Codes(torch.ones(len(chosen), device=features.device), chosen.clone())


def follow(codes: Codes, features: Float[Tensor, "m d"], generator: torch.Generator) -> Codes:
    """Update the running means with these features; codes that are hardly ever chosen restart at one of them."""
    chosen = F.one_hot(vqvae.quantize(codes.book, features[None])[0], vqvae.CODES).to(features.dtype)
    count = DECAY * codes.chosen + (1 - DECAY) * chosen.sum(0)
    total = DECAY * codes.total + (1 - DECAY) * chosen.T @ features
    fresh = start(features, generator)
    dead = count < DEAD * count.mean()
    return Codes(torch.where(dead, count.mean(), count), torch.where(dead[:, None], fresh.total * count.mean(), total))


def train(batches: Iterable[Tensor], plan: Plan, seed: int, folder: Path, device: str) -> vqvae.Params:
    """Train on batches of crops."""
    generator = torch.Generator().manual_seed(seed)
    params = tree.map(lambda leaf: leaf.to(device), vqvae.init(seed)._replace(codebook=()))
    state, began, free = optim.init(params), time.monotonic(), FREE * plan.steps
    blank = torch.zeros(vqvae.CODES, vqvae.WIDTH, device=device)
    codes = Codes(blank[:, 0], blank)
    for step, masks in enumerate(batches):
        active = codes if step >= free else None
        grads, (value, extras) = finetune.grad_and_value(
            lambda p, masks=masks, active=active: loss(p._replace(codebook=blank), masks, active), params
        )
        grads, _ = optim.clip(grads, 1.0)
        rate = optim.cosine(step, plan.peak, plan.warmup, plan.steps)
        params, state = optim.update(grads, state, params, rate, optim.Settings(weight_decay=plan.weight_decay))
        features = rearrange(extras["features"], "n s d -> (n s) d")
        codes = follow(codes, features, generator) if active else start(features, generator)
        if (step + 1) % 500 == 0 or step + 1 == plan.steps:
            figures = {"loss": float(value), "iou": float(extras["iou"])}
            note(folder, {"stage": "masks", "step": step + 1, "seconds": time.monotonic() - began} | figures)
    return params._replace(codebook=codes.book)
