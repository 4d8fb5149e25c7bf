"""A compiled stream of rows gives what the eager one gives, with one compiled step for all rows."""

import numpy as np
import pytest
from cases import text_model

import pgfunc as pg
from pgfunc.generate import compiled_decode_step
from pgfunc.many import prefilling

MODEL = text_model()
PICTURES = [np.full((4 + i, 9 - i, 3), 40 * i, np.uint8) for i in range(5)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_compiled_stream_equals_an_eager_one(temperature):
    rows = [(PICTURES[i % 5], "what is this?"[: 3 + i % 9]) for i in range(23)]
    steps, prefills = compiled_decode_step.compilations, prefilling.compiled_prefill.compilations
    eager, compiled = (
        sorted(
            pg.generate_many(MODEL, rows, 9, temperature, compile=compile, batch=4, workers=0),
            key=lambda result: result.number,
        )
        for compile in (False, True)
    )
    for one, other in zip(eager, compiled, strict=True):
        assert one.completion
        assert other.completion
        assert one.completion.tokens == other.completion.tokens
        assert one.completion.logprobs == pytest.approx(other.completion.logprobs, abs=1e-4)  # float32, few layers
    assert compiled_decode_step.compilations == steps + 1
    assert prefilling.compiled_prefill.compilations == prefills + 1
