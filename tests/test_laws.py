"""The laws hold for our implementations, and each law finds the fault that was planted for it."""

import json
import re
import runpy
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import reference
import torch
from cases import CONFIGS
from faults import FAULTS
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch._dynamo.exc import TorchDynamoException
from transformers import PaliGemmaForConditionalGeneration
from typer.testing import CliRunner

import pgfunc as pg
from pgfunc import laws, tokenizer
from pgfunc.checkpoint import shipped
from pgfunc.cli import law_systems
from pgfunc.cli import laws as cli_laws
from pgfunc.cli.options import app
from pgfunc.config import Config
from pgfunc.laws import LAWS, System, adapters, strategies
from pgfunc.objects import vqvae

EXAMPLES = Path(__file__).parent.parent / "examples"
TOKENIZER, VQ = tokenizer.load(shipped() / "tokenizer.json"), vqvae.init(3)


def system(cfg: Config, seed: int = 0) -> System:
    return laws.eager(laws.parameters(cfg, seed), cfg, "pgfunc", TOKENIZER, VQ)


def eager(name: str = "gemma2") -> System:
    return system(CONFIGS[name])


systems = st.builds(system, laws.configs(), laws.Strategies().seeds)
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")
few = st.sampled_from([system(replace(CONFIGS["gemma2"], resample=name)) for name in FILTERS])


