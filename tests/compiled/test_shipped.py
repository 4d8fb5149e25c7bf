"""The shipped checkpoint generates the same tokens compiled and eager, on some held-out prompts (all with `deep`)."""

import os
from pathlib import Path

import pgfunc as pg
from examples.tiny import heldout

FOLDER = Path(__file__).parent.parent.parent / "examples/tiny/heldout"
ROWS = 32


def test_greedy_tokens_of_held_out_prompts_are_the_same_compiled():
    model = pg.load(dtype="float32", device="cpu")
    every = [(e.picture, row) for examples in heldout.read(FOLDER).values() for e in examples for row in e.rows]
    chosen = every if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else every[:: len(every) // (2 * ROWS)]
    chosen.sort(key=lambda each: len(each[1].prefix))  # similar lengths share compiled code
    chosen = chosen[: len(chosen) // ROWS * ROWS] + chosen[-ROWS:]
    for start in range(0, len(chosen), ROWS):
        pictures, rows = zip(*chosen[start : start + ROWS], strict=True)
        eager, compiled = (
            pg.generate(model, list(pictures), [row.prefix for row in rows], max_new_tokens=48, compile=compile)
            for compile in (False, True)
        )
        assert [each.tokens for each in compiled] == [each.tokens for each in eager]
