"""The stages of a model, timed on a random prompt: load, vision, prefill, decode and generate."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from pgfunc import paligemma, tree
from pgfunc.bench.inputs import random_prompt
from pgfunc.bench.measuring import memory, timed, times
from pgfunc.bench.roofline import Machine, Work, decode_work, floor, prefill_work, vision_work
from pgfunc.config import Config
from pgfunc.errors import SettingError
from pgfunc.generate import compiled_decode_step, compiled_prefill_step, complete, decode_step, pad_to_bucket
from pgfunc.names import STAGES
from pgfunc.paligemma import Params, Prompt
from pgfunc.prompt import Model, check_fits
from pgfunc.sample import Settings, checked_int, greedy

GREEDY = Settings()


class Stage(NamedTuple):
    """One line of the result.

    For decode, all figures except compilation are for one token of every row; for others, for the whole stage.
    """

    name: str
    seconds: tuple[float, ...]  # for each run
    work: Work
    floor: float  # seconds
    compiled: bool = False
    first: float = 0.0  # seconds of the first call, which compiles; 0 if not measured
    compilations: int = 0


@dataclass(frozen=True)
class Case:
    """What is measured. Each row of the batch has one picture."""

    batch: int = 1
    prompt_tokens: int = 16  # of text, for each row
    tokens: int = 128  # to generate
    slots: int | None = None  # of the cache; None means the number that will be filled
    repeat: int = 5  # runs of each stage
    compile: bool = True
    stages: tuple[str, ...] = STAGES

    def check(self, cfg: Config) -> None:
        """Check the case against a model.

        Raises SettingError if a number is outside its range or a stage is unknown, and PromptError if a row does not
        fit the model's positions.
        """
        for stage in self.stages:
            if stage not in STAGES:
                raise SettingError(f"stage is {stage}, expected {', '.join(STAGES)}")
        # the prefill makes the first of the tokens
        for name, least in {"batch": 1, "prompt_tokens": 1, "tokens": 2, "repeat": 1}.items():
            checked_int(name.replace("_", "-"), getattr(self, name), least)
        check_fits(cfg, 1, self.prompt_tokens + self.tokens)
        filled = self.length(cfg) + self.tokens
        if self.slots is not None and self.slots < filled:
            raise SettingError(f"slots is {self.slots}, expected {filled} or more, the number that will be filled")

    def check_memory(self, cfg: Config, dtype: torch.dtype, device: torch.device, weights: int) -> None:
        """Raise SettingError if the device cannot hold the case in addition to `weights` bytes.

        Without this check, the operating system would kill the process on a CPU.
        """
        slots = self.length(cfg) + self.free_slots(cfg)
        cache = 2 * cfg.text.layers * slots * cfg.text.kv_heads * cfg.text.head_dim * dtype.itemsize
        hidden = max(cfg.vision.tokens * cfg.vision.hidden, self.length(cfg) * cfg.text.hidden) * dtype.itemsize
        row = cache + hidden + 4 * (3 * cfg.vision.image_size**2 + cfg.text.vocab)  # pixels and logits in float32
        needed, available = weights + self.batch * row, memory(device)
        if needed > available:
            raise SettingError(
                f"batch {self.batch:,} with {slots:,} slots needs {needed / 1e9:,.1f} GB, and {device} has "
                f"{available / 1e9:,.1f}; lower batch= or slots="
            )

    def length(self, cfg: Config) -> int:
        """The number of tokens in a row's prompt, including those of its picture."""
        return cfg.vision.tokens + self.prompt_tokens

    def free_slots(self, cfg: Config) -> int:
        """The number of the cache's slots after the prompt."""
        return self.tokens if self.slots is None else self.slots - self.length(cfg)


def load_stage(
    make: Callable[[], Model], device: torch.device, machine: Machine, repeat: int, name: str = "load"
) -> tuple[Model, Stage]:
    """Load a model. The time includes reading every weight once, because files are memory-mapped.

    At most one model is in memory at a time.
    """
    models: list[Model] = []

    def load() -> None:
        models.clear()
        models.append(make())
        for leaf in tree.flatten(models[0].params).values():
            (leaf.view(torch.uint8) if leaf.itemsize == 1 else leaf).sum()  # float8 has no sum

    seconds = tuple(timed(load, device) for _ in range(repeat))
    work = Work(0, tree.nbytes(models[0].params))
    return models[0], Stage(name, seconds, work, floor([work], machine))


