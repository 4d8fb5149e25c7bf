# a table is a tree of parameters whose leaves are Slots
# pyright: reportArgumentType=false
"""Checkpoints in Hugging Face layout: a folder of config.json, safetensors (single or sharded) and processor files.

Three key layouts are in use; they differ only in the prefixes of the three parts, which are found by one key of each.
Weights are memory-mapped and, where dtype and device stay, never copied. Source of the names: transformers
`models/paligemma`, `models/siglip`, `models/gemma`, `models/gemma2`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pgfunc import gemma, paligemma, quant, siglip, tree
from pgfunc.checkpoint import keys
from pgfunc.checkpoint.files import Entry, Slot, arrange, gather
from pgfunc.checkpoint.hf_config import CONFIG
from pgfunc.checkpoint.writing import (
    CONFIGURED,
    INDEX,
    NAMES,
    SINGLE,
    as_json,
    digest_of,
    digest_of_arrays,
    header,
    write_safetensors,
)
from pgfunc.config import Config, VisionConfig
from pgfunc.errors import CheckpointError, first_line
from pgfunc.files.atomic import Change
from pgfunc.files.jsonfile import check_file, read_json
from pgfunc.quant import lowbit

# what a save replaces
WEIGHTS = re.compile(r"model(-[0-9a-f]{16})?(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

DTYPES = {name: dtype for dtype, name in NAMES.items() if dtype != torch.int64}  # of parameters

# each part of the model is found by this key of it: what stands before is the layout's prefix
ANCHORS = {
    "vision": "embeddings.patch_embedding.weight",
    "projector": "multi_modal_projector.linear.weight",
    "language": "layers.0.input_layernorm.weight",
}
EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"
# the layout of the published checkpoints, which every version of transformers reads; `save` writes it
HUB = {"vision": "vision_tower.vision_model.", "projector": "", "language": "language_model.model."}

REMEDY = "merge it with PEFT (merge_and_unload), and load what that saves"  # for more than plain weights or pairs

# what the parts of a quantized weight add to its key
VALUES, SCALE = ".values", ".scale"

SIGLIP_LAYER = siglip.Layer(
    norm1_scale="layer_norm1.weight", norm1_bias="layer_norm1.bias",
    q="self_attn.q_proj.weight", q_bias="self_attn.q_proj.bias",
    k="self_attn.k_proj.weight", k_bias="self_attn.k_proj.bias",
    v="self_attn.v_proj.weight", v_bias="self_attn.v_proj.bias",
    out="self_attn.out_proj.weight", out_bias="self_attn.out_proj.bias",
    norm2_scale="layer_norm2.weight", norm2_bias="layer_norm2.bias",
    up="mlp.fc1.weight", up_bias="mlp.fc1.bias",
    down="mlp.fc2.weight", down_bias="mlp.fc2.bias",
)  # fmt: skip

GEMMA_LAYER = gemma.Layer(
    attention_norm="input_layernorm.weight",
    q="self_attn.q_proj.weight", k="self_attn.k_proj.weight", v="self_attn.v_proj.weight",
    out="self_attn.o_proj.weight",
    post_attention_norm=(),
    mlp_norm="post_attention_layernorm.weight",  # Gemma 1 names the norm before the MLP so
    gate="mlp.gate_proj.weight", up="mlp.up_proj.weight", down="mlp.down_proj.weight",
    post_mlp_norm=(),
)  # fmt: skip

GEMMA2_LAYER = GEMMA_LAYER._replace(
    post_attention_norm="post_attention_layernorm.weight",
    mlp_norm="pre_feedforward_layernorm.weight",
    post_mlp_norm="post_feedforward_layernorm.weight",
)


def table(cfg: Config, prefixes: Mapping[str, str] = HUB) -> paligemma.Params:
    """The key of every parameter."""
    projector, language = prefixes["projector"] + "multi_modal_projector.linear.", prefixes["language"]
    names = GEMMA2_LAYER if cfg.text.post_norms else GEMMA_LAYER
    return paligemma.Params(
        vision=vision_table(cfg.vision, prefixes["vision"]),
        projector=Slot(projector + "weight"),
        projector_bias=Slot(projector + "bias"),
        language=gemma.Params(
            embed=Slot(language + EMBED),
            layers=tuple(layer_table(names, f"{language}layers.{i}.") for i in range(cfg.text.layers)),
            norm=Slot(language + "norm.weight"),
        ),
    )


def vision_table(cfg: VisionConfig, prefix: str) -> siglip.Params:
    """The key of every parameter of the vision encoder."""
    return siglip.Params(
        patch=Slot(prefix + "embeddings.patch_embedding.weight"),
        patch_bias=Slot(prefix + "embeddings.patch_embedding.bias"),
        position=Slot(prefix + "embeddings.position_embedding.weight") if cfg.position == "learned" else (),
        layers=tuple(layer_table(SIGLIP_LAYER, f"{prefix}encoder.layers.{i}.") for i in range(cfg.layers)),
        norm_scale=Slot(prefix + "post_layernorm.weight"),
        norm_bias=Slot(prefix + "post_layernorm.bias"),
    )


def layer_table(names: Any, prefix: str) -> Any:
    """The key of every parameter of one layer, from their names in it."""
    return type(names)(*(Slot(prefix + name) if name else () for name in names))


def with_parts(table: paligemma.Params, methods: Mapping[str, str]) -> paligemma.Params:
    """The table of a tree with quantized weights: each has the keys of its parts."""

    def parts(path: str, slot: Slot) -> Any:
        if path not in methods:
            return slot
        return lowbit.TYPES[methods[path]](Slot(slot.key + VALUES), Slot(slot.key + SCALE))

    return tree.map_with_path(parts, table)


def load(
    folder: Path,
    cfg: Config,
    dtype: torch.dtype | None,
    device: torch.device,
    methods: Mapping[str, str],
    tie: bool = True,
    mmap: bool = True,
) -> paligemma.Params:
    """The parameters in a folder, quantized where `methods` say so; on the meta device only their headers are read.

    tie: whether the folder's config says that the embedding is the head, so that a head need not be there.
    """
    entries = open_folder(folder)
    if pair := next((key for key in entries if ".lora_" in key), None):
        raise CheckpointError(f"{folder}: {pair} is LoRA's, beside the weights; {REMEDY}")
    prefixes = layout(entries, folder)
    entries = tied(entries, prefixes["language"] + EMBED, tie, folder, compare=device.type != "meta")
    if not mmap:
        entries = copied(entries)
    abstract = quant.apply(paligemma.abstract(cfg), methods)
    return gather(with_parts(table(cfg, prefixes), methods), abstract, entries, str(folder), dtype, device)


def tied(entries: Mapping[str, Entry], embed: str, tie: bool, folder: Path, compare: bool) -> dict[str, Entry]:
    """The arrays without a head: it must equal the embedding, or stands for it where a writer kept one of the two."""
    heads = {key: entry for key, entry in entries.items() if key == HEAD or key.endswith("." + HEAD)}
    rest = {key: entry for key, entry in entries.items() if key not in heads}
    if not tie and not heads:
        raise CheckpointError(f"{folder}: {HEAD} is missing, though tie_word_embeddings is False")
    for key, head in heads.items():
        other = rest.get(embed + VALUES) or rest.setdefault(embed, head)  # a quantized one is no head's equal
        if compare and (head.shape != other.shape or not torch.equal(head.read().to(other.dtype), other.read())):
            raise CheckpointError(f"{folder}: {key} differs from {EMBED}; PaliGemma ties the two")
    return rest


def copied(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The arrays, whose reading leaves nothing mapped from the files."""
    return {key: replace(entry, read=lambda entry=entry: entry.read().clone()) for key, entry in entries.items()}


