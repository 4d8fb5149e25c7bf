"""One stage of training: the loop over batches, and the file from which an interrupted stage continues.

A stage is its loss and its first parameters; optimizer, schedule and gradient come from `pgfunc.train`.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.tiny.recipe import Plan
from pgfunc import tree
from pgfunc.errors import NumericalError
from pgfunc.jit import cuda_graphs
from pgfunc.train import finetune, optim

Loss = Callable[[Any, Any], tuple[Tensor, Any]]  # (parameters, batch) -> the loss, and a tree of numbers to log


def fit(
    stage: str, params: Any, loss: Loss, batches: Callable[[int], Iterable[Any]], plan: Plan, folder: Path, until: float
) -> bool:
    """Continue from the file in the folder, to the end of the plan or to the time `until`; True when the plan is done.

    `batches(n)` are the batches from number n on. When done, `folder/stage.safetensors` holds the parameters only. Each
    process of a torch.distributed group brings its own share of every batch; the first process writes the files, and
    logs the figures of its own share.
    """
    unfinished, settings = (
        folder / f"{stage}.going.safetensors",
        optim.Settings(beta2=0.98, weight_decay=plan.weight_decay),
    )
    params, state = resume(unfinished, params)
    done, began, logged = int(state.step), time.monotonic(), []
    gradient = cuda_graphs.graphed(lambda params, batch: finetune.grad_and_value(lambda p: loss(p, batch), params))
    for step, batch in enumerate(batches(done), done):
        grads, (value, extras) = gradient(params, batch)
        grads, _ = optim.clip(average(grads), 1.0)
        rate = optim.cosine(step, plan.peak, plan.warmup, plan.steps)
        params, state = optim.update(grads, state, params, rate, settings)
        logged.append(torch.stack([value.detach(), *(extra.detach().float() for extra in extras.values())]))
        if (step + 1) % 100 == 0 or step + 1 == plan.steps:
            figures = dict(zip(["loss", *extras], torch.stack(logged).mean(0).tolist(), strict=True))
            note(folder, {"stage": stage, "step": step + 1, "seconds": round(time.monotonic() - began, 1)} | figures)
            logged = []
            finite(stage, step, figures["loss"])
        if late(until) and step + 1 < plan.steps:
            finite(stage, step, float(value))
            if writes():
                save(unfinished, params, state)
            return False
    if writes():
        write(folder / f"{stage}.safetensors", tree.flatten(params))
        unfinished.unlink(missing_ok=True)
    return True


def writes() -> bool:
    """Whether this process is the one that logs and saves."""
    return not dist.is_initialized() or dist.get_rank() == 0


def average(grads: Any) -> Any:
    """The mean of all processes' gradients, exchanged as one tensor."""
    if not dist.is_initialized():
        return grads
    leaves = tree.flatten(grads)
    flat = torch.cat([leaf.flatten() for leaf in leaves.values()])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([leaf.numel() for leaf in leaves.values()])
    return tree.replace(grads, {name: part.view_as(leaves[name]) for name, part in zip(leaves, parts, strict=True)})


def late(until: float) -> bool:
    """Whether any process has passed the time `until`."""
    over = torch.tensor(float(time.monotonic() > until))
    if dist.is_initialized():
        dist.all_reduce(over, dist.ReduceOp.MAX)
    return bool(over)


def finite(stage: str, step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise NumericalError(f"{stage}: the loss is {loss} at step {step + 1}")


def note(folder: Path, line: dict[str, Any]) -> None:
    if not writes():
        return
    text = json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()})
    print(text, flush=True)
    with (folder / "log.jsonl").open("a") as log:
        log.write(text + "\n")


def save(path: Path, params: Any, state: optim.State) -> None:
    parts = {"params": params, "first": state.first, "second": state.second, "step": state.step}
    write(path, {f"{part}/{name}": leaf for part, each in parts.items() for name, leaf in tree.flatten(each).items()})


def resume(path: Path, params: Any) -> tuple[Any, optim.State]:
    """Parameters and optimizer state from the file; those of the first step if there is no file."""
    state = optim.init(params)
    if not path.exists():
        return params, state
    stored, device = load_file(path), next(iter(tree.flatten(params).values())).device
    parts = {"params": params, "first": state.first, "second": state.second, "step": state.step}
    read = {
        part: tree.replace(each, {name: stored[f"{part}/{name}"].to(device) for name in tree.flatten(each)})
        for part, each in parts.items()
    }
    return read["params"], optim.State(read["step"].cpu(), read["first"], read["second"])


def write(path: Path, leaves: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file({name: leaf.detach().cpu().contiguous() for name, leaf in leaves.items()}, temporary)
    temporary.replace(path)


def read(path: Path, params: Any) -> Any:
    """The parameters of a finished stage, as a tree like `params`."""
    stored = load_file(path)
    return tree.map_with_path(lambda name, leaf: stored[name].to(leaf), params)
