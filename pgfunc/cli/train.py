"""Commands that fine-tune: train; and merge, which makes a model of what LoRA trained."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import current_thread, main_thread
from typing import Annotated, Any

import typer
from tqdm import tqdm

import pgfunc as pg
from pgfunc import tree
from pgfunc.checkpoint import dtype_name, find, shipped
from pgfunc.checkpoint.conversion import write_folder
from pgfunc.cli import options
from pgfunc.cli.options import app, enough_memory, say_aside, unset
from pgfunc.errors import SettingError, harmless
from pgfunc.files import outputs
from pgfunc.train import data, fit, run

TARGETS = ("language.layers.*",)
SAVING = "raise --accumulate, or give --recompute, --dtype bfloat16, --freeze, or --lora-rank"


@app.command()
def train(
    examples: Annotated[Path, typer.Argument(metavar="DATA", help="JSON Lines of image, prefix, suffix.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the model; an unfinished run in it is continued.")],
    model: options.ModelName = None,
    images: Annotated[Path | None, unset("--images", help="Folder of the pictures; without it DATA's own.")] = None,
    valid: Annotated[Path | None, unset("--valid", help="JSON Lines to take the loss of after each epoch.")] = None,
    epochs: Annotated[int | None, unset("--epochs", help="Times each example is read; 3 without --steps.")] = None,
    steps: Annotated[int | None, unset("--steps", help="Updates, in place of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples an update.")] = 8,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Parts of a batch, one in memory at a time.")] = 1,
    learning_rate: Annotated[float | None, unset("--learning-rate", help=(
        "The highest; it falls as a cosine. Else 1e-5, or 3e-4 below 100 million parameters; for LoRA ten times that."
    ))] = None,
    warmup: Annotated[int | None, unset("--warmup", help="Updates over which it rises; else a twentieth.")] = None,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of matrices.")] = 0.0,
    freeze: Annotated[list[str] | None, unset("--freeze", help="Paths to leave as they are: 'vision.*'.")] = None,
    lora_rank: Annotated[int, typer.Option("--lora-rank", help="Train LoRA pairs of this rank; 0: the weights.")] = 0,
    lora_alpha: Annotated[float | None, unset("--lora-alpha", help="LoRA's scale times rank; else the rank.")] = None,
    lora_target: Annotated[list[str] | None, unset("--lora-target", help="Paths; else 'language.layers.*'.")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Save memory: compute activations twice.")] = False,
    checkpoint_every: Annotated[int, typer.Option("--checkpoint-every", help="Save the run after so many.")] = 100,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write logs for TensorBoard too.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of the examples, and of LoRA's start.")] = 0,
    device: options.Device = None,
    dtype: Annotated[str | None, unset("--dtype", help="float32 or bfloat16, to compute in; else the files'.")] = None,
    config: options.Config = None,
    tokenizer: options.Vocabulary = None,
) -> None:  # fmt: skip
    """Fine-tune on pictures with prefixes and suffixes. The data are checked whole before training starts.

    Interrupted, it saves the run; the same command goes on from there. What is trained is float32, whatever the dtype.
    """
    if tensorboard and find_spec("tensorboard") is None:
        raise SettingError("tensorboard is not installed: python -m pip install 'pgfunc[train]'")
    if find_spec("matplotlib") is None:
        say_aside(f"{fit.CURVE} is not drawn without matplotlib: python -m pip install 'pgfunc[plot]'")
    if steps is not None and epochs is not None:
        raise SettingError("give --epochs or --steps, not both")
    if not lora_rank and (lora_target or lora_alpha is not None):
        raise SettingError("--lora-target and --lora-alpha need --lora-rank")
    if checkpoint_every < 1:
        raise SettingError(f"checkpoint-every is {checkpoint_every}, expected 1 or more")
    outputs.check_folder(out, "--out")
    outputs.check_apart([out], [examples, valid, images, model or shipped(), config, tokenizer], "--out")
    rows, others = data.read(examples, images), data.read(valid, images) if valid else []
    outputs.check_apart([out], {path for row in [*rows, *others] for path in row.images}, "--out")
    loaded = pg.load(model, None, device, config, tokenizer)
    if steps is None:
        steps = (3 if epochs is None else epochs) * data.steps_per_epoch(max(1, batch_size), len(rows))
    settings = run.Settings(
        steps=steps, batch_size=batch_size, accumulate=accumulate,
        learning_rate=usual_rate(loaded.params, lora_rank) if learning_rate is None else learning_rate,
        warmup=steps // 20 if warmup is None else warmup,
        weight_decay=weight_decay, freeze=tuple(freeze or ()), lora_rank=lora_rank,
        lora_alpha=float(lora_rank) if lora_alpha is None else lora_alpha,
        lora_targets=tuple(lora_target or TARGETS) if lora_rank else (),
        dtype=dtype or str(loaded.params.projector.dtype).removeprefix("torch."), seed=seed, recompute=recompute,
    )  # fmt: skip
    job = run.Job(loaded, rows, settings)
    data.check(loaded, tqdm([*rows, *others], desc="checking", unit="line", leave=False, disable=None))
    with enough_memory(SAVING):
        state = fit.begin(job, out)
        with watching(job, state, out, tensorboard) as watch, ending():
            fit.fit(job, out, state, others, checkpoint_every, watch, str(find(model)) if model is None else model)
    first, *_, last = fit.read_log(out) * 2
    print(f"{harmless(str(out))}: {steps} steps, loss {first['loss']:.4f} -> {last['loss']:.4f}" + (
        f", validation {last['valid']:.4f}" if valid else ""))  # fmt: skip


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="A folder that LoRA's training left, here or in PEFT.")],
    target: Annotated[Path, typer.Argument(help="A folder for the model, in Hugging Face layout.")],
    model: options.ModelName = None,
    config: options.Config = None,
    tokenizer: options.Vocabulary = None,
    force: options.Force = False,
) -> None:
    """Add a LoRA adapter to the model that it was trained on, and save that as a model; --adapter runs it unsaved."""
    outputs.check_folder(target)
    outputs.check_apart([target], [find(model), adapter, config, tokenizer])
    outputs.check_new(target, force)
    merged = pg.load(model, None, "cpu", config, tokenizer, adapter=adapter)
    write_folder(target, merged, find(model))
    kind, size = dtype_name(merged.params.projector), tree.nbytes(merged.params)
    print(f"{harmless(str(target))}: Hugging Face layout, {kind}, {size:,} bytes")


def usual_rate(params: pg.Params, lora_rank: int) -> float:
    """The learning rate where none is given; LoRA's pairs take ten times that of the weights.

    1e-5 is big_vision's for PaliGemma (configs/proj/paligemma/transfers/forkme.py, cococap.py), its warm-up of 5% too.
    The shipped checkpoint, a thousandth of the size, learns next to nothing from that; at 1e-3 it forgets what it knew.
    """
    return (3e-4 if tree.count(params) < 10**8 else 1e-5) * (10 if lora_rank else 1)


def stopped(saved: int | None, done: int) -> str:
    """What an interrupt leaves: the step of the state on the disk, where there is one, and the last that was done.

    That may be a step ahead: an interrupt before the end of a step is one before the step.
    """
    if saved is None:
        return "stopped; nothing was saved"
    if saved < done - 1:
        return f"stopped; the last save is that of step {saved}; the same command goes on from there"
    return "stopped and saved; the same command goes on"


class Terminated(KeyboardInterrupt):
    """A signal that ends a run; its argument is the number."""


@contextmanager
def ending() -> Iterator[None]:
    """SIGTERM, of job schedulers, and SIGHUP, of a terminal that closes, interrupt the block as SIGINT does.

    In the main thread, and unless somebody has said what they do, as nohup does.
    """

    def stop(number: int, frame: Any) -> None:
        raise Terminated(number)

    signals = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    main = current_thread() is main_thread()
    mine = [number for number in signals if main and signal.getsignal(number) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def watching(
    job: run.Job, state: run.State, out: Path, tensorboard: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar with the loss, and TensorBoard's logs; an interrupt is a line that says how to go on."""
    done = int(state.optimizer.step)
    if done:
        tqdm.write(f"{harmless(str(out))}: going on after step {done}")
    writer = None
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)
    bar = tqdm(total=job.settings.steps, initial=done, unit="step", disable=None)

    def watch(entry: dict[str, Any]) -> None:
        nonlocal done
        done = entry["step"]
        bar.update()
        bar.set_postfix({name: f"{entry[name]:.4f}" for name in ("loss", "valid") if name in entry})
        if writer:
            for name in entry.keys() - {"step"}:
                writer.add_scalar(name, entry[name], entry["step"])

    try:
        yield watch
    except KeyboardInterrupt as stop:
        bar.close()
        tqdm.write(f"{harmless(str(out))}: {stopped(run.step_in(out / fit.STATE), done)}")
        raise typer.Exit(128 + (stop.args[0] if isinstance(stop, Terminated) else signal.SIGINT)) from None
    finally:
        bar.close()
        if writer:
            writer.close()
