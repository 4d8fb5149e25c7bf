"""`config.json` and `preprocessor_config.json` of Hugging Face's PaliGemma folders, read into a `Config` and written.

A text_config leaves out what equals its class's default, so those defaults stand here. What this project does not
implement (biases in the language model, another activation, untied embeddings) is an error, never ignored. Source:
transformers `configuration_{paligemma,gemma,gemma2,siglip}.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgfunc.config import Config, TextConfig, VisionConfig
from pgfunc.errors import CheckpointError

CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"

SIGLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 16, "num_channels": 3, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    "position": "learned", "rope_theta": 10_000.0,  # the last two are this project's own
}  # fmt: skip
GEMMA = {
    "vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24_576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "attention_bias": False, "tie_word_embeddings": True,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
GEMMA2 = GEMMA | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip

NULLABLE = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")  # null: without

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read_config(folder: Path) -> Config:
    """The configuration of a checkpoint folder, its processor's resize filter included."""
    cfg = parse_file(folder / CONFIG)
    for name in (PREPROCESSOR, PROCESSOR):
        if (folder / name).exists():
            raw = read_json(folder / name)
            nested = raw.get("image_processor")
            return with_processor(cfg, nested if isinstance(nested, dict) else raw, folder / name)
    return cfg


def parse_file(path: Path) -> Config:
    """The configuration in a `config.json`."""
    raw = read_json(path)
    try:
        return parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        said = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: {said}; expected the configuration of a PaliGemma") from error


def parse(raw: Mapping[str, Any]) -> Config:
    """The value of a `config.json`; a ValueError says what does not fit."""
    if raw["model_type"] != "paligemma":
        raise ValueError(f"model_type is {raw['model_type']!r}, expected 'paligemma'")
    given = raw["text_config"]
    text = {"gemma": GEMMA, "gemma2": GEMMA2}.get(given.get("model_type"))
    if text is None:
        raise ValueError(f"text_config.model_type is {given.get('model_type')}, expected gemma or gemma2")
    text = text | {key: value for key, value in given.items() if value is not None or key in NULLABLE}
    vision = SIGLIP | raw["vision_config"]
    _require(raw, "tie_word_embeddings", True)
    image = _whole(raw, "image_token_id" if raw.get("image_token_id") is not None else "image_token_index")
    cfg = Config(
        vision=_vision(vision),
        text=_text(text, image),
        pad=_token(raw, text, "pad_token_id"),
        eos=_token(raw, text, "eos_token_id"),
        bos=_token(raw, text, "bos_token_id"),
        image=image,
    )
    if raw.get("projection_dim", cfg.text.width) != cfg.text.width:
        raise ValueError(
            f"projection_dim is {raw['projection_dim']}, expected text_config.hidden_size {cfg.text.width}"
        )
    return cfg


def _vision(raw: Mapping[str, Any]) -> VisionConfig:
    _require(raw, "hidden_act", "gelu_pytorch_tanh")
    _require(raw, "num_channels", 3)
    _require(raw, "vision_use_head", False)
    cfg = VisionConfig(
        width=_whole(raw, "hidden_size"),
        layers=_whole(raw, "num_hidden_layers"),
        heads=_whole(raw, "num_attention_heads"),
        hidden=_whole(raw, "intermediate_size"),
        image_size=_whole(raw, "image_size"),
        patch=_whole(raw, "patch_size"),
        position=raw["position"],
        theta=float(raw["rope_theta"]),
        eps=float(raw["layer_norm_eps"]),
    )
    if cfg.position not in ("learned", "rope2d"):
        raise ValueError(f"vision_config.position is {cfg.position}, expected learned or rope2d")
    if cfg.width % cfg.heads:
        raise ValueError(f"vision_config.hidden_size {cfg.width} is not a multiple of its {cfg.heads} heads")
    if cfg.position == "rope2d" and cfg.head_dim % 4:
        raise ValueError(f"rope2d needs heads of a multiple of 4, found {cfg.head_dim}")
    if cfg.image_size % cfg.patch:
        raise ValueError(f"image_size {cfg.image_size} is not a multiple of patch_size {cfg.patch}")
    return cfg


