"""The cost of an immutable cache: the same step compiled by `pg.jit`, and compiled with a cache that is overwritten.

    python examples/benchmarks/immutable.py --config paligemma-3b-224
    python examples/benchmarks/immutable.py --model weights/tiny --dtype float32 --device cpu

Both generate the same number of greedy tokens after one random prompt, in turns, and keep each token. The second step
owns one cache, one token and one length, and overwrites them; on a CUDA device it is a graph that is replayed. The
script prints medians of milliseconds a token and their ratio. The exit status is 1 if the tokens differ.
"""

import argparse
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import pgfunc as pg
from pgfunc import bench, paligemma
from pgfunc.cache import Cache, pad
from pgfunc.checkpoint import as_device, as_dtype
from pgfunc.errors import PgfuncError, first_line
from pgfunc.generate import compiled_decode_step, decode_step
from pgfunc.jit import cuda_graphs
from pgfunc.jit.donation import bucket
from pgfunc.sample import greedy


def values(model: pg.Model, token: torch.Tensor, cache: Cache, u: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens of a loop over `compiled_decode_step`, the loop of `generate`."""
    tokens = []
    for _ in range(count):
        token, _, cache = compiled_decode_step(model.params, token, cache, model.cfg, bench.GREEDY, u)
        tokens.append(token)
    return torch.stack(tokens)


def overwriting(model: pg.Model, token: torch.Tensor, cache: Cache, u: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """A function that generates a number of tokens, always in the same memory."""
    free = bucket(cache.slots) - cache.slots
    start = token, *(pad(x, free) for x in (*cache.k, *cache.v)), cache.length
    state = [x.clone() for x in start]

    def step(params: Any, state: list[torch.Tensor]) -> None:
        layers = (len(state) - 2) // 2
        old_cache = Cache(tuple(state[1 : 1 + layers]), tuple(state[1 + layers : -1]), state[-1])
        token, _, new = decode_step(params, state[0], old_cache, model.cfg, bench.GREEDY, u)
        for old, after in zip(state, (token, *new.k, *new.v, new.length), strict=True):
            old.copy_(after)

    compiled = torch.compile(step, dynamic=False, fullgraph=True)
    with torch.no_grad():
        compiled(model.params, state)
    once = lambda: compiled(model.params, state)  # noqa: E731
    if token.is_cuda:
        once, _ = cuda_graphs.capture(lambda _: compiled(model.params, state), [token])

    def write(count: int) -> torch.Tensor:
        tokens = []
        for old, first in zip(state, start, strict=True):
            old.copy_(first)
        for _ in range(count):
            once()
            tokens.append(state[0].clone())
        return torch.stack(tokens)

    return write


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config", choices=pg.PUBLISHED, default="paligemma-3b-224", help="random weights of this size"
    )
    source.add_argument("--model", help="use a checkpoint instead")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate in each turn")
    parser.add_argument("--repeat", type=int, default=9, help="number of turns")
    parser.add_argument("--dtype", help="dtype of the weights; default: the checkpoint's, bfloat16 if random")
    parser.add_argument("--device", help="cpu or cuda; default: CUDA if available")
    options = parser.parse_args(arguments)
    try:
        device, dtype = as_device(options.device), as_dtype(options.dtype)
        if options.model:
            model = pg.load(options.model, dtype, device)
        else:
            cfg = pg.PUBLISHED[options.config]
            model = pg.Model(cfg, bench.random_params(cfg, dtype or torch.bfloat16, device), None)
        case = bench.Case(tokens=options.tokens, repeat=options.repeat)
        case.check(model.cfg)
    except (PgfuncError, torch.OutOfMemoryError) as error:
        print(f"immutable.py: {first_line(error)}", file=sys.stderr)
        return 2
    prompt, u = bench.random_prompt(model.cfg, 1, 16, device), torch.zeros(1, dtype=torch.float64, device=device)
    logits, cache = paligemma.prefill(model.params, prompt, model.cfg, options.tokens)
    token = greedy(logits)
    writers = {
        "a value, by pg.jit": lambda count: values(model, token, cache, u, count),
        "overwritten": overwriting(model, token, cache, u),
    }
    tokens = {name: write(options.tokens) for name, write in writers.items()}
    times: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(options.repeat):
        for name, write in writers.items():
            seconds = bench.timed(lambda write=write: write(options.tokens), device)
            times[name].append(1e3 * seconds / options.tokens)
    print(f"{options.model or options.config}, {model.params.projector.dtype}, {bench.hardware(device)}, "
          f"torch {torch.__version__}")  # fmt: skip
    for name, turns in times.items():
        print(f"{name:<20} {median(turns):8.3f} ms a token ({min(turns):.3f} to {max(turns):.3f})")
    one, other = (median(turns) for turns in times.values())
    print(f"ratio {one / other:.3f}")
    return int(not torch.equal(*tokens.values()))


if __name__ == "__main__":
    sys.exit(main())
