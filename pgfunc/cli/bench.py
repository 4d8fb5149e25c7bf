"""The command that measures: bench."""

import json
import sys
from dataclasses import asdict
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import pgfunc as pg
from pgfunc import bench as measuring
from pgfunc import paligemma
from pgfunc.bench import STAGES, Case, Stage
from pgfunc.checkpoint import as_device, as_dtype
from pgfunc.cli import options
from pgfunc.cli.compiled import compiles
from pgfunc.cli.options import app, enough_memory, unset
from pgfunc.errors import DeviceError, SettingError
from pgfunc.sample import whole

Name = Annotated[str | None, unset("--config", help="A published name: random weights. Or, for a .npz, its config.")]
Dtype = Annotated[str | None, unset("--dtype", help="Of the weights; else the files' own, bfloat16 if random.")]

MOST_THREADS = 1024  # a million end the process

LABELS = {
    "load": "load, read once", "draw": "random weights", "vision": "vision", "prefill": "prefill, with vision",
    "decode": "decode, a token", "generate": "generate",
}  # fmt: skip


@app.command()
def bench(
    model: options.Named = None,
    config: Name = None,
    batch: Annotated[int, typer.Option("--batch", help="Rows.")] = 1,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Text tokens a row, beside a picture's.")] = 16,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to generate.")] = 128,
    slots: Annotated[int | None, unset("--slots", help="Of the cache, for decode; else as many as get filled.")] = None,
    repeat: Annotated[int, typer.Option("--repeat", help="Runs of each stage, after one that warms up.")] = 5,
    stage: Annotated[
        list[str] | None, unset("--stage", help="Measure this one, and others so named; else all.")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Decode and generate compiled too, prefill on a GPU.")
    ] = True,
    threads: Annotated[int | None, unset("--threads", help="Of the CPU; else PyTorch's choice.")] = None,
    device: options.Device = None,
    dtype: Dtype = None,
    quantize: options.Quantize = None,
    as_json: options.Json = False,
) -> None:
    """Measure load, vision, prefill, decode and generate, beside their floors on this machine.

    A floor is the time that a stage's bytes need at the memory's bandwidth, or its FLOPs at the rate of a large matrix
    product, both measured first. Times are medians. The checkpoint is the shipped one without --model and --config.
    """
    case = Case(batch, prompt_tokens, tokens, slots, repeat, compile, tuple(stage or STAGES))
    if threads is not None:
        whole("threads", threads, 1, MOST_THREADS)
    where = as_device(device)
    if where.type == "meta":
        raise DeviceError("device meta has shapes but no arithmetic, so there is nothing to measure; name another")
    drawn = config is not None and model is None
    headers = None if drawn else pg.load(model, dtype, "meta", config, quantize=quantize)
    cfg = headers.cfg if headers else published(str(config))
    kind = headers.params.projector.dtype if headers else as_dtype(dtype) or torch.bfloat16
    case.check(cfg)
    case.check_memory(cfg, kind, where, 0 if headers else pg.tree.count(paligemma.abstract(cfg)) * kind.itemsize)
    if drawn and quantize:
        pg.quant.quantize(paligemma.abstract(cfg), quantize)  # a mistake is known before anything is measured
    if threads is not None:
        torch.set_num_threads(threads)

    def make() -> pg.Model:
        if not drawn:
            return pg.load(model, dtype, where, config, quantize=quantize)
        params = measuring.random_params(cfg, kind, where)
        return pg.Model(cfg, pg.quant.quantize(params, quantize) if quantize else params, None)

    with (
        enough_memory("lower --batch or --slots, or give --dtype bfloat16"),
        compiles("give --no-compile"),
        measuring.cold(),
    ):
        machine = measuring.measure(where, kind)
        about = {
            "model": f"{config}, random weights" if drawn else model or "the shipped checkpoint",
            "dtype": str(kind).removeprefix("torch."), "quantize": quantize,
            "hardware": measuring.hardware(where), "device": str(where),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "image_tokens": cfg.vision.tokens,
        } | asdict(case) | {"slots": case.length(cfg) + case.free_slots(cfg)} | machine._asdict()  # fmt: skip
        del about["stages"]  # what follows says it
        loaded, first = measuring.load_stage(make, where, machine, 1 if drawn else repeat, "draw" if drawn else "load")
        rest = measuring.stages(loaded, case, machine)
        bar = tqdm(rest, desc="measuring", unit="stage", leave=False, disable=None)
        stages = [first, *bar]
    if as_json:
        print(json.dumps(about | {"stages": [record(stage) for stage in stages]}))
    else:
        show(about, stages)


def published(name: str) -> pg.Config:
    """The configuration of that name."""
    if name not in pg.PUBLISHED:
        raise SettingError(f"config {name} is not one of {', '.join(pg.PUBLISHED)}")
    return pg.PUBLISHED[name]


def record(stage: Stage) -> dict[str, Any]:
    """A stage as JSON: seconds and bytes are of one token where the stage is a step."""
    seconds = median(stage.seconds)
    return {
        "stage": stage.name, "compiled": stage.compiled, "seconds": seconds, "fastest": min(stage.seconds),
        "slowest": max(stage.seconds), "flops": stage.work.flops, "bytes": stage.work.nbytes,
        "bytes_per_second": stage.work.nbytes / seconds, "floor": stage.floor, "floor_over_time": stage.floor / seconds,
        "first_seconds": stage.first, "compilations": stage.compilations,
    }  # fmt: skip


def show(about: dict[str, Any], stages: list[Stage]) -> None:
    """Two lines about what was measured on what, and a line a stage."""
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
    what = "read" if about["device"] == "cpu" else "copied, both ways counted"
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True, markup=False, highlight=False)
    weights = " in ".join(filter(None, (about["quantize"], about["dtype"])))
    console.print("{model}, {weights}, batch {batch}: a picture of {image_tokens} tokens, {prompt_tokens} of text, "
                  "{tokens} generated, {slots} cache slots".format(**about, weights=weights))  # fmt: skip
    console.print("{hardware}, torch {torch}, {threads} threads:".format(**about),
                  f"{about['bandwidth'] / 1e9:,.1f} GB/s {what}, {about['rate'] / 1e12:,.2f} TFLOP/s")  # fmt: skip
    console.print(table)
