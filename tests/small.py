"""Small whole files of each kind that the package reads, and how they are taken apart and put together again."""

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

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")  # of pictures
NPZ = "model.npz"

# --- small whole files

LARGE = CONFIGS["gemma2"]
TEXT = TextConfig(vocab=12, padding=2, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, hidden=8, query_scale=0.5,
                  attention_softcap=2.0, final_softcap=3.0, window=5, post_norms=True)  # fmt: skip
CFG = replace(LARGE, vision=replace(LARGE.vision, width=8, layers=1, hidden=8, patch=4, image_size=8), text=TEXT,
              image=12)  # fmt: skip
SIGLIP = SiglipConfig(CFG.vision, SiglipTextConfig(vocab=20, width=8, layers=1, heads=2, hidden=8, out=8, positions=8))


def files(write: Callable[[Path], object]) -> dict[str, bytes]:
    """Name -> content of what is written into a folder."""
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
    """A safetensors file with this header."""
    return struct.pack("<Q", len(header)) + header + bytes(len(SAFETENSORS) - 8 - len(HEADER))


def with_npy_header(header: bytes) -> bytes:
    """A `.npz` of one array with this header."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("params/a.npy", b"\x93NUMPY\2\0" + struct.pack("<I", len(header)) + header + bytes(64))
    return file.getvalue()


def vocabularies(*words: str) -> tuple[bytes, ...]:
    """A `tokenizer.json` of each model, with parts of each kind."""
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
    """A small file of every kind that Pillow writes and reads, in every mode that it takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of formats that Pillow will drop
        Image.init()
        formats = sorted(Image.SAVE.keys() & Image.OPEN.keys())
        return tuple(found for format in formats for mode in MODES if (found := picture_file(format, mode, 16, 16)))


def picture_file(format: str, mode: str, width: int, height: int) -> bytes:
    """A picture's file; none where the format does not take the mode or the size."""
    file = io.BytesIO()
    try:
        Image.new(mode, (width, height)).save(file, format)
    except (OSError, ValueError, KeyError):
        return b""
    return file.getvalue()


def split(content: bytes) -> tuple[bytes, bytes]:
    """The header of a safetensors file, and its data."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end], content[end:]


def joined(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def members(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def zipped(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


# --- JSON in them

NUMBERS = (0, 1, -1, 7, 2**31, 2**63, 10**9, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"))
VALUES = (*NUMBERS, None, True, False, "", "a\nb", "\0", "\ud800", "../x", "x" * 5000, [], {}, [0], {"a": 0}, [[]])

Place = tuple[str | int, ...]


def within(value: Any, place: Place = ()) -> list[Place]:
    """Every place in a JSON value: the keys and indices that lead there."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, part in parts for found in within(part, (*place, key)))]


def replaced(value: Any, place: Place, new: Any) -> Any:
    """The JSON value with another in one place."""
    if not place:
        return new
    key, *rest = place
    parts = {**value} if isinstance(value, dict) else [*value]
    parts[key] = replaced(value[key], tuple(rest), new)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return parts


# --- the files

WORDS = ("<pad>", "<eos>", "<bos>", "<unk>", "\n", "a", "é", "▁", "<loc0001>", "<0x0A>", "##a", "</s>")
VOCABULARIES = vocabularies(*WORDS)
TOKEN = {"content": "<task>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}
DECLARED = {
    "tokenizer.json": VOCABULARIES[0],
    "tokenizer_config.json": json.dumps({"bos_token": "<bos>", "mask_token": TOKEN, "extra_special_tokens": ["<a>"],
                                         "added_tokens_decoder": {"12": TOKEN}}).encode(),
}  # fmt: skip
OLD_DECLARED = (json.dumps({"eos_token": "<eos>", "additional_special_tokens": ["<a>", TOKEN]}).encode(), b"{}")
ADDED = {"tokenizer_config.json": b"{}", "added_tokens.json": b'{"<task>": 12, "<a>": 13}'}
PICTURES = pictures()
NPZS = npz(a=np.ones((2, 3), "f4"), b=np.zeros(3, "V2")), npz(a=np.array([{}], object)), npz()
MASKS = save({"_vq_vae._embedding": torch.ones(128, 1)})
JOB = run.Job(MODEL, (), run.Settings(steps=2, freeze=("vision.*", "language.*")))
STATE = files(lambda folder: run.save(folder / fit.STATE, JOB, run.start(JOB)))[fit.STATE]
RUN_LOG = b'{"step": 1, "loss": 2.5, "norm": 1.0, "rate": 0.1}\n{"step": 2, "loss": 2}\n'
OBJECT, CODES = "<loc0102><loc0204><loc0511><loc0767>", "".join(f"<seg{code:03d}>" for code in range(7, 23))
PLACES = (f"{OBJECT} cat ; {OBJECT} bus".encode(), f"{OBJECT}{CODES} cat".encode(), b"a <loc0001> ; ;",
          "<loc9999>é☃\u2028;".encode())  # fmt: skip
MASKED = f"{OBJECT}{CODES} cat ; {OBJECT}<seg001> bus".encode(), f"{OBJECT}{CODES}<seg128>;".encode()
LINE = {"image": "a.png", "prefix": "caption en", "suffix": "a dog"}
LINES = json.dumps(LINE) + "\n\n" + json.dumps(LINE | {"image": ["a.png"]})
EXAMPLES = {"data.jsonl": LINES.encode()} | files(lambda folder: Image.new("RGB", (4, 4), "red").save(folder / "a.png"))
