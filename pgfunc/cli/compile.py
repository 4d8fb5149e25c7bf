"""The command that compiles ahead of time: compile."""

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

import pgfunc as pg
from pgfunc.cli import options
from pgfunc.cli.options import app
from pgfunc.errors import SettingError, escape_controls


@app.command()
def compile(
    folder: Annotated[Path, typer.Argument(help="Folder to add the code to.", metavar="FOLDER")],
    model: options.ModelName = None,
    batch: Annotated[
        int,
        typer.Option("--batch", help="Pictures per batch. Commands such as caption use 1; pg.generate may use more."),
    ] = 1,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Text tokens in a prompt. The code also serves slightly longer ones.")
    ] = 16,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    config: options.Config = None,
) -> None:
    """Compile a model ahead of time into a folder, for the option --compiled of other commands.

    The code is for prompts and answers of the given size. It works with this version of PyTorch on this kind of device,
    and with other weights of the same configuration. Whoever uses the folder runs its code, so use only folders whose
    author you trust.
    """
    from pgfunc.bench import Case
    from pgfunc.checkpoint import as_device
    from pgfunc.cli.compiled import compile_all, compiled_files, compiling, make_folder
    from pgfunc.cli.devices import enough_memory
    from pgfunc.sample import Settings

    settings, where = Settings(temperature, top_k, top_p, min_p), as_device(device)
    if max_new_tokens < 2:
        raise SettingError(f"max-new-tokens is {max_new_tokens}, expected 2 or more: the first needs no decode step")
    make_folder(folder, where)
    with enough_memory("lower --batch, or give --dtype bfloat16"), compiling(True, folder, where):
        loaded = pg.load(model, dtype, where, config, quantize=quantize)
        case = Case(batch, prompt_tokens, max_new_tokens)
        case.check(loaded.cfg)
        case.check_memory(loaded.cfg, loaded.params.projector.dtype, where, 0)
        start = perf_counter()
        compile_all(loaded, case, settings, where)
    files = compiled_files(folder)
    size = sum(path.stat().st_size for path in files) / 1e6
    seconds = perf_counter() - start
    print(escape_controls(f"{folder} has the code after {seconds:.1f} s: {len(files)} files, {size:.1f} MB"))
