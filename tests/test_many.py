"""A stream of rows gives what `generate` gives, each row once, whatever the other rows are and in bounded memory."""

import gc
import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import text_model
from hypothesis import given, settings
from hypothesis import strategies as st

import pgfunc as pg
from pgfunc import paligemma
from pgfunc.errors import DeviceError, ImageError, NumericalError, PromptError, SettingError

MODEL = text_model()
ROOT = Path(__file__).parent.parent
PICTURES = [np.full((4 + i, 9 - i, 3), 40 * i, np.uint8) for i in range(5)]
SCENES = sorted((ROOT / "examples" / "tiny" / "heldout").glob("S0-00*.webp"))

pictures = st.one_of(st.sampled_from(PICTURES), st.lists(st.sampled_from(PICTURES), max_size=2))
rows = st.lists(st.tuples(pictures, st.text("abc de", min_size=1, max_size=20)), min_size=1, max_size=9)


def results(model, stream, **options) -> list[pg.Result]:
    """All results in the order of the rows, each of which has one."""
    got = sorted(pg.generate_many(model, iter(stream), workers=0, **options), key=lambda result: result.number)
    assert [result.number for result in got] == list(range(len(got)))
    return got


def completions(model, stream, **options) -> list[pg.Completion]:
    got = results(model, stream, **options)
    assert len(got) == len(stream)
    assert all(result.error is None for result in got)
    assert all(given == result.row for given, result in zip(stream, got, strict=True))
    return [result.completion for result in got if result.completion]


@given(stream=rows, batch=st.integers(1, 5), most=st.integers(1, 12), temperature=st.sampled_from([0.0, 1.0]))
def test_a_stream_equals_generate(stream, batch, most, temperature):
    got = completions(MODEL, stream, batch=batch, max_new_tokens=most, temperature=temperature, seed=3)
    images, prefixes = ([*column] for column in zip(*stream, strict=True))
    expected = pg.generate(MODEL, images, prefixes, max_new_tokens=most, temperature=temperature, seed=3)
    for one, other in zip(got, expected, strict=True):
        assert (one.text, one.tokens, one.finish) == (other.text, other.tokens, other.finish)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)  # float32, few layers


@settings(max_examples=3)
@given(order=st.permutations(range(10)), size=st.integers(3, 10))
def test_in_float32_a_result_does_not_depend_on_the_other_rows_to_the_bit(shipped, order, size):
    stream = [(str(path), prefix) for path, prefix in zip(SCENES, ["caption en", "ocr"] * 5, strict=True)]
    alone = dict(zip(stream, completions(shipped, stream, max_new_tokens=8), strict=True))
    some = [stream[i] for i in order[:size]]
    assert completions(shipped, some, max_new_tokens=8) == [alone[row] for row in some]


def test_worker_processes_read_the_same_pictures():
    stream = [(str(path), "a") for path in SCENES]
    by_workers = sorted(pg.generate_many(MODEL, stream, 4, workers=2), key=lambda result: result.number)
    assert [x.completion for x in by_workers] == completions(MODEL, stream, max_new_tokens=4)
    assert all(x.sizes == ((224, 224),) for x in by_workers)


