"""The stage `masks`: the VQ-VAE that writes a mask as sixteen codes, learned from the masks of rendered scenes.

For the first steps nothing is quantised; then codes start as features of the encoder, follow the features that choose
them as running means (van den Oord et al. 2017, appendix A.1), and move to a random feature when nothing does.
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
FREE = 0.05  # of the steps go by before anything is quantised


class Codes(NamedTuple):
    """The codebook as running means of how many features choose each code, and of their sum."""

    chosen: Float[Tensor, "c"]
    total: Float[Tensor, "c d"]

    @property
    def book(self) -> Float[Tensor, "c d"]:
        return self.total / rearrange(self.chosen, "c -> c 1").clamp(min=1e-5)


def crops(masks: Bool[Tensor, "n y x"], boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 64 64"]:
    """What of each mask lies in its box, enlarged or reduced to 64 x 64."""
    low, high = boxes[:, :2].flip(-1), boxes[:, 2:].flip(-1)  # x, y
    theta = torch.cat([torch.diag_embed(high - low), rearrange(low + high - 1, "n c -> n c 1")], -1)
    grid = F.affine_grid(theta, [len(masks), 1, 128, 128], align_corners=False)
    fine = F.grid_sample(rearrange(masks, "n y x -> n 1 y x").float(), grid, align_corners=False)
    return rearrange(F.avg_pool2d(fine, 2), "n 1 y x -> n y x")


def loss(params: vqvae.Params, masks: Tensor, codes: Codes | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Of what comes out, and of features that lie far from their codes."""
    features = vqvae.encode(params, masks)
    given, commit = features, features.new_zeros(())
    if codes is not None:
        near = vqvae.lookup(codes.book, vqvae.quantize(codes.book, features.detach()))
        commit = (features - near).square().mean()
        given = features + (near - features).detach()  # straight through
    out = vqvae.decode(params, given)
    target = masks.round()
    error = F.binary_cross_entropy_with_logits(4 * out, target) + 0.1 * (out - (2 * target - 1)).square().mean()
    return error + COMMIT * commit, {"features": features.detach(), "iou": iou(out.detach() > 0, target > 0.5).mean()}


def iou(a: Bool[Tensor, "n y x"], b: Bool[Tensor, "n y x"]) -> Float[Tensor, "n"]:
    both, either = (reduce(x.float(), "n y x -> n", "sum") for x in (a & b, a | b))
    return both / either.clamp(min=1)


def start(features: Float[Tensor, "m d"], generator: torch.Generator) -> Codes:
    """Codes at random features."""
    chosen = features[torch.randint(len(features), (vqvae.CODES,), generator=generator).to(features.device)]
    return Codes(torch.ones(len(chosen), device=features.device), chosen.clone())


def follow(codes: Codes, features: Float[Tensor, "m d"], generator: torch.Generator) -> Codes:
    """The running means after these features; codes that are hardly ever chosen start anew at one of them."""
    chosen = F.one_hot(vqvae.quantize(codes.book, features[None])[0], vqvae.CODES).to(features.dtype)
    count = DECAY * codes.chosen + (1 - DECAY) * chosen.sum(0)
    total = DECAY * codes.total + (1 - DECAY) * chosen.T @ features
    fresh = start(features, generator)
    dead = count < DEAD * count.mean()
    return Codes(torch.where(dead, count.mean(), count), torch.where(dead[:, None], fresh.total * count.mean(), total))


def train(batches: Iterable[Tensor], plan: Plan, seed: int, folder: Path, device: str) -> vqvae.Params:
    """From batches of crops."""
    generator = torch.Generator().manual_seed(seed)
    params = tree.map(lambda leaf: leaf.to(device), vqvae.init(seed)._replace(codebook=()))
    state, began, free = optim.init(params), time.monotonic(), FREE * plan.steps
    blank = torch.zeros(vqvae.CODES, vqvae.WIDTH, device=device)
    codes = Codes(blank[:, 0], blank)
    for step, masks in enumerate(batches):
        known = codes if step >= free else None
        grads, (value, seen) = finetune.grad_and_value(
            lambda given, masks=masks, known=known: loss(given._replace(codebook=blank), masks, known), params
        )
        grads, _ = optim.clip(grads, 1.0)
        rate = optim.cosine(step, plan.peak, plan.warmup, plan.steps)
        params, state = optim.update(grads, state, params, rate, optim.Settings(weight_decay=plan.weight_decay))
        features = rearrange(seen["features"], "n s d -> (n s) d")
        codes = follow(codes, features, generator) if known else start(features, generator)
        if (step + 1) % 500 == 0 or step + 1 == plan.steps:
            figures = {"loss": float(value), "iou": float(seen["iou"])}
            note(folder, {"stage": "masks", "step": step + 1, "seconds": time.monotonic() - began} | figures)
    return params._replace(codebook=codes.book)
