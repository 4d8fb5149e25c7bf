"""A run of fine-tuning: steps over a data set, saved so that what was interrupted goes on as if it had not been.

    state ──advance──▶ state′ ──advance──▶ ...          the state: what is trained, AdamW's means, the steps done

A `Job` never changes; which rows a step reads, and at which rate, follow from the job and the step's number, so the
state is all there is to save. On the CPU a resumed run ends equal to the bit.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from pgfunc import tree
from pgfunc.checkpoint.writing import reporting_write_errors, write_safetensors
from pgfunc.errors import CheckpointError, NumericalError, SettingError, first_line
from pgfunc.files.atomic import replacing
from pgfunc.paligemma import Params
from pgfunc.prompt import Model
from pgfunc.train import data, finetune, lora, optim
from pgfunc.train.data import Example

MOST = 2**31 - 1  # of a count, and of a seed


@dataclass(frozen=True)
class Settings:
    """How to train; the state of a run fits these alone."""

    steps: int
    batch_size: int = 8
    accumulate: int = 1  # parts of a batch, of which one is in memory at a time
    learning_rate: float = 1e-5  # the highest: it rises over `warmup` steps and falls to 0 as a cosine
    warmup: int = 0
    weight_decay: float = 0.0  # of matrices
    clip: float = 1.0  # the largest norm of a gradient
    freeze: tuple[str, ...] = ()
    lora_rank: int = 0  # 0: train the parameters themselves
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = ()
    dtype: str = "float32"  # of the computation; what is trained is float32
    seed: int = 0
    recompute: bool = False  # gradient checkpointing

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "batch_size": 1,
            "accumulate": 1,
            "warmup": 0,
            "weight_decay": 0,
            "lora_rank": 0,
            "seed": 0,
        }
        for name, value in least.items():
            if not value <= getattr(self, name) <= MOST:
                raise SettingError(
                    f"{name.replace('_', '-')} is {getattr(self, name)}, expected {value} or more, at most {MOST}"
                )
        if not 0 < self.learning_rate < float("inf"):
            raise SettingError(f"learning-rate is {self.learning_rate}, expected a number above 0")
        if self.lora_rank and not 0 < self.lora_alpha < 1e30:
            raise SettingError(f"lora-alpha is {self.lora_alpha}, expected a number above 0")
        if self.dtype not in ("float32", "bfloat16"):
            raise SettingError(f"dtype is {self.dtype}, expected float32 or bfloat16 to train in")


class Job(NamedTuple):
    """What a run is given. The model's parameters are those before training."""

    model: Model
    examples: Sequence[Example]
    settings: Settings


class State(NamedTuple):
    """What training changes: path -> leaf or LoRA pair, in float32; and AdamW's state, which counts the steps."""

    trained: dict[str, Any]
    optimizer: optim.State


class Report(NamedTuple):
    """What a step said: its number from 1, the loss before it in nats a token, the gradient's norm, the rate."""

    step: int
    loss: float
    norm: float
    rate: float


def start(job: Job) -> State:
    """The state before the first step. Raises SettingError for a pattern that matches nothing."""
    params, given = job.model.params, job.settings
    if given.lora_rank:
        if given.freeze:
            raise SettingError("with lora-rank everything but the pairs is frozen; leave out freeze")
        trained = lora.init(params, given.lora_targets, given.lora_rank, given.lora_alpha, given.seed).pairs
    else:
        trained = tree.map(lambda leaf: leaf.float(), finetune.select(params, given.freeze))
    return State(trained, optim.init(trained))


def advance(job: Job, state: State, frozen: Params) -> tuple[State, Report]:
    """One step. `frozen` is `cast(job)`, made once. Raises NumericalError when a number in it is not finite."""
    given, step = job.settings, int(state.optimizer.step)
    rows = data.batch(given.seed, step, given.batch_size, len(job.examples))
    prompts = data.prompts(job.model, [job.examples[row] for row in rows], given.accumulate)
    with kernel(job):
        grads, loss = finetune.gradient(
            partial(build, job, frozen), state.trained, prompts, job.model.cfg, given.recompute
        )
    grads, norm = optim.clip(grads, given.clip)
    if not norm.isfinite() or not loss.isfinite():
        raise NumericalError(
            f"step {step + 1}: loss {loss:.4g}, gradient {norm:.4g}; lower learning-rate, or use float32"
        )
    rate = optim.cosine(step, given.learning_rate, given.warmup, given.steps)
    settings = optim.Settings(weight_decay=given.weight_decay)
    new = State(*optim.update(grads, state.optimizer, state.trained, rate, settings))
    if (path := tree.not_finite(new)) is not None:
        raise NumericalError(f"step {step + 1}: {path} is not finite after it; lower learning-rate, or use float32")
    return new, Report(step + 1, loss.item(), norm.item(), rate)


