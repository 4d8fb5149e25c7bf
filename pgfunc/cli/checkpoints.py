"""Commands about checkpoint files: inspect and convert."""

import json
from pathlib import Path
from typing import Annotated

import typer

import pgfunc as pg
from pgfunc import paligemma
from pgfunc.cli import options
from pgfunc.cli.options import app
from pgfunc.errors import SettingError, harmless


@app.command()
def inspect(
    source: Annotated[str | None, typer.Argument(help="Folder, .npz or hub id.", show_default=False)] = None,
    model: options.Named = None, config: options.Config = None, as_json: options.Json = False,
) -> None:  # fmt: skip
    """List the parameters: path, shape, dtype, bytes. Only the headers of the files are read."""
    if source and model:
        raise SettingError(f"inspect takes one checkpoint, found {source} and --model {model}")
    cfg, params, _ = pg.load(source or model, device="meta", config=config)
    rows = [(path, tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."), leaf.numel() * leaf.element_size())
            for path, leaf in pg.tree.flatten(params).items()]  # fmt: skip
    if as_json:
        keys = ("path", "shape", "dtype", "bytes")
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    width = max(len(path) for path, *_ in rows)
    for path, shape, dtype, size in rows:
        print(f"{path:<{width}}  {' x '.join(map(str, shape)):<16}  {dtype:<8}  {size:>13,}")
    print(f"{pg.tree.count(paligemma.abstract(cfg)):,} parameters, {pg.tree.nbytes(params):,} bytes")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder, .npz or hub id.")],
    target: Annotated[Path, typer.Argument(help="A folder for Hugging Face layout, or a .npz for big_vision's.")],
    config: options.Config = None, tokenizer: options.Vocabulary = None, dtype: options.Dtype = None,
    quantize: options.Quantize = None, force: options.Force = False,
) -> None:  # fmt: skip
    """Write a checkpoint in the other format, or in fewer bits; its mask decoder and its siglip/ come along."""
    done = pg.convert(source, target, dtype, config, tokenizer, quantize, force)
    print(f"{harmless(str(done.path))}: {done.format}, {done.dtype}, {done.bytes:,} bytes")