def _text(raw: Mapping[str, Any], image: int) -> TextConfig:
    gemma2 = raw["model_type"] == "gemma2"
    _require(raw, "attention_bias", False)
    _require(raw, "tie_word_embeddings", True)
    _require(raw, "hidden_activation", "gelu_pytorch_tanh")
    _require(raw, "rope_scaling", None)
    if not str(raw.get("hidden_act") or "gelu").startswith("gelu"):  # old files say gelu, and meant the tanh form
        raise ValueError(f"hidden_act is {raw['hidden_act']!r}, expected gelu_pytorch_tanh")
    rope = raw.get("rope_parameters") or {"rope_theta": raw["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']}, expected default")
    rows = _whole(raw, "vocab_size")
    scale = _whole(raw, "query_pre_attn_scalar") if gemma2 else _whole(raw, "head_dim")
    cfg = TextConfig(
        vocab=min(rows, image),  # the rows from `<image>` on are random numbers in the published files
        padding=max(rows - image, 0),
        width=_whole(raw, "hidden_size"),
        layers=_whole(raw, "num_hidden_layers"),
        heads=_whole(raw, "num_attention_heads"),
        kv_heads=_whole(raw, "num_key_value_heads"),
        head_dim=_whole(raw, "head_dim"),
        hidden=_whole(raw, "intermediate_size"),
        query_scale=scale**-0.5,
        attention_softcap=float(raw["attn_logit_softcapping"] or 0) if gemma2 else 0.0,
        final_softcap=float(raw["final_logit_softcapping"] or 0) if gemma2 else 0.0,
        window=_whole(raw, "sliding_window") if gemma2 and raw["sliding_window"] is not None else 0,
        post_norms=gemma2,
        theta=float(rope["rope_theta"]),
        eps=float(raw["rms_norm_eps"]),
        positions=_whole(raw, "max_position_embeddings"),
    )
    kinds = ["sliding_attention" if cfg.windowed(i) else "full_attention" for i in range(cfg.layers)]
    if gemma2 and raw.get("layer_types", kinds) != kinds:
        raise ValueError("layer_types do not alternate sliding_attention and full_attention")
    if cfg.heads % cfg.kv_heads or cfg.head_dim % 2:
        raise ValueError(f"{cfg.heads} heads of {cfg.head_dim} do not fit {cfg.kv_heads} kv heads and rotary positions")
    return cfg


def _token(raw: Mapping[str, Any], text: Mapping[str, Any], key: str) -> int:
    """A token id at the top level or in text_config; the first, where Gemma lists the ends of a turn too."""
    found = raw[key] if raw.get(key) is not None else text[key]
    return _whole({key: found[0] if isinstance(found, list) and found else found}, key)


def _whole(raw: Mapping[str, Any], key: str) -> int:
    value = raw[key]
    if type(value) is not int or value < (0 if key.endswith("token_id") else 1):
        raise ValueError(f"{key} is {value!r}, expected a whole number")
    return value


def _require(raw: Mapping[str, Any], key: str, value: Any) -> None:
    """The only value that is implemented, which is also the default."""
    if raw.get(key, value) != value:
        raise ValueError(f"{key} is {raw[key]!r}, expected {value!r}")


def with_processor(cfg: Config, raw: Mapping[str, Any], path: Path) -> Config:
    """The config with the resize filter that an image processor's settings ask for."""
    side = cfg.vision.image_size
    expected = {
        "size": {"height": side, "width": side},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255,
        "do_resize": True, "do_rescale": True, "do_normalize": True,
    }  # fmt: skip
    for key, value in expected.items():
        if raw.get(key) not in (None, value):
            raise CheckpointError(f"{path}: {key} is {raw[key]}, expected {value}")
    resample = raw.get("resample", 3)
    if type(resample) is not int or resample not in RESAMPLE:
        raise CheckpointError(f"{path}: resample is {resample!r}, expected one of {RESAMPLE}")
    return replace(cfg, resample=RESAMPLE[resample])


def write_config(folder: Path, cfg: Config, dtype: str) -> None:
    """Write `config.json` and `preprocessor_config.json`, as transformers reads them."""
    write_json(folder / CONFIG, render(cfg, dtype))
    side, resample = cfg.vision.image_size, {name: number for number, name in RESAMPLE.items()}[cfg.resample]
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"height": side, "width": side}, "resample": resample, "image_seq_length": cfg.vision.tokens,
    }  # fmt: skip
    write_json(folder / PREPROCESSOR, processor)


def render(cfg: Config, dtype: str) -> dict[str, Any]:
    """The `config.json` of a config: `parse` gives the config back.

    Raises CheckpointError for a config that the format cannot say, such as softcaps without Gemma 2's post-norms.
    """
    vision, text = cfg.vision, cfg.text
    ids = {"pad_token_id": cfg.pad, "eos_token_id": cfg.eos, "bos_token_id": cfg.bos}
    vision_config = {
        "model_type": "siglip_vision_model", "hidden_size": vision.width, "intermediate_size": vision.hidden,
        "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads, "image_size": vision.image_size,
        "patch_size": vision.patch, "num_channels": 3, "layer_norm_eps": vision.eps, "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False, "projection_dim": text.width, "num_image_tokens": vision.tokens,
    }  # fmt: skip
    if vision.position != "learned":
        vision_config |= {"position": vision.position, "rope_theta": vision.theta}
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
    if (read := parse(rendered)) != replace(cfg, resample=read.resample):
        raise CheckpointError(f"Hugging Face's config.json cannot hold {cfg}: read back it is {read}")
    return rendered


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
