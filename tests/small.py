"""Small valid files of every format that the package reads, and functions that take files apart and rebuild them."""

import io
import json
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CONFIGS
from cases import params as parameters
from PIL import Image
from safetensors.torch import save
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

import pgfunc as pg
from pgfunc import siglip_dual
from pgfunc.checkpoint import bigvision, hf
from pgfunc.checkpoint.hf_config import CONFIG
from pgfunc.config import SiglipConfig, SiglipTextConfig, TextConfig
from pgfunc.train import fit, lora, run

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")  # of images
NPZ = "model.npz"

# --- checkpoints

LARGE = CONFIGS["gemma2"]
TEXT = TextConfig(vocab=12, padding=2, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, hidden=8, query_scale=0.5,
                  attention_softcap=2.0, final_softcap=3.0, window=5, post_norms=True)  # fmt: skip
CFG = replace(LARGE, vision=replace(LARGE.vision, width=8, layers=1, hidden=8, patch=4, image_size=8), text=TEXT,
              image=12)  # fmt: skip
SIGLIP = SiglipConfig(CFG.vision, SiglipTextConfig(vocab=20, width=8, layers=1, heads=2, hidden=8, out=8, positions=8))


def files(write: Callable[[Path], object]) -> dict[str, bytes]:
    """Name -> content of the files that `write` writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


MODEL = pg.Model(CFG, parameters(CFG), None)
HF = files(lambda folder: pg.save(MODEL, folder))
QUANTIZED = json.dumps(
    json.loads(HF[CONFIG])
    | {
        "quantization_config": {
            "format": "pgfunc",
            "weights": {"language.layers.0.q": "int8", "language.layers.1.q": "fp8"},
        }
    }
).encode()
SHARDS = files(lambda folder: pg.save(MODEL, folder, shard_bytes=4000))
BIG_VISION = files(lambda folder: bigvision.save(folder / NPZ, CFG, MODEL.params)) | {
    name: content for name, content in HF.items() if name != hf.SINGLE
}
DUAL = files(lambda folder: pg.save_siglip(pg.SiglipModel(SIGLIP, siglip_dual.init(SIGLIP, 0), None), folder))
PAIRS = lora.init(MODEL.params, ["language.*.q", "projector"], 2, 4.0)
ADAPTER = files(lambda folder: lora.save(folder, PAIRS, CFG, "base"))

ARRAYS = {"a": torch.ones(2, 3), "é": torch.zeros(3, dtype=torch.bfloat16), "": torch.zeros((), dtype=torch.int8)}
SAFETENSORS = save(ARRAYS, metadata={"format": "pt"})
HEADER = SAFETENSORS[8 : 8 + struct.unpack("<Q", SAFETENSORS[:8])[0]]
NPY_HEADERS = tuple(
    str({"descr": descr, "fortran_order": order, "shape": shape}).encode()
    for descr, order, shape in (("<f4", False, (3, 4)), ("|V2", True, (2, 3)), ("<f8", False, ()), ("<f2", True, (8,)))
)


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def with_header(header: bytes) -> bytes:
    """A safetensors file with this header, and zeros as data."""
    return struct.pack("<Q", len(header)) + header + bytes(len(SAFETENSORS) - 8 - len(HEADER))


def with_npy_header(header: bytes) -> bytes:
    """A `.npz` with one array that has this header."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("params/a.npy", b"\x93NUMPY\2\0" + struct.pack("<I", len(header)) + header + bytes(64))
    return file.getvalue()