def test_a_row_that_cannot_be_completed_has_its_error_and_the_others_go_on(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    bad = [(str(broken), "a"), (str(tmp_path / "missing.jpg"), "a"), (PICTURES[0], "word " * 5000), (PICTURES[0], 3), 7,
           ([PICTURES[0], str(broken)], "a")]  # fmt: skip
    kinds = [ImageError, ImageError, PromptError, PromptError, PromptError, ImageError]
    good = [(PICTURES[i % 5], "abc"[i % 3]) for i in range(7)]
    got = results(MODEL, [*good[:3], *bad, *good[3:]], max_new_tokens=5, batch=4)
    assert [type(result.error) for result in got[3:9]] == kinds
    assert all(result.completion is None for result in got[3:9])
    done = [result.completion for result in got if result.completion]
    assert done == completions(MODEL, good, max_new_tokens=5, batch=4)


def test_logits_that_are_nan_are_the_error_of_their_row():
    weights = pg.tree.map(lambda x: torch.full_like(x, torch.nan), MODEL.params)
    (result,) = results(MODEL._replace(params=weights), [(PICTURES[0], "a")])
    assert isinstance(result.error, NumericalError)


def test_an_endless_stream_is_read_only_a_little_ahead():
    taken = count()

    def endless() -> Iterator[tuple[np.ndarray, str]]:
        while True:
            yield PICTURES[next(taken) % 5], "a"

    stream = pg.generate_many(MODEL, endless(), max_new_tokens=3, batch=4, workers=0)
    numbers = [next(stream).number for _ in range(60)]
    stream.close()
    assert len({*numbers}) == 60
    assert next(taken) < 60 + 5 * 4, "rows in places, waiting for one, and read ahead"


def test_an_error_of_the_callers_iterator_reaches_the_caller():
    def failing() -> Iterator[tuple[np.ndarray, str]]:
        yield PICTURES[0], "a"
        raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        list(pg.generate_many(MODEL, failing(), workers=0))


def test_a_stream_that_is_left_early_ends_its_processes():
    stream = pg.generate_many(MODEL, ((str(path), "a") for path in SCENES * 50), max_new_tokens=3, workers=1)
    next(stream)
    assert children()
    del stream
    gc.collect()
    end = time.monotonic() + 10
    while children() and time.monotonic() < end:
        time.sleep(0.02)
    assert not children()


def test_a_worker_that_is_killed_ends_the_stream_with_one_line():
    stream = pg.generate_many(MODEL, ((str(path), "a") for path in SCENES * 50), max_new_tokens=3, workers=1)
    next(stream)
    (worker,) = children()
    os.kill(int(worker), signal.SIGKILL)
    with pytest.raises(DeviceError, match="a process that reads pictures has ended"):
        list(stream)


def children() -> set[str]:
    """The processes that this one has started and that have not ended."""
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_questions_about_the_same_file_share_one_encoding(monkeypatch):
    encoded = []
    encode = paligemma.encode_images

    def counting(params, pixels, cfg):
        encoded.append(len(pixels))
        return encode(params, pixels, cfg)

    monkeypatch.setattr(paligemma, "encode_images", counting)
    stream = [(str(path), question) for path in SCENES[:3] for question in ("a", "b", "c", "d")]
    assert len(completions(MODEL, stream, max_new_tokens=3)) == 12
    assert sum(encoded) == 3


def test_an_array_that_is_changed_between_two_rows_is_not_shared():
    frame = np.zeros((8, 8, 3), np.uint8)

    def frames() -> Iterator[tuple[np.ndarray, str]]:
        for level in (0, 250):
            frame[:] = level
            yield frame, "a"

    moving = sorted(pg.generate_many(MODEL, frames(), 4, workers=1), key=lambda result: result.number)
    still = [pg.generate(MODEL, np.full_like(frame, level), "a", 4)[0] for level in (0, 250)]
    logprobs = [done.logprobs for result in moving if (done := result.completion)]
    assert logprobs[0] != logprobs[1]
    for got, expected in zip(logprobs, still, strict=True):
        assert got == pytest.approx(expected.logprobs, abs=1e-4)  # float32, few layers


@pytest.mark.parametrize("wrong", [
    {"max_new_tokens": 0}, {"temperature": -1.0}, {"batch": 0}, {"workers": -1}, {"seed": -1}, {"top_p": 0.0},
])  # fmt: skip
def test_a_setting_outside_its_range_is_refused_at_the_call(wrong):
    with pytest.raises(SettingError):
        pg.generate_many(MODEL, [], **wrong)


def test_an_empty_stream_gives_nothing():
    assert list(pg.generate_many(MODEL, [])) == []
