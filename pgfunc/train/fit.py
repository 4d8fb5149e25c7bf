"""Fine-tuning from start to end in one folder: where a run is saved, its log, its curve, what stays when it is done.

run.safetensors    the state of an unfinished run; gone when the run is done
log.jsonl          a line a step
loss.png           the curve
model.safetensors, config.json, tokenizer.json ...     the trained model; or of LoRA, PEFT's two files
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgfunc import checkpoint
from pgfunc.checkpoint import ADAPTER
from pgfunc.checkpoint.hf_config import CONFIG
from pgfunc.errors import CheckpointError, SettingError
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
    try:
        out.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_log(out) if entry["step"] <= done] if done else []
        (out / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error})") from error
    return state


def fit(
    job: Job, out: Path, state: State, valid: Sequence[Example] = (), every: int = 100,
    watch: Callable[[dict[str, Any]], None] = lambda entry: None, base: str = "",
) -> State:  # fmt: skip
    """Train to the last step, saving every so many, then save the model and draw the curve.

    `watch` is shown each line of the log. The loss over `valid` is taken at the end of every epoch. An interrupt saves
    the state and is raised again. `base` is the name that LoRA's files give of the model they belong to.
    """
    frozen, given = run.cast(job), job.settings
    epoch = steps_per_epoch(given.batch_size, len(job.examples))
    try:
        for step in range(int(state.optimizer.step) + 1, given.steps + 1):
            new, report = run.advance(job, state, frozen)
            entry: dict[str, Any] = report._asdict()
            if valid and (step % epoch == 0 or step == given.steps):
                entry["valid"] = run.evaluate(job, new, frozen, valid)
            with (out / LOG).open("a") as log:
                log.write(json.dumps(entry) + "\n")
            watch(entry)
            state = new  # last: an interrupt before it is one before the step, and the log is cut to that
            if step % every == 0:
                run.save(out / STATE, job, state)
        finish(job, out, state, base)
    except KeyboardInterrupt:
        run.save(out / STATE, job, state)
        raise
    return state


def finish(job: Job, out: Path, state: State, base: str) -> None:
    """Save what was trained and draw its curve; then the run is no longer unfinished."""
    if job.settings.lora_rank:
        lora.save(out, run.adapter(job, state.trained), job.model.cfg, base)
    else:
        checkpoint.save(run.finished(job, state), out)
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
    """The loss of every step, its running mean, and the validation loss, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps, losses = [entry["step"] for entry in entries], [entry["loss"] for entry in entries]
    window = max(1, len(losses) // 20)
    means = [float(np.mean(losses[max(0, i + 1 - window) : i + 1])) for i in range(len(losses))]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3 if window > 1 else 1, label="a batch")
    if window > 1:
        axes.plot(steps, means, color="tab:blue", label=f"mean of the last {window} batches")
    if checked := [(entry["step"], entry["valid"]) for entry in entries if "valid" in entry]:
        axes.plot(*zip(*checked, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
