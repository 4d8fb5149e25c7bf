"""Stop each writer at its k-th change of a file, and print what is wrong afterwards. `test_killed` runs this script.

It forks from a process that has loaded everything and has one thread. Changes are counted inside Python: an audit hook
sees files opened, renamed, removed and created, and files count their own writes. If a writer is stopped in a write,
half of the data is written.
"""

import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from errno import ENOSPC
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cases import text_model
from PIL import Image

import pgfunc as pg
from pgfunc import siglip_dual, tree
from pgfunc.checkpoint.conversion import MASKS
from pgfunc.checkpoint.writing import digest_of_arrays
from pgfunc.cli import comparing, drawings
from pgfunc.config import SiglipConfig, SiglipTextConfig
from pgfunc.errors import PgfuncError
from pgfunc.objects import vqvae
from pgfunc.train import fit, lora, run
from pgfunc.train.data import Example

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FAULTS = ("SIGKILL", "SIGINT", "SIGTERM", "ENOSPC")


class Writer(NamedTuple):
    """A way to change a folder: functions that create its old state, change it, and read its content."""

    prepare: Callable[[Path], object]
    write: Callable[[Path], object]
    read: Callable[[Path], Any]


class Counter:
    """Stops a writer at its `at`-th change of a file in a folder."""

    def __init__(self, folder: Path, at: int, fault: str) -> None:
        self.folder, self.at, self.fault, self.count = str(folder), at, fault, 0

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if (writes or event in CHANGES) and str(arguments[0]).startswith(self.folder):
            self.change(event != "os.remove", event in ("open", "os.mkdir"))

    def change(self, may_fail: bool = True, needs_space: bool = True) -> None:
        self.count += 1
        if self.count == self.at and self.fault != "ENOSPC":
            os.kill(os.getpid(), getattr(signal, self.fault))
        if self.fault == "ENOSPC" and ((self.count == self.at and may_fail) or (self.count > self.at and needs_space)):
            raise OSError(ENOSPC, os.strerror(ENOSPC))

    def opened(self, file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        """`io.open`, with a count of the writes."""
        if set(mode) & set("wa+"):
            raw = Counted(self, file, mode.replace("b", "").replace("t", ""))
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8", write_through=True)
        return OPEN(file, mode, *rest, **more)


class Counted(io.FileIO):
    """A file whose writes count. If the writer is stopped in a write, half of the data is written."""

    def __init__(self, counter: Counter, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self.counter = counter

    def write(self, data: Any, /) -> int:
        counter, half = self.counter, len(data) // 2
        if counter.count + 1 == counter.at and half and counter.fault != "SIGINT":  # SIGINT comes between two writes
            super().write(memoryview(data)[:half])
            if counter.fault == "ENOSPC":  # the second half is written again, and the disk is full
                counter.at += 1
                counter.count += 1
                return half
        counter.change()
        return super().write(data)


OPEN = io.open


def run_stopped(writer: Writer, folder: Path, at: int, fault: str) -> tuple[int, int, str]:
    """Run a writer in a child process, stopped at change `at`; 0 never stops it.

    Returns its exit status, the number of its changes, and what it raised.
    """
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        counter, message = Counter(folder, at, fault), ""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.addaudithook(counter.hook)
        io.open = counter.opened
        os.fdopen = lambda file, mode, *rest: counter.opened(file, mode)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            writer.write(folder)
        except BaseException as error:
            message = f"{'one line' if isinstance(error, PgfuncError) else type(error).__name__}: {error}"
        os.write(send, json.dumps([counter.count, message]).encode())
        os._exit(0)
    os.close(send)
    _, status = os.waitpid(child, 0)
    with os.fdopen(receive, "rb") as file:
        text = file.read()
    count, message = json.loads(text) if text else (0, "")
    return status, count, message


def check_writer(name: str, writer: Writer, points: int) -> Iterator[str]:
    """A line for everything that is wrong after a writer was stopped."""
    with tempfile.TemporaryDirectory() as folder:
        before, after, work = (Path(folder) / part for part in ("before", "after", "work"))
        before.mkdir()
        writer.prepare(before)
        shutil.copytree(before, after)
        _, count, message = run_stopped(writer, after, 0, "")
        old, new = writer.read(before), writer.read(after)
        assert not message, (name, message)
        assert old != new, name
        for number, fault in enumerate(FAULTS):  # each fault at other changes
            for at in sorted({1 + int((i + number / len(FAULTS)) * count / points) for i in range(points)}):
                shutil.copytree(before, work)
                for problem in check_stopped_writer(writer, work, at, fault, old, new):
                    yield f"{name}, {fault} at change {at} of {count}: {problem}"
                shutil.rmtree(work)


def check_stopped_writer(writer: Writer, folder: Path, at: int, fault: str, old: Any, new: Any) -> Iterator[str]:
    """A line for everything that is wrong with the folder that one stopped writer left."""
    status, _, message = run_stopped(writer, folder, at, fault)
    if fault == "ENOSPC" and (status or "\n" in message or (message and not message.startswith("one line"))):
        yield f"status {status}, raised {message!r}"
    if fault in ("ENOSPC", "SIGINT") and not (folder / ".pgfunc-journal").exists() and hidden(folder):
        yield f"left {hidden(folder)}"
    try:
        content = writer.read(folder)
    except PgfuncError as error:
        content = new
        if "incomplete save" not in str(error):
            yield f"cannot be read: {error}"
    if content not in (old, new):
        yield "is neither the old nor the new"
    writer.write(folder)
    if writer.read(folder) != new:
        yield "cannot be written again"
    if hidden(folder):
        yield f"then left {hidden(folder)}"


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


# --- the writers

VISION = text_model().cfg.vision
DUAL = SiglipConfig(VISION, SiglipTextConfig(vocab=20, width=8, layers=1, heads=2, hidden=8, out=VISION.width,
                                             positions=8))  # fmt: skip
MODELS = text_model(1), text_model(2)._replace(cfg=replace(text_model().cfg, resample="bilinear"))
DUALS = [pg.SiglipModel(DUAL, siglip_dual.init(DUAL, seed), None) for seed in (1, 2)]
PAIRS = [lora.init(MODELS[0].params, ["language.*.q"], 2, alpha, seed) for seed, alpha in ((1, 2.0), (2, 4.0))]
VQ = [vqvae.init(seed) for seed in (1, 2)]
SOURCES = [Path(tempfile.mkdtemp()) for _ in MODELS]
for source, model, encoder in zip(SOURCES, MODELS, DUALS, strict=True):
    pg.save(model, source)
    pg.save_siglip(encoder, source / "siglip", vision=False)
    (source / MASKS).write_text(str(source))  # it is copied unchanged

Image.new("RGB", (28, 28), "red").save(SOURCES[0] / "a.png")
EXAMPLES = [Example(f"line {i}", (SOURCES[0] / "a.png",), "caption en", word) for i, word in enumerate("ab")]
JOB = run.Job(MODELS[0], EXAMPLES, run.Settings(steps=2, batch_size=1, lora_rank=1, lora_alpha=1.0,
                                                lora_targets=("projector",)))  # fmt: skip
STATE = run.start(JOB)


def digest(params: Any) -> str:
    """A digest of parameters."""
    return digest_of_arrays(tree.flatten(params))


def loaded(folder: Path, **more: Any) -> tuple[Any, ...]:
    model = pg.load(folder, device="cpu", **more)
    return model.cfg, digest(model.params), model.tokenizer is not None


def both(folder: Path) -> tuple[Any, ...]:
    return (*loaded(folder), digest(pg.load_siglip(folder / "siglip", device="cpu").params),
            (folder / MASKS).read_text())  # fmt: skip


def archived(folder: Path) -> tuple[Any, ...]:
    return (*loaded(folder / "m.npz", config=SOURCES[0]), (folder / MASKS).read_text())


def trained(folder: Path) -> str:
    """A digest of the pairs, if the run is done; otherwise its state, if there is one, must be readable."""
    if (folder / fit.STATE).exists():
        run.resume(folder / fit.STATE, JOB)
        return "not done"
    return digest(lora.load(folder, JOB.model.cfg).pairs) if (folder / lora.ADAPTER).exists() else "not done"


def train(folder: Path) -> None:
    if trained(folder) == "not done":
        fit.fit(JOB, folder, fit.begin(JOB, folder), (), 1)


def saving(*shard_bytes: int) -> Writer:
    """Save a model over another one."""
    first, second = (partial(pg.save, model, shard_bytes=size) for model, size in zip(MODELS, shard_bytes, strict=True))
    return Writer(first, second, loaded)


def replacing(name: str, write: Callable[[Path, Any], object], values: Sequence[Any]) -> Writer:
    """Write a file over another one."""
    first, second = (lambda folder, value=value: write(folder / name, value) for value in values)
    return Writer(first, second, lambda folder: (folder / name).read_bytes())


PICTURES = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
WRITERS = {
    "save": saving(10**9, 10**9),
    "save shards over one file": saving(10**9, 30_000),
    "save one file over shards": saving(30_000, 10**9),
    "save shards over shards": saving(30_000, 20_000),
    "convert to a folder": Writer(partial(pg.convert, SOURCES[0]), partial(pg.convert, SOURCES[1], force=True), both),
    "convert to npz": Writer(
        lambda folder: pg.convert(SOURCES[0], folder / "m.npz"),
        lambda folder: pg.convert(SOURCES[1], folder / "m.npz", force=True),
        archived,
    ),
    "save_siglip": Writer(
        partial(pg.save_siglip, DUALS[0]), partial(pg.save_siglip, DUALS[1], shard_bytes=20_000),
        lambda folder: digest(pg.load_siglip(folder, device="cpu").params),
    ),
    "vqvae.save": replacing(MASKS, pg.segment.save, VQ),
    "lora.save": Writer(
        *(partial(lora.save, lora=pairs, cfg=MODELS[0].cfg, base="base") for pairs in PAIRS),
        lambda folder: (digest((content := lora.load(folder, MODELS[0].cfg)).pairs), content.scale),
    ),
    "run.save": replacing("run.safetensors", lambda path, state: run.save(path, JOB, state),
                          [STATE, tree.map(lambda leaf: leaf + 1, STATE)]),
    "train": Writer(lambda folder: None, train, trained),
    "detect --out": replacing("a.png", lambda path, picture: drawings.write_picture(picture, path), PICTURES),
    "detect --coco": replacing("a.json", drawings.write_text, ["{}", '{"images": []}']),
    "embed --out": replacing("a.npy", comparing.write_array, [np.zeros((2, 8)), np.ones((3, 8))]),
}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    problems = [line for name, writer in WRITERS.items() for line in check_writer(name, writer, int(sys.argv[1]))]
    for folder in SOURCES:
        shutil.rmtree(folder)
    print("\n".join(problems))
