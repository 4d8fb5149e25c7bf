"""`config.json` of Hugging Face's PaliGemma folders, read into a `Config` and written; also its vision_config alone.

A text_config leaves out what equals its class's default, so those defaults stand here. What this project does not
implement (biases in the language model, another activation, untied embeddings) is an error, never ignored. Source:
transformers `configuration_{paligemma,gemma,gemma2,siglip}.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pgfunc import paligemma, quant
from pgfunc.checkpoint import processor
from pgfunc.config import Config, TextConfig, VisionConfig, with_vocabulary
from pgfunc.errors import CheckpointError, SettingError
from pgfunc.files.jsonfile import read_json

T = TypeVar("T")

CONFIG = "config.json"

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

# the most of a count, so that a file of a kilobyte cannot ask for gigabytes of layers, nor for a shape that no tensor
# has; published checkpoints have 46 layers, 257,216 rows and pictures of 896 pixels
MOST, MOST_OF = 2**20, {"num_hidden_layers": 1000, "image_size": 2**12}
MOST_TOKENS = 2**14  # of a picture: attention is quadratic in them, and a patch may be of one pixel

NULLABLE = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")  # null: without


def read_config(folder: Path) -> Config:
    """The configuration of a checkpoint folder, its processor's resize filter included."""
    return processor.read(folder, parse_file(folder / CONFIG))


def parse_file(path: Path) -> Config:
    """The configuration in a `config.json`."""
    return parse_as(path, parse, "a PaliGemma")


def parse_as(path: Path, parse: Callable[[dict[str, Any]], T], kind: str) -> T:
    """The value of a `config.json`; what `parse` raises becomes a CheckpointError that names the file."""
    raw = read_json(path)
    try:
        return parse(raw)
    except (KeyError, ValueError) as error:
        said = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: {said}; expected the configuration of {kind}") from error


def read_storage(folder: Path, cfg: Config) -> tuple[dict[str, str], bool]:
    """How a folder stores weights: path -> method of every quantized one, and whether the embedding is the head.

    The methods are as `with_methods` writes them, and as the model can have them.
    """
    path, raw = folder / CONFIG, read_json(folder / CONFIG)
    given, tie = raw.get("quantization_config"), raw.get("tie_word_embeddings") is not False
    if given is None:
        return {}, tie
    given = given if isinstance(given, dict) else {}
    methods = given.get("weights") if given.get("format") == "pgfunc" else None
    if not isinstance(methods, dict) or not all(isinstance(method, str) for method in methods.values()):
        by = given.get("quant_method", "something else")
        raise CheckpointError(
            f"{path}: quantization_config is not of pgfunc; load the original weights, which {by} has quantized here, "
            "and give quantize= if they should be smaller"
        )
    try:
        quant.apply(paligemma.abstract(cfg), methods)
    except SettingError as error:
        raise CheckpointError(f"{path}: quantization_config: {error}") from error
    return methods, tie


def parse(raw: Mapping[str, Any]) -> Config:
    """The value of a `config.json`; a ValueError says what does not fit."""
    if raw["model_type"] != "paligemma":
        raise ValueError(f"model_type is {raw['model_type']!r}, expected 'paligemma'")
    given = {"model_type": "gemma"} | section(raw, "text_config")
    text = {"gemma": GEMMA, "gemma2": GEMMA2}.get(str(given.get("model_type")))
    if text is None:
        raise ValueError(f"text_config.model_type is {given.get('model_type')}, expected gemma or gemma2")
    text = text | {key: value for key, value in given.items() if value is not None or key in NULLABLE}
    vision = SIGLIP | section(raw, "vision_config")
    image = whole(raw, "image_token_id" if raw.get("image_token_id") is not None else "image_token_index")
    cfg = Config(
        vision=parse_vision(vision),
        text=_text(text),
        pad=_token(raw, text, "pad_token_id"),
        eos=_token(raw, text, "eos_token_id"),
        bos=_token(raw, text, "bos_token_id"),
        image=image,
    )
    rows, ids = cfg.text.vocab, (cfg.pad, cfg.eos, cfg.bos)
    if max(ids) >= rows or image in ids:
        raise ValueError(f"pad, eos, bos are {ids}, expected ids below {rows}, and none that is <image>'s {image}")
    if raw.get("projection_dim", cfg.text.width) != cfg.text.width:
        raise ValueError(
            f"projection_dim is {raw['projection_dim']}, expected text_config.hidden_size {cfg.text.width}"
        )
    return without_tokenizer(cfg)


