"""The command that compiles ahead of time: compile."""

import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer

import pgfunc as pg
from pgfunc.bench import Case, random_prompt
from pgfunc.checkpoint import as_device
from pgfunc.cli import options
from pgfunc.cli.compiled import MADE_FOR, MAKER, compiled_files, compiling, makers, platform_of, read_made_for
from pgfunc.cli.options import app, enough_memory
from pgfunc.errors import SettingError, escape_controls
from pgfunc.files.atomic import write_text
from pgfunc.generate import complete
from pgfunc.sample import Settings


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
    settings, where = Settings(temperature, top_k, top_p, min_p), as_device(device)
    if max_new_tokens < 2:
        raise SettingError(f"max-new-tokens is {max_new_tokens}, expected 2 or more: the first needs no decode step")
    make_folder(folder, where)
    with enough_memory("lower --batch, or give --dtype bfloat16"), compiling(True, folder, where):
        loaded = pg.load(model, dtype, where, config, quantize=quantize)
        case = Case(batch, prompt_tokens, max_new_tokens)
        case.check(loaded.cfg)
        case.check_memory(loaded.cfg, loaded.params.projector.dtype, where, 0)
        endless = loaded._replace(cfg=replace(loaded.cfg, eos=-1))  # no answer ends early
        prompt = random_prompt(loaded.cfg, batch, prompt_tokens, where)
        uniforms = torch.zeros(batch, max_new_tokens, dtype=torch.float64, device="cpu")
        start = perf_counter()
        complete(endless, prompt, settings, uniforms, compile=True)
    files = compiled_files(folder)
    size = sum(path.stat().st_size for path in files) / 1e6
    seconds = perf_counter() - start
    print(escape_controls(f"{folder} has the code after {seconds:.1f} s: {len(files)} files, {size:.1f} MB"))


def make_folder(folder: Path, device: torch.device) -> None:
    """Make a folder for code and record its platform and its maker. Only its owner may write there: the code is run."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if read_made_for(folder) is None:
            write_text(folder / MADE_FOR, json.dumps(platform_of(device) | {MAKER: makers()[0]}))
    except OSError as error:
        raise SettingError(f"{folder}: cannot be a folder for compiled code ({error.strerror})") from error
