"""What `pgfunc bench` does: it checks what to measure, measures it, and prints a table."""

import json
import sys
from dataclasses import asdict
from statistics import median
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import pgfunc as pg
from pgfunc import bench as measuring
from pgfunc import paligemma
from pgfunc.bench import Case, Stage
from pgfunc.checkpoint import as_dtype
from pgfunc.cli.compiled import compiler_errors
from pgfunc.cli.devices import computing_device, enough_memory
from pgfunc.errors import SettingError
from pgfunc.sample import checked_int

MOST_THREADS = 1024  # PyTorch crashes if asked for a million threads

LABELS = {
    "load": "load, read once", "draw": "random weights", "vision": "vision", "prefill": "prefill, with vision",
    "decode": "decode, a token", "generate": "generate",
}  # fmt: skip


class Subject(NamedTuple):
    """The weights that are measured, before they are in memory."""

    model: str | None
    config: str | None
    dtype: str | None  # None: that of the checkpoint
    quantize: str | None
    random: bool  # random weights of a published size, in place of a checkpoint
    cfg: pg.Config
    precision: torch.dtype  # of the loaded weights


def bench(
    case: Case, model: str | None, config: str | None, dtype: str | None, quantize: str | None, device: str | None,
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure the stages of a case, and print their times beside their floors."""
    if threads is not None:
        checked_int("threads", threads, 1, MOST_THREADS)
    where = computing_device(device, "measure")
    subject = check(case, model, config, dtype, quantize, where)
    if threads is not None:
        torch.set_num_threads(threads)
    with (
        enough_memory("lower --batch or --slots, or give --dtype bfloat16"),
        compiler_errors("give --no-compile"),
        measuring.cold(),
    ):
        conditions, stages = measure(subject, case, where)
    if as_json:
        print(json.dumps(conditions | {"stages": [record(stage) for stage in stages]}))
    else:
        print_tables(conditions, stages)


def check(
    case: Case, model: str | None, config: str | None, dtype: str | None, quantize: str | None, device: torch.device
) -> Subject:
    """What to measure. Raises a PgfuncError for every mistake that can be found before anything is in memory."""
    random = config is not None and model is None
    if random:
        cfg, precision = published(str(config)), as_dtype(dtype) or torch.bfloat16
        weights = pg.tree.count(paligemma.abstract(cfg)) * precision.itemsize
    else:
        headers = pg.load(model, dtype, "meta", config, quantize=quantize)
        cfg, precision, weights = headers.cfg, headers.params.projector.dtype, 0
    case.check(cfg)
    case.check_memory(cfg, precision, device, weights)
    if random and quantize:
        pg.quant.quantize(paligemma.abstract(cfg), quantize)
    return Subject(model, config, dtype, quantize, random, cfg, precision)


def published(name: str) -> pg.Config:
    """The configuration with a published name. Raises SettingError for another name."""
    if name not in pg.PUBLISHED:
        raise SettingError(f"config {name} is not one of {', '.join(pg.PUBLISHED)}")
    return pg.PUBLISHED[name]


def load(subject: Subject, device: torch.device) -> pg.Model:
    """Load the checkpoint, or draw random weights."""
    if not subject.random:
        return pg.load(subject.model, subject.dtype, device, subject.config, quantize=subject.quantize)
    params = measuring.random_params(subject.cfg, subject.precision, device)
    params = pg.quant.quantize(params, subject.quantize) if subject.quantize else params
    return pg.Model(subject.cfg, params, None)


def measure(subject: Subject, case: Case, device: torch.device) -> tuple[dict[str, Any], list[Stage]]:
    """Measure the machine and then each stage. Returns the conditions, as JSON has them, and the stages."""
    machine = measuring.measure(device, subject.precision)
    name = f"{subject.config}, random weights" if subject.random else subject.model or "the shipped checkpoint"
    conditions = {
        "model": name, "dtype": pg.tree.dtype_name(subject.precision), "quantize": subject.quantize,
        "hardware": measuring.hardware(device), "device": str(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "image_tokens": subject.cfg.vision.tokens,
    } | asdict(case) | machine._asdict()  # fmt: skip
    conditions["slots"] = case.length(subject.cfg) + case.free_slots(subject.cfg)
    del conditions["stages"]  # the stages themselves follow
    repeat, label = (1, "draw") if subject.random else (case.repeat, "load")
    loaded, first = measuring.load_stage(lambda: load(subject, device), device, machine, repeat, label)
    rest = measuring.stages(loaded, case, machine)
    return conditions, [first, *tqdm(rest, desc="measuring", unit="stage", leave=False, disable=None)]


def record(stage: Stage) -> dict[str, Any]:
    """A stage for JSON. Seconds and bytes are per token if the stage is a decode step."""
    seconds = median(stage.seconds)
    return {
        "stage": stage.name, "compiled": stage.compiled, "seconds": seconds, "fastest": min(stage.seconds),
        "slowest": max(stage.seconds), "flops": stage.work.flops, "bytes": stage.work.nbytes,
        "bytes_per_second": stage.work.nbytes / seconds, "floor": stage.floor, "floor_over_time": stage.floor / seconds,
        "first_seconds": stage.first, "compilations": stage.compilations,
    }  # fmt: skip


def print_tables(conditions: dict[str, Any], stages: list[Stage]) -> None:
    """Print two lines about the conditions, and a table with a line per stage."""
    bandwidth = "read" if conditions["device"] == "cpu" else "copied, both ways counted"
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True, markup=False, highlight=False)
    weights = " in ".join(filter(None, (conditions["quantize"], conditions["dtype"])))
    console.print("{model}, {weights}, batch {batch}: a picture of {image_tokens} tokens, {prompt_tokens} of text, "
                  "{tokens} generated, {slots} cache slots".format(**conditions, weights=weights))  # fmt: skip
    console.print("{hardware}, torch {torch}, {threads} threads:".format(**conditions),
                  f"{conditions['bandwidth'] / 1e9:,.1f} GB/s {bandwidth}, "
                  f"{conditions['rate'] / 1e12:,.2f} TFLOP/s")  # fmt: skip
    console.print(table(stages))


def table(stages: list[Stage]) -> Table:
    """A table with a line per stage."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("stage", "ms", "fastest .. slowest", "GB/s", "floor, ms", "floor/time", "cold compile"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage in stages:
        row = record(stage)
        times = [f"{1e3 * row[name]:,.2f}" for name in ("seconds", "fastest", "slowest", "floor")]
        compiling = f"{row['compilations']} in {row['first_seconds']:.1f} s" if row["compilations"] else ""
        table.add_row(
            LABELS[stage.name] + (", compiled" if stage.compiled else ""), times[0], f"{times[1]} .. {times[2]}",
            f"{row['bytes_per_second'] / 1e9:,.1f}", times[3], f"{row['floor_over_time']:.2f}", compiling,
        )  # fmt: skip
    return table
