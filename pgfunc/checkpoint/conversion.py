"""Convert a checkpoint to the other format, another dtype or fewer bits, with the files that belong to it."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from pgfunc import quant, tree
from pgfunc.checkpoint import Source, bigvision, dtype_name, find, hf, load, siglip
from pgfunc.checkpoint import check as check_model
from pgfunc.checkpoint import put as put_model
from pgfunc.checkpoint.hf_config import CONFIG
from pgfunc.checkpoint.writing import written
from pgfunc.files import outputs
from pgfunc.files.atomic import Change, changing
from pgfunc.prompt import Model
from pgfunc.siglip_dual.prompt import SiglipModel

MASKS, SIGLIP = "masks.safetensors", "siglip"  # the mask decoder, and a dual encoder with the same vision encoder
BESIDE = ("tokenizer.model", "generation_config.json")  # what other programs read in a folder

TOKENS = "tokenizer.json|tokenizer_config.json|special_tokens_map.json|added_tokens.json"
OWN = (
    (re.compile("|".join(map(re.escape, (MASKS, *BESIDE))) + f"|{TOKENS}"), ""),
    (re.compile(f"{hf.WEIGHTS.pattern}|{CONFIG}|(pre)?processor_config.json|{TOKENS}"), SIGLIP),
)

SHARD = 5 * 10**9


class Converted(NamedTuple):
    """What was written."""

    path: Path
    format: str
    dtype: str
    bytes: int  # of the parameters


class Dual(NamedTuple):
    """A dual encoder, and whether its files have the vision encoder or leave it to those of the checkpoint."""

    model: SiglipModel
    vision: bool


def convert(
    source: Source,
    target: str | Path,
    dtype: str | torch.dtype | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    quantize: str | None = None,
    force: bool = False,
) -> Converted:
    """Write a checkpoint in the other format: big_vision when the target ends in `.npz`, else Hugging Face layout.

    A mask decoder (`masks.safetensors`) and a dual encoder (`siglip/`) in the source's folder come along, the latter
    into a folder only. A `.npz` holds weights alone: for the way back keep the source's json files, and give their
    folder as `config`. It cannot hold quantized ones; a folder can, so `quantize` (see `load`) is for those.
    Everything changes at once. Raises SettingError for a target that exists, without `force`, or that is the source.
    """
    target, found = Path(target), find(source)
    archive = target.suffix == ".npz"
    if not archive:
        outputs.check_folder(target)
    outputs.check_apart([target], [found, config, tokenizer])
    outputs.check_new(target, force)
    model = load(source, dtype, "cpu", config, tokenizer, quantize)
    if archive:
        write_archive(target, model, companion(found, MASKS), force)
    else:
        write_folder(target, model, found, dual_encoder(found, dtype))
    kind = "big_vision's npz" if archive else "Hugging Face layout"
    numbers = sorted({*quant.methods(model.params).values()}) or [dtype_name(model.params.projector)]
    return Converted(target, kind, ", ".join(numbers), tree.nbytes(model.params))


def write_archive(target: Path, model: Model, masks: Path | None, force: bool) -> None:
    """Write a `.npz`, and beside it the mask decoder, which replaces no other unless forced."""
    bigvision.check(target, model.params)
    beside = target.parent / MASKS
    if masks and beside.exists() and beside.read_bytes() == masks.read_bytes():
        masks = None  # it is there
    if masks:
        outputs.check_new(beside, force)
    with written(target), changing(target.parent) as change:
        copy(change, masks)
        with change.new(target.name) as file:
            bigvision.write(file, model.cfg, model.params)


def write_folder(target: Path, model: Model, source: Path | None, dual: Dual | None = None) -> None:
    """Write a folder in Hugging Face layout: a model, the files that belong to its source, and a dual encoder."""
    check_model(model, target)
    if dual:
        siglip.check(dual.model, target / SIGLIP)
    with written(target), changing(target) as change:
        for path in [companion(source, name) for name in (MASKS, *BESIDE)] if source else []:
            copy(change, path)
        for pattern, inner in OWN:  # of the model that was here
            change.supersede(pattern, inner)
        if dual:
            siglip.put(change, dual.model, dual.vision, SHARD, SIGLIP)
        put_model(change, model, SHARD)


def dual_encoder(source: Path, dtype: str | torch.dtype | None) -> Dual | None:
    """The dual encoder of a checkpoint; one without a vision encoder needs a folder, which has it."""
    folder = companion(source, SIGLIP)
    if folder is None or not (folder / CONFIG).exists():
        return None
    vision = any(siglip.is_tower(key) for key in hf.open_folder(folder))
    return Dual(siglip.load_siglip(folder, dtype, "cpu"), vision) if vision or source.is_dir() else None


def companion(source: Path, name: str) -> Path | None:
    """A file or folder that belongs to a checkpoint, if it has it: in its folder, or beside its `.npz`."""
    path = (source if source.is_dir() else source.parent) / name
    return path if path.exists() and (source.is_dir() or name not in BESIDE) else None


def copy(change: Change, path: Path | None) -> None:
    """Copy a file, if there is one, into a folder that changes."""
    if path is not None:
        with path.open("rb") as old, change.new(path.name) as new:
            shutil.copyfileobj(old, new)
