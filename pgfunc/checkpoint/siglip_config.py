"""`config.json` of SigLIP folders: parsed into a `SiglipConfig`, and rendered from one.

As for PaliGemma, fields that equal the defaults of their class are omitted. Source: transformers
`configuration_siglip.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgfunc.checkpoint import processor
from pgfunc.checkpoint.fields import integer, positive, require, section
from pgfunc.checkpoint.hf_config import CONFIG, SIGLIP_DEFAULTS, parse_as, parse_vision, render_vision
from pgfunc.config import SiglipConfig, SiglipTextConfig

TEXT_DEFAULTS = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 64, "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip


def read_config(folder: Path) -> SiglipConfig:
    """The configuration of a checkpoint folder, with the resize filter of its processor."""
    return processor.read(folder, parse_as(folder / CONFIG, parse, "a SigLIP"))


def parse(raw: Mapping[str, Any]) -> SiglipConfig:
    """The config that a `config.json` describes. Raises a KeyError or a ValueError for a field that does not fit."""
    if raw["model_type"] == "siglip2":
        raise ValueError("model_type is 'siglip2': images of variable shape (NaFlex) are not implemented; use a SigLIP "
                         "2 of fixed resolution, such as google/siglip2-base-patch16-224")  # fmt: skip
    if raw["model_type"] != "siglip":
        raise ValueError(f"model_type is {raw['model_type']!r}, expected 'siglip'")
    vision, text = (
        {key: value for key, value in (section(raw, part) if raw.get(part) else {}).items() if value is not None}
        for part in ("vision_config", "text_config")
    )
    if vision.pop("vision_use_head", True) is not True:
        raise ValueError("vision_use_head is false: without a pooling head there are no image embeddings")
    cfg = SiglipConfig(parse_vision(SIGLIP_DEFAULTS | vision), parse_text(TEXT_DEFAULTS | text))
    if cfg.text.out != cfg.vision.width:
        raise ValueError(f"text embeddings have length {cfg.text.out}, image embeddings {cfg.vision.width}")
    return cfg


def parse_text(raw: Mapping[str, Any]) -> SiglipTextConfig:
    """The config that a complete text_config describes. Raises as `parse` does."""
    require(raw, "hidden_act", "gelu_pytorch_tanh")
    cfg = SiglipTextConfig(
        vocab=integer(raw, "vocab_size"),
        width=integer(raw, "hidden_size"),
        layers=integer(raw, "num_hidden_layers"),
        heads=integer(raw, "num_attention_heads"),
        hidden=integer(raw, "intermediate_size"),
        out=integer(raw, "projection_size" if "projection_size" in raw else "hidden_size"),
        positions=integer(raw, "max_position_embeddings"),
        eps=positive(raw, "layer_norm_eps"),
    )
    if cfg.width % cfg.heads:
        raise ValueError(f"text_config.hidden_size {cfg.width} is not a multiple of its {cfg.heads} heads")
    return cfg


def render(cfg: SiglipConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a config; `parse` is its inverse, and transformers reads it too."""
    text = cfg.text
    text_config = {
        "model_type": "siglip_text_model", "vocab_size": text.vocab, "hidden_size": text.width,
        "intermediate_size": text.hidden, "num_hidden_layers": text.layers, "num_attention_heads": text.heads,
        "max_position_embeddings": text.positions, "projection_size": text.out, "layer_norm_eps": text.eps,
        "hidden_act": "gelu_pytorch_tanh", "bos_token_id": None, "eos_token_id": None,  # the defaults are CLIP's
    }  # fmt: skip
    return {
        "architectures": ["SiglipModel"], "model_type": "siglip", "dtype": dtype,
        "vision_config": render_vision(cfg.vision), "text_config": text_config,
    }  # fmt: skip
