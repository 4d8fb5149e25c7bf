"""Complete rows on many machines, as a Ray Data pipeline. Ray, which the extra `ray` installs, is imported when used.

    rows      0 1 2 3 4 5 6 7 8 9 ...
    blocks    [0 1 2 3] [4 5 6 7] [8 9 ...
    actors    each loads the model once, and completes one block after another
    results   a block at a time, as Ray delivers them

Ray schedules the blocks and limits how many results wait. If a process or a machine dies, Ray starts the actor again
and repeats the blocks that it had not finished, for ever; `Tries` ends a run in which the same thing fails again and
again. A block's results are one value, so no row is lost or comes twice.
"""

import os
import pickle
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from pgfunc.checkpoint import load
from pgfunc.errors import DeviceError, PgfuncError, SettingError
from pgfunc.many import MOST_WORKERS, plan
from pgfunc.many.reading import as_row
from pgfunc.many.scheduling import Plan, Result, run
from pgfunc.prompt import Model
from pgfunc.sample import Settings, checked_int

GROUPS = 8  # of rows that are decoded together in a block: longer blocks leave fewer places empty at their ends
BLOCKS = 4  # for each actor at least, so that all have work to the end
MOST_TRIES = 4  # of loading the model in an actor, or of a block

T = TypeVar("T")
Sent = tuple[int, tuple[Any, ...]]  # a row's index in the stream, and the row with its number


class Loading(NamedTuple):
    """The arguments of `pg.load`, with which each actor loads the model. The files must be on all machines."""

    source: str | None = None
    dtype: str | None = None
    device: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    quantize: str | None = None
    adapter: str | None = None

    def load(self, device: str | None = None) -> Model:
        """The model on its device, or on another one."""
        return load(**self._replace(device=device or self.device)._asdict())


class Share(NamedTuple):
    """The actors, and what each one has of the cluster."""

    actors: int
    cpus: int
    gpus: int
    readers: int  # processes that read pictures


class Tries:
    """An actor of Ray's that counts how often something was begun and not ended, because its process died."""

    def __init__(self):
        self.counts: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        self.counts[what] += 1
        return self.counts[what]

    def end(self, what: str) -> None:
        del self.counts[what]


class Worker:
    """An actor of Ray's: it loads the model, and completes blocks of rows.

    Its blocks and results are bytes, which Ray passes on as they are. An error that ends the run, such as that of a
    model that cannot be loaded, is the result of a block: Ray would report an exception in its own words.
    """

    def __init__(self, loading: Loading, plan: Plan, folder: str, tries: Any):
        with suppress(OSError):  # this machine lacks the folder, and then the files whose names are relative to it
            os.chdir(folder)
        self.plan, self.tries = plan, tries
        self.model = self.tried(actor_id(), loading.load)

    def __call__(self, block: dict[str, Any]) -> dict[str, bytes]:
        """The results of a block, or the error that ends the run."""
        if isinstance(self.model, PgfuncError):
            return {"results": pickle.dumps(self.model)}
        model = self.model
        done = self.tried(f"block {block['number']}", lambda: complete(model, pickle.loads(block["rows"]), self.plan))
        return {"results": pickle.dumps(done)}

    def tried(self, what: str, function: Callable[[], T]) -> T | PgfuncError:
        """What the function returns or raises; an error if this process has died of it several times."""
        import ray  # pyright: ignore[reportMissingImports]

        tries: Any = ray.get(self.tries.begin.remote(what))
        if tries > MOST_TRIES:
            return DeviceError(f"a Ray worker died {MOST_TRIES} times in the same place, perhaps for lack of memory")
        try:
            value = function()
        except PgfuncError as error:
            value = without_cause(error)
        ray.get(self.tries.end.remote(what))
        return value


def complete(model: Model, sent: Sequence[Sent], plan: Plan) -> list[tuple[int, Result]]:
    """For each row its index, and its result, which leaves out the row itself."""
    index_of = {id(row): index for index, row in sent}
    return [
        (index_of[id(result.row)], result._replace(row=None, error=result.error and without_cause(result.error)))
        for result in run(model, [row for _, row in sent], plan)
    ]


