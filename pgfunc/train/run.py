"""A run of fine-tuning: steps over a data set, with a state that can be saved and resumed.

    state ──advance──▶ state′ ──advance──▶ ...          the state: trained values, AdamW's means, steps done

A `Job` never changes. The rows and the learning rate of a step follow from the job and the number of the step, so only
the state is saved. On the CPU a resumed run ends with bitwise equal weights.
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
from pgfunc.checkpoint.writing import write_safetensors
from pgfunc.errors import CheckpointError, NumericalError, SettingError, first_line
from pgfunc.files.atomic import replacing
from pgfunc.files.outputs import write_errors
from pgfunc.paligemma import Params
from pgfunc.prompt import Model
from pgfunc.train import data, finetune, lora, optim
from pgfunc.train.data import Example

MAX_INTEGER = 2**31 - 1  # the largest count, and the largest seed


@dataclass(frozen=True)
class Settings:
    """How to train. A saved state can be resumed only with the same settings."""

    steps: int
    batch_size: int = 8
    accumulate: int = 1  # parts of a batch; one of them is in memory at a time
    learning_rate: float = 1e-5  # the highest rate: it rises over `warmup` steps and falls to 0 as a cosine
    warmup: int = 0
    weight_decay: float = 0.0  # of matrices
    clip: float = 1.0  # the gradient is scaled to at most this norm
    freeze: tuple[str, ...] = ()
    lora_rank: int = 0  # 0: train the parameters without LoRA
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = ()
    dtype: str = "float32"  # of the computation; trained values are float32
    seed: int = 0
    recompute: bool = False  # gradient checkpointing

    def __post_init__(self) -> None:
        minima = {"steps": 1, "batch_size": 1, "accumulate": 1, "warmup": 0, "weight_decay": 0, "lora_rank": 0,
                  "seed": 0}  # fmt: skip
        for name, least in minima.items():
            value = getattr(self, name)
            if not least <= value <= MAX_INTEGER:
                raise SettingError(
                    f"{name.replace('_', '-')} is {value}, expected {least} or more, at most {MAX_INTEGER}"
                )
        if not 0 < self.learning_rate < float("inf"):
            raise SettingError(f"learning-rate is {self.learning_rate}, expected a number above 0")
        if self.lora_rank and not 0 < self.lora_alpha < 1e30:
            raise SettingError(f"lora-alpha is {self.lora_alpha}, expected a number above 0")
        if self.dtype not in ("float32", "bfloat16"):
            raise SettingError(f"dtype is {self.dtype}, expected float32 or bfloat16 to train in")


class Job(NamedTuple):
    """The inputs of a run. The model's parameters are those before training."""

    model: Model
    examples: Sequence[Example]
    settings: Settings


class State(NamedTuple):
    """What training changes: path -> leaf or LoRA pair, in float32; and AdamW's state with the step count."""

    trained: dict[str, Any]
    optimizer: optim.State


class Report(NamedTuple):
    """The log of a step: its number from 1, the loss before it in nats per token, the gradient's norm, the rate."""

    step: int
    loss: float
    norm: float
    rate: float


def start(job: Job) -> State:
    """The state before the first step. Raises SettingError if a pattern matches nothing."""
    params, settings = job.model.params, job.settings
    if settings.lora_rank:
        if settings.freeze:
            raise SettingError("with lora-rank everything but the pairs is frozen; leave out freeze")
        trained = lora.init(params, settings.lora_targets, settings.lora_rank, settings.lora_alpha, settings.seed).pairs
    else:
        trained = tree.map(lambda leaf: leaf.float(), finetune.select(params, settings.freeze))
    return State(trained, optim.init(trained))


def advance(job: Job, state: State, frozen: Params) -> tuple[State, Report]:
    """One step. `frozen` is `cast(job)`, computed once per run.

    Raises NumericalError if the loss, the gradient or a number of the new state is not finite.
    """
    settings, step = job.settings, int(state.optimizer.step)
    rows = data.batch(settings.seed, step, settings.batch_size, len(job.examples))
    prompts = data.prompts(job.model, [job.examples[row] for row in rows], settings.accumulate)
    with attention_backend(job):
        grads, loss = finetune.gradient(
            partial(build, job, frozen), state.trained, prompts, job.model.cfg, settings.recompute
        )
    grads, norm = optim.clip(grads, settings.clip)
    if not norm.isfinite() or not loss.isfinite():
        raise NumericalError(
            f"step {step + 1}: loss {loss:.4g}, gradient {norm:.4g}; lower learning-rate, or use float32"
        )
    rate = optim.cosine(step, settings.learning_rate, settings.warmup, settings.steps)
    decay = optim.Settings(weight_decay=settings.weight_decay)
    new = State(*optim.update(grads, state.optimizer, state.trained, rate, decay))
    if (path := tree.not_finite(new)) is not None:
        raise NumericalError(f"step {step + 1}: {path} is not finite after it; lower learning-rate, or use float32")
    return new, Report(step + 1, loss.item(), norm.item(), rate)


