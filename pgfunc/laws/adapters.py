"""pgfunc's own implementations as systems: eager, compiled, in fewer bits."""

from functools import partial

from torch import Tensor

from pgfunc import masks, ops, paligemma, quant, sample
from pgfunc.config import Config
from pgfunc.jit import jit
from pgfunc.laws.system import ROUNDING, System
from pgfunc.paligemma import Params
from pgfunc.quant import dequantize


def eager(params: Params, cfg: Config, name: str = "pgfunc") -> System:
    """The functions as they are."""
    return System(
        name,
        cfg.text.vocab,
        cfg.vision.image_size,
        ROUNDING[params.projector.dtype],
        forward=lambda prompt: paligemma.forward(params, prompt, cfg),
        prefill=lambda prompt, size: paligemma.prefill(params, prompt, cfg, size),
        extend=lambda tokens, cache: paligemma.extend(params, tokens, cache, cfg),
        decode=lambda token, cache: paligemma.decode(params, token, cache, cfg),
        params=params,
        apply=lambda params, prompt: paligemma.forward(params, prompt, cfg),
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
    """What appends to a cache is compiled, and the cache donated; prompts are not."""
    plain = eager(params, cfg)
    step, more = jit(paligemma.decode, donate="cache"), jit(paligemma.extend, donate="cache")
    return System(
        "pgfunc, compiled",
        plain.vocab,
        plain.image_size,
        plain.rounding,
        forward=plain.forward,
        prefill=plain.prefill,
        extend=lambda tokens, cache: more(params, tokens, cache, cfg),
        decode=lambda token, cache: step(params, token, cache, cfg),
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
