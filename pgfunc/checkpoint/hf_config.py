"""`config.json` of Hugging Face's PaliGemma folders: parsed into a `Config`, and rendered from one.

A text_config omits the fields that equal the defaults of its class, so those defaults are listed here. A field that
asks for something this project does not implement (biases in the language model, another activation, untied
embeddings) is an error; it is never ignored. Source: transformers `configuration_{paligemma,gemma,gemma2,siglip}.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pgfunc import paligemma, quant
from pgfunc.checkpoint import processor
from pgfunc.checkpoint.fields import integer, positive, require, section
from pgfunc.config import Config, TextConfig, VisionConfig, with_vocabulary
from pgfunc.errors import CheckpointError, SettingError
from pgfunc.files.jsonfile import read_json

T = TypeVar("T")

CONFIG = "config.json"

SIGLIP_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 16, "num_channels": 3, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    "position": "learned", "rope_theta": 10_000.0,  # the last two are pgfunc's own
}  # fmt: skip
GEMMA_DEFAULTS = {
    "vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24_576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "attention_bias": False, "tie_word_embeddings": True,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
GEMMA2_DEFAULTS = GEMMA_DEFAULTS | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip

MAX_PATCHES = 2**14  # attention is quadratic in them, and a patch may be as small as one pixel

NULLABLE = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")  # null means none


def read_config(folder: Path) -> Config:
    """The configuration of a checkpoint folder, with the resize filter of its processor."""
    return processor.read(folder, parse_file(folder / CONFIG))


def parse_file(path: Path) -> Config:
    """The configuration in a `config.json`."""
    return parse_as(path, parse, "a PaliGemma")


def parse_as(path: Path, parse: Callable[[dict[str, Any]], T], model: str) -> T:
    """The config that `parse` makes of a `config.json`. Raises CheckpointError, naming the file, if `parse` raises."""
    raw = read_json(path)
    try:
        return parse(raw)
    except (KeyError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: not a configuration of {model} that can be read: {reason}") from error


def read_storage(folder: Path, cfg: Config) -> tuple[dict[str, str], bool]:
    """How a folder stores its weights: path -> method of each quantized one, and whether the head is the embedding.

    Raises CheckpointError for weights that another program quantized, and for methods that this model cannot have.
    """
    path, raw = folder / CONFIG, read_json(folder / CONFIG)
    quantization, tied = raw.get("quantization_config"), raw.get("tie_word_embeddings") is not False
    if quantization is None:
        return {}, tied
    if not isinstance(quantization, dict) or quantization.get("format") != "pgfunc":
        raise CheckpointError(
            f"{path}: quantization_config is not one of pgfunc's; load the original weights, and quantize them with "
            "quantize="
        )
    methods = quantization.get("weights")
    if not isinstance(methods, dict) or not all(isinstance(method, str) for method in methods.values()):
        raise CheckpointError(
            f"{path}: quantization_config.weights does not map paths to methods; save the model again"
        )
    try:
        quant.apply(paligemma.abstract(cfg), methods)
    except SettingError as error:
        raise CheckpointError(f"{path}: quantization_config: {error}") from error
    return methods, tied


def parse(raw: Mapping[str, Any]) -> Config:
    """The config that a `config.json` describes. Raises a KeyError or a ValueError for a field that does not fit."""
    if raw["model_type"] != "paligemma":
        raise ValueError(f"model_type is {raw['model_type']!r}, expected 'paligemma'")
    text = _with_defaults(section(raw, "text_config"))
    image = integer(raw, "image_token_id" if raw.get("image_token_id") is not None else "image_token_index")
    cfg = Config(
        vision=parse_vision(SIGLIP_DEFAULTS | section(raw, "vision_config")),
        text=_parse_text(text),
        pad=_token(raw, text, "pad_token_id"),
        eos=_token(raw, text, "eos_token_id"),
        bos=_token(raw, text, "bos_token_id"),
        image=image,
    )
    rows, ids = cfg.text.vocab, (cfg.pad, cfg.eos, cfg.bos)
    if max(ids) >= rows or image in ids:
        raise ValueError(f"pad, eos, bos are {ids}, expected ids below {rows} that differ from <image>'s {image}")
    if raw.get("projection_dim", cfg.text.width) != cfg.text.width:
        raise ValueError(
            f"projection_dim is {raw['projection_dim']}, expected text_config.hidden_size {cfg.text.width}"
        )
    return without_tokenizer(cfg)


def without_tokenizer(cfg: Config) -> Config:
    """The config without a tokenizer: rows from `<image>` on are padding, since published files hold noise there."""
    return with_vocabulary(cfg, range(cfg.image))


def parse_vision(raw: Mapping[str, Any]) -> VisionConfig:
    """The config that a complete vision_config describes. Raises as `parse` does."""
    require(raw, "hidden_act", "gelu_pytorch_tanh")
    require(raw, "num_channels", 3)
    if raw["position"] not in ("learned", "rope2d"):
        raise ValueError(f"vision_config.position is {raw['position']}, expected learned or rope2d")
    cfg = VisionConfig(
        width=integer(raw, "hidden_size"),
        layers=integer(raw, "num_hidden_layers"),
        heads=integer(raw, "num_attention_heads"),
        hidden=integer(raw, "intermediate_size"),
        image_size=integer(raw, "image_size"),
        patch=integer(raw, "patch_size"),
        position=raw["position"],
        theta=positive(raw, "rope_theta"),
        eps=positive(raw, "layer_norm_eps"),
    )
    if cfg.width % cfg.heads:
        raise ValueError(f"vision_config.hidden_size {cfg.width} is not a multiple of its {cfg.heads} heads")
    if cfg.position == "rope2d" and cfg.head_dim % 4:
        raise ValueError(f"rope2d needs heads whose size is a multiple of 4, found {cfg.head_dim}")
    if not 1 <= cfg.tokens <= MAX_PATCHES:
        raise ValueError(
            f"image_size {cfg.image_size} and patch_size {cfg.patch} make {cfg.tokens} patches, "
            f"expected 1 to {MAX_PATCHES}"
        )
    return cfg


def _with_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A complete text_config: the defaults of its model_type, and the fields that are present."""
    raw = {"model_type": "gemma", **raw}
    defaults = {"gemma": GEMMA_DEFAULTS, "gemma2": GEMMA2_DEFAULTS}.get(str(raw["model_type"]))
    if defaults is None:
        raise ValueError(f"text_config.model_type is {raw['model_type']}, expected gemma or gemma2")
    return defaults | {key: value for key, value in raw.items() if value is not None or key in NULLABLE}


