"""pgfunc's own implementations as systems: eager, compiled, in fewer bits."""

from functools import partial
from typing import Any

from torch import Tensor

from pgfunc import masks, ops, paligemma, quant, sample, tree
from pgfunc.cache import Cache
from pgfunc.config import Config
from pgfunc.jit import jit
from pgfunc.laws.system import ROUNDING, System
from pgfunc.paligemma import Params
from pgfunc.prompt import Prompt
from pgfunc.quant import dequantize


def eager(params: Params, cfg: Config, name: str = "pgfunc") -> System:
    """The functions as they are, on the device of the parameters."""
    device = params.projector.device

    def here(given: Any) -> Any:
        return tree.map(lambda leaf: leaf.to(device), given)

    def back(results: tuple[Tensor, Cache]) -> tuple[Tensor, Cache]:
        return results[0].cpu(), results[1]

    def apply(params: Params, prompt: Prompt) -> Tensor:
        return paligemma.forward(params, here(prompt), cfg).cpu()

    return System(
        name,
        cfg.text.vocab,
        cfg.vision.image_size,
        ROUNDING[params.projector.dtype],
        forward=partial(apply, params),
        prefill=lambda prompt, size: back(paligemma.prefill(params, here(prompt), cfg, size)),
        extend=lambda tokens, cache: back(paligemma.extend(params, here(tokens), cache, cfg)),
        decode=lambda token, cache: back(paligemma.decode(params, here(token), cache, cfg)),
        params=params,
        apply=apply,
        rms_norm=partial(ops.rms_norm, eps=1e-6),
        rotate=lambda x, positions: ops.rotate(x, ops.angles(positions, x.shape[-1], cfg.text.theta)),
        softcap=ops.softcap,
        attend=lambda q, k, v, mask: ops.attend(q, k, v, mask, q.shape[-1] ** -0.5),
        mask=mask,
        draw=sample.draw,
        top_k=sample.top_k,
        top_p=sample.top_p,
        min_p=sample.min_p,
    )


def compiled(params: Params, cfg: Config) -> System:
    """The step is compiled, and its cache donated; prompts are not."""
    plain, step = eager(params, cfg), jit(paligemma.decode, donate="cache")

    def decode(token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        logits, cache = step(params, token.to(params.projector.device), cache, cfg)
        return logits.cpu(), cache

    return System(
        "pgfunc, compiled",
        plain.vocab,
        plain.image_size,
        plain.rounding,
        forward=plain.forward,
        prefill=plain.prefill,
        decode=decode,
    )


def quantized(params: Params, cfg: Config, method: str = "int8") -> System:
    """The functions on quantized weights; beside them the weights that these stand for."""
    fewer = quant.quantize(params, method)
    return eager(fewer, cfg, f"pgfunc, {method}")._replace(
        params=(), apply=(), reference=eager(dequantize(fewer), cfg).forward
    )


def mask(valid: Tensor, causal: Tensor, window: int) -> Tensor:
    made = masks.prompt(valid, causal, window)
    found = made.window if window else made.full
    assert isinstance(found, Tensor)
    return found
