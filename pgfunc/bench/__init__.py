"""How long the stages of a model take on this machine, beside their floors there.

The bandwidth of the memory and the rate of a matrix product are measured on the device first, then vision, prefill,
decode and generate on a random prompt. Knows nothing about the command line.
"""

import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pgfunc import packing, paligemma, tree
from pgfunc.bench.roofline import Machine, Work, decode_work, floor, prefill_work, vision_work
from pgfunc.config import Config
from pgfunc.errors import SettingError
from pgfunc.generate import advance, bucketed, compiled_advance, compiled_begin, complete
from pgfunc.jit import compiled_in
from pgfunc.paligemma import Params, Prompt
from pgfunc.prompt import Model, fits
from pgfunc.sample import Settings, greedy, whole

GREEDY = Settings()
STAGES = ("vision", "prefill", "decode", "generate")


class Stage(NamedTuple):
    """One line of the result; where a stage is a loop, all but what compiling cost is of one token of every row."""

    name: str
    seconds: tuple[float, ...]  # of each run
    work: Work
    floor: float  # seconds
    compiled: bool = False
    first: float = 0.0  # seconds of the first step, which compiles
    compilations: int = 0


@dataclass(frozen=True)
class Case:
    """What is measured: so many rows of one picture and so many tokens of text, and so many tokens after them."""

    batch: int = 1
    prompt_tokens: int = 16
    tokens: int = 128
    slots: int | None = None  # of the cache; None: as many as get filled
    repeat: int = 5
    compile: bool = True
    stages: tuple[str, ...] = STAGES

    def check(self, cfg: Config) -> None:
        """Raise SettingError for a number outside its range or an unknown stage, PromptError for a row that has too few
        positions."""
        for stage in self.stages:
            if stage not in STAGES:
                raise SettingError(f"stage is {stage}, expected {', '.join(STAGES)}")
        # the first token is the prefill's
        for name, least in {"batch": 1, "prompt-tokens": 1, "tokens": 2, "repeat": 1}.items():
            whole(name, getattr(self, name.replace("-", "_")), least)
        fits(cfg, 1, self.prompt_tokens + self.tokens)
        filled = self.length(cfg) + self.tokens
        if self.slots is not None and self.slots < filled:
            raise SettingError(f"slots is {self.slots}, expected {filled} or more: so many get filled")

    def check_memory(self, cfg: Config, dtype: torch.dtype, device: torch.device, weights: int) -> None:
        """Raise SettingError for what the device's memory cannot hold beside so many bytes of weights: on a CPU the
        system would end the process."""
        slots = self.length(cfg) + self.room(cfg)
        cache = 2 * cfg.text.layers * slots * cfg.text.kv_heads * cfg.text.head_dim * dtype.itemsize
        hidden = max(cfg.vision.tokens * cfg.vision.hidden, self.length(cfg) * cfg.text.hidden) * dtype.itemsize
        row = cache + hidden + 4 * (3 * cfg.vision.image_size**2 + cfg.text.vocab)  # pixels and logits in float32
        needed, there = weights + self.batch * row, memory(device)
        if needed > there:
            raise SettingError(
                f"batch {self.batch:,} with {slots:,} slots needs {needed / 1e9:,.1f} GB, and {device} has "
                f"{there / 1e9:,.1f}; lower batch= or slots="
            )

    def length(self, cfg: Config) -> int:
        """The tokens of a row's prompt, its picture's included."""
        return cfg.vision.tokens + self.prompt_tokens

    def room(self, cfg: Config) -> int:
        """The cache's slots behind the prompt."""
        return self.tokens if self.slots is None else self.slots - self.length(cfg)


# --- measuring --------------------------------------------------------------------------------------------------------


def times(fn: Callable[[], Any], device: torch.device, repeat: int, calls: int = 1) -> tuple[float, ...]:
    """The seconds of a call, in each of several runs of so many calls, after one that warms up."""
    return tuple(timed(lambda: [fn() for _ in range(calls)], device) / calls for _ in range(repeat + 1))[1:]


def timed(fn: Callable[[], Any], device: torch.device) -> float:
    """The seconds until the device is done with what a call asks of it."""
    synchronize(device)
    start = perf_counter()
    fn()
    synchronize(device)
    return perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """The fastest of a few runs of reading 1 GiB, or copying it, and of a square matrix product in the dtype."""
    cpu = device.type == "cpu"
    buffer = torch.ones(2**28, dtype=torch.float32, device=device)
    bandwidth = read_bandwidth(buffer) if cpu else copy_bandwidth(buffer)
    side = 2048 if cpu else 8192
    x = torch.randn(side, side, device=device).to(dtype)
    return Machine(bandwidth, 2 * side**3 / min(times(lambda: x @ x.T, device, 5, 1 if cpu else 10)))