@torch.no_grad()
def stages(model: Model, case: Case, machine: Machine) -> Iterator[Stage]:
    """Measure vision, prefill, decode and generate on a random prompt, one after another.

    If the case compiles, decode and generate are also measured compiled, and on a GPU so is prefill.
    """
    case.check(model.cfg)
    model = model._replace(cfg=replace(model.cfg, eos=-1))  # so that no row ends early
    params, cfg, device = model.params, model.cfg, model.params.projector.device
    prompt = random_prompt(cfg, case.batch, case.prompt_tokens, device)

    def encode() -> Any:
        return paligemma.encode_images(params, prompt.pixels, cfg)

    def prefill() -> Any:
        return paligemma.prefill(params, prompt, cfg, case.free_slots(cfg))

    if "vision" in case.stages:
        yield stage("vision", encode, [vision_work(params, cfg, case.batch)], machine, device, case.repeat)
    if "prefill" in case.stages:
        work = [prefill_work(params, cfg, case.batch, case.prompt_tokens)]
        yield stage("prefill", prefill, work, machine, device, case.repeat)
        if case.compile and device.type == "cuda":  # as `generate` does
            yield compiled_prefill_stage(model, prompt, case, machine)
    for name, measure_stage in {"decode": decode_stage, "generate": generate_stage}.items():
        if name in case.stages:
            for compiled in (False, True) if case.compile else (False,):
                yield measure_stage(model, prompt, case, machine, compiled)


def compiled_prefill_stage(model: Model, prompt: Prompt, case: Case, machine: Machine) -> Stage:
    """The compiled prefill of `generate`: on a padded prompt, including the choice of the first token."""
    params, cfg, device = model.params, model.cfg, model.params.projector.device
    before = compiled_prefill_step.compilations
    u = torch.zeros(case.batch, dtype=torch.float64, device=device)

    def prefill() -> None:
        padded, size = pad_to_bucket(prompt, case.tokens, cfg)
        compiled_prefill_step(params, padded, cfg, size, GREEDY, u)

    first, work = timed(prefill, device), [prefill_work(params, cfg, case.batch, case.prompt_tokens)]
    prefill()  # captures the graph
    done = stage("prefill", prefill, work, machine, device, case.repeat)
    return done._replace(compiled=True, first=first, compilations=compiled_prefill_step.compilations - before)


def decode_stage(model: Model, prompt: Prompt, case: Case, machine: Machine, compiled: bool) -> Stage:
    """One token for every row, by the decode step of `generate`, in a loop that feeds the token back."""
    params, cfg, device = model.params, model.cfg, model.params.projector.device
    step, before = compiled_decode_step if compiled else decode_step, compiled_decode_step.compilations
    logits, filled = paligemma.prefill(params, prompt, cfg, case.free_slots(cfg))
    token, u = greedy(logits), torch.zeros(case.batch, dtype=torch.float64, device=device)

    def loop(steps: int) -> None:
        last, cache = token, filled
        for _ in range(steps):
            last, _, cache = step(params, last, cache, cfg, GREEDY, u)

    first, work = timed(lambda: loop(1), device) if compiled else 0.0, decode_works(params, cfg, case)
    done = stage("decode", lambda: loop(len(work)), work, machine, device, case.repeat, len(work))
    return done._replace(compiled=compiled, first=first, compilations=compiled_decode_step.compilations - before)


def generate_stage(model: Model, prompt: Prompt, case: Case, machine: Machine, compiled: bool) -> Stage:
    """All of `generate`, from a prompt on the device to token ids: the prefill, and a step for each token but one.

    It makes a cache of its own size, as `generate` does.
    """
    params, cfg, before = model.params, model.cfg, compilations()
    u = torch.zeros(case.batch, case.tokens, dtype=torch.float64, device="cpu")
    work = [prefill_work(params, cfg, case.batch, case.prompt_tokens), *decode_works(params, cfg, case)]

    def generate() -> None:
        complete(model, prompt, GREEDY, u, compiled)

    done = stage("generate", generate, work, machine, params.projector.device, case.repeat)
    return done._replace(compiled=compiled, compilations=compilations() - before)


def compilations() -> int:
    """How often `generate` has compiled one of its steps."""
    return compiled_prefill_step.compilations + compiled_decode_step.compilations


def decode_works(params: Params, cfg: Config, case: Case) -> list[Work]:
    """The work of each decode step of `generate`. The prefill makes the first token."""
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
    """Time a function that does all of the work. The figures are divided by `per`."""
    seconds = tuple(each / per for each in times(fn, device, repeat))
    mean = Work(*(sum(column) // per for column in zip(*work, strict=True)))
    return Stage(name, seconds, mean, floor(work, machine) / per)
