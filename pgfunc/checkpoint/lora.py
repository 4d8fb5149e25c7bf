"""LoRA adapters as PEFT writes them (adapter_config.json, adapter_model.safetensors): read, and added to the weights.

All names that versions of PEFT and transformers gave the arrays are read. An adapter that holds more than the pairs of
plain LoRA is an error, because the pairs alone are not what was trained. Axes: r rank, i inputs, o outputs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pgfunc import paligemma, quant, tree
from pgfunc.checkpoint import hf, keys, shards
from pgfunc.checkpoint.fields import MAX_COUNT
from pgfunc.checkpoint.source import ADAPTER, find
from pgfunc.checkpoint.tables import Entry, check_arrays
from pgfunc.config import Config
from pgfunc.errors import CheckpointError
from pgfunc.files.journal import reading
from pgfunc.files.jsonfile import read_json
from pgfunc.ops import upcast
from pgfunc.paligemma import Params

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
EMBEDDINGS = {"vision.position", "language.embed"}
PAIR = re.compile(r"(.+)\.lora_(A|B)(?:\.[\w-]+)?\.weight")  # an adapter's name may follow, mostly `default`
SAVED = re.compile(r"\.modules_to_save(?:\.[\w-]+)?(?=\.)|\.base_layer(?=\.)")  # in names of full weights
# prefixes of older versions of PEFT and transformers -> those of the newest, which `train.lora.save` writes
RENAMED = {"base_model.model.": "", "model.": "", "language_model.model.": "language_model.",
           "vision_tower.vision_model.": "vision_tower.", "language_model.lm_head.": "lm_head."}  # fmt: skip
# settings of PEFT beyond plain LoRA: if one of them is set, the pairs alone are not the adapter
BEYOND = ("bias", "use_dora", "use_rslora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "kasa_config",
          "rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices",
          "target_parameters", "alora_invocation_tokens", "arrow_config", "monteclora_config",
          "velora_config")  # fmt: skip
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that also change the base weights


class Pair(NamedTuple):
    """Two matrices; scale · b @ a is added to one weight."""

    a: Float[Tensor, "r i"]
    b: Float[Tensor, "o r"]


class Lora(NamedTuple):
    """Path of a weight -> its pair, and the factor alpha / rank."""

    pairs: dict[str, Pair]
    scale: float


def merge(params: Params, lora: Lora) -> Params:
    """The parameters with every pair added to its weight; the sum is computed in float32 or wider, then cast back."""
    quant.check_plain(params, "merging LoRA")
    leaves = tree.flatten(params)

    def added(leaf: Tensor, pair: Pair) -> Tensor:
        return (upcast(leaf) + lora.scale * (pair.b @ pair.a).to(leaf.device)).to(leaf.dtype)

    return tree.replace(params, {path: added(leaves[path], pair) for path, pair in lora.pairs.items()})


def load(folder: str | Path, cfg: Config, params: Params | None = None) -> Lora:
    """Read an adapter, a folder or a hub id, onto the CPU, in float32 or wider as PEFT does.

    params: the base model's. Full weights that are saved beside the pairs must equal them; without `params` they are an
    error.
    Raises CheckpointError for keys that are not this model's, half a pair, a wrong shape, or more than plain LoRA.
    """
    folder = find(folder)
    with reading(folder):
        rank, scale, modules_to_save = read_settings(folder / ADAPTER)
        arrays = open_adapter(folder)
    path_of = {name: path for path, name in modules(cfg).items()}
    shapes = tree.flatten(paligemma.abstract(cfg))
    pairs, expected, full_weights = {}, {}, {}
    for key, entry in arrays.items():
        if not (match := PAIR.fullmatch(key)) or match[1] not in path_of:
            full_weights[key] = entry
            continue
        path, (outputs, inputs) = path_of[match[1]], shapes[path_of[match[1]]].shape
        pairs[f"{path} {match[2]}"] = entry  # named as in error messages
        expected[f"{path} A"] = torch.empty(rank, inputs, device="meta")
        expected[f"{path} B"] = torch.empty(outputs, rank, device="meta")
    for name in modules_to_save if isinstance(modules_to_save, list) else []:
        if not any(str(name) in key for key in full_weights):
            raise CheckpointError(
                f"{folder / ADAPTER}: modules_to_save is {modules_to_save}, but {WEIGHTS} has no {name}"
            )
    check_full_weights(full_weights, cfg, params, folder / WEIGHTS)
    check_arrays(expected, pairs, str(folder / WEIGHTS), "the adapter that adapter_config.json describes")
    paths = [path for path in shapes if f"{path} A" in pairs]
    return Lora({path: Pair(*(upcast(pairs[f"{path} {part}"].read()) for part in "AB")) for path in paths}, scale)


def open_adapter(folder: Path) -> dict[str, Entry]:
    """The arrays of an adapter, by their names in the newest PEFT and transformers, without `model.`."""
    path = folder / WEIGHTS
    if (folder / PICKLED).exists() and not path.exists():
        raise CheckpointError(
            f"{folder / PICKLED}: is pickled, which is not read because loading it can run code; "
            "PEFT's from_pretrained(base, folder).save_pretrained(folder) writes safetensors"
        )
    arrays = keys.unwrapped(shards.open_file(path), str(path))
    by_name = {renamed(key): entry for key, entry in arrays.items()}
    if len(by_name) < len(arrays):
        raise CheckpointError(f"{path}: holds several adapters, or the same one twice; save a single one with PEFT")
    return by_name


def renamed(key: str) -> str:
    """An array's name in the newest PEFT and transformers, without `model.`."""
    key = SAVED.sub("", key)
    for old, new in RENAMED.items():
        key = new + key.removeprefix(old) if key.startswith(old) else key
    return key if not (match := PAIR.fullmatch(key)) else f"{match[1]}.lora_{match[2]}.weight"