def _parse_text(raw: Mapping[str, Any]) -> TextConfig:
    gemma2 = raw["model_type"] == "gemma2"
    require(raw, "attention_bias", False)
    require(raw, "hidden_activation", "gelu_pytorch_tanh")
    if not str(raw.get("hidden_act") or "gelu").startswith("gelu"):  # old files say gelu and mean its tanh form
        raise ValueError(f"hidden_act is {raw['hidden_act']!r}, expected gelu_pytorch_tanh")
    scale = positive(raw, "query_pre_attn_scalar") if gemma2 else integer(raw, "head_dim")
    cfg = TextConfig(
        vocab=integer(raw, "vocab_size"),
        width=integer(raw, "hidden_size"),
        layers=integer(raw, "num_hidden_layers"),
        heads=integer(raw, "num_attention_heads"),
        kv_heads=integer(raw, "num_key_value_heads"),
        head_dim=integer(raw, "head_dim"),
        hidden=integer(raw, "intermediate_size"),
        query_scale=scale**-0.5,
        attention_softcap=positive(raw, "attn_logit_softcapping") if gemma2 and raw["attn_logit_softcapping"] else 0.0,
        final_softcap=positive(raw, "final_logit_softcapping") if gemma2 and raw["final_logit_softcapping"] else 0.0,
        window=integer(raw, "sliding_window") if gemma2 and raw["sliding_window"] is not None else 0,
        post_norms=gemma2,
        theta=_rope_theta(raw),
        eps=positive(raw, "rms_norm_eps"),
        positions=integer(raw, "max_position_embeddings"),
    )
    layer_types = ["sliding_attention" if cfg.windowed(i) else "full_attention" for i in range(cfg.layers)]
    if gemma2 and raw.get("layer_types", layer_types) != layer_types:
        raise ValueError(f"layer_types do not match sliding_window {raw['sliding_window']}")
    if cfg.heads % cfg.kv_heads:
        raise ValueError(f"num_attention_heads {cfg.heads} is not a multiple of num_key_value_heads {cfg.kv_heads}")
    if cfg.head_dim % 2:
        raise ValueError(f"head_dim is {cfg.head_dim}, expected an even number for rotary positions")
    return cfg


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """The base of the rotary embedding, in either field that transformers has used; scaling is not implemented."""
    scaling = section(raw, "rope_scaling") if raw.get("rope_scaling") else {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ValueError(f"rope_scaling is {scaling}, expected none")
    rope = section(raw, "rope_parameters") if raw.get("rope_parameters") else {"rope_theta": raw["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']}, expected default")
    return positive(rope, "rope_theta")


def _token(raw: Mapping[str, Any], text: Mapping[str, Any], key: str) -> int:
    """A token id at the top level or in text_config.

    If it is a list, its first id: Gemma's list of eos ids also has the end of a turn.
    """
    id = raw[key] if raw.get(key) is not None else text[key]
    return integer({key: id[0] if isinstance(id, list) and id else id}, key)


def with_methods(config: dict[str, Any], methods: Mapping[str, str]) -> dict[str, Any]:
    """The `config.json` with the method of each quantized weight, if there are any."""
    # no quant_method is written: transformers then stops, but with an unknown one it would load random weights
    return config | {"quantization_config": {"format": "pgfunc", "weights": dict(methods)}} if methods else config


def render_vision(vision: VisionConfig) -> dict[str, Any]:
    """The vision_config of an encoder; `parse_vision` is its inverse."""
    rendered = {
        "model_type": "siglip_vision_model", "hidden_size": vision.width, "intermediate_size": vision.hidden,
        "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads, "image_size": vision.image_size,
        "patch_size": vision.patch, "num_channels": 3, "layer_norm_eps": vision.eps, "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    own = {} if vision.position == "learned" else {"position": vision.position, "rope_theta": vision.theta}
    return rendered | own


def render(cfg: Config, dtype: str) -> dict[str, Any]:
    """The `config.json` of a config; `parse` is its inverse.

    Raises CheckpointError for a config that the format cannot express, such as softcaps without Gemma 2's post-norms.
    """
    vision, text = cfg.vision, cfg.text
    ids = {"pad_token_id": cfg.pad, "eos_token_id": cfg.eos, "bos_token_id": cfg.bos}
    in_paligemma = {"vision_use_head": False, "projection_dim": text.width, "num_image_tokens": vision.tokens}
    vision_config = render_vision(vision) | in_paligemma
    text_config = ids | {
        "model_type": "gemma", "vocab_size": text.vocab + text.padding, "hidden_size": text.width,
        "intermediate_size": text.hidden, "num_hidden_layers": text.layers, "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads, "head_dim": text.head_dim, "max_position_embeddings": text.positions,
        "rms_norm_eps": text.eps, "rope_theta": text.theta, "num_image_tokens": vision.tokens,
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True,
    }  # fmt: skip
    if text.post_norms:
        text_config |= {
            "model_type": "gemma2", "query_pre_attn_scalar": round(text.query_scale**-2),
            "sliding_window": text.window or None,
            "attn_logit_softcapping": text.attention_softcap or None,
            "final_logit_softcapping": text.final_softcap or None,
        }  # fmt: skip
    rendered = ids | {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", "dtype": dtype,
        "image_token_index": cfg.image, "projection_dim": text.width, "hidden_size": text.width,
        "tie_word_embeddings": True, "text_config": text_config, "vision_config": vision_config,
    }  # fmt: skip
    try:
        parsed = parse(rendered)
    except ValueError as error:
        raise CheckpointError(f"Hugging Face's config.json cannot hold {cfg}: {error}") from error
    if parsed != without_tokenizer(replace(cfg, resample=parsed.resample)):
        raise CheckpointError(f"Hugging Face's config.json cannot hold {cfg}: it reads back as {parsed}")
    return rendered
