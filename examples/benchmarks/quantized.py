"""How fast are products and decode steps with weights in 16, 8 and 4 bits on this CPU?

    python examples/benchmarks/quantized.py

First one row times each matrix of PaliGemma 3B's language model, in memory that no cache holds; then one decode step,
batch 1, of that language model with 4 of its 18 layers and random weights, as it is and compiled. Kinds take turns, and
medians are printed: milliseconds, and the bytes of weights read a second. Takes about 6 GB of memory and 4 minutes.
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

KINDS = ("bf16", "int8", "int4")
LAYERS = 4


def seconds(runs: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """The median time of each run, taken in turns after two that do not count."""
    taken: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(rounds + 2):
        for kind, run in runs.items():
            start = time.perf_counter()
            run()
            taken[kind].append(time.perf_counter() - start)
    return {kind: median(times[2:]) for kind, times in taken.items()}


def report(title: str, sizes: dict[str, int], taken: dict[str, float]) -> None:
    figures = [f"{kind} {1e3 * taken[kind]:8.2f} ms {sizes[kind] / taken[kind] / 1e9:5.1f} GB/s" for kind in taken]
    print(f"{title:<22} {sizes['bf16'] / 1e6:7.1f} MB in bf16   {'   '.join(figures)}", flush=True)


def product(outputs: int, inputs: int) -> None:
    """One row times a matrix; copies of it take turns, so that each comes from memory."""
    x = torch.randn(1, inputs, dtype=torch.bfloat16)
    plain = torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(std=inputs**-0.5)
    kinds = {"bf16": plain} | {kind: lowbit.quantize(plain, kind) for kind in KINDS[1:]}
    sizes = {kind: pg.tree.nbytes(w) for kind, w in kinds.items()}
    turns = {
        kind: cycle([pg.tree.map(torch.clone, w) for _ in range(1 + 2**28 // sizes[kind])]) for kind, w in kinds.items()
    }
    runs = {kind: lambda kind=kind: ops.linear(x, next(turns[kind])) for kind in KINDS}
    report(f"{outputs} x {inputs}", sizes, seconds(runs, 40))


def decode() -> None:
    """One step of the language model, batch 1, from the same cache each time."""
    cfg = pg.PUBLISHED["paligemma-3b-224"]
    cfg = replace(cfg, text=replace(cfg.text, layers=LAYERS), vision=replace(cfg.vision, layers=1))
    plain = pg.tree.map(
        lambda leaf: torch.empty(leaf.shape, dtype=torch.bfloat16).normal_(std=0.02), paligemma.abstract(cfg)
    )
    trees = {"bf16": plain} | {kind: pg.quant.quantize(plain, kind) for kind in KINDS[1:]}
    sizes = {kind: pg.tree.nbytes(tree.language) for kind, tree in trees.items()}
    tokens, some = torch.ones(1, 16, dtype=torch.int64), torch.ones(1, 16, dtype=torch.bool)
    prompt = pg.Prompt(torch.empty(1, 0, 3, 224, 224, dtype=torch.bfloat16), tokens, some, ~some)
    caches = {kind: pg.prefill(tree, prompt, cfg, 256)[1] for kind, tree in trees.items()}
    step = pg.jit(pg.decode, donate="cache")

    def compiled(kind: str) -> None:
        caches[kind] = step(trees[kind], tokens[:, 0], caches[kind], cfg)[1]

    eager = {kind: lambda kind=kind: pg.decode(trees[kind], tokens[:, 0], caches[kind], cfg) for kind in KINDS}
    report(f"decode, {LAYERS} layers", sizes, seconds(eager))
    report("the same, compiled", sizes, seconds({kind: lambda kind=kind: compiled(kind) for kind in KINDS}))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    with torch.no_grad():
        for shape in ((2048, 2048), (16384, 2048), (2048, 16384), (257_216, 2048)):
            product(*shape)
        decode()
