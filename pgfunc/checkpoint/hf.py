# a table is a tree of parameters whose leaves are Slots
# pyright: reportArgumentType=false
"""PaliGemma in Hugging Face layout: which array of a folder's safetensors holds which parameter.

Three key layouts are in use. They differ only in the prefixes of the three parts of the model; `find_prefixes` reads
each prefix off one key of the part, so a new layout with other prefixes needs no code. `arrays` names its arrays in the
layout `HUB`. The files themselves are read and written by `shards`. Source of the names: transformers
`models/paligemma`, `models/siglip`, `models/gemma`, `models/gemma2`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgfunc import gemma, paligemma, quant, siglip, tree
from pgfunc.checkpoint import shards
from pgfunc.checkpoint.tables import Entry, Slot, from_arrays, to_arrays
from pgfunc.checkpoint.writing import INDEX as INDEX
from pgfunc.checkpoint.writing import SINGLE as SINGLE
from pgfunc.config import Config, VisionConfig
from pgfunc.errors import CheckpointError
from pgfunc.quant import lowbit

# a key that each part of the model has once; the text before it is the prefix of the part
ANCHORS = {
    "vision": "embeddings.patch_embedding.weight",
    "projector": "multi_modal_projector.linear.weight",
    "language": "layers.0.input_layernorm.weight",
}
EMBED, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
# the prefixes in the published checkpoints, which every version of transformers reads
HUB = {"vision": "vision_tower.vision_model.", "projector": "", "language": "language_model.model."}

MERGE_FIRST = "merge it with PEFT (merge_and_unload) and load the result"  # for LoRA that `lora` cannot add

# suffixes of the two arrays of a quantized weight
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
    mlp_norm="post_attention_layernorm.weight",  # Gemma 1's name for the norm before the MLP
    gate="mlp.gate_proj.weight", up="mlp.up_proj.weight", down="mlp.down_proj.weight",
    post_mlp_norm=(),
)  # fmt: skip

GEMMA2_LAYER = GEMMA_LAYER._replace(
    post_attention_norm="post_attention_layernorm.weight",
    mlp_norm="pre_feedforward_layernorm.weight",
    post_mlp_norm="post_feedforward_layernorm.weight",
)


def table(cfg: Config, prefixes: Mapping[str, str] = HUB) -> paligemma.Params:
    """Where every parameter is stored, for the prefixes of one key layout."""
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
    """Where every parameter of the vision encoder is stored."""
    return siglip.Params(
        patch=Slot(prefix + "embeddings.patch_embedding.weight"),
        patch_bias=Slot(prefix + "embeddings.patch_embedding.bias"),
        position=Slot(prefix + "embeddings.position_embedding.weight") if cfg.position == "learned" else (),
        layers=tuple(layer_table(SIGLIP_LAYER, f"{prefix}encoder.layers.{i}.") for i in range(cfg.layers)),
        norm_scale=Slot(prefix + "post_layernorm.weight"),
        norm_bias=Slot(prefix + "post_layernorm.bias"),
    )


def layer_table(names: Any, prefix: str) -> Any:
    """Where every parameter of a layer is stored: a layer of names, each after the prefix."""
    return type(names)(*(Slot(prefix + name) if name else () for name in names))


def with_quantized(table: paligemma.Params, methods: Mapping[str, str]) -> paligemma.Params:
    """The table of a tree in which the weights at these paths are quantized: each is stored as values and scale."""

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
    tied: bool = True,
    mmap: bool = True,
) -> paligemma.Params:
    """The parameters in a folder; on the meta device only headers are read.

    methods: path -> method of each quantized weight. tied: whether the folder's config says that the head is the
    embedding, so that the head may be missing. Weights are memory-mapped, and not copied unless dtype or device change
    or `mmap` is False.
    """
    entries = shards.open_folder(folder)
    if lora_key := next((key for key in entries if ".lora_" in key), None):
        raise CheckpointError(f"{folder}: {lora_key} is a LoRA array beside the weights; {MERGE_FIRST}")
    prefixes = find_prefixes(entries, folder)
    entries = without_head(entries, prefixes["language"] + EMBED, tied, folder, compare=device.type != "meta")
    if not mmap:
        entries = shards.copied(entries)
    abstract = quant.apply(paligemma.abstract(cfg), methods)
    return from_arrays(with_quantized(table(cfg, prefixes), methods), abstract, entries, str(folder), dtype, device)


def without_head(entries: Mapping[str, Entry], embed: str, tied: bool, folder: Path, compare: bool) -> dict[str, Entry]:
    """The entries without a head, which must equal the embedding.

    If a writer saved only one of the two tied matrices and that is the head, it becomes the embedding. `embed` is the
    embedding's key.
    """
    heads = {key: entry for key, entry in entries.items() if key == LM_HEAD or key.endswith("." + LM_HEAD)}
    others = {key: entry for key, entry in entries.items() if key not in heads}
    if not tied and not heads:
        raise CheckpointError(f"{folder}: {LM_HEAD} is missing, though tie_word_embeddings is False")
    for key, head in heads.items():
        embedding = others.get(embed + VALUES) or others.setdefault(embed, head)  # a head never equals quantized values
        if compare and not _equal(head, embedding):
            raise CheckpointError(f"{folder}: {key} differs from {EMBED}; PaliGemma uses one matrix for both")
    return others


def _equal(head: Entry, embedding: Entry) -> bool:
    return head.shape == embedding.shape and torch.equal(head.read().to(embedding.dtype), embedding.read())


def find_prefixes(entries: Mapping[str, Entry], folder: Path) -> dict[str, str]:
    """The prefix of each part of the model in these keys."""
    prefixes = {}
    for part, anchor in ANCHORS.items():
        matches = [key for key in (key.removesuffix(VALUES) for key in entries) if key.endswith(anchor)]
        if len(matches) != 1:
            count = f"{len(matches)} keys end in" if matches else "no key ends in"
            raise CheckpointError(f"{folder}: {count} {anchor}; expected one, as in a PaliGemma checkpoint")
        prefixes[part] = matches[0].removesuffix(anchor)
    return prefixes


def arrays(cfg: Config, params: paligemma.Params) -> dict[str, Tensor]:
    """Key -> array, as files hold the parameters."""
    params = quant.to_device_layout(params, torch.device("cpu"))  # files hold the memory order of a CPU
    return to_arrays(with_quantized(table(cfg), quant.methods(params)), params)
