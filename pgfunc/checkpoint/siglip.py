# a table is a tree of parameters whose leaves are Slots
# pyright: reportArgumentType=false
"""SigLIP checkpoints in Hugging Face layout: a folder of config.json, safetensors and a tokenizer.json.

A folder may omit its vision encoder, if it was trained beside a locked one (LiT; Zhai et al. 2022): it then uses the
vision encoder of the PaliGemma checkpoint in its parent folder, as `weights/tiny/siglip` does. Source of the names:
transformers `models/siglip`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pgfunc import siglip, siglip_dual, tree
from pgfunc.checkpoint import (
    TOKEN_DECLARATIONS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    as_device,
    as_dtype,
    hf,
    hf_config,
    processor,
    shards,
)
from pgfunc.checkpoint.hf_config import CONFIG
from pgfunc.checkpoint.siglip_config import read_config, render
from pgfunc.checkpoint.source import Source, check_model_folder, check_weights, find, shipped
from pgfunc.checkpoint.tables import Entry, Slot, from_arrays, to_arrays
from pgfunc.checkpoint.writing import as_json, check_params, check_same_save
from pgfunc.config import SiglipConfig
from pgfunc.errors import CheckpointError
from pgfunc.files.atomic import Change, changing
from pgfunc.files.journal import reading
from pgfunc.files.outputs import write_errors
from pgfunc.siglip_dual.prompt import SiglipModel, TextTokenizer, load_tokenizer, self_contained

VISION, POOL = "vision_model.", "vision_model.head."
IN_WEIGHT, IN_BIAS = POOL + "attention.in_proj_weight", POOL + "attention.in_proj_bias"

POOLING_HEAD = siglip.Head(
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
    """Load a dual encoder into memory.

    source: None for the shipped one; a folder in Hugging Face layout; or a hub id such as
    "google/siglip-base-patch16-224". A folder without a vision encoder uses that of the PaliGemma in its parent folder.
    dtype, device, mmap: as for `pgfunc.load`.
    Raises CheckpointError, naming file, key and shapes, for files that do not fit; DeviceError; SettingError.
    """
    target, cast = as_device(device), as_dtype(dtype)
    folder = shipped() / "siglip" if source is None else find(source)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; expected a SigLIP checkpoint in Hugging Face layout")
    check_model_folder(folder)
    with reading(folder.resolve().parent), reading(folder):  # a save may write both
        cfg = read_config(folder)
        check_weights(folder)
        check_same_save(folder, CONFIG)
        entries = read_entries(folder, cfg) if mmap else shards.copied(read_entries(folder, cfg))
        params = from_arrays(table(cfg), siglip_dual.abstract(cfg), entries, str(folder), cast, target)
        tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    return SiglipModel(cfg, params, tokenizer)


def save_siglip(
    model: SiglipModel, folder: str | Path, vision: bool = True, shard_bytes: int = shards.SHARD_BYTES
) -> None:
    """Write a dual encoder in Hugging Face layout, in shards of at most `shard_bytes`; transformers loads it.

    vision: False omits the vision encoder, for a folder inside that of a PaliGemma with the same one. transformers
    cannot load such a folder.
    The folder's weights and configuration are replaced, and its tokenizer if the model has one. Other files stay. The
    replaced files change at once, as for `pgfunc.save`.
    Raises CheckpointError for a folder that cannot be written, NumericalError for a parameter that is not finite.
    """
    folder = Path(folder)
    check_params(model.params, folder)
    with write_errors(folder, CheckpointError), changing(folder) as change:
        write_model(change, model, vision, shard_bytes)


def write_model(change: Change, model: SiglipModel, vision: bool, shard_bytes: int, subfolder: str = "") -> None:
    """Write a model's files, as part of a change of a folder, into that folder or a subfolder of it."""
    settings = processor.render(model.cfg, processor_class="SiglipProcessor")
    change.write(str(Path(subfolder, processor.PREPROCESSOR_CONFIG)), as_json(settings))
    change.supersede(re.compile(re.escape(processor.PROCESSOR_CONFIG)), subfolder)
    if model.tokenizer is not None:
        write_tokenizer(change, model.tokenizer, model.cfg.text.positions, subfolder)
    arrays = join_qkv(to_arrays(table(model.cfg), model.params))
    arrays = {key: array for key, array in arrays.items() if vision or not in_encoder(key)}
    shards.write(change, arrays, render(model.cfg, tree.dtype_name(model.params.scale)), shard_bytes, subfolder)


