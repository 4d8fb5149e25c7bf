"""How checkpoints are written: safetensors, JSON, and a name by which weights and configuration know each other.

The name stands in config.json and in the metadata of the weights; `check_save` compares the two, so that weights with
the configuration of others (a copy that was interrupted) are no model. What others wrote has no name and passes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from pgfunc.errors import CheckpointError
from pgfunc.files.jsonfile import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIGURED = "pgfunc_config"  # the key of the name of a configuration

MOST_HEADER = 2**23  # bytes; that of the largest published checkpoint, in one file, has a fortieth of it
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
         torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}  # fmt: skip


@contextmanager
def written(path: Path) -> Iterator[None]:
    """A CheckpointError that names the file or folder, for an OSError of the block that writes it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def as_json(value: Mapping[str, Any]) -> str:
    """The text of a JSON file, indented; a ValueError for numbers that JSON has not."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_safetensors(file: IO[bytes], arrays: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write arrays as a safetensors file, one in memory at a time; the widest first, so that all are aligned.

    Source: huggingface/safetensors, README, "Format".
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    keys, begin = sorted(arrays, key=lambda key: (-arrays[key].element_size(), key)), 0
    for key in keys:
        array = arrays[key]
        end = begin + array.numel() * array.element_size()
        header[key] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for key in keys:
        file.write(as_bytes(arrays[key]))


def as_bytes(array: Tensor) -> memoryview:
    """The numbers of an array as they lie in memory, copied only from another device or another order."""
    return array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest_of(text: str) -> str:
    """A name that only this text has: what stands in a file and in those that belong to it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_arrays(arrays: Mapping[str, Tensor]) -> str:
    """A name that only these arrays have. 1.8 GB/s on a core of an AMD EPYC: 3 s for 3 billion bfloat16 numbers."""
    digest = hashlib.sha256()
    for key, array in arrays.items():
        digest.update(f"{key} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(as_bytes(array))
    return digest.hexdigest()[:16]


def check_save(folder: Path, config: str) -> None:
    """Raise CheckpointError where a folder's configuration and its weights are of different saves."""
    said = {config: read_json(folder / config).get(CONFIGURED)}
    files = [SINGLE]
    if not (folder / SINGLE).exists() and (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        said[INDEX] = dict_of(index.get("metadata")).get(CONFIGURED)
        files = [name for name in dict_of(index.get("weight_map")).values() if name == Path(str(name)).name]
    for name in dict.fromkeys(files):
        said[name] = metadata(folder / name).get(CONFIGURED)
    names = {file: name for file, name in said.items() if isinstance(name, str)}
    for file, name in names.items():
        if name != names[first := next(iter(names))]:
            raise CheckpointError(f"{folder}: an incomplete save or copy: {file} was not saved with this {first}; "
                                  "save or copy the whole folder again")  # fmt: skip


def metadata(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file; what cannot be read has none: who loads it says so."""
    try:
        if path.is_file():
            return dict_of(json.loads(header(path))).get("__metadata__") or {}
    except (OSError, ValueError, RecursionError):
        pass
    return {}


def header(path: Path) -> bytes:
    """The header of a safetensors file; a ValueError where it is larger than the file, or than any model's."""
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError("it is a pointer of Git LFS: git lfs pull")
        size = int.from_bytes(start, "little")
        if size > min(MOST_HEADER, path.stat().st_size):
            raise ValueError(f"its header has {size:,} bytes")
        return file.read(size)


def dict_of(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
