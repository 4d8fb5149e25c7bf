"""What activations say about the logits: resumed runs, the logit lens, attributions.

Each reading is a pure function, so it can be differentiated, mapped by `vmap` and compiled. Axes: b batch, s sequence
(left-aligned: index = position), d width, l layers, n heads, r tokens whose logits are explained.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc import gemma, ops, paligemma, tree
from pgfunc.config import Config
from pgfunc.errors import SettingError
from pgfunc.lab.edits import add
from pgfunc.lab.functions import capture, edit
from pgfunc.lab.naming import describe
from pgfunc.paligemma import Params, Prompt
from pgfunc.quant.lowbit import dequantize
from pgfunc.taps import Tap, Wrap, identity, plain

PARTS = ("language.embed", "language.*.z", "language.*.mlp_out", "language.*.resid_post")  # what `attribution` reads
T = TypeVar("T", bound=Any)


def resume(
    params: Params,
    prompt: Prompt,
    cfg: Config,
    layer: int,
    resid: Float[Tensor, "b s d"],
    tap: Tap = identity,
    wrap: Wrap = plain,
    queries: gemma.Queries = (),
) -> Float[Tensor, "b t v"]:
    """The logits of `pg.forward`, computed from the input of one layer of the language model.

    `resid` is `language.{layer}.resid_pre`; for `layer` = the number of layers it is the last `resid_post`. The
    pictures of the prompt are not read. If `queries` is given, these positions of `resid` get logits instead of all
    text positions, and the last layer computes only them: its activations, and its mask, have only these queries.
    Raises SettingError for a layer that does not exist.
    """
    if not 0 <= layer <= cfg.text.layers:
        raise SettingError(f"layer is {layer}, expected 0 to {cfg.text.layers}")
    if resid.shape[1] < prompt.tokens.shape[1]:
        raise SettingError(f"resid has {resid.shape[1]} positions, fewer than the {prompt.tokens.shape[1]} of the text")
    x = paligemma.hidden_from(params, resid, prompt, cfg, layer, tap, wrap, queries)
    x = x if isinstance(queries, Tensor) else x[:, x.shape[1] - prompt.tokens.shape[1] :]
    return wrap(gemma.unembed)(params.language, x, cfg.text, tap)


def lens(
    params: Params, resid: Float[Tensor, "*b d"], cfg: Config, allowed: gemma.Allowed = None
) -> Float[Tensor, "*b r"]:
    """The logits that the final norm and the head make of a residual stream: the logit lens (nostalgebraist 2020)."""
    return gemma.unembed(params.language, resid, cfg.text, allowed=allowed)


class Attribution(NamedTuple):
    """How much each part of the language model adds to some logits. The parts sum to the logits."""

    embed: Float[Tensor, "b r"]
    heads: Float[Tensor, "b l n r"]
    mlps: Float[Tensor, "b l r"]

    def total(self) -> Float[Tensor, "b r"]:
        """The sum of all parts: the logits."""
        return self.embed + self.heads.sum((1, 2)) + self.mlps.sum(1)


def attribution(
    params: Params, seen: Mapping[str, Tensor], cfg: Config, tokens: Int[Tensor, "b r"], at: Int[Tensor, "b"]
) -> Attribution:
    """Direct logit attribution of these tokens' logits after the token at position `at` of each row, in float32.

    `seen` has the activations `PARTS`. The scale of the final norm is the one of this run. Gemma 2's norm after each
    sublayer is applied to each head with the scale of the heads' sum. The final softcap multiplies each part by the
    same factor. The logits of ids that are not tokens are -inf, and are not explained. (Elhage et al. 2021, "A
    Mathematical Framework for Transformer Circuits")
    """
    text, p = cfg.text, params.language
    row = torch.arange(len(at), device=at.device)
    pick = lambda name: ops.upcast(seen[name][row, at])  # noqa: E731
    final_scale = torch.rsqrt(pick(f"language.{text.layers - 1}.resid_post").square().mean(-1) + text.eps)
    unembedding = ops.upcast(ops.embedding(tokens, p.embed)) * (1 + ops.upcast(p.norm))

    def read(x: Float[Tensor, "b *n d"]) -> Float[Tensor, "b *n r"]:
        return einsum(x, unembedding, final_scale, "b ... d, b r d, b -> b ... r")

    heads, mlps = [], []
    for i, layer in enumerate(p.layers):
        z, out = pick(f"language.{i}.z"), layer.out if isinstance(layer.out, Tensor) else dequantize(layer.out)
        out = rearrange(ops.upcast(out), "d (n h) -> n d h", n=text.heads)
        added = einsum(z, out, "b n h, n d h -> b n d")
        if isinstance(layer.post_attention_norm, Tensor):
            scale = torch.rsqrt(added.sum(1, keepdim=True).square().mean(-1, keepdim=True) + text.eps)
            added = added * scale * (1 + ops.upcast(layer.post_attention_norm))
        heads.append(read(added))
        mlps.append(read(pick(f"language.{i}.mlp_out")))
    parts = Attribution(read(pick("language.embed")), torch.stack(heads, 1), torch.stack(mlps, 1))
    if not text.final_softcap:
        return parts
    total = parts.total()
    divisor = torch.where(total == 0, 1.0, total)  # so that the gradient is finite too
    factor = torch.where(total == 0, 1.0, ops.softcap(total, text.final_softcap) / divisor)
    return Attribution(parts.embed * factor, parts.heads * factor[:, None, None], parts.mlps * factor[:, None])


def attribution_patching(
    fn: Callable[..., T],
    metric: Callable[[T], Float[Tensor, ""]],
    patterns: Sequence[str],
    args: tuple[Any, ...],
    other_args: tuple[Any, ...],
) -> dict[str, Tensor]:
    """For each activation: estimates of how the metric of `fn(*args)` changes if it is patched from `fn(*other_args)`.

    The estimate of a patch is the sum over the patched elements. It is the first-order term, (other - own) · gradient,
    for all sites from three runs. (Nanda 2023; Kramár et al. 2024, arXiv 2403.00745)
    """
    _, own = capture(fn, *patterns)(*args)
    _, other = capture(fn, *patterns)(*other_args)
    own = {name: x for name, x in own.items() if x.is_floating_point()}  # not the masks
    for name, x in own.items():
        if x.shape != other[name].shape:
            raise SettingError(f"{name} is {describe(x)} in one run and {describe(other[name])} in the other")

    def shifted(shifts: dict[str, Tensor]) -> Float[Tensor, ""]:
        return metric(edit(fn, {name: add(shift) for name, shift in shifts.items()})(*args))

    gradients = torch.func.grad(shifted)({name: torch.zeros_like(x) for name, x in own.items()})
    return {name: (other[name] - own[name]) * gradient for name, gradient in gradients.items()}


def jacobian(
    fn: Callable[..., T],
    read: Callable[[T], Float[Tensor, "*r"]],
    name: str,
    args: tuple[Any, ...],
    chunk: int | None = None,
) -> Float[Tensor, "..."]:
    """The derivatives of `read(fn(*args))` by one activation, at the values of this call.

    Its axes are those of `read`, then those of the activation. Let `read` sum over the rows of a batch, as one row does
    not depend on another: `lambda logits: logits[:, -1, ids].sum(0)` gives `r b p d` for `projector`. `chunk` is the
    number of derivatives that are computed together, by default all. Raises SettingError for a pattern of several names
    and for a mask.
    """
    _, seen = capture(fn, name)(*args)
    if name not in seen or not seen[name].is_floating_point():
        raise SettingError(f"{name!r} is not the name of one activation of floating point; a Jacobian needs one")

    def shifted(shift: Tensor) -> Float[Tensor, "*r"]:
        return read(edit(fn, {name: add(shift)})(*args))

    return torch.func.jacrev(shifted, chunk_size=chunk)(torch.zeros_like(seen[name]))


def per_example(
    loss: Callable[[T, Prompt], Float[Tensor, ""]], weights: T, prompt: Prompt, chunk: int | None = None
) -> T:
    """The gradient of each row's loss: a tree like `weights`, whose leaves have a leading axis of rows.

    `loss` gets a prompt of one row. `weights` may be all parameters, or a dict of some leaves that `loss` puts into the
    others by `pg.tree.replace`. `chunk` is the number of rows that are computed together, by default all.
    """
    rows = tree.map(lambda x: rearrange(x, "b ... -> b 1 ..."), prompt)
    return torch.func.vmap(torch.func.grad(loss), (None, 0), chunk_size=chunk)(weights, rows)


def integrated(
    fn: Callable[[Float[Tensor, "*s"]], Float[Tensor, "*b"]],
    x: Float[Tensor, "*s"],
    baseline: Float[Tensor, "*s"],
    nodes: int = 32,
) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*b"]]:
    """Integrated gradients of a function along the line from `baseline` to x, by Gauss-Legendre quadrature.

    `fn` returns a number, or a number for each row of x that depends on no other row. The attributions are in float32,
    or wider. Also returns the gap: the sum of the attributions (of each row) minus fn(x) - fn(baseline), which is 0 for
    the exact integral. Choose a baseline near the data: for pictures, a blurred copy converges with far fewer nodes
    than a grey one. (Sundararajan et al. 2017)
    """
    start, direction = ops.upcast(baseline), ops.upcast(x) - ops.upcast(baseline)
    total = torch.zeros_like(direction)
    for root, weight in quadrature(nodes):
        point = (start + root * direction).to(x.dtype)
        total = total + weight * ops.upcast(torch.func.grad(lambda each: fn(each).sum())(point))
    parts, difference = total * direction, fn(x) - fn(baseline)
    return parts, parts.reshape(*difference.shape, -1).sum(-1) - difference


@torch.compiler.assume_constant_result
def quadrature(nodes: int) -> list[tuple[float, float]]:
    """Points and weights of the Gauss-Legendre rule on 0 to 1. A constant in compiled code."""
    roots, weights = np.polynomial.legendre.leggauss(nodes)
    return [(float(root + 1) / 2, float(weight) / 2) for root, weight in zip(roots, weights, strict=True)]