def without_tokenizer(cfg: Config) -> Config:
    """The config where no tokenizer names the tokens: the rows from `<image>` on are random in the published files."""
    return with_vocabulary(cfg, range(cfg.image))


def parse_vision(raw: Mapping[str, Any]) -> VisionConfig:
    """The value of a vision_config that is whole; a ValueError says what does not fit."""
    require(raw, "hidden_act", "gelu_pytorch_tanh")
    require(raw, "num_channels", 3)
    if raw["position"] not in ("learned", "rope2d"):
        raise ValueError(f"vision_config.position is {raw['position']}, expected learned or rope2d")
    cfg = VisionConfig(
        width=whole(raw, "hidden_size"),
        layers=whole(raw, "num_hidden_layers"),
        heads=whole(raw, "num_attention_heads"),
        hidden=whole(raw, "intermediate_size"),
        image_size=whole(raw, "image_size"),
        patch=whole(raw, "patch_size"),
        position=raw["position"],
        theta=positive(raw, "rope_theta"),
        eps=positive(raw, "layer_norm_eps"),
    )
    if cfg.width % cfg.heads:
        raise ValueError(f"vision_config.hidden_size {cfg.width} is not a multiple of its {cfg.heads} heads")
    if cfg.position == "rope2d" and cfg.head_dim % 4:
        raise ValueError(f"rope2d needs heads of a multiple of 4, found {cfg.head_dim}")
    if not 1 <= cfg.tokens <= MOST_TOKENS:
        raise ValueError(
            f"image_size {cfg.image_size} and patch_size {cfg.patch} make {cfg.tokens} patches, "
            f"expected 1 to {MOST_TOKENS}"
        )
    return cfg


