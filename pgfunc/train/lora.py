"""LoRA (Hu et al. 2021): a pair of thin matrices beside each chosen weight, whose product is added to the weight.

The pairs are a tree beside the parameters. Training changes only the pairs, by the gradient of loss(merge(params,
lora)). This module initializes and saves them; `checkpoint.lora` reads them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pgfunc import quant, tree
from pgfunc.checkpoint import ADAPTER, HUB_ID
from pgfunc.checkpoint.lora import WEIGHTS, Lora, Pair, linear_paths, modules
from pgfunc.checkpoint.lora import load as load
from pgfunc.checkpoint.lora import merge as merge
from pgfunc.checkpoint.writing import as_json, write_safetensors
from pgfunc.config import Config
from pgfunc.errors import CheckpointError, SettingError
from pgfunc.files.atomic import changing
from pgfunc.files.outputs import write_errors
from pgfunc.paligemma import Params


def init(params: Params, targets: Sequence[str], rank: int, alpha: float, seed: int = 0) -> Lora:
    """Pairs (a, b) for the weights whose paths match a target such as `language.*.q`.

    A pair adds b·a times alpha / rank to its weight. b starts at zero, so the weights do not change at first; a is
    uniform in ±1/sqrt(inputs), as PEFT's default. `params` may be abstract. Only matrices that multiply activations are
    adapted. Raises SettingError if a target matches no such matrix, or if the rank is below 1 or above the largest rank
    of the chosen matrices.
    """
    quant.check_plain(params, "LoRA")
    linear = linear_paths(params)
    weights = {path: leaf for path, leaf in tree.flatten(params).items() if path in linear}
    chosen = {path for target in targets for path in tree.matching(weights, target)}
    most = max((min(leaf.shape) for path, leaf in weights.items() if path in chosen), default=1)
    if not 1 <= rank <= most:
        raise SettingError(
            f"lora-rank is {rank}, expected 1 or more, and at most {most}, that of the matrices themselves"
        )
    generator = torch.Generator().manual_seed(seed)

    def pair(weight: Tensor) -> Pair:
        outputs, inputs = weight.shape
        a = (torch.rand(rank, inputs, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1) * inputs**-0.5
        device = "cpu" if weight.is_meta else weight.device
        return Pair(a.to(device), torch.zeros(outputs, rank, dtype=torch.float32, device=device))

    return Lora({path: pair(leaf) for path, leaf in weights.items() if path in chosen}, alpha / rank)


def unmerge(params: Params, lora: Lora) -> Params:
    """The inverse of `merge`, up to rounding."""
    return merge(params, lora._replace(scale=-lora.scale))


def save(folder: str | Path, lora: Lora, cfg: Config, base: str) -> None:
    """Write PEFT's two files, as one atomic change.

    `base` names the model that the pairs belong to: a folder or a hub id, as `load` takes. Raises NumericalError if a
    pair is not finite, CheckpointError if the files cannot be written.
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
    with write_errors(folder, CheckpointError), changing(folder) as change:
        with change.new(WEIGHTS) as file:
            write_safetensors(file, arrays, {"format": "pt"})
        change.write(ADAPTER, as_json(settings))
        change.hide(ADAPTER)
