"""Contrastive losses on unit vectors, CLIP's softmax and SigLIP's sigmoid; and retrieval recall, which measures them.

Picture i matches text i; every other pair is a negative. The logits of a block of rows are

                texts 0 .. b-1
    rows   first     [ . + . . . ]      logit = exp(scale) · x·y + bias;  + marks the pairs that match
           first + 1 [ . . + . . ]

Both losses are sums over such rows, so one function serves three cases. By default the whole batch is one block. With
`chunk` there are several blocks, and one at a time is in memory. With `group` each process has the rows of its own
pictures and gathers the texts of all processes. Both gradients have the form (probability - target) at each logit; with
`chunk` the backward pass computes the logits again, block by block, and only the vectors stay in memory between the
passes.

Axes: b batch of this process, m the vectors that match its rows (m = b), r rows of a block, s all texts (or all
pictures), d width, c classes, k prompts per class.
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
    """Mean cross-entropy of choosing each picture's text and each text's picture (Radford et al. 2021), in float32.

    scale: the logarithm of the factor on the cosines (1 / temperature); learned. A bias would cancel.
    chunk: rows of logits in memory at once, forward and backward; 0 takes all rows. With chunks only first derivatives
    in reverse mode exist.
    group: the processes that share the batch. Each process calls this function with its own b pairs; b is the same in
    all. The mean of the losses over the processes is the loss of the whole batch, and the gradients, averaged over the
    processes as DDP does, are its gradients.
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
    """-Σ log sigmoid(±logit) / b over all pairs, with + for matching pairs (Zhai et al. 2023), in float32.

    scale: the logarithm of the factor on the cosines. bias: added to the logits; SigLIP starts at -10. Both are
    learned. chunk, group: as in `softmax_loss`.
    """
    return rows_loss("sigmoid", images, texts, scale, bias, chunk, group) / len(images)


def rows_loss(
    kind: Kind,
    x: Float[Tensor, "b d"],
    y: Float[Tensor, "m d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    chunk: int,
    group: dist.ProcessGroup | None,
) -> Float[Tensor, ""]:
    """The sum of the loss over this process's rows, against the columns of all processes."""
    if chunk < 0:
        raise SettingError(f"chunk is {chunk}, expected the number of rows at once, or 0 for all")
    if len(x) != len(y):
        raise SettingError(f"expected as many pictures as texts, found {len(x)} and {len(y)}")
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
    """The sum of the loss over one block of rows. The largest tensor has r x s elements."""
    logits = scale.exp() * (x @ y.T) + bias
    matches = pairs(first, logits)
    if kind == "softmax":
        return -torch.where(matches, logits.log_softmax(-1), 0).sum()
    return -F.logsigmoid(torch.where(matches, logits, -logits)).sum()


def pairs(first: int, logits: Float[Tensor, "r s"]) -> Bool[Tensor, "r s"]:
    """True where a row and a column match: row i matches column `first` + i."""
    row, column = (torch.arange(size, device=logits.device) for size in logits.shape)
    return rearrange(row, "r -> r 1") + first == column


class Blocks(torch.autograd.Function):
    """Σ block_loss over blocks of `chunk` rows; the backward pass computes each block's logits again.

    Only the inputs are saved for the backward pass. `torch.utils.checkpoint` does the same, but not under torch.func.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(kind, chunk, first, x, y, scale, bias):
        return torch.stack([block_loss(kind, row, part, y, scale, bias) for row, part in blocks(chunk, first, x)]).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        ctx.settings, tensors = inputs[:3], inputs[3:]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads):
        kind, chunk, first = ctx.settings
        x, y, scale, bias = ctx.saved_tensors
        to_x, shared = [], (torch.zeros_like(y), torch.zeros_like(scale), torch.zeros_like(bias))
        for row, part in blocks(chunk, first, x):
            to_part, *to_shared = slopes(kind, row, part, y, scale, bias)
            to_x.append(to_part)
            shared = tuple(total + more for total, more in zip(shared, to_shared, strict=True))
        return None, None, None, *(grads[0] * slope for slope in (torch.cat(to_x), *shared))


def blocks(chunk: int, first: int, x: Float[Tensor, "b d"]) -> Iterator[tuple[int, Float[Tensor, "r d"]]]:
    """The rows in blocks, each with the column that matches its first row."""
    for i, part in enumerate(x.split(chunk)):
        yield first + i * chunk, part


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
    """The rows of all processes, in the order of their ranks. The backward pass sums the gradients over processes.

    It uses public collectives that PyTorch 2.11 to 2.13 have without deprecation; PyTorch's differentiable collectives
    are deprecated or private, and opaque to torch.func. SigLIP passes rows from neighbor to neighbor; here one
    collective gathers all rows at once, and with `chunk` the logits still stay small.
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
    """The share of rows whose match is among the k nearest, from 0 to 1."""

    texts: Float[Tensor, ""]  # each picture's text is searched among all texts
    images: Float[Tensor, ""]  # each text's picture is searched among all pictures


def recall(images: Float[Tensor, "b d"], texts: Float[Tensor, "b d"], k: int = 1) -> Recall:
    """Retrieval recall@k in both directions.

    A tie with the match counts as nearer: if all vectors are equal, recall is 0, unless k is the number of pairs.
    """
    if not 1 <= k <= len(images):
        raise SettingError(f"k is {k}, expected 1 to {len(images)}, the number of pairs")
    similar = upcast(images) @ upcast(texts).T
    own = similar.diagonal()
    rank_of_text = (similar >= rearrange(own, "b -> b 1")).sum(1)
    rank_of_image = (similar >= rearrange(own, "b -> 1 b")).sum(0)
    return Recall((rank_of_text <= k).float().mean(), (rank_of_image <= k).float().mean())


def class_vectors(prompts: Float[Tensor, "c k d"]) -> Float[Tensor, "c d"]:
    """One unit vector per class: the direction of the mean of its prompts' vectors (Radford et al. 2021, 3.1.4).

    `dual.logits(params, images, class_vectors(prompts))` are the scores of zero-shot classification.
    """
    return F.normalize(upcast(prompts).mean(1), dim=-1)
