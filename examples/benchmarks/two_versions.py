"""Two versions of pgfunc in turns: is the new one slower?

    git worktree add ../before HEAD~1
    python examples/benchmarks/two_versions.py ../before . --config paligemma-3b-224 --stage decode --stage prefill

Each version runs in a process of its own and measures the stages of `pgfunc bench`, compiled. The processes measure in
turns, A B A B, so that what slows the machine down slows both. The script prints the median of all runs of each version
in milliseconds (decode: of one token), their ratio, and the ratio of each turn. Memory must hold both models.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

STAGES = "decode", "prefill"


def measure(options: argparse.Namespace) -> None:
    """The process of one version: measures a stage each time that it reads a line, until the line is empty."""
    sys.path.insert(0, options.folders[0])
    import pgfunc as pg
    from pgfunc import bench
    from pgfunc.checkpoint import as_device

    assert Path(pg.__file__).resolve().is_relative_to(Path(options.folders[0]).resolve()), (
        f"{pg.__file__} was imported instead"
    )
    device = as_device(options.device)
    if options.config:
        cfg = pg.PUBLISHED[options.config]
        params = bench.random_params(cfg, getattr(torch, options.dtype or "bfloat16"), device)
        model = pg.Model(cfg, pg.quant.quantize(params, options.quantize) if options.quantize else params, None)
    else:
        model = pg.load(options.model, options.dtype, device, quantize=options.quantize)
    model = model._replace(cfg=replace(model.cfg, eos=-1))  # so that no row ends early
    case = bench.Case(options.batch, tokens=options.tokens, repeat=options.repeat)
    prompt = bench.random_prompt(model.cfg, case.batch, case.prompt_tokens, device)
    measured: Any = sys.modules.get("pgfunc.bench.pipeline", bench)  # the module whose stages call `times`
    times, name = measured.times, ""

    def times_in_turns(fn: Callable[[], Any], device: torch.device, repeat: int, calls: int = 1) -> tuple[float, ...]:
        for _ in range(2):
            fn()
        print(json.dumps(name), flush=True)
        seconds = ()
        while sys.stdin.readline().strip():
            seconds += times(fn, device, repeat, calls)
            print(json.dumps(seconds[-repeat:]), flush=True)
        return seconds

    measured.times = times_in_turns
    machine = measured.Machine(1e12, 1e12)  # the floors are not printed
    with torch.no_grad(), bench.cold():
        for name in options.stage:
            if name == "decode":
                measured.decode_stage(model, prompt, case, machine, True)
            else:
                measured.compiled_prefill_stage(model, prompt, case, machine)


def compare(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Run both versions in turns and print their times."""
    versions = [
        subprocess.Popen(
            [sys.executable, __file__, folder, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for folder in options.folders
    ]

    def answer(version: subprocess.Popen, line: str | None = None) -> Any:
        if line is not None:
            print(line, file=version.stdin, flush=True)
        text = version.stdout.readline() if version.stdout else ""
        if not text:
            sys.exit(f"two_versions.py: the process of {options.folders[versions.index(version)]} ended")
        return json.loads(text)

    for stage in options.stage:
        for version in versions:
            assert answer(version) == stage
        turns = [[answer(version, "go") for version in versions] for _ in range(options.turns)]
        for version in versions:
            print(file=version.stdin, flush=True)
        steps = options.tokens - 1 if stage == "decode" else 1
        old, new = (1e3 * median(x for turn in turns for x in turn[i]) / steps for i in range(2))
        ratios = " ".join(f"{median(new) / median(old):.3f}" for old, new in turns)
        print(f"{stage:8} old {old:9.3f} ms  new {new:9.3f} ms  ratio {new / old:.4f}  turns {ratios}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="two checkouts: the old one and the new one")
    parser.add_argument("--config", help="random weights of this published size")
    parser.add_argument("--model", help="a checkpoint; default: the shipped one")
    parser.add_argument("--stage", action="append", choices=STAGES, help="repeat it for several; default: both")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to decode")
    parser.add_argument("--quantize", help="a method of pgfunc.quant, such as int8")
    parser.add_argument("--dtype", help="dtype of the weights; default: the checkpoint's, bfloat16 if random")
    parser.add_argument("--device", help="cpu or cuda; default: CUDA if available")
    parser.add_argument("--repeat", type=int, default=5, help="runs in a turn")
    parser.add_argument("--turns", type=int, default=4, help="turns of each version")
    options = parser.parse_args()
    if len(options.folders) > 2:  # a process of one version is given one
        parser.error(f"{len(options.folders)} folders, expected 2")
    options.stage = options.stage or list(STAGES)
    return options


if __name__ == "__main__":
    given = parse()
    if len(given.folders) == 1:
        measure(given)
    else:
        compare(given, [word for word in sys.argv[1:] if word not in given.folders])
