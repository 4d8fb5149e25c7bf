"""The laws of the cache hold for a compiled decode step with a donated cache."""

import re

from cases import CONFIGS, text_model
from typer.testing import CliRunner

import pgfunc as pg
from pgfunc import laws
from pgfunc.cli import app
from pgfunc.laws import adapters

CACHE = {
    "decode-equals-longer-prefill", "prefill-equals-forward", "an-old-handle-stays-valid", "forks-are-apart",
    "a-step-is-pure",
}  # fmt: skip


def test_the_laws_of_the_cache_hold_for_compiled_steps():
    cfg = CONFIGS["gemma2"]
    rows = laws.ragged(rows=2).filter(lambda rows: len(rows.prefix) == 2)  # code is compiled for each batch size
    chosen = [law for law in laws.MODEL if law.name in CACHE]
    results = laws.check(laws.compiled(laws.parameters(cfg), cfg), chosen, laws.Strategies(rows=rows), 20, True)
    verdicts = [(result.law.name, result.verdict, result.why) for result in results]
    assert verdicts == [(law.name, "holds", "") for law in chosen]
    assert len(chosen) == len(CACHE)


def test_the_law_of_compiled_edits_holds():
    cfg = CONFIGS["gemma2"]
    rows = laws.ragged(rows=2).filter(lambda rows: len(rows.prefix) == 2)
    chosen = [law for law in laws.LAB if "compile" in law.needs]
    system = laws.compiled(laws.parameters(cfg), cfg)
    (result,) = laws.check(system, chosen, laws.Strategies(rows=rows), 5, derandomize=True)
    assert (result.verdict, result.why) == ("holds", "")


def test_the_command_compiles_the_step(tmp_path, monkeypatch):
    pg.save(text_model(), tmp_path)
    steps = []
    monkeypatch.setattr(adapters, "jit", lambda fn, donate: steps.append(pg.jit(fn, donate)) or steps[0])
    options = ["--examples", "1", "--law", "an-old-handle-stays-valid", "--device", "cpu", "--compile"]
    result = CliRunner().invoke(app, ["laws", "--model", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert re.search("an-old-handle-stays-valid +holds +1 ", result.output)
    assert [step.compilations for step in steps] == [1]
