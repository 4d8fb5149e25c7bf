"""pgfunc's own implementations as systems: eager, compiled, quantized."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgfunc import image, lab, masks, ops, paligemma, quant, sample, taps, tokenizer, tree
from pgfunc.cache import Cache
from pgfunc.checkpoint import bigvision, hf, shards
from pgfunc.config import Config
from pgfunc.files.atomic import changing
from pgfunc.jit import jit
from pgfunc.laws.system import ROUNDING, Edges, System
from pgfunc.objects import detect, segment, vqvae
from pgfunc.objects.detect import Box, Detection
from pgfunc.paligemma import Params
from pgfunc.prompt import Prompt
from pgfunc.quant import dequantize, lowbit
from pgfunc.taps import Tap, identity
from pgfunc.tokenizer import Tokenizer
from pgfunc.train.contrastive import sigmoid_loss, softmax_loss


def eager(
    params: Params,
    cfg: Config,
    name: str = "pgfunc",
    tokenizer: Tokenizer | None = None,
    vq: vqvae.Params | tuple[()] = (),
    step: Callable[..., tuple[Tensor, Cache]] = paligemma.decode,
) -> System:
    """pgfunc run eagerly, on the device of the parameters.

    Functions of text exist if a tokenizer is passed, and those of masks if a mask decoder (`vq`) is. `step` replaces
    the decode function.
    """
    cfg = replace(cfg, text=replace(cfg.text, masked=()))  # the laws cover every token id, with finite logits
    device = params.projector.device
    on_device = partial(to, device)

    def to_cpu(results: tuple[Tensor, Cache]) -> tuple[Tensor, Cache]:
        return results[0].cpu(), results[1]

    def apply(params: Params, prompt: Prompt, cfg: Config = cfg) -> Tensor:
        return paligemma.forward(params, on_device(prompt), cfg).cpu()

    def windowed(prompt: Prompt, size: int) -> Tensor:
        return apply(params, prompt, replace(cfg, text=replace(cfg.text, window=size)))

    def tapped(prompt: Prompt, tap: Tap = identity) -> Tensor:
        return paligemma.forward(params, on_device(prompt), cfg, tap if device.type == "cpu" else OnCpu(tap)).cpu()

    system = System(
        name,
        cfg.text.vocab,
        cfg.vision.image_size,
        ROUNDING[params.projector.dtype],
        forward=partial(apply, params),
        prefill=lambda prompt, size: to_cpu(paligemma.prefill(params, on_device(prompt), cfg, size)),
        extend=lambda tokens, cache: to_cpu(paligemma.extend(params, on_device(tokens), cache, cfg)),
        decode=lambda token, cache: to_cpu(step(params, on_device(token), cache, cfg)),
        windowed=windowed,
        image_tokens=cfg.vision.tokens,
        params=params,
        apply=apply,
        reorder=reorder,
        reload=partial(reload, cfg),
        convert=partial(convert, cfg),
        tapped=tapped,
        capture=lab.capture,
        edit=lab.edit,
        resume=on(device, partial(resume, params, cfg)),
        parts=lab.PARTS,
        attribution=on(device, lambda seen, tokens, at: lab.attribution(params, seen, cfg, tokens, at)),
        integrated=lab.integrated,
        quantize=on(device, quantize),
        rms_norm=on(device, partial(ops.rms_norm, eps=1e-6)),
        rotate=on(
            device, lambda x, positions: ops.rotate(x, ops.rotation(ops.angles(positions, x.shape[-1], cfg.text.theta)))
        ),
        softcap=on(device, ops.softcap),
        attend=on(device, lambda q, k, v, mask: ops.attend(q, k, v, mask, q.shape[-1] ** -0.5)),
        mask=on(device, mask),
        draw=on(device, sample.draw),
        choose=on(device, lambda logits, u, temperature: sample.choose(logits, u, sample.Settings(temperature))),
        top_k=on(device, sample.top_k),
        top_p=on(device, sample.top_p),
        min_p=on(device, sample.min_p),
        write_boxes=write_boxes,
        read_boxes=lambda text, width, height: [(label, box) for label, box, _ in detect.parse(text, width, height)],
        pixels=lambda picture: image.pixels(picture, cfg),
        contrast=on(device, contrast),
    )
    system = with_tokenizer(system, tokenizer) if tokenizer else system
    return with_masks(system, vq) if isinstance(vq, vqvae.Params) else system


def with_tokenizer(system: System, words: Tokenizer) -> System:
    """The system with the functions of a tokenizer."""
    return system._replace(to_ids=partial(tokenizer.encode, words), to_text=partial(tokenizer.decode, words))


def with_masks(system: System, vq: vqvae.Params) -> System:
    """The system with the functions of a mask decoder."""

    def write(objects: list[tuple[str, Tensor]]) -> str:
        return segment.render([segment.from_mask(label, mask) for label, mask in objects], vq)

    def read(text: str, width: int, height: int) -> list[tuple[str, Edges, Tensor]]:
        return [(label, box, mask.cpu()) for label, box, mask, _ in segment.parse(text, width, height, vq)]

    return system._replace(
        write_masks=write,
        read_masks=read,
        features=on(vq.codebook.device, partial(vqvae.lookup, vq.codebook)),
        codes=on(vq.codebook.device, partial(vqvae.quantize, vq.codebook)),
    )


def compiled(
    params: Params,
    cfg: Config,
    name: str = "pgfunc, compiled",
    tokenizer: Tokenizer | None = None,
    vq: vqvae.Params | tuple[()] = (),
) -> System:
    """pgfunc with a compiled decode step and a donated cache; compiled again for each batch size and cache size."""
    return eager(params, cfg, name, tokenizer, vq, jit(paligemma.decode, donate="cache"))._replace(compile=jit)


def quantized(params: Params, cfg: Config, method: str = "int8") -> System:
    """pgfunc with quantized weights. The reference is the same model with these weights dequantized."""
    small = quant.quantize(params, method)
    return eager(small, cfg, f"pgfunc, {method}")._replace(params=(), reference=eager(dequantize(small), cfg).forward)


def to(device: torch.device, values: Any) -> Any:
    """A tree with its tensors on a device; other leaves are unchanged."""
    return tree.map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, values)


def on(device: torch.device, fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function computed on a device, with arguments and results on the CPU."""
    return lambda *arguments: to(torch.device("cpu"), fn(*to(device, arguments)))


