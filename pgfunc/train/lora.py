"""LoRA (Hu et al. 2021): a pair of thin matrices beside each chosen weight, whose product is added to it.

The pairs are a tree beside the tree, so what is trained is the pairs, by the gradient of loss(merge(params, lora)).
Files are PEFT's: adapter_config.json and adapter_model.safetensors. Axes: r rank, i inputs, o outputs.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pgfunc import paligemma, quant, tree
from pgfunc.atomic import changing
from pgfunc.checkpoint import ADAPTER, HUB_ID, hf
from pgfunc.checkpoint.files import check
from pgfunc.checkpoint.hf_config import MOST, read_json
from pgfunc.checkpoint.writing import as_json, write_safetensors, written
from pgfunc.config import Config
from pgfunc.errors import CheckpointError, SettingError
from pgfunc.journal import reading
from pgfunc.ops import widen
from pgfunc.paligemma import Params

WEIGHTS = "adapter_model.safetensors"
TABLES = {"vision.position", "language.embed"}
KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
# versions of transformers name the modules differently; the newest first, which `save` writes
RENAMED = {"language_model.model.": "language_model.", "vision_tower.vision_model.": "vision_tower."}
# what PEFT can do beside plain LoRA: where one of these is set, the pairs alone are not the adapter
BEYOND = ("bias", "use_dora", "use_rslora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "kasa_config",
          "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices",
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


def init(params: Params, targets: Sequence[str], rank: int, alpha: float, seed: int = 0) -> Lora:
    """Pairs for the weights whose paths match a target such as `language.*.q`; b is zero, so nothing changes at first.

    `params` may be abstract. Only matrices that multiply activations take part. a is uniform in ±1/sqrt(inputs),
    as PEFT's default. Raises SettingError for a target that matches no such matrix, or a rank below 1 or above
    that of every chosen weight.
    """
    quant.check_plain(params, "LoRA")
    if rank < 1:
        raise SettingError(f"lora-rank is {rank}, expected 1 or more")
    linear = linear_paths(params)
    weights = {path: leaf for path, leaf in tree.flatten(params).items() if path in linear}
    chosen = {path for target in targets for path in tree.matching(weights, target)}
    if rank > (most := max(min(weights[path].shape) for path in chosen)):
        raise SettingError(f"lora-rank is {rank}, expected {most} or less: the chosen weights have no higher rank")
    generator = torch.Generator().manual_seed(seed)

    def pair(weight: Tensor) -> Pair:
        outputs, inputs = weight.shape
        a = (torch.rand(rank, inputs, generator=generator) * 2 - 1) * inputs**-0.5
        device = "cpu" if weight.is_meta else weight.device
        return Pair(a.to(device), torch.zeros(outputs, rank, device=device))

    return Lora({path: pair(leaf) for path, leaf in weights.items() if path in chosen}, alpha / rank)


def merge(params: Params, lora: Lora) -> Params:
    """The parameters with every pair added to its weight, in float32 or wider, cast last."""
    return _added(params, lora.pairs, lora.scale)


def unmerge(params: Params, lora: Lora) -> Params:
    """The inverse of `merge`, up to rounding."""
    return _added(params, lora.pairs, -lora.scale)


def _added(params: Params, pairs: dict[str, Pair], scale: float) -> Params:
    quant.check_plain(params, "merging LoRA")
    leaves = tree.flatten(params)

    def added(leaf: Tensor, pair: Pair) -> Tensor:
        return (widen(leaf) + scale * (pair.b @ pair.a).to(leaf.device)).to(leaf.dtype)

    return tree.replace(params, {path: added(leaves[path], pair) for path, pair in pairs.items()})


def save(folder: str | Path, lora: Lora, cfg: Config, base: str) -> None:
    """Write PEFT's two files, which change at once.

    `base` names the model that the pairs belong to, a folder or a hub id as `load` takes. Raises NumericalError for a
    pair that is not finite.
    """
    folder, names = Path(folder), modules(cfg)
    base, _, revision = base.partition("@") if HUB_ID.fullmatch(base) and not Path(base).exists() else (base, "", "")
    arrays = {
        f"base_model.model.model.{names[path]}.lora_{part}.weight": array
        for path, pair in lora.pairs.items()
        for part, array in zip("AB", pair, strict=True)
    }
    rank = next(iter(lora.pairs.values())).a.shape[0]
    settings = {"peft_type": "LORA", "base_model_name_or_path": base,
                "revision": revision or None, "r": rank, "lora_alpha": lora.scale * rank,
                "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
                "target_modules": sorted(names[path] for path in lora.pairs)}  # fmt: skip
    tree.check_finite(lora.pairs, str(folder))
    with written(folder), changing(folder) as change:
        with change.new(WEIGHTS) as file:
            write_safetensors(file, arrays, {"format": "pt"})
        change.write(ADAPTER, as_json(settings))
        change.hide(ADAPTER)


def load(folder: str | Path, cfg: Config) -> Lora:
    """Read PEFT's two files onto the CPU, whichever version of transformers named the modules.

    Raises CheckpointError for keys that are not this model's, half a pair, a wrong shape, or more than plain LoRA.
    """
    folder = Path(folder)
    with reading(folder):
        rank, scale = read_settings(folder / ADAPTER)
        files = hf.open_file(folder / WEIGHTS)
    paths = {name: path for path, name in modules(cfg).items()}
    shapes = tree.flatten(paligemma.abstract(cfg))
    entries, expected = {}, {}
    for key, entry in files.items():
        name, part = module(key)
        if name not in paths:
            raise CheckpointError(f"{folder / WEIGHTS}: {key} is no linear weight of this model")
        path = paths[name]
        entries[f"{path} {part}"] = entry
        outputs, inputs = shapes[path].shape
        expected |= {f"{path} A": torch.empty(rank, inputs, device="meta")}
        expected |= {f"{path} B": torch.empty(outputs, rank, device="meta")}
    check(expected, entries, str(folder / WEIGHTS), "the adapter that adapter_config.json describes")
    chosen = [path for path in shapes if f"{path} A" in entries]
    return Lora({path: Pair(*(entries[f"{path} {part}"].read() for part in "AB")) for path in chosen}, scale)


def read_settings(path: Path) -> tuple[int, float]:
    """Rank and scale in an adapter_config.json, which must describe plain LoRA."""
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
        raise CheckpointError(f"{path}: {name} is {settings[name]!r}; only plain LoRA is read, merge it with PEFT")
    return rank, alpha / rank


def module(key: str) -> tuple[str, str]:
    """The module that an array of an adapter belongs to, as `modules` names it, and which half it is."""
    if not (found := KEY.fullmatch(key)):
        return key, ""
    name = found[1].removeprefix("model.")
    for old, new in RENAMED.items():
        name = new + name.removeprefix(old) if name.startswith(old) else name
    return name, found[2]


def modules(cfg: Config) -> dict[str, str]:
    """Path of a linear weight -> the name of its module in transformers, without the leading `model.`."""
    keys = hf.table(cfg, {"vision": "vision_tower.", "projector": "", "language": "language_model."})
    linear = linear_paths(paligemma.abstract(cfg))
    return {path: slot.key.removesuffix(".weight") for path, slot in tree.flatten(keys).items() if path in linear}


def linear_paths(params: Params) -> set[str]:
    """The paths of the matrices that multiply activations; tables that are looked up are none."""
    return {path for path, leaf in tree.flatten(params).items() if leaf.dim() == 2} - TABLES
