"""The loops in `examples/loops` generate the same text as `generate` in the cases where they must."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import text_model

import pgfunc as pg
from examples.loops import beam, best_of_n, boxes, continuous, greedy, speculative

TOKENS = 14
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model() -> pg.Model:
    return text_model(seed=2)


@pytest.fixture(scope="module")
def picture():
    return torch.randint(0, 255, (40, 30, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()


@pytest.fixture(scope="module")
def expected(model, picture) -> str:
    (completion,) = pg.generate(model, picture, "what", max_new_tokens=TOKENS)
    assert len(completion.tokens) > 3
    return completion.text


def test_the_greedy_loop_equals_generate(model, picture, expected):
    assert greedy.greedy(model, picture, "what", TOKENS) == expected


def test_speculation_changes_only_the_number_of_steps(model, picture, expected):
    text, steps = speculative.speculative(model, picture, "what", TOKENS)
    assert text == expected
    assert steps < TOKENS - 1, "some steps accept more than one token"


def test_beam_search_with_one_beam_is_greedy(model, picture, expected):
    assert beam.beam(model, picture, "what", 1, TOKENS) == expected


def test_rows_that_take_the_places_of_finished_ones_are_completed_as_alone():
    model = text_model(seed=3)
    pictures = [torch.full((5 + i, 9, 3), 30 * i, dtype=torch.uint8).numpy() for i in range(7)]
    end = pg.generate(model, pictures[2], "what", max_new_tokens=TOKENS)[0].tokens[4]
    model = model._replace(cfg=replace(model.cfg, eos=end))  # so some rows end early
    expected = pg.generate(model, pictures, "what", max_new_tokens=TOKENS)
    lengths = {len(each.tokens) for each in expected}
    assert len(lengths) > 1, "places become free at different times"
    assert continuous.continuous(model, pictures, "what", 3, TOKENS) == [each.text for each in expected]
    assert continuous.step.compilations == 1
    assert continuous.step.copies == 1, "an inserted row is not copied again"


def test_coordinates_chosen_among_coordinates_are_those_chosen_among_all_tokens():
    shipped, image = pg.load(dtype="float32", device="cpu"), str(ROOT / "examples/images/cat-and-bus.png")
    (completion,) = pg.generate(shipped, image, "detect cat ; bus")
    assert completion.text.count("<loc") == 8
    assert boxes.boxes(shipped, image, "cat ; bus") == completion.text
    assert boxes.step.compilations == 2  # with logits for all tokens, and only for location tokens


def test_samples_at_a_temperature_near_zero_are_greedy(model, picture, expected):
    assert best_of_n.best_of_n(model, picture, "what", 3, TOKENS, temperature=1e-5) == expected
