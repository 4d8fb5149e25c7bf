"""The command that looks for examples that break the laws: laws."""

import json
import sys
from importlib import import_module
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.strategies import SearchStrategy
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import pgfunc as pg
from pgfunc import laws as pglaws
from pgfunc.checkpoint import as_device
from pgfunc.cli import options
from pgfunc.cli.compiled import compiles
from pgfunc.cli.locate import beside
from pgfunc.cli.options import app, enough_memory, unset
from pgfunc.errors import DeviceError, SettingError
from pgfunc.laws import LAWS, Law, Result, System
from pgfunc.laws.check import EXAMPLES
from pgfunc.objects import segment

DEEP = 2000
MOST_COPIED = 2**30  # bytes; the laws of parameters copy them for each example, in float64 or into files


@app.command()
def laws(
    model: options.Named = None,
    adapter: Annotated[
        str | None, unset("--adapter", help="module:object, a System of your own; see `pgfunc.laws`.", metavar="NAME")
    ] = None,
    law: Annotated[list[str] | None, unset("--law", help="Only this one; may be repeated.", metavar="LAW")] = None,
    examples: Annotated[int, typer.Option("--examples", help="Of each law.")] = EXAMPLES,
    deep: Annotated[bool, typer.Option("--deep", help=f"{DEEP:,} examples of each law.")] = False,
    device: options.Device = None,
    dtype: Annotated[str | None, unset("--dtype", help="float32, bfloat16 or float16; without it float32.")] = None,
    quantize: options.Quantize = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the decode step, for each number of rows and of slots: minutes.")
    ] = False,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Look for examples that break the laws of a PaliGemma, of a checkpoint or of another implementation.

    The exit status is 1 where there is one. The laws of parameters (gradients, vmap, files) are not asked of those that
    are quantized, or have more than 1 GiB.
    """
    if examples < 1:
        raise SettingError(f"examples is {examples}, expected 1 or more")
    chosen = [named(name) for name in law] if law else list(LAWS)
    given = {
        "model": model, "device": device, "dtype": dtype, "quantize": quantize, "compile": compile, "config": config,
    }  # fmt: skip
    if adapter is not None and any(given.values()):
        more = next(name for name, value in given.items() if value)
        raise SettingError(f"--{more} is for a checkpoint, and --adapter names another implementation")
    with enough_memory("give --dtype bfloat16 or --device cpu"), TemporaryDirectory() as folder:
        system = of_checkpoint(**given) if adapter is None else found(adapter)
        set_hypothesis_home_dir(folder)  # else it leaves files where the user is
        try:
            searches = pglaws.checks(system, chosen, examples=DEEP if deep else examples)
            results = list(tqdm(searches, total=len(chosen), unit="law", leave=False, disable=None))
        finally:
            set_hypothesis_home_dir(None)
    if as_json:
        for result in results:
            print(json.dumps(record(result)))
    else:
        show(results)
    if any(result.verdict == "broken" for result in results):
        raise typer.Exit(1)


def of_checkpoint(
    model: str | None, device: str | None, dtype: str | None, quantize: str | None, compile: bool, config: str | None
) -> System:
    """The checkpoint as the options say it runs, with its tokenizer, and its mask decoder where it has one."""
    where, masks = as_device(device), beside(model)
    if where.type == "meta":
        raise DeviceError("device meta has shapes but no arithmetic, so there is nothing to check; name another")
    loaded = pg.load(model, dtype or "float32", where, config, quantize=quantize)
    vq = segment.load(masks, where) if masks.exists() else ()
    adapt = pglaws.compiled if compile else pglaws.eager
    system = adapt(loaded.params, loaded.cfg, model or "the shipped checkpoint", loaded.tokenizer, vq)
    if compile:  # a step, so that a compiler that is missing breaks no law
        with compiles("is there a C++ compiler? It runs without --compile"):
            one = pglaws.prompt(pglaws.Rows((1,), (0,), images=0), system.vocab, system.image_size)
            system.decode(one.tokens[:, 0], system.prefill(one, 1)[1])
    return system._replace(params=()) if quantize or pg.tree.nbytes(loaded.params) > MOST_COPIED else system


def named(name: str) -> Law:
    """The law of that name."""
    for law in LAWS:
        if law.name == name:
            return law
    raise SettingError(f"law {name} is not one of {', '.join(law.name for law in LAWS)}")


def found(adapter: str) -> System | SearchStrategy[System]:
    """The object of that name: a System, a strategy of Systems, or a function that gives one."""
    module, _, name = adapter.partition(":")
    if not (module and name):
        raise SettingError(f"adapter is {adapter!r}, expected module:object")
    sys.path.insert(0, str(Path.cwd()))
    try:
        loaded = import_module(module)
    except ImportError as error:
        raise SettingError(f"adapter {adapter}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not hasattr(loaded, name):
        raise SettingError(f"adapter {adapter}: the module has no {name}")
    made = getattr(loaded, name)
    made = made() if callable(made) and not isinstance(made, (System, SearchStrategy)) else made
    if not isinstance(made, (System, SearchStrategy)):
        raise SettingError(f"adapter {adapter} is a {type(made).__name__}, expected a pgfunc.laws.System")
    return made


def record(result: Result) -> dict[str, Any]:
    law = result.law
    return {
        "law": law.name, "statement": law.statement, "verdict": result.verdict, "examples": result.examples,
        "worst_error": result.worst if isfinite(result.worst) else None, "tolerance": result.tolerance,
        "reason": law.reason, "counterexample": result.counterexample, "why": result.why,
    }  # fmt: skip


def show(results: list[Result]) -> None:
    """A line a law, and below the table what was found of those that are broken."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("law", "", "examples", "worst error", "may be"):
        table.add_column(name, justify="left" if name in ("law", "") else "right", no_wrap=True)
    for result in results:
        tried = (f"{result.examples:,}", f"{result.worst:.1e}", f"{result.tolerance:.1e}")
        absent = (f"has no {result.why}", "", "", "")
        table.add_row(result.law.name, *(absent if result.verdict == "absent" else (result.verdict, *tried)))
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    for result in results:
        if result.verdict == "broken":
            console.print(f"{result.law.name}: {result.law.statement}")
            console.print(f"  {result.counterexample}")
            console.print(
                f"  {result.why or f'error {result.worst:.3g}, may be {result.tolerance:.3g}: {result.law.reason}'}"
            )
