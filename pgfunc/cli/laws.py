"""The command that looks for examples that break the laws: laws.

Whatever needs Hypothesis is imported inside the command, so that the other commands run without it.
"""

import json
import sys
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pgfunc.cli import options
from pgfunc.cli.options import app, optional
from pgfunc.errors import SettingError

if TYPE_CHECKING:
    from pgfunc.laws import Result

EXAMPLES, DEEP = 20, 2000  # EXAMPLES equals that of `laws.check`, which cannot be imported without Hypothesis


@app.command()
def laws(
    model: options.CheckpointName = None,
    system: Annotated[
        str | None,
        optional(
            "--system",
            "--adapter",  # the former name
            help="Check your own implementation: module:object that names a pgfunc.laws.System.",
            metavar="NAME",
        ),
    ] = None,
    law: Annotated[list[str] | None, optional("--law", help="Check only this law; repeatable.", metavar="LAW")] = None,
    examples: Annotated[int, typer.Option("--examples", help="Examples of each law.")] = EXAMPLES,
    deep: Annotated[bool, typer.Option("--deep", help=f"Try {DEEP:,} examples of each law.")] = False,
    device: options.MeasuredDevice = None,
    dtype: Annotated[str | None, optional("--dtype", help="float32 (the default), bfloat16 or float16.")] = None,
    quantize: options.Quantize = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the decode step, for each batch size and cache size. This takes minutes."
        ),
    ] = False,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Look for examples that break the laws of PaliGemma, in a checkpoint or in another implementation.

    The exit status is 1 if a law is broken. The laws about parameters (gradients, vmap, files) are not checked if the
    parameters are quantized or larger than 1 GiB.
    """
    from pgfunc import laws as pglaws  # before what follows: this import says what to install if Hypothesis is missing
    from pgfunc.cli import law_systems
    from pgfunc.cli.devices import enough_memory

    if examples < 1:
        raise SettingError(f"examples is {examples}, expected 1 or more")
    chosen = [law_systems.law_named(name) for name in law] if law else list(pglaws.LAWS)
    checkpoint = {
        "model": model, "device": device, "dtype": dtype, "quantize": quantize, "compile": compile, "config": config,
    }  # fmt: skip
    if system is not None and any(checkpoint.values()):
        option = next(name for name, value in checkpoint.items() if value)
        raise SettingError(f"--{option} is for a checkpoint, and --system names another implementation")
    with enough_memory("give --dtype bfloat16 or --device cpu"), law_systems.temporary_examples():
        checked = law_systems.from_checkpoint(**checkpoint) if system is None else law_systems.import_system(system)
        searches = pglaws.checks(checked, chosen, examples=DEEP if deep else examples)
        results = list(tqdm(searches, total=len(chosen), unit="law", leave=False, disable=None))
    if as_json:
        for result in results:
            print(json.dumps(record(result)))
    else:
        print_table(results)
    if any(result.verdict == "broken" for result in results):
        raise typer.Exit(1)


def record(result: "Result") -> dict[str, Any]:
    """A result as one object of the JSON output."""
    law = result.law
    return {
        "law": law.name, "statement": law.statement, "verdict": result.verdict, "examples": result.examples,
        "worst_error": result.worst if isfinite(result.worst) else None, "tolerance": result.tolerance,
        "reason": law.reason, "counterexample": result.counterexample, "why": result.why,
    }  # fmt: skip


def print_table(results: "list[Result]") -> None:
    """Print one row for each law, and below the table the counterexamples of the broken ones."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("law", "", "examples", "worst error", "allowed"):
        table.add_column(name, justify="left" if name in ("law", "") else "right", no_wrap=True)
    for result in results:
        figures = (f"{result.examples:,}", f"{result.worst:.1e}", f"{result.tolerance:.1e}")
        absent = (f"has no {result.why}", "", "", "")
        table.add_row(result.law.name, *(absent if result.verdict == "absent" else (result.verdict, *figures)))
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    for result in results:
        if result.verdict == "broken":
            error = f"error {result.worst:.3g}, allowed {result.tolerance:.3g}: {result.law.reason}"
            console.print(f"{result.law.name}: {result.law.statement}")
            console.print(f"  {result.counterexample}")
            console.print(f"  {result.why or error}")
