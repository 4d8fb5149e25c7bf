"""The file of results: a row for each picture, written as soon as the row is known, so that a killed run can go on.

    results.jsonl                 JSON Lines, in the order of the inputs
    results.csv  results.parquet  tables, made at the end; until then the rows are in .results.csv.jsonl beside it
    results.json                  boxes and masks as COCO's JSON, made at the end in the same way

Each row is written by one call and ends in a newline, so only the last line can be torn, and `--resume` removes it. A
picture that has a row is not read again, also if its row is an error. This module knows nothing about models.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from pgfunc.cli.inputs import Item
from pgfunc.cli.options import check_file, print_note, to_json
from pgfunc.errors import DataError, SettingError
from pgfunc.files.atomic import replacing
from pgfunc.files.locks import lock, not_inherited
from pgfunc.files.outputs import check_apart, write_errors

SUFFIXES = (".jsonl", ".csv", ".parquet")
COCO = ".json"
PART = re.compile(r"^(<loc\d{4}>){4} ")  # of a picture, before the prefix: see `detect.region`

Record = dict[str, Any]


def is_results(path: Path | None, objects: bool = False) -> bool:
    """Whether the name of a file is that of a file of results; with `objects`, also of COCO's JSON."""
    return path is not None and path.suffix.lower() in (*SUFFIXES, *([COCO] if objects else []))


def is_coco(path: Path | None) -> bool:
    return path is not None and path.suffix.lower() == COCO


def check_results(path: Path, inputs: Sequence[str | None], resume: bool) -> None:
    """Raise SettingError if results cannot be written to this file: called before anything is computed."""
    check_file(path)
    check_apart([path], inputs, "--out")
    if not resume and (path.exists() or working_file(path).exists()):
        raise SettingError(f"--out {path}: exists already; continue it with --resume, or give another name")
    if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        raise SettingError(
            f"--out {path}: needs pyarrow: python -m pip install 'pgfunc[parquet]'; or give a .csv or .jsonl"
        )


def working_file(path: Path) -> Path:
    """The file that rows are appended to."""
    return path if path.suffix.lower() == ".jsonl" else path.with_name(f".{path.name}.jsonl")


class Writer:
    """The rows that are done, and the file that new ones are appended to."""

    def __init__(self, descriptor: int, done: Iterable[Record]):
        self._descriptor = descriptor
        self._done: Counter[tuple[str, str]] = Counter()
        self.errors = 0
        for record in done:
            self._done[key_of(record)] += 1
            self.errors += "error" in record
        self.count = self._done.total()

    def skips(self, item: Item, asked: str) -> bool:
        """Whether a picture has its row. Call it once for each input: of equal inputs, each has a row of its own."""
        key = item.image, asked
        if not self._done[key]:
            return False
        self._done[key] -= 1
        return True

    def write(self, record: Record) -> None:
        """Append a row."""
        line = (to_json(record) + "\n").encode()
        while line:
            line = line[os.write(self._descriptor, line) :]


def key_of(record: Record) -> tuple[str, str]:
    """What tells the rows of a file apart: the picture, and what was asked about it, without the part (--box)."""
    return record["image"], PART.sub("", record.get("prompt", record.get("template", "")))


@contextmanager
def opened(path: Path, resume: bool) -> Iterator[Writer]:
    """A writer for the file of results. At the end of the block, the file is made.

    Raises SettingError if another process writes it, and DataError if it has other rows. If it is finished, exits.
    """
    work = working_file(path)
    if resume and work != path and path.exists() and not work.exists():
        print_note(f"{path}: is finished; nothing to do")
        raise typer.Exit
    with write_errors(path, option="--out"):
        descriptor = os.open(work, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        with not_inherited(descriptor):  # else a worker process would hold the lock, after its parent was killed
            if lock(descriptor, exclusive=True, wait=False) is False:
                raise SettingError(f"--out {path}: another process is writing it")
            repair(descriptor)
            yield Writer(descriptor, records(work))
            os.fsync(descriptor)
            if work != path:
                with write_errors(path, option="--out"):
                    finish(work, path)
                work.unlink()
    finally:
        os.close(descriptor)


def repair(descriptor: int) -> None:
    """Remove the last line of a file if it does not end: its writer was killed."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    start = end
    while start > 0:
        size = min(start, 2**16)
        start -= size
        newline = os.pread(descriptor, size, start).rfind(b"\n")
        if newline >= 0:
            os.ftruncate(descriptor, start + newline + 1)
            return
    os.ftruncate(descriptor, 0)


def records(path: Path) -> Iterator[Record]:
    """The rows of a file of JSON Lines. Raises DataError if a line is not a row of results."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                key_of(record)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path}:{number}: is not a row of results; give another name to --out") from error
            yield record


def finish(work: Path, path: Path) -> None:
    """Make the final file from the rows."""
    with replacing(path) as file:
        if path.suffix.lower() == ".parquet":
            write_parquet(work, file)
        elif path.suffix.lower() == ".csv":
            write_csv(work, file)
        else:
            from pgfunc.objects.coco import numbered

            found = (record for record in records(work) if "error" not in record)
            file.write(to_json(numbered(found)).encode())


def write_csv(work: Path, file: Any) -> None:
    """The rows as CSV; lists and objects as JSON."""
    columns = columns_of(work)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    table = csv.DictWriter(text, columns)
    table.writeheader()
    for record in records(work):
        table.writerow({name: value if isinstance(value, str) else to_json(value) for name, value in record.items()})
    text.detach()


def columns_of(work: Path) -> list[str]:
    """The columns of all rows, in the order of their first use."""
    return list(dict.fromkeys(name for record in records(work) for name in record))


def write_parquet(work: Path, file: Any) -> None:
    """The rows as Parquet."""
    import pyarrow
    import pyarrow.parquet

    columns = columns_of(work)
    rows = [{name: record.get(name) for name in columns} for record in records(work)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