def layout(entries: Mapping[str, Entry], folder: Path) -> dict[str, str]:
    """The prefix of each part of the model."""
    found = {}
    for part, anchor in ANCHORS.items():
        matches = [key for key in (key.removesuffix(VALUES) for key in entries) if key.endswith(anchor)]
        if len(matches) != 1:
            said = f"{len(matches)} keys end in" if matches else "no key ends in"
            raise CheckpointError(f"{folder}: {said} {anchor}; expected one, as in a PaliGemma checkpoint")
        found[part] = matches[0].removesuffix(anchor)
    return found


def open_folder(folder: Path) -> dict[str, Entry]:
    """Every array in a folder's safetensors, by name; nothing is read but headers."""
    return keys.unwrapped(_open_folder(folder), str(folder))


def _open_folder(folder: Path) -> dict[str, Entry]:
    if (folder / SINGLE).exists():  # before an index, as transformers does, which may leave an old one behind
        return open_file(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map is not a table of file names")
    entries, present = {}, {path.name for path in folder.iterdir()}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{folder / INDEX}: {name} lies outside the folder; shards are plain file names")
        if name not in present:  # not asked of the file system, which takes no name of a thousand characters
            raise CheckpointError(f"{folder / name}: missing, though {INDEX} names it; download it again")
        shard = open_file(folder / name)
        if absent := sorted({key for key, file in weight_map.items() if file == name} - shard.keys()):
            raise CheckpointError(f"{folder / name}: {absent[0]} is missing, though {INDEX} places it there")
        entries |= {key: entry for key, entry in shard.items() if weight_map.get(key, name) == name}
    return entries


def open_file(path: Path) -> dict[str, Entry]:
    """The arrays of one safetensors file, memory-mapped when read."""
    check_file(path)
    try:
        header(path)
        file = safe_open(path, framework="pt")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}); download it again") from error
    for key, piece in slices.items():
        if piece.get_dtype() not in DTYPES and not keys.UNREAD.fullmatch(key):
            raise CheckpointError(f"{path}: {key}: dtype {piece.get_dtype()} is not one of {', '.join(DTYPES)}")
    other = torch.int64  # stands for the dtypes of what is left out
    return {
        key: Entry(tuple(piece.get_shape()), DTYPES.get(piece.get_dtype(), other), partial(_read, file, path, key))
        for key, piece in slices.items()
    }


