"""What is timed is the loop that is meant, on numbers that are numbers."""

import os
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import text_model

import pgfunc as pg
from pgfunc import bench, paligemma
from pgfunc.bench import Case, roofline
from pgfunc.bench.roofline import Machine, Work
from pgfunc.config import Config, TextConfig, VisionConfig
from pgfunc.errors import PromptError, SettingError

CPU = torch.device("cpu")
MACHINE = Machine(bandwidth=1e9, rate=1e10)


def test_times_are_of_one_call_and_leave_the_first_run_out():
    calls = []

    def fn():
        calls.append(0)
        time.sleep(0.05 if len(calls) <= 2 else 0.002)

    found = bench.times(fn, CPU, repeat=3, calls=2)
    assert len(calls) == 8
    assert len(found) == 3
    assert all(0.002 <= seconds < 0.05 for seconds in found)


def test_a_machine_is_measured_within_reason():
    machine = bench.measure(CPU, torch.float32)
    assert 1e8 < machine.bandwidth < 1e13
    assert 1e8 < machine.rate < 1e16
    assert bench.hardware(CPU)


def test_stages_are_measured_in_order_and_a_step_is_a_token(monkeypatch):
    model, case = text_model(), Case(batch=2, prompt_tokens=3, tokens=4, repeat=2, compile=False)
    length, seen = case.length(model.cfg), []

    def advance(params, token, cache, cfg, settings, u):
        after = pg.decode(params, token, cache, cfg)
        seen.append((cache.length.tolist(), cache.slots, token.tolist(), after[0].argmax(-1).tolist()))
        return after[0].argmax(-1), u, after[1]

    monkeypatch.setattr(bench, "advance", advance)
    found = list(bench.stages(model, case, MACHINE))
    assert [(stage.name, stage.compiled) for stage in found] == [
        (name, False) for name in ("vision", "prefill", "decode", "generate")
    ]
    assert all(len(stage.seconds) == 2 and min(stage.seconds) > 0 for stage in found)
    runs = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert len(runs) == 3, "one warms up"
    for run in runs:
        assert [lengths for lengths, *_ in run] == [[length + i] * 2 for i in range(3)], "the cache grows"
        assert {slots for _, slots, *_ in run} == {length + 4}
        assert [given for *_, given, _ in run][1:] == [said for *_, said in run][:-1], "what is said is fed back"
    decode, generate = found[2:]
    works = [roofline.decode_work(model.params, model.cfg, 2, length + i) for i in range(3)]
    assert decode.work == Work(*(sum(column) // 3 for column in zip(*works, strict=True)))
    assert decode.floor == pytest.approx(roofline.floor(works, MACHINE) / 3)
    assert generate.floor == pytest.approx(found[1].floor + 3 * decode.floor)
    assert min(decode.seconds) < min(generate.seconds), "a token is less than all"


def test_slots_are_room_that_decode_has(monkeypatch):
    seen = set()

    def advance(params, token, cache, cfg, settings, u):
        seen.add(cache.slots)
        return token, u, pg.decode(params, token, cache, cfg)[1]

    monkeypatch.setattr(bench, "advance", advance)
    list(bench.stages(text_model(), Case(tokens=2, slots=64, repeat=1, compile=False), MACHINE))
    assert seen == {64}


MIDDLE = Config(
    VisionConfig(width=64, layers=2, heads=2, hidden=128, image_size=28, patch=14),
    TextConfig(vocab=2000, width=256, layers=6, heads=4, kv_heads=1, head_dim=64, hidden=512, query_scale=0.125),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_parameters_are_numbers_and_say_many_things(dtype):
    tree = bench.random_params(MIDDLE, dtype, CPU)
    leaves, shapes = pg.tree.flatten(tree), pg.tree.flatten(paligemma.abstract(MIDDLE))
    assert {path: leaf.shape for path, leaf in leaves.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    assert {leaf.dtype for leaf in leaves.values()} == {dtype}
    assert all(torch.equal(leaf, other) for leaf, other in zip(
        leaves.values(), pg.tree.flatten(bench.random_params(MIDDLE, dtype, CPU)).values(), strict=True))  # fmt: skip
    model = pg.Model(replace(MIDDLE, eos=-1), tree, None)
    u = torch.zeros(1, 24, dtype=torch.float64)
    (done,) = bench.complete(model, bench.random_prompt(MIDDLE, 1, 4, CPU), bench.GREEDY, u)
    assert len(done.tokens) == 24
    assert len(set(done.tokens)) > 6


def test_loading_is_timed_with_one_model_in_memory():
    alive = []

    def make() -> pg.Model:
        assert not any(leaf() is not None for leaf in alive)
        model = text_model()
        alive.append(weakref.ref(model.params.projector))
        return model

    model, stage = bench.load_stage(make, CPU, MACHINE, repeat=3)
    assert len(alive) == len(stage.seconds) == 3
    assert stage.work == Work(0, pg.tree.nbytes(model.params))
    assert stage.floor == pytest.approx(pg.tree.nbytes(model.params) / 1e9)


def test_cold_is_an_empty_folder_while_it_lasts(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with bench.cold():
        place = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        place.mkdir()
        assert place.parent == Path(os.environ["TRITON_CACHE_DIR"]).parent
    assert not place.parent.exists()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert "TRITON_CACHE_DIR" not in os.environ


WRONG = {
    "batch is 0, expected 1 or more": Case(batch=0),
    "prompt-tokens is 0, expected 1 or more": Case(prompt_tokens=0),
    "tokens is 1, expected 2 or more": Case(tokens=1),
    "repeat is 0, expected 1 or more": Case(repeat=0),
    "slots is 399, expected 400 or more: so many get filled": Case(slots=399),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_number_outside_its_range_is_said(said):
    with pytest.raises(SettingError) as found:
        WRONG[said].check(pg.PUBLISHED["paligemma-3b-224"])
    assert str(found.value) == said


def test_the_longest_row_that_fits_passes_and_one_token_more_does_not():
    cfg = pg.PUBLISHED["paligemma-3b-448"]
    Case(prompt_tokens=8192 - 1024 - 128).check(cfg)
    with pytest.raises(PromptError, match="do not fit 8192 positions"):
        Case(prompt_tokens=8192 - 1024 - 127).check(cfg)
