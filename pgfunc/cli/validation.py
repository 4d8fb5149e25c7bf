"""The metrics that `train` logs beside the loss: those of `evaluate`, on the first validation lines of each task."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pgfunc.cli.options import print_note
from pgfunc.errors import DataError, SettingError

if TYPE_CHECKING:
    from pgfunc.evaluation.rows import Row, Task
    from pgfunc.objects import vqvae
    from pgfunc.prompt import Model
    from pgfunc.train.data import Example

LINES = 64  # of each task


def metrics_on(
    examples: "Sequence[Example]", lines: int, model: "Model", name: str | None
) -> "Callable[[Model], dict[str, float]]":
    """A function from a model to its metrics on the first `lines` examples of each task, as `task/metric`.

    `name` is that of the model before training, whose folder may have a mask decoder. A note says which tasks have no
    metrics, and why. Raises SettingError if `lines` is negative.
    """
    from pgfunc.evaluation import tasks

    if lines < 0:
        raise SettingError(f"--valid-lines is {lines}, expected 0 or more")
    if not examples or not lines:
        return lambda model: {}
    try:
        tasks.check_packages()
    except SettingError as error:
        print_note(f"no metrics of answers: {error}")
        return lambda model: {}
    chosen, vq = rows_by_task(examples, lines), None
    if "segment" in chosen and (vq := mask_decoder(model, name)) is None:
        print_note("no metrics of segment: the model's folder has no mask decoder")
        del chosen["segment"]

    def measure(trained: "Model") -> dict[str, float]:
        metrics: dict[str, float] = {}
        for task, rows in chosen.items():
            done = tasks.evaluate(trained, task, rows, vq, workers=0)  # starting processes takes longer
            metrics |= {f"{task}/{name}": one.value for name, one in done.metrics.items() if one.value is not None}
            for case in [case for case in done.cases if case.error][:1]:
                print_note(f"{case.row.where}: {case.error}; it counts as a wrong answer")
        return metrics

    return measure


def rows_by_task(examples: "Sequence[Example]", lines: int) -> "dict[Task, list[Row]]":
    """The first rows of each task that a prefix names; without tasks whose suffixes are not what the task needs."""
    from pgfunc.evaluation.rows import TASKS, Row, of_task, task_of

    rows = [Row(one.where, one.images, one.prefix, (one.suffix,), None) for one in examples]
    chosen: dict[Task, list[Row]] = {}
    for task in TASKS:
        try:
            if own := [row for row in rows if task_of(row) == task]:
                chosen[task] = of_task(own[:lines], task)
        except DataError as error:
            print_note(f"no metrics of {task}: {error}")
    return chosen


def mask_decoder(model: "Model", name: str | None) -> "vqvae.Params | None":
    """The mask decoder in the folder of a model, on the model's device; None if there is none."""
    from pgfunc.cli.finding import mask_decoder_beside
    from pgfunc.objects import segment

    path = mask_decoder_beside(name)
    return segment.load(path, model.params.projector.device) if path.exists() else None
