"""The command that fine-tunes: train."""

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

import pgfunc as pg
from pgfunc.cli import options, validation
from pgfunc.cli.options import app, of_model, optional, print_note
from pgfunc.errors import SettingError, escape_controls
from pgfunc.files import outputs

if TYPE_CHECKING:
    from pgfunc.train.data import Example

TARGETS = ("language.layers.*",)
EPOCHS = 3
of_updates = partial(typer.Option, rich_help_panel="Updates")
of_lora = partial(typer.Option, rich_help_panel="LoRA")
LESS_MEMORY = "raise --accumulate, or give --recompute, --dtype bfloat16, --freeze, or --lora-rank"


@app.command()
def train(
    examples: Annotated[
        Path, typer.Argument(metavar="DATA", help="JSON Lines file: each line has image, prefix and suffix.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the model. An unfinished run in it is continued.")],
    images: Annotated[
        Path | None, optional("--images", help="Folder of the pictures. Default: the folder of DATA.")
    ] = None,
    valid: Annotated[Path | None, optional("--valid", help="JSON Lines file for validation, after each epoch.")] = None,
    valid_lines: Annotated[
        int,
        typer.Option(
            "--valid-lines",
            metavar="N",
            help="Validation lines of each task on which the metrics of `pgfunc evaluate` are computed; 0: loss only.",
        ),
    ] = validation.LINES,
    epochs: Annotated[int | None, of_updates("--epochs", help=f"Passes over the data. Default: {EPOCHS}.")] = None,
    steps: Annotated[int | None, of_updates("--steps", help="Number of updates, in place of --epochs.")] = None,
    batch_size: Annotated[int, of_updates("--batch-size", help="Examples per update.")] = 8,
    accumulate: Annotated[
        int, of_updates("--accumulate", help="Number of parts of a batch; one part is in memory at a time.")
    ] = 1,
    learning_rate: Annotated[
        float | None,
        of_updates(
            "--learning-rate",
            help="Highest learning rate; it falls as a cosine. Default: 1e-5, or 3e-4 for models below 100 million "
            "parameters; ten times that for LoRA.",
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        of_updates("--warmup", help="Updates over which the learning rate rises. Default: 5% of all updates."),
    ] = None,
    weight_decay: Annotated[float, of_updates("--weight-decay", help="Weight decay of matrices.")] = 0.0,
    freeze: Annotated[
        list[str] | None,
        of_updates("--freeze", help="Pattern of parameters to leave unchanged, such as 'vision.*'. May be repeated."),
    ] = None,
    lora_rank: Annotated[
        int,
        of_lora("--lora-rank", help="Rank of the adapters to train; 0 trains the weights without LoRA."),
    ] = 0,
    lora_alpha: Annotated[
        float | None,
        of_lora("--lora-alpha", show_default=False, help="The adapters are scaled by alpha / rank. Default: the rank."),
    ] = None,
    lora_target: Annotated[
        list[str] | None,
        of_lora(
            "--lora-target",
            show_default=False,
            help="Pattern of weights to adapt. Repeat it for several. Default: 'language.layers.*'.",
        ),
    ] = None,
    recompute: Annotated[
        bool, of_updates("--recompute", help="Save memory: compute activations again in the backward pass.")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", help="Save the run every N updates.", metavar="N")
    ] = 100,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write logs for TensorBoard.")] = False,
    seed: Annotated[int, of_updates("--seed", help="Random seed of the order of examples and of LoRA's start.")] = 0,
    model: options.ModelName = None,
    device: options.Device = None,
    dtype: Annotated[
        str | None,
        of_model("--dtype", help="Dtype to compute in: float32 or bfloat16. Default: the dtype of the checkpoint."),
    ] = None,
    config: options.Config = None,
    tokenizer: options.Tokenizer = None,
) -> None:
    """Fine-tune a model on pictures, each with a prefix (the question) and a suffix (the answer).

    All data are checked before training starts. If a run is interrupted, for example by Ctrl-C, it is saved, and the
    same command continues it. The weights being trained are float32, whatever the dtype.
    """
    check_packages(tensorboard)
    if steps is not None and epochs is not None:
        raise SettingError("give --epochs or --steps, not both")
    if not lora_rank and (lora_target or lora_alpha is not None):
        raise SettingError("--lora-target and --lora-alpha need --lora-rank")
    if checkpoint_every < 1:
        raise SettingError(f"checkpoint-every is {checkpoint_every}, expected 1 or more")
    from pgfunc.checkpoint import find, shipped
    from pgfunc.cli.devices import enough_memory
    from pgfunc.cli.progress import signals_interrupt, watching
    from pgfunc.train import data, fit, run

    train_rows, valid_rows = read_examples(examples, valid, images, out, [model or shipped(), config, tokenizer])
    loaded = pg.load(model, None, device, config, tokenizer)
    if steps is None:
        steps = (EPOCHS if epochs is None else epochs) * data.steps_per_epoch(max(1, batch_size), len(train_rows))
    settings = run.Settings(
        steps=steps, batch_size=batch_size, accumulate=accumulate,
        learning_rate=default_rate(loaded.params, lora_rank) if learning_rate is None else learning_rate,
        warmup=steps // 20 if warmup is None else warmup,
        weight_decay=weight_decay, freeze=tuple(freeze or ()), lora_rank=lora_rank,
        lora_alpha=float(lora_rank) if lora_alpha is None else lora_alpha,
        lora_targets=tuple(lora_target or TARGETS) if lora_rank else (),
        dtype=dtype or pg.tree.dtype_name(loaded.params.projector), seed=seed, recompute=recompute,
    )  # fmt: skip
    job = run.Job(loaded, train_rows, settings)
    data.check(loaded, tqdm([*train_rows, *valid_rows], desc="checking", unit="line", leave=False, disable=None))
    measure = validation.metrics_on(valid_rows, valid_lines, loaded, model)
    with enough_memory(LESS_MEMORY):
        state = fit.begin(job, out)
        with watching(job, state, out, tensorboard) as watch, signals_interrupt():
            base = str(find(model)) if model is None else model
            fit.fit(job, out, state, valid_rows, checkpoint_every, watch, base, measure)
    print_losses(out, steps, validated=bool(valid))


def check_packages(tensorboard: bool) -> None:
    """Raise SettingError if TensorBoard is wanted and not installed; print a note if matplotlib is not installed."""
    if tensorboard and find_spec("tensorboard") is None:
        raise SettingError("tensorboard is not installed: python -m pip install 'pgfunc[train]'")
    if find_spec("matplotlib") is None:
        from pgfunc.train import fit

        print_note(f"{fit.CURVE} is not drawn without matplotlib: python -m pip install 'pgfunc[plot]'")


def read_examples(
    examples: Path, valid: Path | None, images: Path | None, out: Path, inputs: Sequence[str | Path | None]
) -> "tuple[list[Example], list[Example]]":
    """The lines to train on and to validate on. Raises SettingError if `out` contains an input or a picture."""
    from pgfunc.train import data

    outputs.check_folder(out, "--out")
    outputs.check_apart([out], [examples, valid, images, *inputs], "--out")
    train_rows, valid_rows = data.read(examples, images), data.read(valid, images) if valid else []
    outputs.check_apart([out], {path for row in [*train_rows, *valid_rows] for path in row.images}, "--out")
    return train_rows, valid_rows


def print_losses(out: Path, steps: int, validated: bool) -> None:
    """Print the first and the last loss of a finished run, and the last validation loss and metrics if there are."""
    from pgfunc.train import fit

    rows = fit.read_log(out)
    first, last = rows[0], rows[-1]
    ends = [f"validation {last['valid']:.4f}"] if validated else []
    ends += [f"{name.removeprefix(fit.VALID)} {last[name]:.3f}" for name in fit.headline(last)]
    line = ", ".join([f"{steps} steps, loss {first['loss']:.4f} -> {last['loss']:.4f}", *ends])
    print(f"{escape_controls(str(out))}: {line}")


def default_rate(params: "pg.Params", lora_rank: int) -> float:
    """The default learning rate. LoRA's pairs take ten times that of the weights.

    big_vision uses 1e-5 and a warm-up of 5% for PaliGemma (configs/proj/paligemma/transfers/forkme.py, cococap.py). The
    shipped checkpoint is 370 times smaller, and learns next to nothing at 1e-5; at 1e-3 it forgets what it knew.
    """
    return (3e-4 if pg.tree.count(params) < 10**8 else 1e-5) * (10 if lora_rank else 1)