def systems_for(law: laws.Law) -> tuple[st.SearchStrategy[System], int]:
    """The systems to check a law on, and the number of examples: networks of every kind if the law runs one."""
    runs_network = {"forward", "prefill", "windowed", "params", "tapped"} & {*law.needs}
    return (systems, max(10, settings().max_examples // 4)) if runs_network else (few, settings().max_examples)


def broken(results: list[laws.Result]) -> list[str]:
    return [
        f"{result.law.name}: {result.counterexample} {result.why} {result.worst}"
        for result in results
        if result.verdict == "broken"
    ]


def with_own_reference(system: System) -> System:
    """The system whose reference is its own forward, one row at a time."""

    def reference(prompt):
        rows = [pg.Prompt(*(leaf[row : row + 1] for leaf in prompt)) for row in range(len(prompt.tokens))]
        return torch.cat([system.forward(row) for row in rows])

    return system._replace(reference=reference)


@pytest.mark.parametrize("law", [law for law in LAWS if "compile" not in law.needs], ids=lambda law: law.name)
def test_each_law_holds_for_networks_of_every_kind(law):
    drawn, examples = systems_for(law)
    (result,) = laws.check(drawn.map(with_own_reference), [law], examples=examples, derandomize=True)
    assert not broken([result])
    assert result.verdict == "holds"
    assert result.examples >= 10


@pytest.mark.parametrize("method", ["int8", "int4-32"])
def test_the_laws_of_the_cache_hold_for_quantized_networks_which_equal_their_dequantized_ones(method):
    cfg = CONFIGS["gemma2"]
    cfg = replace(cfg, text=replace(cfg.text, width=64, hidden=64, head_dim=32, kv_heads=2))
    names = {"decode-equals-longer-prefill", "an-old-handle-stays-valid", "logits-are-those-of-the-reference"}
    chosen = [law for law in LAWS if law.name in names]
    results = laws.check(laws.quantized(laws.parameters(cfg), cfg, method), chosen, examples=5, derandomize=True)
    assert not broken(results)
    assert {result.law.name for result in results if result.verdict == "holds"} == names


# --- faults -----------------------------------------------------------------------------------------------------------


def test_every_law_has_a_fault():
    assert [law.name for law in LAWS] == [*FAULTS]


@pytest.fixture
def unshrunk(monkeypatch):
    """Do not shrink counterexamples: the test accepts any."""
    monkeypatch.setattr(laws.law, "QUIET", settings(laws.law.QUIET, phases=[Phase.generate]))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_each_law_finds_the_fault_that_was_planted_for_it(law, unshrunk):
    (result,) = laws.check(systems_for(law)[0].map(FAULTS[law.name]), [law], examples=200, derandomize=True)
    assert result.verdict == "broken"
    assert not result.why, "a fault must give wrong numbers, not raise"
    assert result.counterexample.startswith("pgfunc: ")


# --- transformers -----------------------------------------------------------------------------------------------------


def test_transformers_without_token_type_ids_lets_one_unpadded_row_see_its_whole_suffix(tmp_path, unshrunk):
    """With its default attention. The example below covers eager attention and ragged rows."""
    reference.save_random(tmp_path, "gemma-1kv")
    ours = pg.load(tmp_path, device="cpu")
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    unmarked = laws.transformers(theirs, ours.cfg, marked=False)
    checked = unmarked._replace(reference=laws.eager(ours.params, ours.cfg).forward)
    rows = laws.ragged(rows=1, padding=0).filter(lambda rows: rows.images > 0)
    results = laws.check(checked, laws.MODEL, laws.Strategies(rows=rows), 15, derandomize=True)
    names = {result.law.name for result in results if result.verdict == "broken"}
    overwriting = {"an-old-handle-stays-valid", "forks-are-apart", "a-step-is-pure"}  # broken because it has one cache
    expected = {"a-suffix-is-causal", "decode-equals-longer-prefill", "logits-are-those-of-the-reference"}
    assert names - overwriting == expected, broken(results)
    assert "forks-are-apart" in names


def test_the_example_finds_what_its_note_reports(capsys, unshrunk):
    runpy.run_path(str(EXAMPLES / "laws_of_transformers.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    words, heads = [line.split() for line in lines], [i for i, line in enumerate(lines) if not line.startswith(" ")]
    names = [{line[0] for line in words[a + 1 : b]} for a, b in zip(heads, [*heads[1:], None], strict=True)]
    rounded = {"a-step-is-pure", "an-old-handle-stays-valid"}  # PaliGemma breaks them, if at all, only by the last bits
    sdpa, sdpa_unmarked, eager, eager_unmarked, gemma2, gemma2_unmarked = (broken - rounded for broken in names)
    assert sdpa == eager == {"forks-are-apart"}
    assert sdpa_unmarked >= {"a-suffix-is-causal", "a-row-is-alone", "decode-equals-longer-prefill", *sdpa}
    assert eager_unmarked == {"a-prefix-sees-itself", "logits-are-those-of-the-reference", *eager}
    assert gemma2 == {"decode-equals-longer-prefill", *sdpa}
    assert gemma2_unmarked == {*gemma2, *eager_unmarked}


# --- results -----------------------------------------------------------------------------------------------


def test_a_counterexample_is_small_and_legible():
    causal = next(law for law in LAWS if law.name == "a-suffix-is-causal")
    (result,) = laws.check(FAULTS[causal.name](eager("gemma")), [causal], examples=30, derandomize=True)
    assert result.worst == 1
    assert result.tolerance == 0
    assert result.counterexample == (
        "pgfunc: Position(rows=Rows(prefix=(1,), suffix=(1,), images=0, padding=0, seed=0), share=0.0)"
    )


def test_an_example_that_raises_or_gives_nan_breaks_its_law():
    pure = next(law for law in LAWS if law.name == "forward-is-pure")
    alone = next(law for law in LAWS if law.name == "a-row-is-alone")

    def raising(prompt):
        raise ValueError("no such shape\nmore")

    (result,) = laws.check(eager()._replace(forward=raising), [pure], examples=5)
    assert (result.verdict, result.why) == ("broken", "ValueError: no such shape")
    (result,) = laws.check(eager()._replace(forward=lambda p: torch.full((*p.tokens.shape, 64), torch.nan)), [alone])
    assert result.verdict == "broken"


def test_a_law_that_is_broken_only_sometimes_is_broken():
    calls, system = [], eager()

    def forward(prompt):
        calls.append(1)
        return system.forward(prompt) + float(len(calls) == 6)

    pure = [law for law in LAWS if law.name == "forward-is-pure"]
    (result,) = laws.check(system._replace(forward=forward), pure, examples=10)
    assert result.verdict == "broken"


def test_laws_about_functions_that_a_system_lacks_are_absent():
    results = laws.check(System("nothing", 10, 28), examples=3)
    assert {result.verdict for result in results} == {"absent"}
    assert results[0].why == "forward, prefill, decode"


def test_examples_are_drawn_from_the_strategies():
    shapes, system = [], eager()

    def forward(prompt):
        shapes.append(tuple(prompt.tokens.shape))
        return system.forward(prompt)

    narrow = laws.Strategies(rows=laws.ragged(rows=1, prefix=1, suffix=0, images=1, padding=0))
    names = {"padding-is-not-read", "a-suffix-is-causal", "the-order-of-pictures-matters", "a-row-is-alone"}
    chosen = [law for law in LAWS if law.name in names]
    results = laws.check(system._replace(forward=forward), chosen, narrow, examples=5)
    assert set(shapes) == {(1, 1)}
    absent = {result.law.name for result in results if result.why == "such examples"}
    assert absent == {"a-suffix-is-causal", "the-order-of-pictures-matters"}


@pytest.mark.parametrize("mode", strategies.MODES)
def test_the_pictures_of_every_mode_can_be_read(mode):
    picture = laws.picture(laws.Picture(mode, 9, 5, seed=0))
    assert (picture.mode, picture.size) == (mode, (9, 5))
    assert eager().pixels(picture).isfinite().all()


# --- the command ------------------------------------------------------------------------------------------------------

run = CliRunner().invoke


def test_the_command_checks_the_shipped_checkpoint_and_prints_a_table():
    options = [word for law in ("a-suffix-is-causal", "drawing-is-monotone") for word in ("--law", law)]
    result = run(app, ["laws", "--examples", "2", *options])
    assert result.exit_code == 0, result.output
    assert re.search(r"a-suffix-is-causal +holds +2 +0\.0e\+00", result.output)
    result = run(app, ["laws", "--examples", "2", "--json", *options[2:]])
    (line,) = result.output.splitlines()
    assert json.loads(line)["verdict"] == "holds"
    assert json.loads(line)["statement"] == "A larger uniform number never draws an earlier token."


def test_the_exit_status_is_1_if_a_law_is_broken(tmp_path, monkeypatch):
    (tmp_path / "mine_wrong.py").write_text(
        "from pgfunc.laws import System\nSYSTEM = System('mine', 5, 28, softcap=lambda x, cap: x)\n"
    )
    monkeypatch.chdir(tmp_path)
    result = run(app, ["laws", "--system", "mine_wrong:SYSTEM", "--law", "softcap-is-bounded-and-monotone"])
    assert result.exit_code == 1
    assert "broken" in result.output
    assert "A softcap never exceeds its cap" in result.output
    assert "mine: Scaled(seed=0, by=" in result.output


def test_the_command_and_the_function_try_the_same_number_of_examples():
    assert signature(laws.check).parameters["examples"].default == cli_laws.EXAMPLES


@pytest.mark.parametrize("options", [["--quantize", "int8"], []])
def test_laws_about_parameters_are_not_checked_if_these_are_quantized_or_large(options, monkeypatch):
    monkeypatch.setattr(law_systems, "MOST_COPIED", 2**30 if options else 2**20)
    chosen = [law for law in LAWS if "params" in law.needs or law.name == "forward-is-pure"]
    names = [word for law in chosen for word in ("--law", law.name)]
    result = run(app, ["laws", "--examples", "1", "--json", *options, *names])
    assert result.exit_code == 0
    records = [json.loads(line) for line in result.output.splitlines()]
    assert {record["law"]: record["verdict"] for record in records} == {
        law.name: "absent" if "params" in law.needs else "holds" for law in chosen
    }


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (torch.OutOfMemoryError("2 GB"), "not enough memory on the device: give --dtype bfloat16 or --device cpu"),
        (TorchDynamoException("no g++"), "torch.compile fails here (no g++): check that a C++ compiler is installed"),
    ],
)
def test_a_missing_compiler_or_too_little_memory_breaks_no_law(problem, message, monkeypatch):
    def fails(*arguments, **options):
        raise problem

    monkeypatch.setattr(adapters, "jit", lambda *arguments, **options: fails)
    result = run(app, ["laws", "--examples", "1", "--law", "forks-are-apart", "--compile"])
    assert str(result.exception).startswith(message)


def test_an_example_that_runs_out_of_memory_breaks_no_law():
    def fails(prompt):
        raise torch.OutOfMemoryError("2 GB")

    with pytest.raises(torch.OutOfMemoryError):
        laws.check(eager()._replace(forward=fails), examples=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", ":thing"], "system is ':thing', expected module:object"),
        (["--system", "nothing"], "system is 'nothing', expected module:object"),
        (["--adapter", "no.such:thing"], "system no.such:thing: No module named 'no'"),
        (["--adapter", "json:thing"], "system json:thing: the module has no thing"),
        (["--adapter", "json:decoder"], "system json:decoder is a module, expected a pgfunc.laws.System"),
        (["--adapter", "a:b", "--quantize", "int8"], "--quantize is for a checkpoint, and --system names another"),
        (["--system", "a:b", "--compile"], "--compile is for a checkpoint, and --system names another"),
        (["--device", "meta"], "device meta has shapes but no arithmetic, so there is nothing to check"),
        (["--law", "gravity"], "law gravity is not one of decode-equals-longer-prefill, "),
        (["--examples", "0"], "examples is 0, expected 1 or more"),
    ],
)
def test_mistakes_are_errors_of_one_line(options, message):
    result = run(app, ["laws", *options])
    assert str(result.exception).startswith(message)


def test_an_adapter_for_a_toy_model_takes_20_lines(capsys):
    example = EXAMPLES / "laws_of_a_toy.py"
    assert len(example.read_text().splitlines()) <= 20
    runpy.run_path(str(example))
    verdicts = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert len(verdicts) == 5
    assert set(verdicts) == {"holds"}