def _text(raw: Mapping[str, Any]) -> TextConfig:
    gemma2 = raw["model_type"] == "gemma2"
    require(raw, "attention_bias", False)
    require(raw, "hidden_activation", "gelu_pytorch_tanh")
    scaling = section(raw, "rope_scaling") if raw.get("rope_scaling") else {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ValueError(f"rope_scaling is {scaling}, expected none")
    if not str(raw.get("hidden_act") or "gelu").startswith("gelu"):  # old files say gelu, and meant the tanh form
        raise ValueError(f"hidden_act is {raw['hidden_act']!r}, expected gelu_pytorch_tanh")
    rope = section(raw, "rope_parameters") if raw.get("rope_parameters") else {"rope_theta": raw["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']}, expected default")
    scale = positive(raw, "query_pre_attn_scalar") if gemma2 else whole(raw, "head_dim")
    cfg = TextConfig(
        vocab=whole(raw, "vocab_size"),
        width=whole(raw, "hidden_size"),
        layers=whole(raw, "num_hidden_layers"),
        heads=whole(raw, "num_attention_heads"),
        kv_heads=whole(raw, "num_key_value_heads"),
        head_dim=whole(raw, "head_dim"),
        hidden=whole(raw, "intermediate_size"),
        query_scale=scale**-0.5,
        attention_softcap=positive(raw, "attn_logit_softcapping") if gemma2 and raw["attn_logit_softcapping"] else 0.0,
        final_softcap=positive(raw, "final_logit_softcapping") if gemma2 and raw["final_logit_softcapping"] else 0.0,
        window=whole(raw, "sliding_window") if gemma2 and raw["sliding_window"] is not None else 0,
        post_norms=gemma2,
        theta=positive(rope, "rope_theta"),
        eps=positive(raw, "rms_norm_eps"),
        positions=whole(raw, "max_position_embeddings"),
    )
    kinds = ["sliding_attention" if cfg.windowed(i) else "full_attention" for i in range(cfg.layers)]
    if gemma2 and raw.get("layer_types", kinds) != kinds:
        raise ValueError(f"layer_types are not those of sliding_window {raw['sliding_window']}")
    if cfg.heads % cfg.kv_heads or cfg.head_dim % 2:
        raise ValueError(f"{cfg.heads} heads of {cfg.head_dim} do not fit {cfg.kv_heads} kv heads and rotary positions")
    return cfg


def _token(raw: Mapping[str, Any], text: Mapping[str, Any], key: str) -> int:
    """A token id at the top level or in text_config; the first, where Gemma lists the ends of a turn too."""
    found = raw[key] if raw.get(key) is not None else text[key]
    return whole({key: found[0] if isinstance(found, list) and found else found}, key)


def section(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object in an object; a ValueError for what is none."""
    if not isinstance(raw[key], dict):
        raise ValueError(f"{key} is {raw[key]!r}, expected an object")
    return raw[key]


def whole(raw: Mapping[str, Any], key: str) -> int:
    """A count, or the id of a token; a ValueError for what is none."""
    value, least, most = raw[key], 0 if key.endswith("token_id") else 1, MOST_OF.get(key, MOST)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} is {value!r}, expected a whole number from {least} to {most}")
    return value


def positive(raw: Mapping[str, Any], key: str) -> float:
    """A factor or a cap; a ValueError for what is none."""
    value = raw[key]
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{key} is {value!r}, expected a number above 0")
    return float(value)


def require(raw: Mapping[str, Any], key: str, value: Any) -> None:
    """The only value that is implemented, which is also the default."""
    if raw.get(key, value) != value:
        raise ValueError(f"{key} is {raw[key]!r}, expected {value!r}")


def with_methods(config: dict[str, Any], methods: Mapping[str, str]) -> dict[str, Any]:
    """A `config.json` that says how weights are quantized, if any are."""
    # an entry without quant_method stops transformers; one that it does not know, it skips, and makes up the weights
    return config | {"quantization_config": {"format": "pgfunc", "weights": dict(methods)}} if methods else config


def render_vision(vision: VisionConfig) -> dict[str, Any]:
    """The vision_config of an encoder: `parse_vision` gives it back."""
    rendered = {
        "model_type": "siglip_vision_model", "hidden_size": vision.width, "intermediate_size": vision.hidden,
        "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads, "image_size": vision.image_size,
        "patch_size": vision.patch, "num_channels": 3, "layer_norm_eps": vision.eps, "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    own = {} if vision.position == "learned" else {"position": vision.position, "rope_theta": vision.theta}
    return rendered | own


def render(cfg: Config, dtype: str) -> dict[str, Any]:
    """The `config.json` of a config: `parse` gives the config back.

    Raises CheckpointError for a config that the format cannot say, such as softcaps without Gemma 2's post-norms.
    """
    vision, text = cfg.vision, cfg.text
    ids = {"pad_token_id": cfg.pad, "eos_token_id": cfg.eos, "bos_token_id": cfg.bos}
    paligemma = {"vision_use_head": False, "projection_dim": text.width, "num_image_tokens": vision.tokens}
    vision_config = render_vision(vision) | paligemma
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
        read = parse(rendered)
    except ValueError as error:
        raise CheckpointError(f"Hugging Face's config.json cannot hold {cfg}: {error}") from error
    if read != without_tokenizer(replace(cfg, resample=read.resample)):
        raise CheckpointError(f"Hugging Face's config.json cannot hold {cfg}: read back it is {read}")
    return rendered
