"""Random parameters and prompts of any size. This module knows nothing about time."""

import torch
from torch import Tensor

from pgfunc import packing, paligemma, tree
from pgfunc.config import Config
from pgfunc.paligemma import Params, Prompt


def random_params(cfg: Config, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Params:
    """Random parameters, drawn on the device: normal matrices with variance 1 / fan-in, and norms without effect.

    The embedding is smaller. With variance 1 / fan-in, the tied head would repeat the last token for ever.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(path: str, parameter: Tensor) -> Tensor:
        if parameter.dim() < 2:
            return parameter.fill_(float(path.endswith("_scale")))
        std = parameter[0].numel() ** -0.5 * (0.05 if path == "language.embed" else 1)
        return parameter.normal_(std=std, generator=generator)

    abstract = tree.map(lambda leaf: leaf.to(dtype), paligemma.abstract(cfg))
    if device.type == "cuda":
        return tree.map_with_path(draw, packing.packed(abstract, device))
    return tree.map_with_path(draw, tree.map(lambda leaf: torch.empty_like(leaf, device=device), abstract))


def random_prompt(cfg: Config, batch: int, tokens: int, device: torch.device, seed: int = 0) -> Prompt:
    """`batch` rows of one picture and `tokens` text tokens, all valid and bidirectional."""
    generator = torch.Generator().manual_seed(seed)
    side = cfg.vision.image_size
    prompt = Prompt(
        pixels=torch.rand(batch, 1, 3, side, side, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1,
        tokens=torch.randint(cfg.text.vocab, (batch, tokens), generator=generator),
        valid=torch.ones(batch, tokens, dtype=torch.bool, device="cpu"),
        causal=torch.zeros(batch, tokens, dtype=torch.bool, device="cpu"),
    )
    return tree.map(lambda leaf: leaf.to(device), prompt)
