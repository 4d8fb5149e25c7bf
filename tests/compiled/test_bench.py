"""What compiling costs is seen: once for the step, which serves the loop and the whole of `generate`."""

from dataclasses import replace

from cases import CONFIGS, params

import pgfunc as pg
from pgfunc import bench, floors


def test_one_compilation_serves_decode_and_generate():
    cfg = replace(CONFIGS["gemma"], text=replace(CONFIGS["gemma"].text, layers=1))
    stages = list(
        bench.stages(pg.Model(cfg, params(cfg), None), bench.Case(tokens=4, repeat=1), floors.Machine(1e10, 1e11))
    )
    assert [(stage.name, stage.compiled, stage.compilations) for stage in stages] == [
        ("vision", False, 0), ("prefill", False, 0), ("decode", False, 0), ("decode", True, 1),
        ("generate", False, 0), ("generate", True, 0),
    ]  # fmt: skip
    eager, compiled = stages[2:4]
    assert compiled.first > 10 * max(compiled.seconds), "the first step compiles, and no other does"
    assert eager.first == 0
