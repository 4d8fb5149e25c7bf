"""What a stage must do is counted as PyTorch counts it; what is timed is the loop that is meant."""

import os
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CONFIGS, params, text_model
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pgfunc as pg
from pgfunc import bench, paligemma
from pgfunc.bench import Case, Machine, Work
from pgfunc.config import Config, TextConfig, VisionConfig
from pgfunc.errors import PromptError, SettingError

CPU = torch.device("cpu")
MACHINE = Machine(bandwidth=1e9, rate=1e10)
UNWINDOWED = {name: replace(cfg, text=replace(cfg.text, window=0)) for name, cfg in CONFIGS.items()}


def counted(fn) -> int:
    """The FLOPs that PyTorch sees in a call, attention written out."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", UNWINDOWED)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 5)])
def test_flops_are_those_that_pytorch_counts(name, batch, tokens):
    cfg = UNWINDOWED[name]
    tree, prompt = params(cfg), bench.random_prompt(cfg, batch, tokens, CPU)
    length = cfg.vision.tokens + tokens
    assert (
        counted(lambda: paligemma.encode_images(tree, prompt.pixels, cfg)) == bench.vision_work(tree, cfg, batch).flops
    )
    assert counted(lambda: pg.prefill(tree, prompt, cfg, 1)) == bench.prefill_work(tree, cfg, batch, tokens).flops
    _, cache = pg.prefill(tree, prompt, cfg, 1)  # full after one step, so that no empty slot is computed
    token = torch.zeros(batch, dtype=torch.long)
    assert counted(lambda: pg.decode(tree, token, cache, cfg)) == bench.decode_work(tree, cfg, batch, length).flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UNWINDOWED)
def test_bytes_are_those_of_the_tensors_that_are_read(name, dtype):
    cfg = UNWINDOWED[name]
    tree = params(cfg, dtype=dtype)
    leaves = {path: leaf.numel() * leaf.element_size() for path, leaf in pg.tree.flatten(tree).items()}
    leaves["language.embed"] = cfg.text.vocab * cfg.text.width * dtype.itemsize
    language = sum(size for path, size in leaves.items() if path.startswith("language."))
    _, cache = pg.prefill(tree, bench.random_prompt(cfg, 2, 3, CPU), cfg, 1)
    live = sum(buffer.numel() * buffer.element_size() for buffer in (*cache.k, *cache.v))
    assert bench.decode_work(tree, cfg, 2, cfg.vision.tokens + 3).nbytes == language + live
    vision = sum(size for path, size in leaves.items() if not path.startswith("language."))
    assert bench.vision_work(tree, cfg, 2).nbytes == vision
    _, cache = pg.prefill(tree, bench.random_prompt(cfg, 2, 3, CPU), cfg, 0)
    written = sum(buffer.numel() * buffer.element_size() for buffer in (*cache.k, *cache.v))
    assert bench.prefill_work(tree, cfg, 2, 3).nbytes == vision + language + written


@given(st.integers(0, 40), st.integers(1, 3))
def test_a_window_bounds_what_the_even_layers_read(length, batch):
    cfg, whole = CONFIGS["gemma2"], UNWINDOWED["gemma2"]
    tree = paligemma.abstract(cfg)
    unseen = max(0, length + 1 - cfg.text.window) * 2  # of the layers 0 and 2
    kv = 2 * cfg.text.kv_heads * cfg.text.head_dim * 4
    few, all_ = bench.decode_work(tree, cfg, batch, length), bench.decode_work(tree, whole, batch, length)
    assert all_.nbytes - few.nbytes == batch * unseen * kv
    assert (all_.flops > few.flops) == (unseen > 0)


# what one token reads in bf16: every weight of the language model, and so much more a token of context
PUBLISHED = {"paligemma-3b-224": (5.02e9, 18_432), "paligemma2-3b-224": (5.23e9, 106_496),
             "paligemma2-10b-224": (18.5e9, 344_064)}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_bytes_of_a_token_are_the_published_ones_and_nothing_is_allocated(name):
    cfg, (weights, kv) = pg.PUBLISHED[name], PUBLISHED[name]
    tree = pg.tree.map(lambda leaf: leaf.to(torch.bfloat16), paligemma.abstract(cfg))
    read = [bench.decode_work(tree, cfg, 1, length).nbytes for length in (271, 272)]
    assert read[0] - 272 * kv == pytest.approx(weights, rel=0.01)
    assert read[1] - read[0] == kv


@given(st.lists(st.builds(Work, st.integers(0, 10**12), st.integers(0, 10**12)), max_size=4))
def test_a_floor_is_the_longer_of_reading_and_computing_one_piece_after_another(pieces):
    expected = 0.0
    for flops, nbytes in pieces:
        expected += flops / 1e10 if flops / 1e10 > nbytes / 1e9 else nbytes / 1e9
    assert bench.floor(pieces, MACHINE) == pytest.approx(expected)


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
    works = [bench.decode_work(model.params, model.cfg, 2, length + i) for i in range(3)]
    assert decode.work == Work(*(sum(column) // 3 for column in zip(*works, strict=True)))
    assert decode.floor == pytest.approx(bench.floor(works, MACHINE) / 3)
    assert generate.floor == pytest.approx(found[1].floor + 3 * decode.floor)
    assert max(decode.seconds) < min(generate.seconds), "a token is less than all"


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