def write_tokenizer(change: Change, tokenizer: TextTokenizer, length: int, subfolder: str) -> None:
    """Write `tokenizer.json`, and a `tokenizer_config.json` with which transformers encodes text as `text_ids` does.

    Callers of transformers still pass `padding="max_length"`. One letter differs: the `tokenizers` package does not
    lowercase a capital sigma at a word's end to ς.
    """
    backend = self_contained(tokenizer)
    eos, pad = (backend.id_to_token(id) for id in (tokenizer.eos, tokenizer.pad))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "SiglipProcessor", "eos_token": eos,
        "pad_token": pad, "unk_token": "<unk>", "model_max_length": length, "padding_side": "right",
        "model_input_names": ["input_ids"], "split_special_tokens": True, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    change.write(str(Path(subfolder, TOKENIZER)), backend.to_str(pretty=True))
    change.write(str(Path(subfolder, TOKENIZER_CONFIG)), as_json(settings))
    change.supersede(TOKEN_DECLARATIONS, subfolder)


def table(cfg: SiglipConfig) -> siglip_dual.DualParams:
    """Where every parameter is stored. The pooling head's q, k and v are stored in one array: see `split_qkv`."""
    layers = (hf.layer_table(hf.SIGLIP_LAYER, f"text_model.encoder.layers.{i}.") for i in range(cfg.text.layers))
    return siglip_dual.DualParams(
        vision=hf.vision_table(cfg.vision, VISION),
        pool=POOLING_HEAD,
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


def in_encoder(key: str) -> bool:
    """Whether a key belongs to the vision encoder without the pooling head, which is what PaliGemma has too."""
    return key.startswith(VISION) and not key.startswith(POOL)


def read_entries(folder: Path, cfg: SiglipConfig) -> dict[str, Entry]:
    """Every array of a folder, with the vision encoder of the parent folder's PaliGemma if the folder has none."""
    entries = shards.open_folder(folder)
    if not any(in_encoder(key) for key in entries):
        entries |= encoder_of_parent(folder, cfg)
    return split_qkv(entries, cfg.vision.width)


def encoder_of_parent(folder: Path, cfg: SiglipConfig) -> dict[str, Entry]:
    """The vision encoder of the PaliGemma in the parent folder, under SigLIP's keys."""
    parent = folder.resolve().parent
    if not (parent / CONFIG).exists():
        raise CheckpointError(f"{folder}: holds no vision encoder, and {parent} holds no PaliGemma to take it from")
    if hf_config.read_config(parent).vision != cfg.vision:
        raise CheckpointError(f"{folder}: its vision_config differs from that of {parent}, whose encoder it uses")
    entries = shards.open_folder(parent)
    prefix = hf.find_prefixes(entries, parent)["vision"]
    renamed = {VISION + key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
    return {key: entry for key, entry in renamed.items() if in_encoder(key)}


def split_qkv(entries: Mapping[str, Entry], width: int) -> dict[str, Entry]:
    """The entries, with a new leading axis (q, k, v) in the two arrays that hold these of the pooling head."""

    def split(key: str, entry: Entry) -> Entry:
        if key not in (IN_WEIGHT, IN_BIAS) or entry.shape[:1] != (3 * width,):
            return entry
        shape = (3, width, *entry.shape[1:])
        return Entry(shape, entry.dtype, lambda: entry.read().reshape(shape))

    return {key: split(key, entry) for key, entry in entries.items()}


def join_qkv(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_qkv`."""
    return {key: array.flatten(0, 1) if key in (IN_WEIGHT, IN_BIAS) else array for key, array in arrays.items()}