class OnCpu(NamedTuple):
    """A tap that gets values on the CPU."""

    tap: Tap

    def asks(self, name: str) -> bool:
        return taps.asks(self.tap, name)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        return self.tap(name, x.cpu()).to(x.device)


def resume(params: Params, cfg: Config, prompt: Prompt, layer: int, resid: Tensor) -> Tensor:
    """The logits of a prompt, from the input of one layer."""
    return lab.resume(params, prompt, cfg, layer, resid)


def mask(valid: Tensor, causal: Tensor, window: int) -> Tensor:
    """The mask of a prompt, with a window or without (0)."""
    both = masks.prompt(valid, causal, window)
    chosen = both.window if window else both.full
    assert isinstance(chosen, Tensor)
    return chosen


def reorder(params: Params, order: Tensor) -> Params:
    """The parameters with the rows of the embedding in another order."""
    embed = params.language.embed
    rows = torch.cat([embed[order.to(embed.device)], embed[len(order) :]])  # followed by the padding rows
    return params._replace(language=params.language._replace(embed=rows))


def reload(cfg: Config, params: Params) -> Params:
    """The parameters, saved in Hugging Face layout and loaded."""
    with TemporaryDirectory() as folder:
        with changing(folder) as change:
            shards.write(change, hf.arrays(cfg, params), {}, shards.SHARD_BYTES)
        return copied(hf.load(Path(folder), cfg, None, params.projector.device, quant.methods(params)))


def convert(cfg: Config, params: Params) -> Params:
    """The parameters, converted from Hugging Face layout to big_vision's and back."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "params.npz"
        bigvision.save(path, cfg, reload(cfg, params))
        return reload(cfg, bigvision.load(path, cfg, None, params.projector.device))


def copied(mapped: Params) -> Params:
    """A copy in memory of parameters that are mapped from a file."""
    return tree.map(Tensor.clone, mapped)


def quantize(w: Tensor, bits: int, group: int) -> Tensor:
    """The matrix, quantized and dequantized."""
    method = {(8, 0): "int8", (4, 128): "int4", (4, 64): "int4-64", (4, 32): "int4-32"}[bits, group]
    return lowbit.dequantize(lowbit.quantize(w, method))


def write_boxes(objects: list[tuple[str, Edges]], width: int, height: int) -> str:
    """The text of labels with boxes."""
    return detect.render([Detection(label, Box(*box)) for label, box in objects], width, height)


def contrast(kind: str, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, chunk: int) -> Tensor:
    """The softmax or the sigmoid loss."""
    if kind == "softmax":
        return softmax_loss(images, texts, scale, chunk)
    return sigmoid_loss(images, texts, scale, bias, chunk)
