"""What compiling costs is seen: once for the step, which serves the loop and the whole of `generate`."""

from dataclasses import replace

from cases import CONFIGS, params

import pgfunc as pg
from pgfunc import bench
from pgfunc.bench import roofline


def test_one_compilation_serves_decode_and_generate():
    cfg = replace(CONFIGS["gemma"], text=replace(CONFIGS["gemma"].text, layers=1))
    stages = list(
        bench.stages(pg.Model(cfg, params(cfg), None), bench.Case(tokens=4, repeat=1), roofline.Machine(1e10, 1e11))
    )
    assert [(stage.name, stage.compiled, stage.compilations) for stage in stages] == [
        ("vision", False, 0), ("prefill", False, 0), ("decode", False, 0), ("decode", True, 1),
        ("generate", False, 0), ("generate", True, 0),
    ]  # fmt: skip
    eager, compiled = stages[2:4]
    assert compiled.first > 10 * max(compiled.seconds), "the first step compiles, and no other does"
    assert eager.first == 0


def test_a_prompt_is_measured_as_generate_begins_with_it():
    cfg = CONFIGS["gemma"]
    model, case, machine = (
        pg.Model(cfg, params(cfg), None),
        bench.Case(tokens=4, repeat=2),
        roofline.Machine(1e10, 1e11),
    )
    given = bench.random_prompt(cfg, 1, case.prompt_tokens, model.params.projector.device)
    done = bench.compiled_prefill_stage(model, given, case, machine)
    assert (done.name, done.compiled, done.compilations, len(done.seconds)) == ("prefill", True, 1, 2)
    assert done.first > max(done.seconds)
    assert done.floor == roofline.floor([roofline.prefill_work(model.params, cfg, 1, case.prompt_tokens)], machine)
