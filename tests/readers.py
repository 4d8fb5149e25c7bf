"""A table of every function that reads untrusted bytes or text, for fuzzing.

`attempt` states the law: a reader either returns a result that keeps its promises, which its function here asserts, or
raises a PgfuncError of one line that names the file. `test_fuzz.py` adds limits on time and memory; `fuzzing.py`
searches for inputs by coverage.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import small
from cases import text_model

import pgfunc as pg
from pgfunc import image, paligemma, siglip_dual, tokenizer
from pgfunc.checkpoint import ADAPTER, bigvision, hf, processor, shards
from pgfunc.checkpoint.hf_config import CONFIG
from pgfunc.checkpoint.tables import Entry
from pgfunc.cli import compiled
from pgfunc.errors import LONGEST, PgfuncError, PromptError
from pgfunc.objects import detect, segment, vqvae
from pgfunc.siglip_dual import prompt as dual_prompt
from pgfunc.train import data, fit, lora, run

HOSTILE = ("", "\n", "a en\n<loc0001> é<eos>", "\0▁☃🐈\u202e", "\ud800")


class Reader(NamedTuple):
    """A function that reads a file, and valid files to start from."""

    file: str  # the file's name
    read: Callable[[Path], object]  # raises an AssertionError if the result breaks a promise
    seeds: tuple[bytes, ...]  # valid files, or what `pack` makes a valid file of
    others: Mapping[str, bytes] = {}  # name -> content of the other files in the folder
    pack: Callable[[bytes], bytes] = bytes


def attempt(reader: Reader, content: bytes, folder: Path) -> str:
    """Write the bytes as the reader's file and read it; return the message that refuses them, or "".

    The folder must hold the reader's other files.
    """
    path = folder / reader.file
    path.unlink(missing_ok=True)  # not overwritten, because arrays of the previous file may still be mapped
    path.write_bytes(reader.pack(content))
    try:
        reader.read(path)
    except PgfuncError as error:
        message = str(error)
        assert message.isprintable(), f"not one line: {message!r}"
        assert len(message) <= LONGEST, f"{len(message)} characters: {message}"
        assert str(folder) in message, f"does not name the file: {message}"
        return message
    return ""


def write_others(reader: Reader, folder: Path) -> None:
    """Write the other files of a reader into a folder."""
    for name, content in reader.others.items():
        (folder / name).write_bytes(content)


# --- the readers and their promises


def check_arrays(entries: Mapping[str, Entry]) -> None:
    """Assert that arrays have the shapes and dtypes in their headers."""
    for entry in entries.values():
        array = entry.read()
        assert (tuple(array.shape), array.dtype) == (entry.shape, entry.dtype)


def shapes(params: Any) -> dict[str, Any]:
    return {path: leaf.shape for path, leaf in pg.tree.flatten(params).items()}


def check_model(model: pg.Model) -> None:
    """Assert that the parameters are those of the configuration, and that its values are valid."""
    text, vision = model.cfg.text, model.cfg.vision
    assert shapes(model.params) == shapes(paligemma.abstract(model.cfg))
    assert all(isfinite(value) for part in (text, vision) for value in asdict(part).values() if type(value) is float)
    assert max(model.cfg.pad, model.cfg.eos, model.cfg.bos) < text.vocab
    assert min(text.theta, vision.theta, text.eps, vision.eps) > 0
    assert min(text.attention_softcap, text.final_softcap) >= 0


def read_safetensors(path: Path) -> None:
    check_arrays(shards.open_file(path))


def read_npz(path: Path) -> None:
    check_arrays(bigvision.open_file(path))


def load_folder(path: Path) -> None:
    check_model(pg.load(path.parent, device="cpu"))


def load_headers(path: Path) -> None:
    check_model(pg.load(path.parent, device="meta"))


def load_npz(path: Path) -> None:
    check_model(pg.load(path, config=path.parent, device="cpu"))


def load_siglip(path: Path) -> None:
    model = pg.load_siglip(path.parent, device="cpu")
    assert shapes(model.params) == shapes(siglip_dual.abstract(model.cfg))
    assert min(model.cfg.text.eps, model.cfg.vision.eps) > 0


def load_published(path: Path) -> None:
    pg.load(path, config="paligemma-3b-224", device="meta")
    raise AssertionError("a small file is no published checkpoint")


def load_tokenizer(path: Path) -> None:
    """Any text is encoded or refused, and any ids that it was encoded to are decoded."""
    loaded = tokenizer.load(path)
    for text in HOSTILE:
        try:
            ids = tokenizer.encode(loaded, text)
        except PromptError:
            continue
        tokenizer.decode(loaded, ids).encode()


def load_declared_tokens(path: Path) -> None:
    load_tokenizer(path.parent / "tokenizer.json")


def load_siglip_tokenizer(path: Path) -> None:
    loaded = dual_prompt.load_tokenizer(path)
    for text in HOSTILE:
        try:
            dual_prompt.encode(loaded, text)
        except PromptError:
            continue


def load_adapter(path: Path) -> None:
    pairs = lora.load(path.parent, small.CFG)
    assert isfinite(pairs.scale)
    lora.merge(small.MODEL.params, pairs)


def read_picture(path: Path) -> None:
    pixels = image.pixels(path, small.CFG)
    assert pixels.shape == (3, small.CFG.vision.image_size, small.CFG.vision.image_size)
    assert -1 <= pixels.min() <= pixels.max() <= 1


def parse_boxes(path: Path) -> None:
    """Every word belongs to an object or a reported piece, and rendered objects parse to the same objects."""
    text = path.read_bytes().decode(errors="surrogateescape")
    pieces = detect.read(text)
    assert re.sub(r"[\s,]", "", "".join(piece.piece for piece in pieces)) == re.sub(r"[\s,;]", "", text)
    objects = detect.parse(text, detect.STEPS, detect.STEPS)
    for _, box, _ in objects:
        assert 0 <= box.ymin < box.ymax <= detect.STEPS + 1e-9
        assert 0 <= box.xmin < box.xmax <= detect.STEPS + 1e-9
    assert detect.parse(detect.render(objects, detect.STEPS, detect.STEPS), detect.STEPS, detect.STEPS) == objects
    assert len(objects) == len(set(objects)) <= len(pieces) - len(detect.malformed(text))


def parse_masks(path: Path) -> None:
    text = path.read_bytes().decode(errors="surrogateescape")
    segments = segment.parse(text, 9, 7, VQ)
    assert len(segments) == len(detect.unique(segment.well_formed(text)))
    assert all(item.mask.shape == (7, 9) for item in segments)


def read_examples(path: Path) -> None:
    rows = data.read(path)
    assert all(row.where.startswith(str(path)) for row in rows)
    data.check(TEXT_MODEL, rows)


def resume_run(path: Path) -> None:
    actual, expected = (pg.tree.flatten(each) for each in (run.resume(path, small.JOB), run.start(small.JOB)))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in actual.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in expected.items()
    }


def read_log(path: Path) -> None:
    for entry in fit.read_log(path.parent):
        assert all(isinstance(({"valid": 0.0} | entry)[key], int | float) for key in ("step", "loss", "valid"))


def check_compiled_code(path: Path) -> None:
    compiled.check_platform(path.parent, MADE_FOR)


TEXT_MODEL = text_model()
VQ = vqvae.init()
MADE_FOR: dict[str, Any] = {"torch": "2.13.0", "hardware": "a CPU", "threads": 1}


def one_of(files: Mapping[str, bytes], name: str, read: Callable[[Path], object], *other_seeds: bytes) -> Reader:
    """A reader of one file of a folder, with the others beside it."""
    return Reader(name, read, (files[name], *other_seeds), {other: files[other] for other in files if other != name})


READERS: dict[str, Reader] = {
    "safetensors": Reader(hf.SINGLE, read_safetensors, (small.SAFETENSORS,)),
    "safetensors-header": Reader(hf.SINGLE, read_safetensors, (small.HEADER,), pack=small.with_header),
    "weights": one_of(small.HF, hf.SINGLE, load_folder),
    "index": one_of(small.SHARDS, hf.INDEX, load_folder),
    "npz": Reader(small.NPZ, read_npz, small.NPZS),
    "npy-header": Reader(small.NPZ, read_npz, small.NPY_HEADERS, pack=small.with_npy_header),
    "npz-weights": one_of(small.BIG_VISION, small.NPZ, load_npz),
    "npz-published": Reader(small.NPZ, load_published, small.PUBLISHED_NPZS),
    "config": one_of(small.HF, CONFIG, load_headers, small.QUANTIZED),
    "preprocessor": one_of(small.HF, processor.PREPROCESSOR_CONFIG, load_headers),
    "siglip-config": one_of(small.DUAL, CONFIG, load_siglip),
    "siglip-weights": one_of(small.DUAL, hf.SINGLE, load_siglip),
    "masks": Reader("masks.safetensors", segment.load, (small.MASKS,)),
    "tokenizer": Reader("tokenizer.json", load_tokenizer, small.VOCABULARIES),
    "siglip-tokenizer": Reader("tokenizer.json", load_siglip_tokenizer, small.VOCABULARIES),
    "tokenizer-config": one_of(
        small.TOKENIZER_FILES, "tokenizer_config.json", load_declared_tokens, *small.OLD_TOKENIZER_CONFIGS
    ),
    "added-tokens": one_of(small.TOKENIZER_FILES | small.ADDED_TOKENS, "added_tokens.json", load_declared_tokens),
    "adapter": one_of(small.ADAPTER, ADAPTER, load_adapter),
    "adapter-weights": one_of(small.ADAPTER, lora.WEIGHTS, load_adapter),
    "picture": Reader("picture", read_picture, small.PICTURES),
    "boxes": Reader("text", parse_boxes, small.BOX_TEXTS),
    "mask-codes": Reader("text", parse_masks, small.MASK_TEXTS),
    "examples": one_of(small.EXAMPLES, "data.jsonl", read_examples),
    "run-state": Reader(fit.STATE, resume_run, (small.STATE,)),
    "run-log": Reader(fit.LOG, read_log, (small.RUN_LOG,)),
    "made-for": Reader(compiled.MADE_FOR, check_compiled_code, (json.dumps(MADE_FOR).encode(),)),
}
