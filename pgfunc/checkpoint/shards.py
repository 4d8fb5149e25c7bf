"""The safetensors of a folder in Hugging Face layout: one file, or shards with an index.

Weights are memory-mapped. This module does not know which arrays a model has.
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

from pgfunc import tree
from pgfunc.checkpoint import keys
from pgfunc.checkpoint.hf_config import CONFIG
from pgfunc.checkpoint.tables import IGNORED_DTYPE, Entry
from pgfunc.checkpoint.writing import (
    DIGEST,
    DTYPE_NAMES,
    INDEX,
    NO_WEIGHTS,
    SINGLE,
    as_json,
    digest_of,
    digest_of_arrays,
    read_header,
    write_safetensors,
)
from pgfunc.errors import CheckpointError, first_line
from pgfunc.files.atomic import Change
from pgfunc.files.jsonfile import check_regular_file, read_json

SHARD_BYTES = 5 * 10**9  # the default size of a shard
WEIGHT_FILES = re.compile(r"model(-[0-9a-f]{16})?(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items() if dtype != torch.int64}  # that parameters may have


def open_folder(folder: Path) -> dict[str, Entry]:
    """Every array in a folder's safetensors, by name without wrappers' prefixes; only headers are read."""
    if (folder / SINGLE).exists():  # preferred to an index, as in transformers, which may leave an old index behind
        return keys.unwrapped(open_file(folder / SINGLE), str(folder))
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder}: {NO_WEIGHTS}")
    return keys.unwrapped(_open_shards(folder), str(folder))


def _open_shards(folder: Path) -> dict[str, Entry]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map does not map keys to file names; download it again")
    entries, present = {}, {path.name for path in folder.iterdir()}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{folder / INDEX}: {name} lies outside the folder; expected a plain file name")
        if name not in present:  # `exists` would raise for a name of a thousand characters
            raise CheckpointError(f"{folder / name}: missing, though {INDEX} names it; download it again")
        shard = open_file(folder / name)
        if absent := sorted({key for key, file in weight_map.items() if file == name} - shard.keys()):
            raise CheckpointError(f"{folder / name}: {absent[0]} is missing, though {INDEX} lists it there")
        entries |= {key: entry for key, entry in shard.items() if weight_map.get(key, name) == name}
    return entries


def open_file(path: Path) -> dict[str, Entry]:
    """Every array of one safetensors file; only its header is read, and reading an array maps it from the file."""
    check_regular_file(path)
    try:
        read_header(path)
        file = safe_open(path, framework="pt")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}); download it again") from error
    for key, piece in slices.items():
        if piece.get_dtype() not in DTYPES and not keys.UNUSED.fullmatch(key):
            raise CheckpointError(f"{path}: {key}: dtype {piece.get_dtype()} is not one of {', '.join(DTYPES)}")
    dtypes = {key: DTYPES.get(piece.get_dtype(), IGNORED_DTYPE) for key, piece in slices.items()}
    return {
        key: Entry(tuple(piece.get_shape()), dtypes[key], partial(_read, file, path, key))
        for key, piece in slices.items()
    }


def _read(file: Any, path: Path, key: str) -> Tensor:
    try:
        return file.get_tensor(key)
    # the header of an empty array may state a shape too large for a tensor
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: {key} cannot be read ({first_line(error)}); download it again") from error


def copied(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries with arrays that are copied when they are read, so that nothing stays mapped from the files."""
    return {key: replace(entry, read=lambda entry=entry: entry.read().clone()) for key, entry in entries.items()}


def write(
    change: Change, arrays: Mapping[str, Tensor], config: Mapping[str, Any], shard_bytes: int, subfolder: str = ""
) -> None:
    """Write arrays as safetensors of at most `shard_bytes` each, and `config.json`; older weight files are removed.

    Several files get an index. All files carry the digest of the configuration. The names of shards contain a digest
    of the weights, so that no shard replaces one that an older index names.
    """
    digest = {DIGEST: digest_of(as_json(config))}
    sharded = len(arrays) > 1 and tree.nbytes(dict(arrays)) > shard_bytes
    pattern = f"model-{digest_of_arrays(arrays)}{{suffix}}.safetensors" if sharded else SINGLE
    shards = split_state_dict_into_shards_factory(
        dict(arrays), get_storage_size=tree.nbytes, filename_pattern=pattern, max_shard_size=shard_bytes
    )
    for name, keys_in_shard in shards.filename_to_tensors.items():
        with change.new(str(Path(subfolder, name))) as file:
            write_safetensors(file, {key: arrays[key] for key in keys_in_shard}, {"format": "pt"} | digest)
    if shards.is_sharded:
        index = {"metadata": shards.metadata | digest, "weight_map": shards.tensor_to_filename}
        change.write(str(Path(subfolder, INDEX)), as_json(index))
    change.supersede(WEIGHT_FILES, subfolder)
    change.write(str(Path(subfolder, CONFIG)), as_json({**config, **digest}))
    change.hide(str(Path(subfolder, CONFIG)))  # without it, no program loads the folder while its files change
