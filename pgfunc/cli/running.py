"""A command over many pictures: which are left, their results in the order of the inputs, errors, and the progress.

Results go to a file (`results.py`), or are printed. A picture that cannot be read is a row with its error in the file,
and a note; the run goes on, and its exit status is 1.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import typer
from tqdm import tqdm

from pgfunc.cli.inputs import Inputs, Item, is_folder
from pgfunc.cli.options import OnError, print_note, print_result
from pgfunc.cli.results import SUFFIXES, Writer, check_results, is_results, opened
from pgfunc.errors import DataError, PgfuncError, SettingError

LINE_EVERY = 30.0  # seconds between two lines about the progress, where there is no terminal


class Outcome(NamedTuple):
    """What was found about a picture, or its error."""

    item: Item
    record: dict[str, Any]  # for JSON, without the picture's name
    lines: Sequence[str] = ()  # for people
    notes: Sequence[str] = ()  # for people, on standard error
    error: PgfuncError | None = None


class Output(NamedTuple):
    """Where results go."""

    as_json: bool
    file: Path | None = None  # of results
    resume: bool = False
    stop: bool = False  # at the first error
    silent: bool = False  # print nothing


def results_output(
    inputs: Inputs, read: Sequence[str | None], out: Path | None, resume: bool, on_error: OnError, as_json: bool,
    also: str = "", objects: bool = False,
) -> Output:  # fmt: skip
    """Where the results of a command go.

    `read`: the other files that it reads. `also`: one more ending that it writes. `objects`: it writes COCO's too.
    Raises SettingError if they cannot be written there, or if --resume has nothing to continue.
    """
    if resume and out is None:
        raise SettingError("--resume needs --out, the file of results to continue")
    if out is not None:
        if not is_results(out, objects):
            endings = ", ".join(filter(None, [also, *SUFFIXES]))
            raise SettingError(f"--out {out}: expected a name that ends in {endings}")
        check_results(out, [*(name for name in inputs.arguments if not is_folder(name)), *read], resume)
    return Output(as_json, out, resume, on_error is OnError.stop)


def run(
    inputs: Inputs,
    asked: Callable[[Item], str],
    compute: Callable[[Iterable[Item]], Iterator[Outcome]],
    output: Output,
) -> int:
    """Compute the outcomes of all pictures that have none yet, and write or print them. Returns the number of errors.

    `asked` is what a row of the file says was asked about a picture. Raises the error of a single picture, and with
    `stop` that of any.
    """
    with opened(output.file, output.resume) if output.file else nullcontext() as writer:
        before, errors = (writer.count, writer.errors) if writer else (0, 0)
        progress = Progress(inputs.total, before, errors)
        skip = (lambda item: writer.skips(item, asked(item))) if writer else (lambda item: False)
        try:
            for outcome in in_order(inputs.items, skip, compute):
                if outcome.error and (inputs.single or output.stop):
                    raise outcome.error
                report(outcome, output, writer)
                progress.step(outcome.error is not None)
        except KeyboardInterrupt:
            progress.close()
            if writer:
                print_note(f"{output.file}: stopped; --resume continues the run")
            raise typer.Exit(130) from None
        finally:
            progress.close()
    if output.file and progress.errors:
        print_note(f"{output.file}: {progress.errors} of {progress.done} rows are errors")
    return progress.errors


def exit_if(errors: int) -> None:
    """End with status 1 if there were errors; called after all results are written."""
    if errors:
        raise typer.Exit(1)


def in_order(
    items: Iterable[Item], skip: Callable[[Item], bool], compute: Callable[[Iterable[Item]], Iterator[Outcome]]
) -> Iterator[Outcome]:
    """The outcomes of the items that are not skipped, in the order of the items, whatever order they come in."""
    started: deque[int] = deque()
    waiting: dict[int, Outcome] = {}

    def remaining() -> Iterator[Item]:
        for item in items:
            if not skip(item):
                started.append(item.number)
                yield item

    for outcome in compute(remaining()):
        waiting[outcome.item.number] = outcome
        while started and started[0] in waiting:
            yield waiting.pop(started.popleft())


def report(outcome: Outcome, output: Output, writer: Writer | None) -> None:
    """Write or print one outcome."""
    item, record = outcome.item, {"image": outcome.item.image} | outcome.record
    if both := record.keys() & item.columns.keys():
        raise DataError(f"the table has a column {min(both)!r}, which results have too; give it another name")
    if outcome.error:
        print_note(str(outcome.error))
    if writer:
        writer.write(record | item.columns | ({"error": str(outcome.error)} if outcome.error else {}))
    elif not outcome.error and not output.silent:
        print_result(record | item.columns, output.as_json, *(f"{item.image}: {line}" for line in outcome.lines))
        for note in () if output.as_json else outcome.notes:
            print_note(f"{item.image}: {note}")


class Progress:
    """How far a run is: a bar on a terminal, elsewhere a line from time to time."""

    def __init__(self, total: int | None, done: int, errors: int):
        self.total, self.done, self.errors = total, done, errors
        self._before, self._began = done, monotonic()
        self._last = self._began
        self._bar = tqdm(
            total=total, initial=done, unit="picture", leave=False, disable=True if total == 1 else None, smoothing=0.1
        )

    def step(self, failed: bool) -> None:
        """Count a picture."""
        self.done, self.errors = self.done + 1, self.errors + failed
        if self.errors:
            self._bar.set_postfix(errors=self.errors, refresh=False)
        self._bar.update()
        now = monotonic()
        if now - self._last > LINE_EVERY and not sys.stderr.isatty():
            self._last = now
            print_note(self._line(now - self._began))

    def _line(self, seconds: float) -> str:
        rate = (self.done - self._before) / seconds
        of = f" of {self.total}" if self.total else ""
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.total else ""
        return f"{self.done}{of} pictures, {rate:.1f} pictures/s{left}, errors: {self.errors}"

    def close(self) -> None:
        self._bar.close()