def vocabularies(*words: str) -> tuple[bytes, ...]:
    """One `tokenizer.json` for each type of tokenizer model, with different normalizers and decoders."""
    ids = {word: id for id, word in enumerate(words)}
    bpe = Backend(models.BPE(ids, [], byte_fallback=True, unk_token="<unk>"))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.add_special_tokens([word for word in words if word.startswith("<")])
    level = Backend(models.WordLevel(ids, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.Split("a", "isolated")
    pieces = Backend(models.WordPiece(ids, unk_token="<unk>"))
    pieces.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pieces.decoder = decoders.WordPiece()
    unigram = Backend(models.Unigram([(word, -float(id)) for word, id in ids.items()], unk_id=3))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace("▁", "never"), decoders.Metaspace()
    return tuple(backend.to_str().encode() for backend in (bpe, level, pieces, unigram))


def pictures() -> tuple[bytes, ...]:
    """A small file in every image format that Pillow writes and reads, in every mode that the format supports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # for formats that Pillow will drop
        Image.init()
        formats = sorted(Image.SAVE.keys() & Image.OPEN.keys())
        return tuple(file for format in formats for mode in MODES if (file := picture_file(format, mode, 16, 16)))


def picture_file(format: str, mode: str, width: int, height: int) -> bytes:
    """An image file; empty if the format does not support the mode or the size."""
    file = io.BytesIO()
    try:
        Image.new(mode, (width, height)).save(file, format)
    except (OSError, ValueError, KeyError):
        return b""
    return file.getvalue()


def split(content: bytes) -> tuple[bytes, bytes]:
    """The header and the data of a safetensors file."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end], content[end:]


def joined(header: bytes, data: bytes) -> bytes:
    """The inverse of `split`."""
    return struct.pack("<Q", len(header)) + header + data


def members(content: bytes) -> list[tuple[str, bytes]]:
    """Name and content of every member of a zip file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def zipped(members: list[tuple[str, bytes]]) -> bytes:
    """The inverse of `members`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


# --- JSON values

NUMBERS = (0, 1, -1, 7, 2**31, 2**63, 10**9, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"))
VALUES = (*NUMBERS, None, True, False, "", "a\nb", "\0", "\ud800", "../x", "x" * 5000, [], {}, [0], {"a": 0}, [[]])

JsonPath = tuple[str | int, ...]  # the keys and indices that lead to a value inside a JSON value


def json_paths(value: Any, path: JsonPath = ()) -> list[JsonPath]:
    """The paths of all values inside a JSON value, and of itself."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, part in parts for inner in json_paths(part, (*path, key)))]


def replaced(value: Any, path: JsonPath, new: Any) -> Any:
    """The JSON value with the value at one path replaced."""
    if not path:
        return new
    key, *rest = path
    parts = {**value} if isinstance(value, dict) else [*value]
    parts[key] = replaced(value[key], tuple(rest), new)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return parts


# --- tokenizers, images, text and training files

WORDS = ("<pad>", "<eos>", "<bos>", "<unk>", "\n", "a", "é", "▁", "<loc0001>", "<0x0A>", "##a", "</s>")
VOCABULARIES = vocabularies(*WORDS)
TOKEN = {"content": "<task>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}
TOKENIZER_FILES = {
    "tokenizer.json": VOCABULARIES[0],
    "tokenizer_config.json": json.dumps({"bos_token": "<bos>", "mask_token": TOKEN, "extra_special_tokens": ["<a>"],
                                         "added_tokens_decoder": {"12": TOKEN}}).encode(),
}  # fmt: skip
OLD_TOKENIZER_CONFIGS = (
    json.dumps({"eos_token": "<eos>", "additional_special_tokens": ["<a>", TOKEN]}).encode(),
    b"{}",
)
ADDED_TOKENS = {"tokenizer_config.json": b"{}", "added_tokens.json": b'{"<task>": 12, "<a>": 13}'}
PICTURES = pictures()
PUBLISHED_NPZS = (npz(**{f"params/{bigvision.EMBED}": np.ones((2, 3), "f4")}),)
NPZS = npz(a=np.ones((2, 3), "f4"), b=np.zeros(3, "V2")), npz(a=np.array([{}], object)), npz()
MASKS = save({"_vq_vae._embedding": torch.ones(128, 1)})
JOB = run.Job(MODEL, (), run.Settings(steps=2, freeze=("vision.*", "language.*")))
STATE = files(lambda folder: run.save(folder / fit.STATE, JOB, run.start(JOB)))[fit.STATE]
RUN_LOG = b'{"step": 1, "loss": 2.5, "norm": 1.0, "rate": 0.1}\n{"step": 2, "loss": 2}\n'
BOX, CODES = "<loc0102><loc0204><loc0511><loc0767>", "".join(f"<seg{code:03d}>" for code in range(7, 23))
BOX_TEXTS = (f"{BOX} cat ; {BOX} bus".encode(), f"{BOX}{CODES} cat".encode(), b"a <loc0001> ; ;",
             "<loc9999>é☃\u2028;".encode())  # fmt: skip
MASK_TEXTS = f"{BOX}{CODES} cat ; {BOX}<seg001> bus".encode(), f"{BOX}{CODES}<seg128>;".encode()
EXAMPLE = {"image": "a.png", "prefix": "caption en", "suffix": "a dog"}
JSON_LINES = json.dumps(EXAMPLE) + "\n\n" + json.dumps(EXAMPLE | {"image": ["a.png"]})
EXAMPLES = {"data.jsonl": JSON_LINES.encode(), "a.png": picture_file("PNG", "RGB", 4, 4)}
