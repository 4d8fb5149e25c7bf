# a table is a tree of parameters whose leaves are Slots
# pyright: reportArgumentType=false
"""SigLIP checkpoints in Hugging Face layout: a folder of config.json, safetensors and a tokenizer.json.

A folder may leave its vision encoder out, where it was trained as the other half of a locked one (LiT; Zhai et al.
2022): then it takes that of the PaliGemma checkpoint in the folder above it, as `weights/tiny/siglip` does. Source of
the names: transformers `models/siglip`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgfunc import siglip, siglip_dual, tree
from pgfunc.checkpoint import (
    DECLARED,
    TOKENIZER,
    TOKENIZER_CONFIG,
    as_device,
    as_dtype,
    dtype_name,
    hf,
    hf_config,
    processor,
)
from pgfunc.checkpoint.files import Entry, Slot, arrange, gather
from pgfunc.checkpoint.hf_config import (
    CONFIG,
    SIGLIP,
    parse_as,
    parse_vision,
    positive,
    render_vision,
    require,
    section,
    whole,
)
from pgfunc.checkpoint.source import Source, check_folder, check_weights, find, shipped
from pgfunc.checkpoint.writing import as_json, check_save, written
from pgfunc.config import SiglipConfig, SiglipTextConfig
from pgfunc.errors import CheckpointError
from pgfunc.files.atomic import Change, changing
from pgfunc.files.journal import reading
from pgfunc.siglip_dual.prompt import SiglipModel, TextTokenizer, load_tokenizer, self_contained

TEXT = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 64, "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip

VISION, POOL = "vision_model.", "vision_model.head."
IN_WEIGHT, IN_BIAS = POOL + "attention.in_proj_weight", POOL + "attention.in_proj_bias"

HEAD = siglip.Head(
    probe=Slot(POOL + "probe", pattern="1 one d -> one d"),
    q=Slot(IN_WEIGHT, (0,)), q_bias=Slot(IN_BIAS, (0,)),
    k=Slot(IN_WEIGHT, (1,)), k_bias=Slot(IN_BIAS, (1,)),
    v=Slot(IN_WEIGHT, (2,)), v_bias=Slot(IN_BIAS, (2,)),
    out=Slot(POOL + "attention.out_proj.weight"), out_bias=Slot(POOL + "attention.out_proj.bias"),
    norm_scale=Slot(POOL + "layernorm.weight"), norm_bias=Slot(POOL + "layernorm.bias"),
    up=Slot(POOL + "mlp.fc1.weight"), up_bias=Slot(POOL + "mlp.fc1.bias"),
    down=Slot(POOL + "mlp.fc2.weight"), down_bias=Slot(POOL + "mlp.fc2.bias"),
)  # fmt: skip


def load_siglip(
    source: Source = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    mmap: bool = True,
) -> SiglipModel:
    """A dual encoder in memory.

    source: None for the shipped one; a folder in Hugging Face layout; or a hub id such as
    "google/siglip-base-patch16-224". A folder without a vision encoder takes that of the PaliGemma above it.
    dtype, device, mmap: as for `pgfunc.load`.
    Raises CheckpointError, naming file, key and shapes, for files that do not fit; DeviceError, SettingError.
    """
    where, kind = as_device(device), as_dtype(dtype)
    folder = shipped() / "siglip" if source is None else find(source)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder in Hugging Face layout, as a SigLIP checkpoint is")
    check_folder(folder)
    with reading(folder.resolve().parent), reading(folder):  # a save may write both
        cfg = read_config(folder)
        check_weights(folder)
        check_save(folder, CONFIG)
        entries = read_entries(folder, cfg) if mmap else hf.copied(read_entries(folder, cfg))
        params = gather(table(cfg), siglip_dual.abstract(cfg), entries, str(folder), kind, where)
        tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    return SiglipModel(cfg, params, tokenizer)


def save_siglip(model: SiglipModel, folder: str | Path, vision: bool = True, shard_bytes: int = 5 * 10**9) -> None:
    """Write a dual encoder in Hugging Face layout, in shards of at most `shard_bytes`; transformers loads it.

    vision: False leaves the vision encoder out, for a folder inside that of the PaliGemma which has the same one;
    transformers then does not find it.
    The folder's weights and configuration are replaced, its tokenizer too if the model has one; other files stay. All
    change at once, as for `pgfunc.save`.
    Raises CheckpointError for a folder that cannot be written, NumericalError for a parameter that is not finite.
    """
    folder = Path(folder)
    check(model, folder)
    with written(folder), changing(folder) as change:
        put(change, model, vision, shard_bytes)


def check(model: SiglipModel, where: Path) -> None:
    """Refuse what cannot be saved, before anything is written."""
    if model.params.scale.is_meta:
        raise CheckpointError(f"{where}: a model on the meta device has no weights to save")
    tree.check_finite(model.params, str(where))


def put(change: Change, model: SiglipModel, vision: bool, shard_bytes: int, inner: str = "") -> None:
    """Write a model's files among those of a folder that change at once; `inner` is a folder in it."""
    settings = processor.render(model.cfg, processor_class="SiglipProcessor")
    change.write(str(Path(inner, processor.NAME)), as_json(settings))
    change.supersede(re.compile(re.escape(processor.IN_PROCESSOR)), inner)
    if model.tokenizer is not None:
        put_tokenizer(change, model.tokenizer, model.cfg.text.positions, inner)
    arrays = unfold(arrange(table(model.cfg), model.params))
    kept = {key: array for key, array in arrays.items() if vision or not is_tower(key)}
    hf.write(change, kept, render(model.cfg, dtype_name(model.params.scale)), shard_bytes, inner)


