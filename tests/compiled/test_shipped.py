"""The shipped checkpoint says compiled what it says eager: on some of its held-out prompts, in `deep` on all."""

import os
from pathlib import Path

import pgfunc as pg
from examples.tiny import heldout

FOLDER = Path(__file__).parent.parent.parent / "examples/tiny/heldout"
ROWS = 32


def test_greedy_tokens_of_held_out_prompts_are_the_same_compiled():
    model = pg.load(dtype="float32", device="cpu")
    every = [(e.picture, row) for examples in heldout.read(FOLDER).values() for e in examples for row in e.rows]
    asked = every if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else every[:: len(every) // (2 * ROWS)]
    asked.sort(key=lambda each: len(each[1].prefix))  # few lengths, few compilations
    asked = asked[: len(asked) // ROWS * ROWS] + asked[-ROWS:]
    for start in range(0, len(asked), ROWS):
        pictures, rows = zip(*asked[start : start + ROWS], strict=True)
        eager, compiled = (
            pg.generate(model, list(pictures), [row.prefix for row in rows], max_new_tokens=48, compile=compile)
            for compile in (False, True)
        )
        assert [each.tokens for each in compiled] == [each.tokens for each in eager]