def _read(file: Any, path: Path, key: str) -> Tensor:
    try:
        return file.get_tensor(key)
    except (SafetensorError, RuntimeError, TypeError) as error:  # an empty array may have a size that no tensor has
        raise CheckpointError(f"{path}: {key} cannot be read ({first_line(error)}); download it again") from error


def arrays(cfg: Config, params: paligemma.Params) -> dict[str, Tensor]:
    """Key -> array, as files hold the parameters."""
    params = quant.to_device_layout(params, torch.device("cpu"))  # the order of files
    return arrange(with_parts(table(cfg), quant.methods(params)), params)


def write(
    change: Change, arrays: Mapping[str, Tensor], config: Mapping[str, Any], shard_bytes: int, inner: str = ""
) -> None:
    """Write arrays as safetensors of at most `shard_bytes` each, with an index if there are several; old ones go.

    `config.json` is written after them, and they say that they belong to it. The names of shards are those of no other
    weights, so that none replaces a shard that an older index names. `inner` is a folder in the folder that changes.
    """
    said = {CONFIGURED: digest_of(as_json(config))}
    many = len(arrays) > 1 and sum(map(_nbytes, arrays.values())) > shard_bytes
    pattern = f"model-{digest_of_arrays(arrays)}{{suffix}}.safetensors" if many else SINGLE
    shards = split_state_dict_into_shards_factory(
        dict(arrays), get_storage_size=_nbytes, filename_pattern=pattern, max_shard_size=shard_bytes
    )
    for name, held in shards.filename_to_tensors.items():
        with change.new(str(Path(inner, name))) as file:
            write_safetensors(file, {key: arrays[key] for key in held}, {"format": "pt"} | said)
    if shards.is_sharded:
        index = {"metadata": shards.metadata | said, "weight_map": shards.tensor_to_filename}
        change.write(str(Path(inner, INDEX)), as_json(index))
    change.supersede(WEIGHTS, inner)
    change.write(str(Path(inner, CONFIG)), as_json({**config, **said}))
    change.hide(str(Path(inner, CONFIG)))


def _nbytes(array: Tensor) -> int:
    return array.numel() * array.element_size()