def read_bandwidth(buffer: Float[Tensor, "n"]) -> float:
    """Bytes/s with PyTorch's threads, by a sum or a matrix-vector product: which one is faster depends on the CPU."""
    vector = buffer[:2048].clone()
    reads = (lambda: buffer.sum(), lambda: buffer.view(-1, 2048) @ vector)
    return tree.nbytes(buffer) / min(min(times(read, buffer.device, 5)) for read in reads)


def copy_bandwidth(buffer: Float[Tensor, "n"]) -> float:
    """Bytes/s of a copy on the device: the bytes read and the bytes written."""
    other = torch.empty_like(buffer)
    return 2 * tree.nbytes(buffer) / min(times(lambda: other.copy_(buffer), buffer.device, 5, 10))


def memory(device: torch.device) -> int | float:
    """The bytes that a device has; of a CPU, those of the machine or what a container may use of them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if not hasattr(os, "sysconf"):  # Windows
        return inf
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), int(text) if text.isdigit() else inf)


def hardware(device: torch.device) -> str:
    """The name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", about.read_text()) if device.type == "cpu" and about.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def random_params(cfg: Config, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Params:
    """Random parameters, drawn where they stay: matrices normal with variance 1 / fan-in, norms that do nothing.

    The embedding is smaller: at that size the tied head would say the last token for ever.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(path: str, room: Tensor) -> Tensor:
        if room.dim() < 2:
            return room.fill_(float(path.endswith("_scale")))
        std = room[0].numel() ** -0.5 * (0.05 if path == "language.embed" else 1)
        return room.normal_(std=std, generator=generator)

    abstract = tree.map(lambda leaf: leaf.to(dtype), paligemma.abstract(cfg))
    if device.type == "cuda":
        return tree.map_with_path(draw, packing.packed(abstract, device))
    return tree.map_with_path(draw, tree.map(lambda leaf: torch.empty_like(leaf, device=device), abstract))


def random_prompt(cfg: Config, batch: int, tokens: int, device: torch.device, seed: int = 0) -> Prompt:
    """Rows of one picture and so many tokens, all valid and bidirectional."""
    generator = torch.Generator().manual_seed(seed)
    side = cfg.vision.image_size
    prompt = Prompt(
        pixels=torch.rand(batch, 1, 3, side, side, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1,
        tokens=torch.randint(cfg.text.vocab, (batch, tokens), generator=generator),
        valid=torch.ones(batch, tokens, dtype=torch.bool, device="cpu"),
        causal=torch.zeros(batch, tokens, dtype=torch.bool, device="cpu"),
    )
    return tree.map(lambda leaf: leaf.to(device), prompt)


@contextmanager
def cold() -> Iterator[None]:
    """In here torch.compile finds nothing that an earlier process left on the disk, and leaves nothing."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as place, compiled_in(place):
        yield


# --- stages -----------------------------------------------------------------------------------------------------------


def load_stage(
    make: Callable[[], Model], device: torch.device, machine: Machine, repeat: int, name: str = "load"
) -> tuple[Model, Stage]:
    """A model, and how long it takes until it is there and read once, for files are mapped. One is in memory a time."""
    made: list[Model] = []

    def load() -> None:
        made.clear()
        made.append(make())
        for leaf in tree.flatten(made[0].params).values():
            (leaf.view(torch.uint8) if leaf.itemsize == 1 else leaf).sum()  # float8 has none

    seconds = tuple(timed(load, device) for _ in range(repeat))
    work = Work(0, tree.nbytes(made[0].params))
    return made[0], Stage(name, seconds, work, floor([work], machine))


