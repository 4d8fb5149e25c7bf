"""The loop between the reader and the decoders: which rows are prefilled next, and when.

Rows of one shape are prefilled in full groups, as soon as that many places are free. A smaller group is prefilled only
if waiting for more rows is of no use: the stream has ended, there is no room for more waiting rows, or nothing else is
to do.
"""

import queue
from collections import deque
from collections.abc import Generator, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch

from pgfunc.errors import DeviceError, PgfuncError, first_line
from pgfunc.generate import Completion, compiled_decode_step, completion, decode_step, uniform
from pgfunc.many.decoding import Decoder, Job
from pgfunc.many.prefilling import Group, Ready, Shape, prefill, shape_of
from pgfunc.many.reading import Reader, Request
from pgfunc.prompt import Model, check_fits, prefix_ids
from pgfunc.sample import Settings

PATIENCE = 0.1  # seconds to wait for a full group while there is nothing else to do


class Plan(NamedTuple):
    """How the rows of a stream are completed."""

    settings: Settings
    max_new_tokens: int
    seed: int
    places: int  # rows that are decoded together
    group: Group
    workers: int  # processes that read pictures


class Result(NamedTuple):
    """A row of the stream and its completion, or the error that it has instead."""

    number: int  # the row's index in the stream, from 0, or the number that it was given with
    row: Any  # as it was given
    completion: Completion | None
    error: PgfuncError | None
    sizes: tuple[tuple[int, int], ...]  # width and height of each picture in pixels; (0, 0) if it was not read


@torch.no_grad()
def run(model: Model, rows: Iterable[Any], plan: Plan) -> Generator[Result, None, None]:
    """The results of all rows, as they are ready."""
    reader = Reader(rows, model.cfg, 2 * plan.places, plan.workers)
    waiting: dict[Shape, deque[Ready]] = {}
    decoders: dict[int, Decoder] = {}  # by slots
    more = True
    try:
        while True:
            active = [decoder for decoder in decoders.values() if decoder.active]
            count = sum(map(len, waiting.values()))
            requests, more = take(reader, plan, count, bool(active), more)
            for request in requests:
                try:
                    ready = check(model, request, plan)
                except PgfuncError as error:
                    yield result(request, error)
                else:
                    shape = shape_of(ready, plan.max_new_tokens, plan.group, model.cfg)
                    waiting.setdefault(shape, deque()).append(ready)
            last = not more or sum(map(len, waiting.values())) >= plan.places + plan.group.size
            while (shape := next_shape(waiting, decoders, plan, last)) is not None:
                admit(model, shape, waiting, decoders, plan)
            active = [decoder for decoder in decoders.values() if decoder.active]
            for decoder in active:
                decoder.advance()
            for job in chain.from_iterable(decoder.finished() for decoder in active):
                yield completed(model, job)
            if not (active or more or waiting):
                return
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DeviceError(f"a process that reads pictures has ended ({first_line(error)}); is memory short?") from error
    finally:
        reader.close()


def take(reader: Reader, plan: Plan, count: int, active: bool, more: bool) -> tuple[list[Request], bool]:
    """The rows that have been read, as many as there is room for beside `count` others; and whether more may come.

    While nothing is decoded, waits for the first row, and has a little patience for a full group.
    """
    taken: list[Request] = []
    while more and count + len(taken) < plan.places + plan.group.size:
        enough = active or count + len(taken) >= plan.group.size
        try:
            request = reader.get(0.0 if enough else PATIENCE if count + len(taken) else None)
        except queue.Empty:
            break
        if request is None:
            more = False
        else:
            taken.append(request)
    return taken, more


def check(model: Model, request: Request, plan: Plan) -> Ready:
    """The row with its token ids. Raises its error if it has one, or if it is too long for the model."""
    errors = [request.error, *(picture.error for picture in request.pictures)]
    for error in filter(None, errors):
        raise error
    assert request.row is not None
    ids = prefix_ids(model, request.row.prefix, len(request.pictures))
    check_fits(model.cfg, len(request.pictures), len(ids) + plan.max_new_tokens)
    return Ready(request, ids)


def next_shape(
    waiting: dict[Shape, deque[Ready]], decoders: dict[int, Decoder], plan: Plan, last: bool
) -> Shape | None:
    """The shape whose rows are prefilled now, if any. `last`: no more rows can come to fill a group."""
    for shape, rows in waiting.items():
        decoder = decoders.get(shape.slots)
        free = len(decoder.free) if decoder else plan.places
        partial = last or not any(each.active for each in decoders.values())
        if free >= plan.group.size and len(rows) >= plan.group.size:
            return shape
        if partial and rows and free >= min(len(rows), plan.group.size):
            return shape
    return None


def admit(
    model: Model, shape: Shape, waiting: dict[Shape, deque[Ready]], decoders: dict[int, Decoder], plan: Plan
) -> None:
    """Prefill a group of rows of this shape, and let the decoder of their slots continue them."""
    rows = [waiting[shape].popleft() for _ in range(min(len(waiting[shape]), plan.group.size))]
    if not waiting[shape]:
        del waiting[shape]
    u = uniform(plan.seed, [row.request.number for row in rows], plan.max_new_tokens)
    token, logprob, cache = prefill(model, rows, shape, plan.settings, u, plan.group)
    if shape.slots not in decoders:
        step = compiled_decode_step if plan.group.compile else decode_step
        decoders[shape.slots] = Decoder(model, step, plan.settings, plan.places, shape.slots)
    decoders[shape.slots].admit([Job(row.request, plan.max_new_tokens) for row in rows], token, logprob, cache, u)


def completed(model: Model, job: Job) -> Result:
    """The result of a row that has ended. Logits that are nan are its error."""
    try:
        done = completion(model, job.tokens, torch.tensor(job.logprobs, device="cpu"))
    except PgfuncError as error:
        return result(job.request, error)
    return result(job.request, None)._replace(completion=done)


def result(request: Request, error: PgfuncError | None) -> Result:
    return Result(request.number, request.given, None, error, tuple(picture.size for picture in request.pictures))
