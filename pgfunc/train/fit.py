"""Fine-tuning from start to end in one folder: where a run is saved, its log, its curve, what stays when it is done.

run.safetensors    the state of an unfinished run; gone when the run is done
log.jsonl          a line a step
loss.png           the curve
model.safetensors, config.json, tokenizer.json ...     the trained model; or of LoRA, PEFT's two files
"""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pgfunc.checkpoint import ADAPTER, conversion
from pgfunc.checkpoint.hf_config import CONFIG
from pgfunc.checkpoint.writing import reporting_write_errors
from pgfunc.errors import CheckpointError, NumericalError, SettingError
from pgfunc.files.atomic import replacing, write_text
from pgfunc.train import lora, run
from pgfunc.train.data import Example, steps_per_epoch
from pgfunc.train.run import Job, State

STATE, LOG, CURVE = "run.safetensors", "log.jsonl", "loss.png"


def begin(job: Job, out: Path) -> State:
    """The state to go on from: that of an unfinished run in the folder, else a fresh one.

    Raises SettingError when the folder holds a model, or a run with other settings.
    """
    for name in (CONFIG, ADAPTER):
        if (out / name).exists() and not (out / STATE).exists():
            raise SettingError(f"{out} holds a model already ({name}); give another folder")
    state = run.resume(out / STATE, job) if (out / STATE).exists() else run.start(job)
    done = int(state.optimizer.step)
    with reporting_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_log(out) if entry["step"] <= done] if done else []
        write_text(out / LOG, "".join(map(line, kept)))
    return state


def fit(
    job: Job, out: Path, state: State, valid: Sequence[Example] = (), every: int = 100,
    watch: Callable[[dict[str, Any]], None] = lambda entry: None, base: str = "",
) -> State:  # fmt: skip
    """Train to the last step, saving the state and drawing the curve every so many, then save the model.

    `watch` is shown each line of the log. The loss over `valid` is taken at the end of every epoch. An interrupt saves
    the state and is raised again; a second one may come before that is done, and then the older state is there. `base`
    names the model before training, a folder or a hub id: LoRA's files give that name, and a folder's mask decoder
    comes along. Raises NumericalError where training diverges: what is not finite is never saved.
    """
    frozen, given = run.cast(job), job.settings
    epoch = steps_per_epoch(given.batch_size, len(job.examples))
    try:
        for step in range(int(state.optimizer.step) + 1, given.steps + 1):
            new, report = run.advance(job, state, frozen)
            entry: dict[str, Any] = report._asdict()
            if valid and (step % epoch == 0 or step == given.steps):
                entry["valid"] = run.evaluate(job, new, frozen, valid)
            with reporting_write_errors(out / LOG), (out / LOG).open("a") as log:
                log.write(line(entry))
            watch(entry)
            state = new  # last: an interrupt before it is one before the step, and the log is cut to that
            if step % every == 0:
                keep(job, out, state)
        finish(job, out, state, base)
    except KeyboardInterrupt:
        keep(job, out, state)
        raise
    except NumericalError as error:
        raise NumericalError(f"{error}; {saved(out)}") from error
    return state


def keep(job: Job, out: Path, state: State) -> None:
    """Save the state, and draw the curve so far."""
    run.save(out / STATE, job, state)
    draw(out / CURVE, read_log(out))


def saved(out: Path) -> str:
    """What of an unfinished run is on the disk, in words."""
    step = run.step_in(out / STATE)
    return "nothing was saved" if step is None else f"the state after step {step} is in {out / STATE}"


def line(entry: dict[str, Any]) -> str:
    """A line of the log."""
    return json.dumps(entry, allow_nan=False) + "\n"


def finish(job: Job, out: Path, state: State, base: str) -> None:
    """Save what was trained and draw its curve; then the run is no longer unfinished."""
    if job.settings.lora_rank:
        lora.save(out, run.adapter(job, state.trained), job.model.cfg, base)
    else:
        conversion.write_folder(out, run.finished(job, state), Path(base) if base and Path(base).is_dir() else None)
    draw(out / CURVE, read_log(out))
    (out / STATE).unlink(missing_ok=True)


def read_log(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; one that was cut off while it was written is none."""
    try:
        text = (out / LOG).read_text() if (out / LOG).exists() else ""
        found = [json.loads(line) for line in text.split("\n")[:-1]]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{out / LOG}: not the log of a run ({error}); give another folder") from error
    for number, entry in enumerate(found, 1):
        given = {"valid": 0.0} | entry if isinstance(entry, dict) else {}
        if {type(given.get(key)) for key in ("step", "loss", "valid")} - {int, float}:
            raise CheckpointError(f"{out / LOG}:{number}: step, loss or valid is no number; give another folder")
    return found


def draw(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """The loss of every step, its running mean, and the validation loss, as a PNG; nothing without matplotlib."""
    if find_spec("matplotlib") is None or not entries:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps, losses = [entry["step"] for entry in entries], [entry["loss"] for entry in entries]
    window = max(1, len(losses) // 20)
    total, ends = np.cumsum([0.0, *losses]), np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    means = (total[ends] - total[starts]) / (ends - starts)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3 if window > 1 else 1, label="a batch")
    if window > 1:
        axes.plot(steps, means, color="tab:blue", label=f"mean of the last {window} batches")
    if checked := [(entry["step"], entry["valid"]) for entry in entries if "valid" in entry]:
        axes.plot(*zip(*checked, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with reporting_write_errors(path), replacing(path) as file:
        figure.savefig(file, format="png")
