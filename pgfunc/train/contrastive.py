"""Contrastive losses on unit vectors, and what is measured with them: CLIP's softmax, SigLIP's sigmoid, recall.

Row i of the pictures belongs to row i of the texts; every other pair is a negative. The logits of a block of rows are

                texts 0 .. b-1
    rows   first     [ . + . . . ]      logit = exp(scale) · x·y + bias;  + marks the pairs that belong together
           first + 1 [ . . + . . ]

and both losses are a sum over such rows, so three cases are one: the whole batch is one block; with `chunk` there are
several, of which one at a time is in memory; with `group` each process has the rows of its own pictures and gathers the
texts of all. Their gradients have one form too, (probability - target) at each logit, which the backward pass computes
anew, block by block: what is kept is the vectors alone.

Axes: b batch of this process, r rows of a block, s all texts (or all pictures), d width, c classes, k prompts a class.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from pgfunc.errors import SettingError
from pgfunc.ops import upcast

Kind = Literal["softmax", "sigmoid"]


def softmax_loss(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    chunk: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of finding each picture's text and each text's picture (Radford et al. 2021), in float32.

    scale: the logarithm of the factor on the cosines (1 / temperature); learned. A bias would cancel.
    chunk: rows of logits in memory at once, forward and backward; 0 takes all. With chunks, only first
    derivatives, in reverse mode.
    group: the processes that share the batch; each calls this with its own b pairs, b equal in all. The mean over
    processes of the loss is the loss of the whole batch, and so are, averaged as DDP does it, all gradients.
    """
    zero = torch.zeros_like(scale)
    both = [rows_loss("softmax", x, y, scale, zero, chunk, group) for x, y in ((images, texts), (texts, images))]
    return (both[0] + both[1]) / (2 * len(images))


