"""Fine-tuning: the loss on a prompt's suffix, the choice of the parameters to train, and the gradient of a batch.

    [image tokens] bos prefix newline | suffix eos
                              ^^^^^^^   ^^^^^^        the loss counts the predictions made here, of the next token

The trained values are a tree of their own beside the parameters: the leaves that `select` returns, or LoRA's pairs. All
other parameters have neither gradient nor optimizer state. Nothing here knows about files.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from pgfunc import gemma, quant, tree
from pgfunc.config import Config
from pgfunc.errors import SettingError
from pgfunc.paligemma import Params, Prompt, encode_images, hidden
from pgfunc.taps import plain

T = TypeVar("T")


def loss(params: Params, prompt: Prompt, cfg: Config, recompute: bool = False) -> Float[Tensor, ""]:
    """Mean cross-entropy of all suffix tokens in the batch, including eos, in nats.

    It equals transformers' loss with label -100 at all other positions, with one exception: the published Hugging Face
    files have rows of random numbers after the vocabulary, which are not tokens here. The loss is nan if no row has a
    suffix.
    """
    total, count = loss_terms(params, prompt, cfg, recompute)
    return total / count


def loss_terms(
    params: Params, prompt: Prompt, cfg: Config, recompute: bool = False
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The sum of the cross-entropies of the suffix tokens, and their number. Terms of several batches may be added.

    Logits are float32, and are computed only where a suffix token is predicted. With `recompute`, only the input of
    each transformer block is saved, and the backward pass computes the rest again (gradient checkpointing, Chen et al.
    2016); torch.func's transforms do not allow that.
    """
    wrap = recomputed if recompute else plain
    x = hidden(params, encode_images(params, prompt.pixels, cfg, wrap=wrap), prompt, cfg, wrap=wrap)
    image_tokens = x.shape[1] - prompt.tokens.shape[1]
    target, tokens = (F.pad(part, (image_tokens, 0))[:, 1:] for part in (prompt.causal & prompt.valid, prompt.tokens))
    logits = gemma.unembed(params.language, x[:, :-1][target], cfg.text)
    return F.cross_entropy(logits, tokens[target], reduction="sum"), target.sum()


def recomputed(block: Callable[..., T]) -> Callable[..., T]:
    """A transformer block that saves only its input; the backward pass computes the rest again."""
    return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


def select(params: Params, freeze: Sequence[str] = ()) -> dict[str, Tensor]:
    """Path -> leaf of the parameters to train: all except those that match a pattern, such as `vision.*`.

    Patterns are fnmatch's, on whole paths. Raises SettingError if a pattern matches nothing, if nothing is left to
    train, or if weights are quantized.
    """
    quant.check_plain(params, "training")
    leaves = tree.flatten(params)
    frozen = {path for pattern in freeze for path in tree.matching(leaves, pattern)}
    if len(frozen) == len(leaves):
        raise SettingError(f"freezing {', '.join(freeze)} leaves nothing to train")
    return {path: leaf for path, leaf in leaves.items() if path not in frozen}


def grad_and_value(fn: Callable[[T], tuple[Tensor, Any]], x: T) -> tuple[T, tuple[Tensor, Any]]:
    """The gradient of fn's first result at x, as a tree like x, and both results. x is not changed.

    Equals `torch.func.grad_and_value(fn, has_aux=True)`, but uses plain autograd: torch.func keeps the graph for a
    second derivative, which took 2.6 times the memory (the shipped checkpoint, 64 rows, float32, CPU), and forbids
    gradient checkpointing.
    """
    leaves, structure = pytree.tree_flatten(tree.map(lambda leaf: leaf.detach().requires_grad_(), x))
    with torch.enable_grad():  # even if the caller has disabled it
        value, aux = fn(pytree.tree_unflatten(leaves, structure))
    grads = torch.autograd.grad(value, leaves, materialize_grads=True)
    return pytree.tree_unflatten(grads, structure), (value.detach(), aux)


def gradient(
    build: Callable[[T], Params], trained: T, prompts: Iterable[Prompt], cfg: Config, recompute: bool = False
) -> tuple[T, Float[Tensor, ""]]:
    """The gradient and the value of the loss of a batch that comes in parts, with one part in memory at a time.

    `build` makes the parameters from the trained values, and is differentiated: it chooses the precision of the
    computation and merges LoRA. The sums of the parts are added and divided by the total number of suffix tokens, so
    the result does not depend on how a batch is cut. There must be at least one part.
    """
    parts = (grad_and_value(lambda x, p=prompt: loss_terms(build(x), p, cfg, recompute), trained) for prompt in prompts)
    grads, (total, count) = next(parts)
    for more, (value, tokens) in parts:
        grads = tree.map(torch.add, grads, more)
        total, count = total + value, count + tokens  # on the device, so a GPU computes while the next part is prepared
    return tree.map(lambda leaf: leaf / count, grads), total / count
