"""Complete a stream of rows: an iterator of rows in, results out as they are ready, in bounded memory.

reading.py     rows and their pictures, read ahead by worker processes
prefilling.py  rows of one shape become a cache; each picture is encoded once
decoding.py    the rows that are decoded together, and change places
scheduling.py  which rows are next
distributed.py the same on many machines
"""

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

from pgfunc.config import Config, SiglipConfig
from pgfunc.many.prefilling import MULTIPLE, group_for
from pgfunc.many.reading import Reader, Request
from pgfunc.many.scheduling import Plan, Result, run
from pgfunc.prompt import Model
from pgfunc.sample import Settings, checked_int

PLACES = {"cpu": 16, "cuda": 64}  # rows that are decoded together, unless the caller says how many
MOST_WORKERS = 8
GROUP = 2 * MULTIPLE  # pictures that `read_many` gives together


def generate_many(
    model: Model,
    rows: Iterable[Any],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    compile: bool = False,
    batch: int | None = None,
    workers: int | None = None,
) -> Generator[Result, None, None]:
    """Complete each row of a stream. Results come as they are ready, in any order.

        rows = ((path, "caption en") for path in paths)
        for result in pg.generate_many(model, rows):
            print(result.row[0], result.completion.text if result.completion else result.error)

    A row is (picture or list of pictures, prefix), as for `generate`, and draws the same tokens as there. A third part,
    if there is one, is the row's number in place of its index: a run that is resumed, or split among machines, then
    draws what one run would. Rows are read ahead, in another thread, and `workers` processes decode the pictures (0:
    none; default: half of the CPUs, at most 8). `batch` rows are decoded together (default: 16 on a CPU, 64 on a GPU);
    a row that has ended makes room for another while the others go on. Rows that name the same file share its encoding.
    Memory does not depend on the number of rows. `compile` is as in `generate`.

    A row whose picture cannot be read, or that does not fit the model, has an `error` in place of a completion. In
    float32 on a CPU a completion does not depend on the other rows, to the bit. Raises SettingError at the call if a
    setting is outside its range.
    """
    settings = Settings(temperature, top_k, top_p, min_p)
    device = model.params.projector.device
    return run(model, rows, plan(device.type, settings, max_new_tokens, seed, compile, batch, workers))


def plan(
    device: str, settings: Settings, max_new_tokens: int, seed: int, compile: bool, batch: int | None,
    workers: int | None,
) -> Plan:  # fmt: skip
    """The plan that these arguments of `generate_many` make on a kind of device. Raises SettingError."""
    most, seed = checked_int("max-new-tokens", max_new_tokens, 1), checked_int("seed", seed, 0, 2**32 - 1)
    places = PLACES.get(device, PLACES["cpu"]) if batch is None else checked_int("batch", batch, 1)
    readers = default_workers() if workers is None else checked_int("workers", workers, 0)
    return Plan(settings, most, seed, places, group_for(places, compile), readers)


def default_workers() -> int:
    """How many processes read pictures, unless the caller says how many."""
    return min(MOST_WORKERS, max(1, (os.cpu_count() or 1) // 2))


def read_many(sources: Iterable[tuple[Any, str, int]], cfg: Config | SiglipConfig) -> Iterator[list[Request]]:
    """Rows with their pictures, read ahead by worker processes, in groups: for functions that need no decoding."""
    with closing(Reader(sources, cfg, 4 * GROUP, default_workers())) as reader:
        group = []
        while (request := reader.get()) is not None:
            group.append(request)
            if len(group) == GROUP:
                yield group
                group = []
        if group:
            yield group
