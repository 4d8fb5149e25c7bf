"""The command that measures: bench."""

from typing import Annotated

import typer

from pgfunc.cli import options
from pgfunc.cli.options import app, of_model, optional
from pgfunc.names import STAGES

Name = Annotated[
    str | None,
    of_model(
        "--config", help="A published name, to measure random weights of its size; or the configuration of a .npz."
    ),
]
Dtype = Annotated[
    str | None,
    of_model("--dtype", help="Dtype of the weights. Default: that of the checkpoint, bfloat16 for random weights."),
]


@app.command()
def bench(
    model: options.CheckpointName = None,
    config: Name = None,
    batch: Annotated[int, typer.Option("--batch", help="Rows in a batch.")] = 1,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Text tokens in each row, in addition to the image tokens.")
    ] = 16,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to generate.")] = 128,
    slots: Annotated[
        int | None, optional("--slots", help="Cache slots for decode. Default: as many as the tokens need.")
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", help="Measured runs of each stage, after one warm-up run.")] = 5,
    stage: Annotated[
        list[str] | None,
        optional("--stage", help=f"Stage to measure: {', '.join(STAGES)}. Repeat it for several. Default: all."),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile", help="Also measure decode and generate compiled, and on a GPU prefill too."
        ),
    ] = True,
    threads: Annotated[int | None, optional("--threads", help="CPU threads. Default: PyTorch's choice.")] = None,
    device: options.MeasuredDevice = None,
    dtype: Dtype = None,
    quantize: options.Quantize = None,
    as_json: options.Json = False,
) -> None:
    """Measure how long load, vision, prefill, decode and generate take, beside the floor of each on this machine.

    The floor of a stage is the time that its bytes need at the memory's bandwidth, or its FLOPs at the rate of a large
    matrix product, whichever is longer; both are measured first. Times are medians. Without --model and --config the
    shipped checkpoint is measured.
    """
    from pgfunc.bench import Case
    from pgfunc.cli import measuring

    case = Case(batch, prompt_tokens, tokens, slots, repeat, compile, tuple(stage or STAGES))
    measuring.bench(case, model, config, dtype, quantize, device, threads, as_json)