def put_tokenizer(change: Change, tokenizer: TextTokenizer, length: int, inner: str) -> None:
    """Write `tokenizer.json`, and the `tokenizer_config.json` with which transformers reads text as `text_ids` does.

    Its caller still says that texts are padded: `padding="max_length"`. One letter differs: a capital sigma that ends
    a word, of which the `tokenizers` package does not know the lower case there.
    """
    backend = self_contained(tokenizer)
    eos, pad = (backend.id_to_token(id) for id in (tokenizer.eos, tokenizer.pad))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "SiglipProcessor", "eos_token": eos,
        "pad_token": pad, "unk_token": "<unk>", "model_max_length": length, "padding_side": "right",
        "model_input_names": ["input_ids"], "split_special_tokens": True, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    change.write(str(Path(inner, TOKENIZER)), backend.to_str(pretty=True))
    change.write(str(Path(inner, TOKENIZER_CONFIG)), as_json(settings))
    change.supersede(DECLARED, inner)


def table(cfg: SiglipConfig) -> siglip_dual.DualParams:
    """The key of every parameter. Query, key and value of the pooling head are parts of one array: see `fold`."""
    layers = (hf.layer_table(hf.SIGLIP_LAYER, f"text_model.encoder.layers.{i}.") for i in range(cfg.text.layers))
    return siglip_dual.DualParams(
        vision=hf.vision_table(cfg.vision, VISION),
        pool=HEAD,
        text=siglip_dual.TextParams(
            embed=Slot("text_model.embeddings.token_embedding.weight"),
            position=Slot("text_model.embeddings.position_embedding.weight"),
            layers=tuple(layers),
            norm_scale=Slot("text_model.final_layer_norm.weight"),
            norm_bias=Slot("text_model.final_layer_norm.bias"),
            head=Slot("text_model.head.weight"),
            head_bias=Slot("text_model.head.bias"),
        ),
        scale=Slot("logit_scale", pattern="1 ->"),
        bias=Slot("logit_bias", pattern="1 ->"),
    )


def is_tower(key: str) -> bool:
    """True for a key of the vision encoder that PaliGemma has too."""
    return key.startswith(VISION) and not key.startswith(POOL)