def cast(job: Job) -> Params:
    """The parameters in the precision of the computation, but for those that are trained, which `build` replaces."""
    dtype = getattr(torch, job.settings.dtype)
    trained = set() if job.settings.lora_rank else finetune.select(job.model.params, job.settings.freeze).keys()
    return tree.map_with_path(lambda path, leaf: leaf if path in trained else leaf.to(dtype), job.model.params)


def build(job: Job, frozen: Params, trained: dict[str, Any]) -> Params:
    """The parameters that compute: what is trained, in their precision, replaced or merged."""
    if job.settings.lora_rank:
        return lora.merge(frozen, adapter(job, trained))
    return tree.replace(frozen, {path: leaf.to(getattr(torch, job.settings.dtype)) for path, leaf in trained.items()})


def adapter(job: Job, trained: dict[str, lora.Pair]) -> lora.Lora:
    """The pairs that are trained, with their scale."""
    return lora.Lora(trained, job.settings.lora_alpha / job.settings.lora_rank)


def finished(job: Job, state: State) -> Model:
    """The trained model, in the dtype of the one before."""
    params = job.model.params
    if job.settings.lora_rank:
        return job.model._replace(params=lora.merge(params, adapter(job, state.trained)))
    leaves = {path: leaf.to(params.projector.dtype) for path, leaf in state.trained.items()}
    return job.model._replace(params=tree.replace(params, leaves))


def evaluate(job: Job, state: State, frozen: Params, examples: Sequence[Example]) -> float:
    """The loss over other examples: the mean of all their suffix tokens."""
    size, params, total, count = job.settings.batch_size, build(job, frozen, state.trained), 0.0, 0
    with torch.no_grad():
        for first in range(0, len(examples), size):
            for prompt in data.prompts(job.model, examples[first : first + size], job.settings.accumulate):
                value, tokens = finetune.loss_terms(params, prompt, job.model.cfg)
                total, count = total + value.item(), count + int(tokens)
    return total / count


def kernel(job: Job) -> Any:
    """The attention to train with: in bfloat16 on the CPU the plain one.

    The gradient of 16 rows of the shipped checkpoint took 144 ms with it and 244 ms with the fused (one core).
    """
    slow = job.settings.dtype == "bfloat16" and job.model.params.projector.device.type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


def save(path: Path, job: Job, state: State) -> None:
    """Write the state as one safetensors file, which says what job it belongs to; an older one is exchanged at once.

    Raises CheckpointError where it cannot be written, NumericalError for a state that could not go on.
    """
    tree.check_finite(state, str(path))
    with reporting_write_errors(path), replacing(path) as file:
        write_safetensors(file, tree.flatten(state), {"job": json.dumps(identity(job))})


def step_in(path: Path) -> int | None:
    """The number of steps that the state in a file has done; None where there is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.get_tensor("optimizer.step"))
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError):
        return None


def resume(path: Path, job: Job) -> State:
    """The state in a file. Raises SettingError, naming what differs, when it belongs to another job."""
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("job", "{}"))
        arrays = load_file(path)
        if not isinstance(found, dict):
            raise ValueError(f"its job is {found!r}")
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:  # as in hf, or nested too deep
        raise CheckpointError(
            f"{path}: not the state of a run ({first_line(error)}); remove it to start again"
        ) from error
    for name, value in identity(job).items():
        if found.get(name) != value:
            raise SettingError(
                f"{path} holds an unfinished run with {name.replace('_', '-')} {found.get(name)}, not {value}; "
                "continue it with its own settings, or give another folder"
            )
    fresh = start(job)
    for name, leaf in tree.flatten(fresh).items():
        if name not in arrays or (arrays[name].shape, arrays[name].dtype) != (leaf.shape, leaf.dtype):
            raise CheckpointError(f"{path}: {name} is missing, or not as the run has it; remove it to start again")
    return tree.map_with_path(lambda name, leaf: arrays[name].to(leaf.device), fresh)


def identity(job: Job) -> dict[str, Any]:
    """What must be the same for a run to go on, as JSON: the settings, the model and the data.

    The projector stands for all of the model's weights: checkpoints of one shape differ in it.
    """
    rows = [(list(map(str, row.images)), row.prefix, row.suffix) for row in job.examples]
    weights = job.model.params.projector.float().cpu().numpy().tobytes()
    digests = {"model": repr(job.model.cfg).encode() + weights, "data": json.dumps(rows).encode()}
    return json.loads(json.dumps(asdict(job.settings))) | {
        name: hashlib.sha256(value).hexdigest()[:16] for name, value in digests.items()
    }
