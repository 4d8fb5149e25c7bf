"""The command that compiles ahead of time: compile."""

from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer

import pgfunc as pg
from pgfunc.bench import Case, compilations, random_prompt
from pgfunc.cli import options
from pgfunc.cli.options import app, compiles, enough_memory
from pgfunc.errors import SettingError
from pgfunc.generate import complete
from pgfunc.sample import Settings


@app.command()
def compile(
    folder: Annotated[Path, typer.Argument(help="For the code; what it has already stays.", metavar="FOLDER")],
    model: options.ModelName = None,
    batch: Annotated[int, typer.Option("--batch", help="Rows.")] = 1,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Of text; a few more are served too.")] = 16,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    config: options.Config = None,
) -> None:  # fmt: skip
    """Compile what a generation of that size needs, and keep the code in a folder for --compiled.

    It is for this PyTorch on this kind of device, and serves other weights of the same configuration.
    """
    settings, case = Settings(temperature, top_k, top_p, min_p), Case(batch, prompt_tokens, max_new_tokens)
    loaded = pg.load(model, dtype, device, config, quantize=quantize)
    case.check(loaded.cfg)
    endless = loaded._replace(cfg=replace(loaded.cfg, eos=-1))
    prompt = random_prompt(loaded.cfg, batch, prompt_tokens, loaded.params.projector.device)
    u = torch.zeros(batch, max_new_tokens, dtype=torch.float64)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"{folder}: cannot be a folder for compiled code ({error.strerror})") from error
    start = perf_counter()
    with enough_memory("lower --batch, or give --dtype bfloat16"), compiles("install one"), pg.compiled_in(folder):
        complete(endless, prompt, settings, u, compile=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    made = f"{compilations()} function{'s' * (compilations() > 1)}"
    print(f"compiled {made} in {perf_counter() - start:.1f} s; {folder} has {size / 1e6:.1f} MB")