def cast(job: Job) -> Params:
    """The parameters in the dtype of the computation, except the trained ones, which `build` replaces."""
    dtype = getattr(torch, job.settings.dtype)
    trained = set() if job.settings.lora_rank else finetune.select(job.model.params, job.settings.freeze).keys()
    return tree.map_with_path(lambda path, leaf: leaf if path in trained else leaf.to(dtype), job.model.params)


def build(job: Job, frozen: Params, trained: dict[str, Any]) -> Params:
    """The parameters of the computation: the frozen ones, with trained leaves replaced or LoRA pairs merged."""
    if job.settings.lora_rank:
        return lora.merge(frozen, adapter(job, trained))
    return tree.replace(frozen, {path: leaf.to(getattr(torch, job.settings.dtype)) for path, leaf in trained.items()})


def adapter(job: Job, trained: dict[str, lora.Pair]) -> lora.Lora:
    """The trained pairs with their scale."""
    return lora.Lora(trained, job.settings.lora_alpha / job.settings.lora_rank)


def finished(job: Job, state: State) -> Model:
    """The trained model, in the dtype of the model before training."""
    params = job.model.params
    if job.settings.lora_rank:
        return job.model._replace(params=lora.merge(params, adapter(job, state.trained)))
    leaves = {path: leaf.to(params.projector.dtype) for path, leaf in state.trained.items()}
    return job.model._replace(params=tree.replace(params, leaves))


def evaluate(job: Job, state: State, frozen: Params, examples: Sequence[Example]) -> float:
    """The mean loss over all suffix tokens of other examples."""
    size, params, total, count = job.settings.batch_size, build(job, frozen, state.trained), 0.0, 0
    with torch.no_grad():
        for first in range(0, len(examples), size):
            for prompt in data.prompts(job.model, examples[first : first + size], job.settings.accumulate):
                value, tokens = finetune.loss_terms(params, prompt, job.model.cfg)
                total, count = total + value.item(), count + int(tokens)
    return total / count


def attention_backend(job: Job) -> Any:
    """PyTorch's attention backend for training: for bfloat16 on a CPU the math backend, which is faster there.

    The gradient of 16 rows of the shipped checkpoint took 144 ms with it, and 244 ms with the fused one (one core).
    """
    slow = job.settings.dtype == "bfloat16" and job.model.params.projector.device.type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


def save(path: Path, job: Job, state: State) -> None:
    """Write the state and the identity of its job to one safetensors file, which atomically replaces an older one.

    Raises CheckpointError if the file cannot be written, NumericalError if a number of the state is not finite.
    """
    tree.check_finite(state, str(path))
    with write_errors(path, CheckpointError), replacing(path) as file:
        write_safetensors(file, tree.flatten(state), {"job": json.dumps(identity(job))})


def step_in(path: Path) -> int | None:
    """The number of steps done by the state in a file; None if there is no readable state."""
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.get_tensor("optimizer.step"))
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError):
        return None


def resume(path: Path, job: Job) -> State:
    """The state in a file.

    Raises SettingError, naming the difference, if it belongs to another job; CheckpointError if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {}).get("job", "{}"))
        arrays = load_file(path)
        if not isinstance(saved, dict):
            raise ValueError(f"its job is {saved!r}")
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:  # RuntimeError: nested too deep
        raise CheckpointError(
            f"{path}: not the state of a run ({first_line(error)}); remove the file to start again"
        ) from error
    for name, value in identity(job).items():
        if saved.get(name) != value:
            raise SettingError(
                f"{path} holds an unfinished run with {name.replace('_', '-')} {saved.get(name)}, not {value}; "
                "continue it with its own settings, or give another folder"
            )
    fresh = start(job)
    for name, leaf in tree.flatten(fresh).items():
        if name not in arrays or (arrays[name].shape, arrays[name].dtype) != (leaf.shape, leaf.dtype):
            raise CheckpointError(f"{path}: {name} is missing, or of another shape or dtype; remove it to start again")
    return tree.map_with_path(lambda name, leaf: arrays[name].to(leaf.device), fresh)


def identity(job: Job) -> dict[str, Any]:
    """What must be equal for a run to be resumed: the settings, and digests of the model and the data, as JSON.

    The projector represents all weights of the model: checkpoints of the same shape differ in it.
    """
    rows = [(list(map(str, row.images)), row.prefix, row.suffix) for row in job.examples]
    weights = job.model.params.projector.float().cpu().numpy().tobytes()
    digests = {"model": repr(job.model.cfg).encode() + weights, "data": json.dumps(rows).encode()}
    return json.loads(json.dumps(asdict(job.settings))) | {
        name: hashlib.sha256(value).hexdigest()[:16] for name, value in digests.items()
    }
