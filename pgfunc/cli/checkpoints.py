"""Commands on checkpoint files: inspect, convert, and merge, which makes a model of what LoRA trained."""

import json
from pathlib import Path
from typing import Annotated

import typer

import pgfunc as pg
from pgfunc.cli import options
from pgfunc.cli.options import app
from pgfunc.errors import SettingError, escape_controls
from pgfunc.files.outputs import check_output


@app.command()
def inspect(
    source: Annotated[
        str | None, typer.Argument(help="Checkpoint: a folder, a .npz file or a hub id.", show_default=False)
    ] = None,
    model: options.CheckpointName = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """List the parameters of a checkpoint: path, shape, dtype and bytes of each. Reads only the files' headers."""
    if source and model:
        raise SettingError(f"inspect takes one checkpoint, found {source} and --model {model}")
    from pgfunc.paligemma import abstract

    cfg, params, _ = pg.load(source or model, device="meta", config=config)
    rows = [(path, tuple(leaf.shape), pg.tree.dtype_name(leaf), leaf.numel() * leaf.element_size())
            for path, leaf in pg.tree.flatten(params).items()]  # fmt: skip
    if as_json:
        keys = ("path", "shape", "dtype", "bytes")
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    width = max(len(path) for path, *_ in rows)
    for path, shape, dtype, nbytes in rows:
        print(f"{path:<{width}}  {' x '.join(map(str, shape)):<16}  {dtype:<8}  {nbytes:>13,}")
    print(f"{pg.tree.count(abstract(cfg)):,} parameters, {pg.tree.nbytes(params):,} bytes")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint: a folder, a .npz file or a hub id.", metavar="SOURCE")],
    target: Annotated[
        Path,
        typer.Argument(help="A folder to make, in Hugging Face layout, or a .npz, as big_vision's.", metavar="TARGET"),
    ],
    config: options.Config = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    force: options.Force = False,
) -> None:
    """Write a checkpoint in the other format, in another dtype, or in fewer bits.

    The mask decoder and the folder siglip/ of the source are copied too.
    """
    print_checkpoint(*pg.convert(source, target, dtype, config, tokenizer, quantize, force))


@app.command()
def merge(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of the adapter, from `pgfunc train` or from PEFT.", metavar="ADAPTER")
    ],
    target: Annotated[Path, typer.Argument(help="A folder to make, in Hugging Face layout.", metavar="TARGET")],
    model: options.ModelName = None,
    config: options.Config = None,
    tokenizer: options.Tokenizer = None,
    force: options.Force = False,
) -> None:
    """Add a LoRA adapter to the model that it was trained on, and save the result as a model.

    The option --adapter of other commands runs an adapter without this step.
    """
    from pgfunc.checkpoint import find
    from pgfunc.checkpoint.conversion import write_folder

    base = find(model)
    check_output(target, [base, adapter, config, tokenizer], folder=True, force=force)
    merged = pg.load(model, None, "cpu", config, tokenizer, adapter=adapter)
    write_folder(target, merged, base)
    dtype = pg.tree.dtype_name(merged.params.projector)
    print_checkpoint(target, "Hugging Face layout", dtype, pg.tree.nbytes(merged.params))


def print_checkpoint(path: Path, format: str, dtype: str, nbytes: int) -> None:
    """Print what was written where."""
    print(f"{escape_controls(str(path))}: {format}, {dtype}, {nbytes:,} bytes")