def check_full_weights(arrays: Mapping[str, Entry], cfg: Config, params: Params | None, path: Path) -> None:
    """Raise CheckpointError for a full weight that differs from the base model's: it was trained too, or resized."""
    leaves = {} if params is None else tree.flatten(params)
    path_of = {slot.key: path for path, slot in tree.flatten(table(cfg)).items()}
    path_of[hf.LM_HEAD] = "language.embed"
    for key, entry in arrays.items():
        if key not in path_of:
            raise CheckpointError(f"{path}: {key} is not a linear weight of this model; {hf.MERGE_FIRST}")
        leaf = leaves.get(path_of[key])
        if leaf is None or leaf.shape != entry.shape or not (leaf.is_meta or _equal(entry, leaf)):
            raise CheckpointError(f"{path}: {key} beside the pairs differs from the base model's; {hf.MERGE_FIRST}")


def _equal(entry: Entry, leaf: Tensor) -> bool:
    return torch.equal(entry.read().to(leaf.dtype), leaf.cpu())


def read_settings(path: Path) -> tuple[int, float, Any]:
    """Rank, scale and modules_to_save in an adapter_config.json, which must describe plain LoRA."""
    settings = read_json(path)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if (
        settings.get("peft_type") != "LORA"
        or not isinstance(rank, int)
        or not isinstance(alpha, (int, float))
        or bool in (type(rank), type(alpha))
    ):
        raise CheckpointError(f"{path}: not a LoRA adapter; expected peft_type LORA, r and lora_alpha")
    beyond = [name for name in BEYOND if settings.get(name) not in (None, False, "none", {}, [])]
    if str(settings.get("init_lora_weights")).startswith(BASE_CHANGING):
        beyond.append("init_lora_weights")
    if beyond:
        raise CheckpointError(
            f"{path}: {beyond[0]} is {settings[beyond[0]]!r}; only plain LoRA is read; {hf.MERGE_FIRST}"
        )
    if not 1 <= rank <= MAX_COUNT:
        raise CheckpointError(f"{path}: r is {rank}, expected 1 to {MAX_COUNT}")
    if not -1e30 < alpha < 1e30:
        raise CheckpointError(f"{path}: lora_alpha is {alpha}, expected a number between -1e30 and 1e30")
    return rank, alpha / rank, settings.get("modules_to_save")


def modules(cfg: Config) -> dict[str, str]:
    """Path of a linear weight -> the name of its module in the newest transformers, without `model.`."""
    linear = linear_paths(paligemma.abstract(cfg))
    return {path: slot.key.removesuffix(".weight") for path, slot in tree.flatten(table(cfg)).items() if path in linear}


def table(cfg: Config) -> Params:
    """Where the newest transformers stores every parameter, without `model.`."""
    return hf.table(cfg, {"vision": "vision_tower.", "projector": "", "language": "language_model."})


def linear_paths(params: Params) -> set[str]:
    """The paths of the matrices that multiply activations; embeddings are not among them."""
    return {path for path, leaf in tree.flatten(params).items() if leaf.dim() == 2} - EMBEDDINGS
