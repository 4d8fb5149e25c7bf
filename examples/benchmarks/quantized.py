"""The speed of products and decode steps with weights in 16, 8 and 4 bits on this CPU.

    python examples/benchmarks/quantized.py

First one row times each matrix of PaliGemma 3B's language model, with weights that are not in a CPU cache; then one
decode step, batch 1, of that language model with 4 of its 18 layers and random weights, eager and compiled. The formats
take turns. Prints medians: milliseconds, and the bytes of weights read per second. Takes about 6 GB of memory and 4
minutes.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import cycle
from statistics import median

import torch

import pgfunc as pg
from pgfunc import ops, paligemma
from pgfunc.quant import lowbit

FORMATS = ("bf16", "int8", "int4")
LAYERS = 4


def seconds(runs: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """The median time of each run. The runs take turns; the first two rounds do not count."""
    elapsed: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            elapsed[name].append(time.perf_counter() - start)
    return {name: median(times[2:]) for name, times in elapsed.items()}


def report(title: str, sizes: dict[str, int], elapsed: dict[str, float]) -> None:
    figures = [
        f"{name} {1e3 * elapsed[name]:8.2f} ms {sizes[name] / elapsed[name] / 1e9:5.1f} GB/s" for name in elapsed
    ]
    print(f"{title:<22} {sizes['bf16'] / 1e6:7.1f} MB in bf16   {'   '.join(figures)}", flush=True)


def product(outputs: int, inputs: int) -> None:
    """One row times a matrix; copies of the matrix take turns, so that each is read from memory."""
    x = torch.randn(1, inputs, dtype=torch.bfloat16)
    plain = torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(std=inputs**-0.5)
    weights = {"bf16": plain} | {name: lowbit.quantize(plain, name) for name in FORMATS[1:]}
    sizes = {name: pg.tree.nbytes(w) for name, w in weights.items()}
    turns = {
        name: cycle([pg.tree.map(torch.clone, w) for _ in range(1 + 2**28 // sizes[name])])
        for name, w in weights.items()
    }
    runs = {name: lambda name=name: ops.linear(x, next(turns[name])) for name in FORMATS}
    report(f"{outputs} x {inputs}", sizes, seconds(runs, 40))


def decode() -> None:
    """One step of the language model, batch 1; the eager step always starts from the same cache."""
    cfg = pg.PUBLISHED["paligemma-3b-224"]
    cfg = replace(cfg, text=replace(cfg.text, layers=LAYERS), vision=replace(cfg.vision, layers=1))
    plain = pg.tree.map(
        lambda leaf: torch.empty(leaf.shape, dtype=torch.bfloat16).normal_(std=0.02), paligemma.abstract(cfg)
    )
    trees = {"bf16": plain} | {name: pg.quant.quantize(plain, name) for name in FORMATS[1:]}
    sizes = {name: pg.tree.nbytes(tree.language) for name, tree in trees.items()}
    tokens, some = torch.ones(1, 16, dtype=torch.int64), torch.ones(1, 16, dtype=torch.bool)
    prompt = pg.Prompt(torch.empty(1, 0, 3, 224, 224, dtype=torch.bfloat16), tokens, some, ~some)
    caches = {name: pg.prefill(tree, prompt, cfg, 256)[1] for name, tree in trees.items()}
    step = pg.jit(pg.decode, donate="cache")

    def compiled(name: str) -> None:
        caches[name] = step(trees[name], tokens[:, 0], caches[name], cfg)[1]

    eager = {name: lambda name=name: pg.decode(trees[name], tokens[:, 0], caches[name], cfg) for name in FORMATS}
    report(f"decode, {LAYERS} layers", sizes, seconds(eager))
    report("the same, compiled", sizes, seconds({name: lambda name=name: compiled(name) for name in FORMATS}))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    with torch.no_grad():
        for shape in ((2048, 2048), (16384, 2048), (2048, 16384), (257_216, 2048)):
            product(*shape)
        decode()