def actor_id() -> str:
    """The name of this actor, which it keeps when it is started again."""
    import ray  # pyright: ignore[reportMissingImports]

    return ray.get_runtime_context().get_actor_id() or ""


def generate_many(
    loading: Loading,
    rows: Iterable[Any],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    compile: bool = False,
    batch: int | None = None,
    actors: int | None = None,
) -> Generator[Result, None, None]:
    """Complete rows on the Ray cluster to which this process is connected (`ray.init`), as `pg.generate_many` does.

        for result in generate_many(Loading("google/paligemma2-3b-mix-224"), rows): ...

    Results come in any order, each row once, and in float32 on a CPU are those of one process. `actors` processes have
    a model each (default: one for each GPU of the cluster, or one for each 2 CPUs), and `batch` is for each of them.
    All rows are listed first; their pictures, if they are names, are read by the actors, so that memory grows with the
    names only. Names of files are relative to this process's folder.

    Raises SettingError at the call if a setting is outside its range, or if there are more `actors` than GPUs, or CPUs;
    then the errors of `pg.load`, or DeviceError if actors die again and again.
    """
    part = share(actors, loading.device)
    settings = Settings(temperature, top_k, top_p, min_p)
    kind = "cuda" if part.gpus else "cpu"
    each = plan(kind, settings, max_new_tokens, seed, compile, batch, part.readers)
    return distribute(loading, rows, each, part)


def share(actors: int | None, device: str | None) -> Share:
    """How the cluster is shared among so many actors. Raises SettingError if it is too small for them."""
    import ray  # pyright: ignore[reportMissingImports]

    has = ray.cluster_resources()
    cpus, gpus = int(has.get("CPU", 0)), 0 if device == "cpu" else int(has.get("GPU", 0))
    count = (gpus or max(1, cpus // 2)) if actors is None else checked_int("ray-workers", actors, 1)
    if count > (gpus or cpus):
        what = f"{gpus} GPUs" if gpus else f"{cpus} CPUs"
        raise SettingError(f"ray-workers is {count}, and the cluster has {what}; expected at most {gpus or cpus}")
    readers = min(MOST_WORKERS, cpus // (2 * count))
    return Share(count, 1 if gpus else min(2, cpus // count), 1 if gpus else 0, readers)


def distribute(loading: Loading, rows: Iterable[Any], plan: Plan, part: Share) -> Generator[Result, None, None]:
    """The results of all rows. A row that is none has its error at once."""
    import ray.data  # pyright: ignore[reportMissingImports]

    given: dict[int, Any] = {}
    sent: list[Sent] = []
    for index, row in enumerate(rows):
        valid, number, error = as_row(row, index)
        if valid is None:
            yield Result(number, row, None, error, ())
        else:
            given[index] = row
            sent.append((index, ([*valid.images], valid.prefix, number)))
    if not sent:
        return
    parts = split(sent, block_size(len(sent), plan, part))
    blocks = [{"number": number, "rows": pickle.dumps(rows)} for number, rows in enumerate(parts)]
    count = len(blocks)
    del sent, parts
    tries = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Tries).remote()
    actors = ray.data.ActorPoolStrategy(size=min(part.actors, count), max_tasks_in_flight_per_actor=2)
    results = ray.data.from_items(blocks, override_num_blocks=count).map(
        cast(Any, Worker), fn_constructor_args=(loading, plan, str(Path.cwd()), tries), compute=actors,
        num_cpus=part.cpus, num_gpus=part.gpus,
    )  # fmt: skip
    for block in results.iter_rows():
        done = pickle.loads(block["results"])
        if isinstance(done, PgfuncError):
            raise done
        for index, result in done:
            yield result._replace(row=given.pop(index))


def block_size(count: int, plan: Plan, part: Share) -> int:
    """How many rows are a block, of so many."""
    even = -(-count // (BLOCKS * part.actors))
    return min(GROUPS * plan.places, max(plan.places, even))


def split(rows: Sequence[Sent], size: int) -> list[Sequence[Sent]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def without_cause(error: PgfuncError) -> PgfuncError:
    """The error without what caused it, which may not travel between processes."""
    return type(error)(str(error))
