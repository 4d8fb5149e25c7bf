"""The rows that are decoded together. A row that has finished makes room for a new one, while the others go on.

    places    0         1         2         3
    step 8    a b c|    d e f g   h i|      j k       0 and 2 have finished
    insert    l m n o   d e f g   p q r     j k       new rows, which were prefilled together
    step 9    l m n o . d e f g . p q r .   j k .     one more token for every place

All steps have the same shape, so one compiled step serves any number of rows. On a GPU the host learns a token
only after the next `AHEAD` steps were started; an empty place is decoded too, and its tokens are ignored.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc import tree
from pgfunc.cache import Cache
from pgfunc.jit.rows import insert, rewind
from pgfunc.prompt import Model
from pgfunc.sample import Settings

AHEAD = 2  # steps on a GPU that the host has started and does not look at yet, so that the GPU does not wait for it


@dataclass(slots=True, eq=False)
class Job:
    """A row that is decoded: its request, the largest number of its tokens, and its tokens so far."""

    request: Any
    most: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False


class Rows(NamedTuple):
    """What a step takes and returns, a row for each place."""

    token: Int[Tensor, "b"]
    cache: Cache
    u: Float[Tensor, "b n"]  # the random numbers of each row
    drawn: Int[Tensor, "b"]  # tokens that each row has


class Started(NamedTuple):
    """The result of a step, on its way to the host, and the jobs that were in the places when it started."""

    token: Tensor
    logprob: Tensor
    copied: torch.cuda.Event | None
    jobs: tuple[Job | None, ...]


class Decoder:
    """The places, and the jobs in them. It owns the only handle of its cache, so a compiled step copies nothing."""

    def __init__(self, model: Model, step: Callable[..., Any], settings: Settings, places: int, slots: int):
        self.model, self.step, self.settings, self.slots = model, step, settings, slots
        self.jobs: list[Job | None] = [None] * places
        self.rows: Rows | None = None  # before the first jobs
        self.started: deque[Started] = deque()

    @property
    def free(self) -> list[int]:
        """The places without a job."""
        return [place for place, job in enumerate(self.jobs) if job is None]

    @property
    def active(self) -> bool:
        return any(self.jobs)

    def admit(self, jobs: Sequence[Job], token: Tensor, logprob: Tensor, cache: Cache, u: Float[Tensor, "b n"]) -> None:
        """Give free places to jobs that were prefilled; `cache` and the other tensors may have more rows than jobs."""
        count, places = len(jobs), self.free[: len(jobs)]
        new = Rows(token, cache, to_device(u, token.device), torch.ones_like(token))
        new = tree.map(lambda x: x[:count], new)
        if self.rows is None:
            self.rows = empty(new, len(self.jobs), self.slots)
        index = to_device(torch.tensor(places, device="cpu"), token.device)
        self.rows = Rows(
            self.rows.token.index_copy(0, index, new.token), insert(self.rows.cache, new.cache, index),
            self.rows.u.index_copy(0, index, new.u), self.rows.drawn.index_copy(0, index, new.drawn),
        )  # fmt: skip
        for place, job in zip(places, jobs, strict=True):
            self.jobs[place] = job
        self._start(token, logprob, tuple(jobs))

    def advance(self) -> None:
        """Start a step."""
        assert self.rows is not None
        token, cache, u, drawn = self.rows
        numbers = u.gather(1, drawn.clamp(max=u.shape[1] - 1)[:, None])[:, 0]
        token, logprob, cache = self.step(self.model.params, token, cache, self.model.cfg, self.settings, numbers)
        self.rows = Rows(token, cache, u, drawn + 1)
        self._start(token, logprob, tuple(self.jobs))

    def finished(self) -> list[Job]:
        """The jobs that have ended, by their end of sequence or their largest number of tokens. Their places are free.

        On a GPU the last steps are not looked at, as they may still run.
        """
        done = []
        while self.started and (self.started[-1].copied is None or len(self.started) > AHEAD):
            token, logprob, copied, jobs = self.started.popleft()
            if copied:
                copied.synchronize()
            for job, id, value in zip(jobs, token.tolist(), logprob.tolist(), strict=False):
                if job is None or job.ended:
                    continue
                job.tokens.append(id)
                job.logprobs.append(value)
                job.ended = id == self.model.cfg.eos or len(job.tokens) == job.most
                if job.ended:
                    done.append(job)
        if done:
            self._free_ended()
        return done

    def _free_ended(self) -> None:
        """Free the places of jobs that have ended. Their rows begin again at length 0, so that they never overflow."""
        self.jobs = [None if job is None or job.ended else job for job in self.jobs]
        assert self.rows is not None
        length = self.rows.cache.length
        kept = torch.tensor([job is not None for job in self.jobs], device="cpu")
        length = torch.where(to_device(kept, length.device), length, 0)
        self.rows = self.rows._replace(cache=rewind(self.rows.cache, length))

    def _start(self, token: Tensor, logprob: Tensor, jobs: tuple[Job | None, ...]) -> None:
        copied = None
        if token.is_cuda:
            token, logprob = (torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
                              for x in (token, logprob))  # fmt: skip
            copied = torch.cuda.Event()
            copied.record()
        self.started.append(Started(token, logprob, copied, jobs))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def empty(like: Rows, places: int, slots: int) -> Rows:
    """Rows of zeros, with the dtypes and devices of other rows."""
    buffers = tree.map(lambda x: x.new_zeros(places, slots, *x.shape[2:]), (like.cache.k, like.cache.v))
    cache = Cache(*buffers, like.cache.length.new_zeros(places))
    u = like.u.new_zeros(places, like.u.shape[1])
    return Rows(like.token.new_zeros(places), cache, u, like.drawn.new_ones(places))
