"""Convert a checkpoint to another format, another dtype or fewer bits, with the files that belong to it."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from pgfunc import quant, tree
from pgfunc.checkpoint import (
    Source,
    bigvision,
    check_saveable,
    find,
    load,
    processor,
    shards,
    siglip,
    write_model,
)
from pgfunc.checkpoint.hf_config import CONFIG
from pgfunc.checkpoint.writing import check_params
from pgfunc.errors import CheckpointError
from pgfunc.files.atomic import Change, changing
from pgfunc.files.outputs import check_new, check_output, write_errors
from pgfunc.names import MASKS
from pgfunc.prompt import Model
from pgfunc.siglip_dual.prompt import SiglipModel

SIGLIP_FOLDER = "siglip"  # a dual encoder with the same vision encoder
FOLDER_ONLY = ("tokenizer.model", "generation_config.json")  # files that other programs read in a folder
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROCESSOR_FILES = (processor.PREPROCESSOR_CONFIG, processor.PROCESSOR_CONFIG)


def any_of(*names: str) -> str:
    """A regular expression that matches these names."""
    return "|".join(map(re.escape, names))


# patterns of files that a previous model left in the target, and their subfolder; they are removed
STALE = (
    (re.compile(any_of(MASKS, *FOLDER_ONLY, *TOKENIZER_FILES)), ""),
    (re.compile(f"{shards.WEIGHT_FILES.pattern}|{any_of(CONFIG, *PROCESSOR_FILES, *TOKENIZER_FILES)}"), SIGLIP_FOLDER),
)


class Converted(NamedTuple):
    """The result of a conversion."""

    path: Path
    format: str
    dtype: str  # or the methods of the quantized weights
    bytes: int  # of the parameters


class DualEncoder(NamedTuple):
    """A dual encoder; its files hold the vision encoder, or use that of the checkpoint in the parent folder."""

    model: SiglipModel
    with_vision: bool


def convert(
    source: Source,
    target: str | Path,
    dtype: str | torch.dtype | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    quantize: str | None = None,
    force: bool = False,
) -> Converted:
    """Write a checkpoint as a big_vision `.npz` if the target ends in `.npz`, else in Hugging Face layout.

    A mask decoder (`masks.safetensors`) in the source's folder is copied, and so is a dual encoder (`siglip/`) if the
    target is a folder. A `.npz` holds only weights: to convert it back, keep the source's json files and pass their
    folder as `config`. It cannot hold quantized weights, so `quantize` (see `load`) needs a folder as target.
    All files change at once. Raises SettingError for a target that exists, unless `force` is True, and for a target
    that is the source.
    """
    target, source_path = Path(target), find(source)
    to_npz = target.suffix == ".npz"
    check_output(target, [source_path, config, tokenizer], folder=not to_npz, force=force)
    model = load(source, dtype, "cpu", config, tokenizer, quantize)
    if to_npz:
        write_npz(target, model, companion(source_path, MASKS), force)
    else:
        write_folder(target, model, source_path, dual_encoder(source_path, dtype))
    layout = "big_vision's npz" if to_npz else "Hugging Face layout"
    numbers = sorted({*quant.methods(model.params).values()}) or [tree.dtype_name(model.params.projector)]
    return Converted(target, layout, ", ".join(numbers), tree.nbytes(model.params))


def write_npz(target: Path, model: Model, masks: Path | None, force: bool) -> None:
    """Write a `.npz` and, beside it, a copy of the mask decoder; another mask decoder is replaced only by force."""
    bigvision.check_saveable(target, model.params)
    copy_of_masks = target.parent / MASKS
    if masks and copy_of_masks.exists() and copy_of_masks.read_bytes() == masks.read_bytes():
        masks = None  # the copy is there already
    if masks:
        check_new(copy_of_masks, force)
    with write_errors(target, CheckpointError), changing(target.parent) as change:
        copy(change, masks)
        with change.new(target.name) as file:
            bigvision.write(file, model.cfg, model.params)


def write_folder(target: Path, model: Model, source: Path | None, dual: DualEncoder | None = None) -> None:
    """Write a folder in Hugging Face layout: a model, the files that belong to its source, and a dual encoder."""
    check_saveable(model, target)
    if dual:
        check_params(dual.model.params, target / SIGLIP_FOLDER)
    with write_errors(target, CheckpointError), changing(target) as change:
        for path in [companion(source, name) for name in (MASKS, *FOLDER_ONLY)] if source else []:
            copy(change, path)
        for pattern, subfolder in STALE:
            change.supersede(pattern, subfolder)
        if dual:
            siglip.write_model(change, dual.model, dual.with_vision, shards.SHARD_BYTES, SIGLIP_FOLDER)
        write_model(change, model, shards.SHARD_BYTES)


def dual_encoder(source: Path, dtype: str | torch.dtype | None) -> DualEncoder | None:
    """The dual encoder of a checkpoint, if it has one.

    None also for a `.npz` whose dual encoder has no vision encoder: only a checkpoint's folder can supply it.
    """
    folder = companion(source, SIGLIP_FOLDER)
    if folder is None or not (folder / CONFIG).exists():
        return None
    with_vision = any(siglip.in_encoder(key) for key in shards.open_folder(folder))
    if not with_vision and not source.is_dir():
        return None
    return DualEncoder(siglip.load_siglip(folder, dtype, "cpu"), with_vision)


def companion(source: Path, name: str) -> Path | None:
    """A file or folder that belongs to a checkpoint, if it exists: in the checkpoint's folder, or beside its `.npz`.

    The files of FOLDER_ONLY belong to folders; beside a `.npz` they are ignored.
    """
    path = (source if source.is_dir() else source.parent) / name
    return path if path.exists() and (source.is_dir() or name not in FOLDER_ONLY) else None


def copy(change: Change, path: Path | None) -> None:
    """Copy a file, if there is one, as part of a change of a folder."""
    if path is not None:
        with path.open("rb") as old, change.new(path.name) as new:
            shutil.copyfileobj(old, new)
