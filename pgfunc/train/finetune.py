"""Fine-tuning: the prefix-LM loss of a prompt's suffix, what of the parameters is trained, and the gradient of a batch.

    [image tokens] bos prefix newline | suffix eos
                              ^^^^^^^   ^^^^^^        here the next token is predicted, and counts in the loss

What is trained is a tree of its own beside the parameters: the leaves that `select` picks, or LoRA's pairs; what is not
in it has neither gradient nor optimizer state. Nothing here knows about files. Axes: t text tokens, s sequence.
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
from pgfunc.ops import plain
from pgfunc.paligemma import Params, Prompt, encode_images, hidden

T = TypeVar("T")


def loss(params: Params, prompt: Prompt, cfg: Config, recompute: bool = False) -> Float[Tensor, ""]:
    """Cross-entropy of the suffix tokens, eos included: the mean over all of them in the batch, in nats.

    Equals transformers' loss with labels -100 everywhere else, but for rows behind the vocabulary: those of the
    published Hugging Face files are random numbers, and here no token. nan for a prompt without a suffix.
    """
    total, count = loss_terms(params, prompt, cfg, recompute)
    return total / count


def loss_terms(
    params: Params, prompt: Prompt, cfg: Config, recompute: bool = False
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The sum of the cross-entropies of the suffix tokens, and their number: the terms of several batches add up.

    Logits are float32, and made only where a suffix token is predicted. `recompute` keeps, of each transformer block,
    only what goes in, and computes the rest again in the backward pass (gradient checkpointing, Chen et al. 2016);
    torch.func's transforms do not allow it.
    """
    wrap = recomputed if recompute else plain
    x = hidden(params, encode_images(params, prompt.pixels, cfg, wrap=wrap), prompt, cfg, wrap=wrap)
    image_tokens = x.shape[1] - prompt.tokens.shape[1]
    target, tokens = (F.pad(part, (image_tokens, 0))[:, 1:] for part in (prompt.causal & prompt.valid, prompt.tokens))
    logits = gemma.unembed(params.language, x[:, :-1][target], cfg.text)
    return F.cross_entropy(logits, tokens[target], reduction="sum"), target.sum()


def recomputed(block: Callable[..., T]) -> Callable[..., T]:
    """A transformer block that keeps what goes in, for the backward pass to compute the rest again."""
    return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def select(params: Params, freeze: Sequence[str] = ()) -> dict[str, Tensor]:
    """Path -> leaf of what is trained: all but the paths that match a pattern such as `vision.*` or `*.norm?_bias`.

    Patterns are fnmatch's, on whole paths. Raises SettingError for one that matches nothing, when nothing is left, and
    for quantized weights.
    """
    quant.check_plain(params, "training")
    leaves = tree.flatten(params)
    frozen = {path for pattern in freeze for path in tree.matching(leaves, pattern)}
    if len(frozen) == len(leaves):
        raise SettingError(f"freezing {', '.join(freeze)} leaves nothing to train")
    return {path: leaf for path, leaf in leaves.items() if path not in frozen}


def grad_and_value(fn: Callable[[T], tuple[Tensor, Any]], x: T) -> tuple[T, tuple[Tensor, Any]]:
    """The gradient of fn's first result at x, as a tree like x, and both results; x is not changed.

    What `torch.func.grad_and_value(fn, has_aux=True)` gives, by plain autograd: torch.func keeps the graph for a second
    derivative, which took 2.6 times the memory (the shipped checkpoint, 64 rows, float32, CPU), and forbids gradient
    checkpointing.
    """
    leaves, structure = pytree.tree_flatten(tree.map(lambda leaf: leaf.detach().requires_grad_(), x))
    with torch.enable_grad():  # whatever surrounds the call
        value, aux = fn(pytree.tree_unflatten(leaves, structure))
    grads = torch.autograd.grad(value, leaves, materialize_grads=True)
    return pytree.tree_unflatten(grads, structure), (value.detach(), aux)


def gradient(
    build: Callable[[T], Params], trained: T, prompts: Iterable[Prompt], cfg: Config, recompute: bool = False
) -> tuple[T, Float[Tensor, ""]]:
    """The gradient and value of the loss of a batch that comes in parts, one part in memory at a time.

    `build` makes the parameters from what is trained, and is differentiated: there compute precision is chosen and LoRA
    merged. The parts' sums are added and divided by the number of suffix tokens in all, so it does not matter how a
    batch is cut, or how ragged its parts are. There is at least one part.
    """
    parts = (grad_and_value(lambda x, p=prompt: loss_terms(build(x), p, cfg, recompute), trained) for prompt in prompts)
    grads, (total, count) = next(parts)
    for more, (value, tokens) in parts:
        grads = tree.map(torch.add, grads, more)
        total, count = total + value, count + tokens  # on the device: a GPU computes while the next part is prepared
    return tree.map(lambda leaf: leaf / count, grads), total / count
