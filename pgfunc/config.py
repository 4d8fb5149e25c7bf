"""Configurations as frozen dataclasses; `PUBLISHED` has one for every published checkpoint.

A config holds the facts about a model that are not tensors: sizes, scales, token ids, the variant of a block. This
module knows nothing about tensors or files (`checkpoint.hf_config` reads and writes `config.json`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP vision encoder."""

    width: int
    layers: int
    heads: int
    hidden: int
    image_size: int  # pixels along each side of the square input
    patch: int
    position: Literal["learned", "rope2d"] = "learned"  # "learned" in every published checkpoint
    theta: float = 10_000.0  # the base of the angles of rope2d
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """The number of patches along each side."""
        return self.image_size // self.patch

    @property
    def tokens(self) -> int:
        """The number of patches, which is also the number of image tokens of one picture."""
        return self.grid**2


@dataclass(frozen=True)
class TextConfig:
    """The Gemma language model. Gemma 2 is Gemma 1 with softcaps, a sliding window and post-norms."""

    vocab: int  # token ids are 0 .. vocab - 1, and logits have this many columns
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    query_scale: float  # multiplies q·k
    padding: int = 0  # embedding rows after the vocabulary; no token uses them
    masked: tuple = ()  # ranges (first, end) of ids below `vocab` that are not tokens: their logits are -inf
    attention_softcap: float = 0.0  # 0 means none
    final_softcap: float = 0.0  # 0 means none
    window: int = 0  # positions that the even layers see; 0 means all
    post_norms: bool = False
    theta: float = 10_000.0
    eps: float = 1e-6
    positions: int = 8192

    def has(self, id: int) -> bool:
        """Whether this id is a token that the model can read and write."""
        return 0 <= id < self.vocab and not any(first <= id < end for first, end in self.masked)

    def windowed(self, layer: int) -> bool:
        """Whether a layer has a sliding window: in Gemma 2 the even layers do, the odd layers see all positions."""
        return self.window > 0 and layer % 2 == 0


@dataclass(frozen=True)
class Config:
    """PaliGemma: the configs of the vision encoder and the language model, and the ids of the special tokens."""

    vision: VisionConfig
    text: TextConfig
    pad: int = 0
    eos: int = 1
    bos: int = 2
    image: int = 257_152  # `<image>`, the placeholder in Hugging Face's prompts; it is never embedded or sampled
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"  # the resize filter of the processor


def with_vocabulary(cfg: Config, ids: Iterable[int]) -> Config:
    """The config with a vocabulary of these ids and pad, eos and bos.

    Ids for which the embedding has no row are left out, and so is `<image>`. The gaps between the ids are masked.
    """
    rows = cfg.text.vocab + cfg.text.padding
    tokens = sorted({id for id in (*ids, cfg.pad, cfg.eos, cfg.bos) if 0 <= id < rows} - {cfg.image})
    vocab = tokens[-1] + 1
    masked = tuple((before + 1, id) for before, id in pairwise([-1, *tokens]) if id > before + 1)
    return replace(cfg, text=replace(cfg.text, vocab=vocab, padding=rows - vocab, masked=masked))


@dataclass(frozen=True)
class SiglipTextConfig:
    """SigLIP's text encoder."""

    vocab: int
    width: int
    layers: int
    heads: int
    hidden: int
    out: int  # the length of the vector of a text, equal to the width of the vision encoder
    positions: int = 64  # every text is padded to this many tokens
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class SiglipConfig:
    """SigLIP: the configs of a vision encoder and a text encoder, whose vectors are compared."""

    vision: VisionConfig
    text: SiglipTextConfig
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"  # the resize filter of the processor


def _vision(image_size: int) -> VisionConfig:
    return VisionConfig(width=1152, layers=27, heads=16, hidden=4304, image_size=image_size, patch=14)


_GEMMA_2B = TextConfig(
    vocab=257_152, width=2048, layers=18, heads=8, kv_heads=1, head_dim=256, hidden=16_384, query_scale=256**-0.5
)
_GEMMA2_2B = TextConfig(
    vocab=257_152, width=2304, layers=26, heads=8, kv_heads=4, head_dim=256, hidden=9216, query_scale=256**-0.5,
    attention_softcap=50.0, final_softcap=30.0, window=4096, post_norms=True,
)  # fmt: skip
_GEMMA2_9B = replace(_GEMMA2_2B, width=3584, layers=42, heads=16, kv_heads=8, hidden=14_336)
_GEMMA2_27B = replace(
    _GEMMA2_2B, width=4608, layers=46, heads=32, kv_heads=16, head_dim=128, hidden=36_864,
    query_scale=144**-0.5,  # width / heads, not the head's own dimension
)  # fmt: skip

PUBLISHED: dict[str, Config] = {
    f"{name}-{image_size}": Config(_vision(image_size), text)
    for name, text in {
        "paligemma-3b": _GEMMA_2B,
        "paligemma2-3b": _GEMMA2_2B,
        "paligemma2-10b": _GEMMA2_9B,
        "paligemma2-28b": _GEMMA2_27B,
    }.items()
    for image_size in (224, 448, 896)
}