@torch.no_grad()
def stages(model: Model, case: Case, machine: Machine) -> Iterator[Stage]:
    """Vision, prefill, decode and generate on a random prompt, one after another; the last two also compiled, on a GPU
    prefill too."""
    case.check(model.cfg)
    model = model._replace(cfg=replace(model.cfg, eos=-1))  # nothing ends before its time
    params, cfg, device = model.params, model.cfg, model.params.projector.device
    prompt = random_prompt(cfg, case.batch, case.prompt_tokens, device)

    def encode() -> Any:
        return paligemma.encode_images(params, prompt.pixels, cfg)

    def prefill() -> Any:
        return paligemma.prefill(params, prompt, cfg, case.room(cfg))

    if "vision" in case.stages:
        yield stage("vision", encode, [vision_work(params, cfg, case.batch)], machine, device, case.repeat)
    if "prefill" in case.stages:
        work = [prefill_work(params, cfg, case.batch, case.prompt_tokens)]
        yield stage("prefill", prefill, work, machine, device, case.repeat)
        if case.compile and device.type == "cuda":  # where `generate` compiles it
            yield compiled_prefill_stage(model, prompt, case, machine)
    for name, measured in {"decode": decode_stage, "generate": generate_stage}.items():
        if name in case.stages:
            for compiled in (False, True) if case.compile else (False,):
                yield measured(model, prompt, case, machine, compiled)


def compiled_prefill_stage(model: Model, prompt: Prompt, case: Case, machine: Machine) -> Stage:
    """The prompt as `generate` begins with it compiled: padded, and with the choice of the first token."""
    params, cfg, device, before = model.params, model.cfg, model.params.projector.device, compiled_begin.compilations
    u = torch.zeros(case.batch, dtype=torch.float64, device=device)

    def begin() -> None:
        padded, size = bucketed(prompt, case.tokens, cfg)
        compiled_begin(params, padded, cfg, size, GREEDY, u)

    first, work = timed(begin, device), [prefill_work(params, cfg, case.batch, case.prompt_tokens)]
    begin()  # captures
    done = stage("prefill", begin, work, machine, device, case.repeat)
    return done._replace(compiled=True, first=first, compilations=compiled_begin.compilations - before)


def decode_stage(model: Model, prompt: Prompt, case: Case, machine: Machine, compiled: bool) -> Stage:
    """A token of every row, by the step of `generate`, in a loop: the token is fed back, the cache grows."""
    params, cfg, device = model.params, model.cfg, model.params.projector.device
    step, before = compiled_advance if compiled else advance, compiled_advance.compilations
    logits, filled = paligemma.prefill(params, prompt, cfg, case.room(cfg))
    token, u = greedy(logits), torch.zeros(case.batch, dtype=torch.float64, device=device)

    def loop(steps: int) -> None:
        last, cache = token, filled
        for _ in range(steps):
            last, _, cache = step(params, last, cache, cfg, GREEDY, u)

    first, work = timed(lambda: loop(1), device) if compiled else 0.0, decode_works(params, cfg, case)
    done = stage("decode", lambda: loop(len(work)), work, machine, device, case.repeat, len(work))
    return done._replace(compiled=compiled, first=first, compilations=compiled_advance.compilations - before)


def generate_stage(model: Model, prompt: Prompt, case: Case, machine: Machine, compiled: bool) -> Stage:
    """The whole of `generate`, from a prompt on the device to token ids: the prefill, and a step for all but a token.

    It makes a cache of its own size, as `generate` does.
    """
    params, cfg, before = model.params, model.cfg, compilations()
    u = torch.zeros(case.batch, case.tokens, dtype=torch.float64, device="cpu")
    work = [prefill_work(params, cfg, case.batch, case.prompt_tokens), *decode_works(params, cfg, case)]

    def whole() -> None:
        complete(model, prompt, GREEDY, u, compiled)

    done = stage("generate", whole, work, machine, params.projector.device, case.repeat)
    return done._replace(compiled=compiled, compilations=compilations() - before)


def compilations() -> int:
    """Of what `generate` compiles."""
    return compiled_begin.compilations + compiled_advance.compilations


def decode_works(params: Params, cfg: Config, case: Case) -> list[Work]:
    """The work of each step that `generate` takes; the first token is the prefill's."""
    return [decode_work(params, cfg, case.batch, case.length(cfg) + i) for i in range(case.tokens - 1)]


def stage(
    name: str,
    fn: Callable[[], Any],
    work: list[Work],
    machine: Machine,
    device: torch.device,
    repeat: int,
    per: int = 1,
) -> Stage:
    """Time what does all of the work; the results are divided by `per`."""
    seconds = tuple(each / per for each in times(fn, device, repeat))
    mean = Work(*(sum(column) // per for column in zip(*work, strict=True)))
    return Stage(name, seconds, mean, floor(work, machine) / per)
