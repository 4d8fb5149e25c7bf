"""LoRA adapters as PEFT writes them (adapter_config.json, adapter_model.safetensors), read and added to the weights.

PEFT and transformers have named the arrays in several ways, which are all read. What an adapter holds beside plain
LoRA's pairs is an error, for without it the pairs are not what was trained. Axes: r rank, i inputs, o outputs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pgfunc import paligemma, quant, tree
from pgfunc.checkpoint import hf, keys
from pgfunc.checkpoint.files import Entry, check
from pgfunc.checkpoint.hf_config import MOST
from pgfunc.checkpoint.source import ADAPTER, find
from pgfunc.config import Config
from pgfunc.errors import CheckpointError
from pgfunc.files.journal import reading
from pgfunc.files.jsonfile import read_json
from pgfunc.ops import upcast
from pgfunc.paligemma import Params

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
TABLES = {"vision.position", "language.embed"}
PAIR = re.compile(r"(.+)\.lora_(A|B)(?:\.[\w-]+)?\.weight")  # where the adapter's name stands, it is mostly `default`
SAVED = re.compile(r"\.modules_to_save(?:\.[\w-]+)?(?=\.)|\.base_layer(?=\.)")  # in the names of whole weights
# versions of PEFT and transformers name the modules differently; the newest comes first, which `save` writes
RENAMED = {"base_model.model.": "", "model.": "", "language_model.model.": "language_model.",
           "vision_tower.vision_model.": "vision_tower.", "language_model.lm_head.": "lm_head."}  # fmt: skip
# what PEFT can do beside plain LoRA: where one of these is set, the pairs alone are not the adapter
BEYOND = ("bias", "use_dora", "use_rslora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "kasa_config",
          "rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices",
          "target_parameters", "alora_invocation_tokens", "arrow_config", "monteclora_config",
          "velora_config")  # fmt: skip
OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start that change the base weights too


class Pair(NamedTuple):
    """What is added to one weight is scale · b @ a."""

    a: Float[Tensor, "r i"]
    b: Float[Tensor, "o r"]


class Lora(NamedTuple):
    """The pairs by the path of their weight, and the factor alpha / rank."""

    pairs: dict[str, Pair]
    scale: float


def merge(params: Params, lora: Lora) -> Params:
    """The parameters with every pair added to its weight, in float32 or wider, cast last."""
    quant.check_plain(params, "merging LoRA")
    leaves = tree.flatten(params)

    def added(leaf: Tensor, pair: Pair) -> Tensor:
        return (upcast(leaf) + lora.scale * (pair.b @ pair.a).to(leaf.device)).to(leaf.dtype)

    return tree.replace(params, {path: added(leaves[path], pair) for path, pair in lora.pairs.items()})


def load(folder: str | Path, cfg: Config, params: Params | None = None) -> Lora:
    """Read an adapter, a folder or a hub id, onto the CPU, in float32 or wider, as PEFT does.

    params: those of its base. Weights that stand beside the pairs must equal them; without `params` they are an error.
    Raises CheckpointError for keys that are not this model's, half a pair, a wrong shape, or more than plain LoRA.
    """
    folder = find(folder)
    with reading(folder):
        rank, scale, named = read_settings(folder / ADAPTER)
        arrays = open_pairs(folder)
    path_of = {name: path for path, name in modules(cfg).items()}
    shapes = tree.flatten(paligemma.abstract(cfg))
    entries, expected, whole = {}, {}, {}
    for key, entry in arrays.items():
        if not (found := PAIR.fullmatch(key)) or found[1] not in path_of:
            whole[key] = entry
            continue
        path, (outputs, inputs) = path_of[found[1]], shapes[path_of[found[1]]].shape
        entries[f"{path} {found[2]}"] = entry
        expected |= {f"{path} A": torch.empty(rank, inputs, device="meta")}
        expected |= {f"{path} B": torch.empty(outputs, rank, device="meta")}
    for name in named if isinstance(named, list) else []:
        if not any(str(name) in key for key in whole):
            raise CheckpointError(f"{folder / ADAPTER}: modules_to_save is {named}, and {WEIGHTS} has no {name}")
    check_whole(whole, cfg, params, folder / WEIGHTS)
    check(expected, entries, str(folder / WEIGHTS), "the adapter that adapter_config.json describes")
    chosen = [path for path in shapes if f"{path} A" in entries]
    return Lora({path: Pair(*(upcast(entries[f"{path} {part}"].read()) for part in "AB")) for path in chosen}, scale)


def open_pairs(folder: Path) -> dict[str, Entry]:
    """The arrays of an adapter, under the names that the newest version gives the modules, without `model.`."""
    path = folder / WEIGHTS
    if (folder / PICKLED).exists() and not path.exists():
        raise CheckpointError(
            f"{folder / PICKLED}: is pickled, and not read, for loading it may run code; "
            "PEFT's from_pretrained(base, folder).save_pretrained(folder) writes safetensors"
        )
    arrays = keys.unwrapped(hf.open_file(path), str(path))
    found = {renamed(key): entry for key, entry in arrays.items()}
    if len(found) < len(arrays):
        raise CheckpointError(f"{path}: holds several adapters, or one twice; save one alone with PEFT")
    return found


def renamed(key: str) -> str:
    """An array's name as the newest version writes it."""
    key = SAVED.sub("", key)
    for old, new in RENAMED.items():
        key = new + key.removeprefix(old) if key.startswith(old) else key
    return key if not (found := PAIR.fullmatch(key)) else f"{found[1]}.lora_{found[2]}.weight"


def check_whole(arrays: Mapping[str, Entry], cfg: Config, params: Params | None, path: Path) -> None:
    """Raise CheckpointError for a weight beside the pairs that is not the base's: it was trained too, or resized."""
    leaves = {} if params is None else tree.flatten(params)
    place = {slot.key: where for where, slot in tree.flatten(table(cfg)).items()}
    place["lm_head.weight"] = "language.embed"
    for key, entry in arrays.items():
        if key not in place:
            raise CheckpointError(f"{path}: {key} is no linear weight of this model; {hf.REMEDY}")
        leaf = leaves.get(place[key])
        if leaf is None or leaf.shape != entry.shape or not (leaf.is_meta or _equal(entry, leaf)):
            raise CheckpointError(f"{path}: {key} stands beside the pairs and is not the base's; {hf.REMEDY}")


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
    if str(settings.get("init_lora_weights")).startswith(OWN_BASE):
        beyond.append("init_lora_weights")
    if not -1e30 < alpha < 1e30:
        beyond.append("lora_alpha")
    if beyond or not 1 <= rank <= MOST:
        name = beyond[0] if beyond else "r"
        raise CheckpointError(f"{path}: {name} is {settings[name]!r}; only plain LoRA is read; {hf.REMEDY}")
    return rank, alpha / rank, settings.get("modules_to_save")


def modules(cfg: Config) -> dict[str, str]:
    """Path of a linear weight -> the name of its module in transformers, without the leading `model.`."""
    linear = linear_paths(paligemma.abstract(cfg))
    return {path: slot.key.removesuffix(".weight") for path, slot in tree.flatten(table(cfg)).items() if path in linear}


def table(cfg: Config) -> Params:
    """The key of every parameter as the newest transformers has it, without the leading `model.`."""
    return hf.table(cfg, {"vision": "vision_tower.", "projector": "", "language": "language_model."})


def linear_paths(params: Params) -> set[str]:
    """The paths of the matrices that multiply activations; tables that are looked up are none."""
    return {path for path, leaf in tree.flatten(params).items() if leaf.dim() == 2} - TABLES
