"""The benchmark reports the cost of compiling: the decode step is compiled once, for both `decode` and `generate`."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from cases import CONFIGS, params, text_model

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
    assert compiled.first > 10 * max(compiled.seconds), "only the first step compiles"
    assert eager.first == 0


def test_the_compiled_prefill_stage_runs_the_prefill_of_generate():
    cfg = CONFIGS["gemma"]
    model, case, machine = (
        pg.Model(cfg, params(cfg), None),
        bench.Case(tokens=4, repeat=2),
        roofline.Machine(1e10, 1e11),
    )
    rows = bench.random_prompt(cfg, 1, case.prompt_tokens, model.params.projector.device)
    done = bench.compiled_prefill_stage(model, rows, case, machine)
    assert (done.name, done.compiled, done.compilations, len(done.seconds)) == ("prefill", True, 1, 2)
    assert done.first > max(done.seconds)
    assert done.floor == roofline.floor([roofline.prefill_work(model.params, cfg, 1, case.prompt_tokens)], machine)


def test_two_versions_are_measured_in_turns(tmp_path):
    root = Path(__file__).parents[2]
    pg.save(text_model(), tmp_path / "model")
    (tmp_path / "old").symlink_to(root)  # the same code in another folder
    options = [
        "--model",
        str(tmp_path / "model"),
        "--tokens",
        "4",
        "--repeat",
        "2",
        "--turns",
        "2",
        "--device",
        "cpu",
        "--stage",
        "decode",
    ]
    script = root / "examples" / "benchmarks" / "two_versions.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "old"), str(root), *options],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    number = r"\d+\.\d{3}"
    pattern = rf"decode +old +{number} ms  new +{number} ms  ratio \d+\.\d{{4}}  turns {number} {number}\n"
    assert re.fullmatch(pattern, done.stdout)
