"""Everything that reads bytes or text of strangers: the table that fuzzing goes by.

`attempt` states the law. What is read either gives a result that keeps the reader's own promises, which its function
here asserts, or a PgfuncError of one line that says where. `test_fuzz.py` adds bounds of time and memory; `fuzzing.py`
looks for inputs by coverage.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import small
from cases import text_model

import pgfunc as pg
from pgfunc import image, paligemma, siglip_dual, tokenizer
from pgfunc.checkpoint import ADAPTER, bigvision, hf, processor
from pgfunc.checkpoint.files import Entry
from pgfunc.checkpoint.hf_config import CONFIG
from pgfunc.cli import compiled
from pgfunc.errors import LONGEST, PgfuncError, PromptError
from pgfunc.objects import detect, segment, vqvae
from pgfunc.siglip_dual import prompt as dual_prompt
from pgfunc.train import data, fit, lora, run

HOSTILE = ("", "\n", "a en\n<loc0001> é<eos>", "\0▁☃🐈\u202e", "\ud800")


class Reader(NamedTuple):
    """What reads a file."""

    file: str  # its name
    read: Callable[[Path], object]  # an AssertionError where the result is not as promised
    seeds: tuple[bytes, ...]  # whole files, or what `pack` makes whole
    beside: Mapping[str, bytes] = {}  # the other files of the folder
    pack: Callable[[bytes], bytes] = bytes


def attempt(reader: Reader, given: bytes, folder: Path) -> str:
    """What is said of the bytes as that reader's file, "" where they are read; the other files lie there already."""
    path = folder / reader.file
    path.unlink(missing_ok=True)  # not written over: what was read of the last one may be mapped still
    path.write_bytes(reader.pack(given))
    try:
        reader.read(path)
    except PgfuncError as error:
        said = str(error)
        assert said.isprintable(), f"not one line: {said!r}"
        assert len(said) <= LONGEST, f"{len(said)} characters: {said}"
        assert str(folder) in said, f"does not say where: {said}"
        return said
    return ""


def lay(reader: Reader, folder: Path) -> None:
    """The folder in which a reader finds its file, without it."""
    for name, content in reader.beside.items():
        (folder / name).write_bytes(content)


# --- what reads them, and what it promises


def arrays(entries: Mapping[str, Entry]) -> None:
    """Arrays are what their headers say."""
    for entry in entries.values():
        array = entry.read()
        assert (tuple(array.shape), array.dtype) == (entry.shape, entry.dtype)


def whole(model: pg.Model) -> None:
    """The parameters are those that the configuration describes, and the configuration is one."""
    text, vision = model.cfg.text, model.cfg.vision
    found, expected = (pg.tree.flatten(each) for each in (model.params, paligemma.abstract(model.cfg)))
    assert {path: leaf.shape for path, leaf in found.items()} == {path: leaf.shape for path, leaf in expected.items()}
    assert all(isfinite(value) for part in (text, vision) for value in asdict(part).values() if type(value) is float)
    assert max(model.cfg.pad, model.cfg.eos, model.cfg.bos) < text.vocab
    assert min(text.theta, vision.theta, text.eps, vision.eps) > 0
    assert min(text.attention_softcap, text.final_softcap) >= 0


def tensors(path: Path) -> None:
    arrays(hf.open_file(path))


def npz(path: Path) -> None:
    arrays(bigvision.open_file(path))


def folder(path: Path) -> None:
    whole(pg.load(path.parent, device="cpu"))


def headers(path: Path) -> None:
    whole(pg.load(path.parent, device="meta"))


def npz_folder(path: Path) -> None:
    whole(pg.load(path, config=path.parent, device="cpu"))


def siglip(path: Path) -> None:
    model = pg.load_siglip(path.parent, device="cpu")
    found, expected = (pg.tree.flatten(each) for each in (model.params, siglip_dual.abstract(model.cfg)))
    assert {path: leaf.shape for path, leaf in found.items()} == {path: leaf.shape for path, leaf in expected.items()}
    assert min(model.cfg.text.eps, model.cfg.vision.eps) > 0


def published(path: Path) -> None:
    pg.load(path, config="paligemma-3b-224", device="meta")
    raise AssertionError("a small file is no published checkpoint")


def words(path: Path) -> None:
    """Any text is encoded or refused, and what was encoded is decoded."""
    loaded = tokenizer.load(path)
    for text in HOSTILE:
        try:
            ids = tokenizer.encode(loaded, text)
        except PromptError:
            continue
        tokenizer.decode(loaded, ids).encode()


def declared(path: Path) -> None:
    words(path.parent / "tokenizer.json")


def siglip_words(path: Path) -> None:
    loaded = dual_prompt.load_tokenizer(path)
    for text in HOSTILE:
        try:
            dual_prompt.encode(loaded, text)
        except PromptError:
            continue