def read_entries(folder: Path, cfg: SiglipConfig) -> dict[str, Entry]:
    """Every array of a folder, and of the PaliGemma above it where the vision encoder is that one's."""
    entries = hf.open_folder(folder)
    if not any(is_tower(key) for key in entries):
        entries |= tower_above(folder, cfg)
    return fold(entries, cfg.vision.width)


def tower_above(folder: Path, cfg: SiglipConfig) -> dict[str, Entry]:
    """The vision encoder of the PaliGemma in the folder above, under SigLIP's keys."""
    above = folder.resolve().parent
    if not (above / CONFIG).exists():
        raise CheckpointError(f"{folder}: holds no vision encoder, nor is there a PaliGemma in {above} to take it from")
    if hf_config.read_config(above).vision != cfg.vision:
        raise CheckpointError(f"{folder}: its vision_config is not that of {above}, whose vision encoder it takes")
    entries = hf.open_folder(above)
    prefix = hf.layout(entries, above)["vision"]
    named = {VISION + key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
    return {key: entry for key, entry in named.items() if is_tower(key)}


def fold(entries: Mapping[str, Entry], width: int) -> dict[str, Entry]:
    """The arrays, with a leading axis of 3 for the query, key and value that the pooling head keeps in one."""

    def folded(key: str, entry: Entry) -> Entry:
        if key not in (IN_WEIGHT, IN_BIAS) or entry.shape[:1] != (3 * width,):
            return entry
        shape = (3, width, *entry.shape[1:])
        return Entry(shape, entry.dtype, lambda: entry.read().reshape(shape))

    return {key: folded(key, entry) for key, entry in entries.items()}


def unfold(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `fold`."""
    return {key: array.flatten(0, 1) if key in (IN_WEIGHT, IN_BIAS) else array for key, array in arrays.items()}


def read_config(folder: Path) -> SiglipConfig:
    """The configuration of a checkpoint folder, its processor's resize filter included."""
    return processor.read(folder, parse_as(folder / CONFIG, parse, "a SigLIP"))


def parse(raw: Mapping[str, Any]) -> SiglipConfig:
    """The value of a `config.json`, which leaves out what equals a default; a ValueError says what does not fit."""
    if raw["model_type"] == "siglip2":
        raise ValueError("model_type is 'siglip2': pictures of any shape (NaFlex) are not implemented; take a SigLIP 2 "
                         "of fixed resolution, such as google/siglip2-base-patch16-224")  # fmt: skip
    if raw["model_type"] != "siglip":
        raise ValueError(f"model_type is {raw['model_type']!r}, expected 'siglip'")
    vision, text = (
        {key: value for key, value in (section(raw, part) if raw.get(part) else {}).items() if value is not None}
        for part in ("vision_config", "text_config")
    )
    if vision.pop("vision_use_head", True) is not True:
        raise ValueError("vision_use_head is false: without a pooling head there is no vector of a picture")
    cfg = SiglipConfig(parse_vision(SIGLIP | vision), parse_text(TEXT | text))
    if cfg.text.out != cfg.vision.width:
        raise ValueError(f"text vectors have length {cfg.text.out}, those of pictures {cfg.vision.width}")
    return cfg


def parse_text(raw: Mapping[str, Any]) -> SiglipTextConfig:
    """The value of a text_config that is whole; a ValueError says what does not fit."""
    require(raw, "hidden_act", "gelu_pytorch_tanh")
    cfg = SiglipTextConfig(
        vocab=whole(raw, "vocab_size"),
        width=whole(raw, "hidden_size"),
        layers=whole(raw, "num_hidden_layers"),
        heads=whole(raw, "num_attention_heads"),
        hidden=whole(raw, "intermediate_size"),
        out=whole(raw, "projection_size" if "projection_size" in raw else "hidden_size"),
        positions=whole(raw, "max_position_embeddings"),
        eps=positive(raw, "layer_norm_eps"),
    )
    if cfg.width % cfg.heads:
        raise ValueError(f"text_config.hidden_size {cfg.width} is not a multiple of its {cfg.heads} heads")
    return cfg


def render(cfg: SiglipConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a config, as transformers reads it."""
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
