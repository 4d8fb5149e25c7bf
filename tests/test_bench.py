"""The benchmark times the intended loop, on random inputs without nan."""

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
from pgfunc.bench import Case, pipeline, roofline
from pgfunc.bench.roofline import Machine, Work
from pgfunc.config import Config, TextConfig, VisionConfig
from pgfunc.errors import PromptError, SettingError
from pgfunc.generate import complete

CPU = torch.device("cpu")
MACHINE = Machine(bandwidth=1e9, rate=1e10)


def test_times_are_per_call_and_exclude_the_first_run():
    calls = []

    def fn():
        calls.append(0)
        time.sleep(0.05 if len(calls) <= 2 else 0.002)

    times = bench.times(fn, CPU, repeat=3, calls=2)
    assert len(calls) == 8
    assert len(times) == 3
    assert all(0.002 <= seconds < 0.05 for seconds in times)


def test_the_measured_speed_of_a_machine_is_plausible():
    machine = bench.measure(CPU, torch.float32)
    assert 1e8 < machine.bandwidth < 1e13
    assert 1e8 < machine.rate < 1e16
    assert bench.hardware(CPU)


def test_stages_are_measured_in_order_and_decode_is_measured_per_token(monkeypatch):
    model, case = text_model(), Case(batch=2, prompt_tokens=3, tokens=4, repeat=2, compile=False)
    length, steps = case.length(model.cfg), []

    def decode_step(params, token, cache, cfg, settings, u):
        logits, new = pg.decode(params, token, cache, cfg)
        steps.append((cache.length.tolist(), cache.slots, token.tolist(), logits.argmax(-1).tolist()))
        return logits.argmax(-1), u, new

    monkeypatch.setattr(pipeline, "decode_step", decode_step)
    stages = list(bench.stages(model, case, MACHINE))
    assert [(stage.name, stage.compiled) for stage in stages] == [
        (name, False) for name in ("vision", "prefill", "decode", "generate")
    ]
    assert all(len(stage.seconds) == 2 and min(stage.seconds) > 0 for stage in stages)
    runs = [steps[i : i + 3] for i in range(0, len(steps), 3)]
    assert len(runs) == 3, "one run warms up"
    for run in runs:
        assert [lengths for lengths, *_ in run] == [[length + i] * 2 for i in range(3)], "the cache grows"
        assert {slots for _, slots, *_ in run} == {length + 4}
        inputs, outputs = [token for *_, token, _ in run], [token for *_, token in run]
        assert inputs[1:] == outputs[:-1], "each token is fed back"
    decode, generate = stages[2:]
    works = [roofline.decode_work(model.params, model.cfg, 2, length + i) for i in range(3)]
    assert decode.work == Work(*(sum(column) // 3 for column in zip(*works, strict=True)))
    assert decode.floor == pytest.approx(roofline.floor(works, MACHINE) / 3)
    assert generate.floor == pytest.approx(stages[1].floor + 3 * decode.floor)
    assert min(decode.seconds) < min(generate.seconds), "one token takes less time than all"


def test_decode_gets_a_cache_with_the_requested_slots(monkeypatch):
    slots = set()

    def decode_step(params, token, cache, cfg, settings, u):
        slots.add(cache.slots)
        return token, u, pg.decode(params, token, cache, cfg)[1]

    monkeypatch.setattr(pipeline, "decode_step", decode_step)
    list(bench.stages(text_model(), Case(tokens=2, slots=64, repeat=1, compile=False), MACHINE))
    assert slots == {64}


MIDDLE = Config(
    VisionConfig(width=64, layers=2, heads=2, hidden=128, image_size=28, patch=14),
    TextConfig(vocab=2000, width=256, layers=6, heads=4, kv_heads=1, head_dim=64, hidden=512, query_scale=0.125),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_parameters_are_reproducible_and_generate_varied_tokens(dtype):
    tree = bench.random_params(MIDDLE, dtype, CPU)
    leaves, shapes = pg.tree.flatten(tree), pg.tree.flatten(paligemma.abstract(MIDDLE))
    assert {path: leaf.shape for path, leaf in leaves.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    assert {leaf.dtype for leaf in leaves.values()} == {dtype}
    assert all(torch.equal(leaf, other) for leaf, other in zip(
        leaves.values(), pg.tree.flatten(bench.random_params(MIDDLE, dtype, CPU)).values(), strict=True))  # fmt: skip
    model = pg.Model(replace(MIDDLE, eos=-1), tree, None)
    u = torch.zeros(1, 24, dtype=torch.float64)
    (done,) = complete(model, bench.random_prompt(MIDDLE, 1, 4, CPU), bench.GREEDY, u)
    assert len(done.tokens) == 24
    assert len(set(done.tokens)) > 6


def test_loading_keeps_at_most_one_model_in_memory():
    projectors = []

    def make() -> pg.Model:
        assert not any(leaf() is not None for leaf in projectors)
        model = text_model()
        projectors.append(weakref.ref(model.params.projector))
        return model

    model, stage = bench.load_stage(make, CPU, MACHINE, repeat=3)
    assert len(projectors) == len(stage.seconds) == 3
    assert stage.work == Work(0, pg.tree.nbytes(model.params))
    assert stage.floor == pytest.approx(pg.tree.nbytes(model.params) / 1e9)


def test_cold_uses_an_empty_folder_and_deletes_it(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with bench.cold():
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        folder.mkdir()
        assert folder.parent == Path(os.environ["TRITON_CACHE_DIR"]).parent
    assert not folder.parent.exists()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert "TRITON_CACHE_DIR" not in os.environ


WRONG = {
    "batch is 0, expected 1 or more": Case(batch=0),
    "prompt-tokens is 0, expected 1 or more": Case(prompt_tokens=0),
    "tokens is 1, expected 2 or more": Case(tokens=1),
    "repeat is 0, expected 1 or more": Case(repeat=0),
    "slots is 399, expected 400 or more, the number that will be filled": Case(slots=399),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_number_outside_its_range_is_named(message):
    with pytest.raises(SettingError) as error:
        WRONG[message].check(pg.PUBLISHED["paligemma-3b-224"])
    assert str(error.value) == message


def test_the_longest_row_that_fits_passes_and_one_token_more_does_not():
    cfg = pg.PUBLISHED["paligemma-3b-448"]
    Case(prompt_tokens=8192 - 1024 - 128).check(cfg)
    with pytest.raises(PromptError, match="do not fit 8192 positions"):
        Case(prompt_tokens=8192 - 1024 - 127).check(cfg)