def adapter(path: Path) -> None:
    found = lora.load(path.parent, small.CFG)
    assert isfinite(found.scale)
    lora.merge(small.MODEL.params, found)


def picture(path: Path) -> None:
    found = image.pixels(path, small.CFG)
    assert found.shape == (3, small.CFG.vision.image_size, small.CFG.vision.image_size)
    assert -1 <= found.min() <= found.max() <= 1


def places(path: Path) -> None:
    """Every word is in an object or in a piece that is named, and objects are written and read back as they were."""
    text = path.read_bytes().decode(errors="surrogateescape")
    pieces = detect.read(text)
    assert re.sub(r"[\s,]", "", "".join(piece.piece for piece in pieces)) == re.sub(r"[\s,;]", "", text)
    found = detect.parse(text, detect.STEPS, detect.STEPS)
    for _, box, _ in found:
        assert 0 <= box.ymin < box.ymax <= detect.STEPS + 1e-9
        assert 0 <= box.xmin < box.xmax <= detect.STEPS + 1e-9
    assert detect.parse(detect.render(found, detect.STEPS, detect.STEPS), detect.STEPS, detect.STEPS) == found
    assert len(found) == len(set(found)) <= len(pieces) - len(detect.malformed(text))


def codes(path: Path) -> None:
    text = path.read_bytes().decode(errors="surrogateescape")
    found = segment.parse(text, 9, 7, VQ)
    assert len(found) == len(detect.unique(segment.well_formed(text)))
    assert all(item.mask.shape == (7, 9) for item in found)


def examples(path: Path) -> None:
    found = data.read(path)
    assert all(row.where.startswith(str(path)) for row in found)
    data.check(TALKER, found)


def state(path: Path) -> None:
    found, expected = (pg.tree.flatten(each) for each in (run.resume(path, small.JOB), run.start(small.JOB)))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in found.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in expected.items()
    }


def log(path: Path) -> None:
    for entry in fit.read_log(path.parent):
        assert all(isinstance(({"valid": 0.0} | entry)[key], int | float) for key in ("step", "loss", "valid"))


def made_for(path: Path) -> None:
    compiled.check_made_for(path.parent, KIND)


TALKER = text_model()
VQ = vqvae.init()
KIND: dict[str, Any] = {"torch": "2.13.0", "hardware": "a CPU", "threads": 1}


def one_of(files: Mapping[str, bytes], name: str, read: Callable[[Path], object], *more: bytes) -> Reader:
    """A reader of one file of a folder, beside the others."""
    return Reader(name, read, (files[name], *more), {other: files[other] for other in files if other != name})


READERS: dict[str, Reader] = {
    "safetensors": Reader(hf.SINGLE, tensors, (small.SAFETENSORS,)),
    "safetensors-header": Reader(hf.SINGLE, tensors, (small.HEADER,), pack=small.with_header),
    "weights": one_of(small.HF, hf.SINGLE, folder),
    "index": one_of(small.SHARDS, hf.INDEX, folder),
    "npz": Reader(small.NPZ, npz, small.NPZS),
    "npy-header": Reader(small.NPZ, npz, small.NPY_HEADERS, pack=small.with_npy_header),
    "npz-weights": one_of(small.BIG_VISION, small.NPZ, npz_folder),
    "npz-published": Reader(small.NPZ, published, (small.npz(**{f"params/{bigvision.EMBED}": np.ones((2, 3), "f4")}),)),
    "config": one_of(small.HF, CONFIG, headers, small.QUANTIZED),
    "preprocessor": one_of(small.HF, processor.NAME, headers),
    "siglip-config": one_of(small.DUAL, CONFIG, siglip),
    "siglip-weights": one_of(small.DUAL, hf.SINGLE, siglip),
    "masks": Reader("masks.safetensors", segment.load, (small.MASKS,)),
    "tokenizer": Reader("tokenizer.json", words, small.VOCABULARIES),
    "siglip-tokenizer": Reader("tokenizer.json", siglip_words, small.VOCABULARIES),
    "tokenizer-config": one_of(small.DECLARED, "tokenizer_config.json", declared, *small.OLD_DECLARED),
    "added-tokens": one_of(small.DECLARED | small.ADDED, "added_tokens.json", declared),
    "adapter": one_of(small.ADAPTER, ADAPTER, adapter),
    "adapter-weights": one_of(small.ADAPTER, lora.WEIGHTS, adapter),
    "picture": Reader("picture", picture, small.PICTURES),
    "places": Reader("text", places, small.PLACES),
    "codes": Reader("text", codes, small.MASKED),
    "examples": one_of(small.EXAMPLES, "data.jsonl", examples),
    "run-state": Reader(fit.STATE, state, (small.STATE,)),
    "run-log": Reader(fit.LOG, log, (small.RUN_LOG,)),
    "made-for": Reader(compiled.MADE_FOR, made_for, (json.dumps(KIND).encode(),)),
}
