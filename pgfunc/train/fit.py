"""Fine-tuning from start to end in one folder, which holds the files of a run.

run.safetensors    the state of an unfinished run; removed when the run is done
log.jsonl          the log, a line per step
loss.png           the curve of the loss
model.safetensors, config.json, tokenizer.json ...     the trained model, or PEFT's two files for LoRA
"""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pgfunc.checkpoint import ADAPTER, conversion
from pgfunc.checkpoint.hf_config import CONFIG
from pgfunc.errors import CheckpointError, NumericalError, SettingError
from pgfunc.files.atomic import replacing, write_text
from pgfunc.files.outputs import write_errors
from pgfunc.prompt import Model
from pgfunc.train import lora, run
from pgfunc.train.data import Example, steps_per_epoch
from pgfunc.train.run import Job, State

STATE, LOG, CURVE = "run.safetensors", "log.jsonl", "loss.png"
VALID = "valid/"  # what the names of metrics begin with in the log
HEADLINES = ("cider", "exact", "vqa_accuracy", "cer", "ap", "mean_iou")  # the metrics to show where room is scarce


def begin(job: Job, out: Path) -> State:
    """The state to start from: that of an unfinished run in the folder, otherwise a new one.

    Raises SettingError if the folder holds a model, or a run with other settings.
    """
    for name in (CONFIG, ADAPTER):
        if (out / name).exists() and not (out / STATE).exists():
            raise SettingError(f"{out} holds a model already ({name}); give another folder")
    state = run.resume(out / STATE, job) if (out / STATE).exists() else run.start(job)
    done = int(state.optimizer.step)
    with write_errors(out, CheckpointError):
        out.mkdir(parents=True, exist_ok=True)
        entries = [entry for entry in read_log(out) if entry["step"] <= done] if done else []
        write_text(out / LOG, "".join(map(log_line, entries)))
    return state


def fit(
    job: Job, out: Path, state: State, valid: Sequence[Example] = (), every: int = 100,
    watch: Callable[[dict[str, Any]], None] = lambda entry: None, base: str = "",
    measure: Callable[[Model], dict[str, float]] = lambda model: {},
) -> State:  # fmt: skip
    """Train to the last step, saving the state and drawing the curve every `every` steps, then save the model.

    `watch` is called with each entry of the log. At the end of every epoch, the loss over `valid` and the metrics that
    `measure` finds for the model so far are added to the entry, each metric under VALID and its own name. An interrupt
    saves the state and is raised again; if a second one comes before the state is saved, the older state remains.
    `base` names the model before training, a folder or a hub id: LoRA's files contain this name, and the mask decoder
    of a folder is copied. Raises NumericalError if training diverges; a state that is not finite is never saved.
    """
    frozen, settings = run.cast(job), job.settings
    epoch = steps_per_epoch(settings.batch_size, len(job.examples))
    try:
        for step in range(int(state.optimizer.step) + 1, settings.steps + 1):
            new, report = run.advance(job, state, frozen)
            entry: dict[str, Any] = report._asdict()
            if valid and (step % epoch == 0 or step == settings.steps):
                entry["valid"] = run.evaluate(job, new, frozen, valid)
                metrics = measure(run.finished(job, new))
                entry |= {f"{VALID}{name}": value for name, value in metrics.items()}
            with write_errors(out / LOG, CheckpointError), (out / LOG).open("a") as log:
                log.write(log_line(entry))
            watch(entry)
            state = new  # last: after an earlier interrupt the step is repeated, and its line of the log is dropped
            if step % every == 0:
                save_progress(job, out, state)
        finish(job, out, state, base)
    except KeyboardInterrupt:
        save_progress(job, out, state)
        raise
    except NumericalError as error:
        raise NumericalError(f"{error}; {saved_state(out)}") from error
    return state


def headline(entry: dict[str, Any]) -> list[str]:
    """The names of the most telling metrics in an entry of the log."""
    return [name for name in entry if name.startswith(VALID) and name.split("/")[-1] in HEADLINES]


def save_progress(job: Job, out: Path, state: State) -> None:
    """Save the state, and draw the curve so far."""
    run.save(out / STATE, job, state)
    draw(out / CURVE, read_log(out))


def saved_state(out: Path) -> str:
    """A phrase for messages: which state of an unfinished run is on disk."""
    step = run.step_in(out / STATE)
    return "nothing was saved" if step is None else f"the state after step {step} is in {out / STATE}"


def log_line(entry: dict[str, Any]) -> str:
    """An entry as a line of the log."""
    return json.dumps(entry, allow_nan=False) + "\n"


def finish(job: Job, out: Path, state: State, base: str) -> None:
    """Save the trained model or adapter, draw the curve, and then remove the state."""
    if job.settings.lora_rank:
        lora.save(out, run.adapter(job, state.trained), job.model.cfg, base)
    else:
        conversion.write_folder(out, run.finished(job, state), Path(base) if base and Path(base).is_dir() else None)
    draw(out / CURVE, read_log(out))
    (out / STATE).unlink(missing_ok=True)


def read_log(out: Path) -> list[dict[str, Any]]:
    """The entries of a run's log, without a last line that was cut off. Raises CheckpointError if it is not a log."""
    try:
        text = (out / LOG).read_text() if (out / LOG).exists() else ""
        entries = [json.loads(line) for line in text.split("\n")[:-1]]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{out / LOG}: not the log of a run ({error}); give another folder") from error
    for number, entry in enumerate(entries, 1):
        fields = {"valid": 0.0} | entry if isinstance(entry, dict) else {}
        keys = ["step", "loss", "valid", *headline(fields)]
        if {type(fields.get(key)) for key in keys} - {int, float}:
            raise CheckpointError(f"{out / LOG}:{number}: step, loss or valid is not a number; give another folder")
    return entries


def draw(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Draw the loss of every step, its running mean, and the validation loss, as a PNG. Needs matplotlib.

    If the log has metrics, a second plot below has a line for each of the most telling ones.
    """
    if find_spec("matplotlib") is None or not entries:
        return
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for entry in entries for name in headline(entry)))
    figure = Figure(figsize=(7, 8 if names else 4), dpi=120, layout="constrained")
    axes, *below = figure.subplots(1 + bool(names), squeeze=False)[:, 0]
    steps, losses = [entry["step"] for entry in entries], [entry["loss"] for entry in entries]
    window = max(1, len(losses) // 20)
    total, ends = np.cumsum([0.0, *losses]), np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    means = (total[ends] - total[starts]) / (ends - starts)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3 if window > 1 else 1, label="one batch")
    if window > 1:
        axes.plot(steps, means, color="tab:blue", label=f"mean of the last {window} batches")
    if validation := [(entry["step"], entry["valid"]) for entry in entries if "valid" in entry]:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    for plot in below:
        draw_metrics(plot, entries, names)
    with write_errors(path, CheckpointError), replacing(path) as file:
        figure.savefig(file, format="png")


def draw_metrics(axes: Any, entries: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Draw a line for each of these metrics; CIDEr-D divided by 10, so that all are between 0 and 1."""
    for name in names:
        scale, label = (10, f"{name} / 10") if name.endswith("cider") else (1, name)
        points = [(entry["step"], entry[name] / scale) for entry in entries if name in entry]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label.removeprefix(VALID))
    axes.set(xlabel="step", ylabel="metric on validation lines", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