def sigmoid_loss(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    chunk: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """-Σ log sigmoid(±logit) / b over all pairs, + for those that belong together (Zhai et al. 2023), in float32.

    scale: the logarithm of the factor on the cosines. bias: added to it; SigLIP starts at -10. Both learned.
    chunk, group: as for `softmax_loss`.
    """
    return rows_loss("sigmoid", images, texts, scale, bias, chunk, group) / len(images)


def rows_loss(
    kind: Kind,
    x: Float[Tensor, "b d"],
    y: Float[Tensor, "c d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    chunk: int,
    group: dist.ProcessGroup | None,
) -> Float[Tensor, ""]:
    """The sum over this process's rows, against the columns of all processes."""
    if chunk < 0:
        raise SettingError(f"chunk is {chunk}, expected the number of rows at once, or 0 for all")
    if len(x) != len(y):
        raise SettingError(f"{len(x)} and {len(y)} vectors: a batch is pairs, one text a picture")
    x, y, scale, bias = upcast(x), upcast(y), upcast(scale), upcast(bias)
    first = dist.get_rank(group) * len(x) if group else 0
    y = Gather.apply(y, group) if group else y
    return Blocks.apply(kind, chunk, first, x, y, scale, bias) if chunk else block_loss(kind, first, x, y, scale, bias)


def block_loss(
    kind: Kind,
    first: int,
    x: Float[Tensor, "r d"],
    y: Float[Tensor, "s d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """The sum over one block of rows. Its largest tensor has r x s elements."""
    logits = scale.exp() * (x @ y.T) + bias
    belongs = pairs(first, logits)
    if kind == "softmax":
        return -torch.where(belongs, logits.log_softmax(-1), 0).sum()
    return -F.logsigmoid(torch.where(belongs, logits, -logits)).sum()


def pairs(first: int, logits: Float[Tensor, "r s"]) -> Bool[Tensor, "r s"]:
    """True where a row and a column belong together: at column `first` + row."""
    row, column = (torch.arange(size, device=logits.device) for size in logits.shape)
    return rearrange(row, "r -> r 1") + first == column


class Blocks(torch.autograd.Function):
    """Σ block_loss over blocks of `chunk` rows; backward computes each block's logits anew.

    It keeps its inputs and nothing else. `torch.utils.checkpoint` would do the same, but not under torch.func.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(kind, chunk, first, x, y, scale, bias):
        return torch.stack([block_loss(kind, at, rows, y, scale, bias) for at, rows in blocks(chunk, first, x)]).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        ctx.settings, tensors = inputs[:3], inputs[3:]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads):
        kind, chunk, first = ctx.settings
        x, y, scale, bias = ctx.saved_tensors
        to_x, shared = [], (torch.zeros_like(y), torch.zeros_like(scale), torch.zeros_like(bias))
        for at, rows in blocks(chunk, first, x):
            to_rows, *to_shared = slopes(kind, at, rows, y, scale, bias)
            to_x.append(to_rows)
            shared = tuple(total + part for total, part in zip(shared, to_shared, strict=True))
        return None, None, None, *(grads[0] * slope for slope in (torch.cat(to_x), *shared))


def blocks(chunk: int, first: int, x: Float[Tensor, "b d"]) -> Iterator[tuple[int, Float[Tensor, "r d"]]]:
    """The rows in blocks, each with the column of its first row's partner."""
    for i, rows in enumerate(x.split(chunk)):
        yield first + i * chunk, rows


def slopes(
    kind: Kind,
    first: int,
    x: Float[Tensor, "r d"],
    y: Float[Tensor, "s d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
) -> tuple[Float[Tensor, "r d"], Float[Tensor, "s d"], Float[Tensor, ""], Float[Tensor, ""]]:
    """The gradient of `block_loss` at x, y, scale and bias: at each logit it is (probability - target)."""
    factor = scale.exp()
    cosines = x @ y.T
    logits = factor * cosines + bias
    probability = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
    error = probability - pairs(first, logits).to(logits.dtype)
    return factor * error @ y, factor * error.T @ x, factor * (error * cosines).sum(), error.sum()


class Gather(torch.autograd.Function):
    """The rows of all processes, in their order; backward sums over processes what each says of these rows.

    Of public collectives that PyTorch 2.11 to 2.13 have without deprecation; what it has that is differentiable is
    deprecated or private, and opaque to torch.func. All rows at once, where SigLIP passes them from neighbour to
    neighbour: one collective instead of many, and with `chunk` the logits stay small all the same.
    """

    @staticmethod
    def forward(x, group):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        x, ctx.group = inputs
        ctx.rows = len(x)

    @staticmethod
    def backward(ctx: Any, *grads):
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.rows)[dist.get_rank(ctx.group)], None


class Recall(NamedTuple):
    """The share of rows whose partner is among the k nearest, 0 to 1."""

    texts: Float[Tensor, ""]  # of each picture's text among all texts
    images: Float[Tensor, ""]  # of each text's picture among all pictures


def recall(images: Float[Tensor, "b d"], texts: Float[Tensor, "b d"], k: int = 1) -> Recall:
    """Retrieval recall@k, both ways. Whatever ties with the partner counts as nearer: equal vectors find nothing."""
    if not 1 <= k <= len(images):
        raise SettingError(f"k is {k}, expected 1 to {len(images)}, the number of pairs")
    similar = upcast(images) @ upcast(texts).T
    own = similar.diagonal()
    rank_of_text = (similar >= rearrange(own, "b -> b 1")).sum(1)
    rank_of_image = (similar >= rearrange(own, "b -> 1 b")).sum(0)
    return Recall((rank_of_text <= k).float().mean(), (rank_of_image <= k).float().mean())


def class_vectors(prompts: Float[Tensor, "c k d"]) -> Float[Tensor, "c d"]:
    """Zero-shot classes: the unit vector in the middle of each class's prompts (Radford et al. 2021, 3.1.4).

    `dual.logits(params, images, class_vectors(prompts))` are the scores.
    """
    return F.normalize(upcast(prompts).mean(1), dim=-1)
