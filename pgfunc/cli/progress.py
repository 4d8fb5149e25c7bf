"""A training run on the terminal: its progress bar, TensorBoard's logs, and the signals that interrupt it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import typer
from tqdm import tqdm

from pgfunc.errors import escape_controls
from pgfunc.train import fit, run


def stop_message(saved: int | None, done: int) -> str:
    """What remains of an interrupted run. `saved`: the step of the state on disk, if any. `done`: the last logged step.

    The log may be one step ahead of the state: if the interrupt comes before the end of a step, the step is repeated.
    """
    if saved is None:
        return "stopped; nothing was saved"
    if saved < done - 1:
        return f"stopped; the last save is that of step {saved}; the same command continues from there"
    return "stopped and saved; the same command continues the run"


class Terminated(KeyboardInterrupt):
    """A signal that ends a run. Its argument is the number of the signal."""


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM (from job schedulers) and SIGHUP (from a closing terminal) interrupt the block as SIGINT does.

    Only in the main thread, and only if nobody has set a handler for the signal, as nohup does.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise Terminated(number)

    signals = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    in_main = current_thread() is main_thread()
    unhandled = [number for number in signals if in_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in unhandled:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in unhandled:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def watching(
    job: run.Job, state: run.State, out: Path, tensorboard: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar with the losses, and TensorBoard's logs. An interrupt prints how to continue, and exits."""
    done = int(state.optimizer.step)
    if done:
        tqdm.write(f"{escape_controls(str(out))}: continuing after step {done}")
    writer = None
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)
    bar = tqdm(total=job.settings.steps, initial=done, unit="step", disable=None)

    def watch(entry: dict[str, Any]) -> None:
        nonlocal done
        done = entry["step"]
        bar.update()
        shown = [name for name in ("loss", "valid") if name in entry] + fit.headline(entry)
        bar.set_postfix({name.removeprefix(fit.VALID): f"{entry[name]:.4f}" for name in shown})
        if writer:
            for name in entry.keys() - {"step"}:
                writer.add_scalar(name, entry[name], entry["step"])

    try:
        yield watch
    except KeyboardInterrupt as stop:
        bar.close()
        tqdm.write(f"{escape_controls(str(out))}: {stop_message(run.step_in(out / fit.STATE), done)}")
        raise typer.Exit(128 + (stop.args[0] if isinstance(stop, Terminated) else signal.SIGINT)) from None
    finally:
        bar.close()
        if writer:
            writer.close()
