"""The command that serves a page in the browser: demo."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pgfunc.cli import options
from pgfunc.cli.locate import Masks
from pgfunc.cli.options import app
from pgfunc.errors import SettingError

if TYPE_CHECKING:
    from pgfunc.demo.actions import Checkpoint

SHIPPED = ", which is shipped: it knows drawn scenes of 201 things and colored shapes, but no photographs"


@app.command()
def demo(
    model: options.ModelName = None,
    adapter: options.Adapter = None,
    masks: Masks = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    config: options.Config = None,
    tokenizer: options.Tokenizer = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than 127.0.0.1 let other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0 takes a free one.")] = 7860,
) -> None:
    """Serve a page in the browser on which you ask about pictures. Needs Gradio, which the extra `demo` installs."""
    if find_spec("gradio") is None:
        raise SettingError('the demo needs Gradio, which is not installed: python -m pip install "pgfunc[demo]"')
    from threading import Event

    from pgfunc.cli.progress import Terminated, signals_interrupt
    from pgfunc.demo import server

    port = server.check_port(host, port)
    loading: dict[str, Any] = {"source": model, "dtype": dtype, "device": device, "config": config,
                               "tokenizer": tokenizer, "quantize": quantize, "adapter": adapter}  # fmt: skip
    checkpoint = load(loading, masks)
    name, remark = (model, "") if model else ("weights/tiny", SHIPPED)
    remark += "" if checkpoint.mask_decoder else "; it has no mask decoder (--masks), so it cannot segment"
    try:
        with signals_interrupt(), server.serving(checkpoint, name, remark, host, port) as address:
            print(f"{address}  (model {name}; Ctrl-C ends the demo)", flush=True)
            Event().wait()
    except KeyboardInterrupt as stop:
        raise typer.Exit(128 + stop.args[0] if isinstance(stop, Terminated) else 0) from None


def load(loading: dict[str, Any], masks: Path | None) -> "Checkpoint":
    """The model, and the mask decoder that is named or stands beside the model, if one does."""
    import pgfunc as pg
    from pgfunc.cli.finding import mask_decoder_beside
    from pgfunc.demo.actions import Checkpoint

    model = pg.load(**loading)
    path = masks or mask_decoder_beside(loading["source"])
    if not masks and not path.exists():
        return Checkpoint(model, loading)
    decoder = pg.segment.load(path, model.params.projector.device)
    return Checkpoint(model, loading, decoder, str(path) if masks or loading["source"] else None)
