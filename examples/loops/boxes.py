"""Boxes with coordinates chosen among `<loc>` tokens only: `python examples/loops/boxes.py IMAGE "cat ; bus"`."""

import sys

import torch

import pgfunc as pg
from pgfunc.prompt import text_ids, tokenizer_of


def advance(params, token, cache, cfg, allowed=None):
    logits, cache = pg.decode(params, token, cache, cfg, allowed=allowed)
    token = pg.sample.greedy(logits)
    return token if allowed is None else pg.sample.among(allowed, token), cache


step = pg.jit(advance, donate="cache")


def boxes(model: pg.Model, image, names: str, max_tokens: int = 64) -> str:
    """The answer to `detect`. After a box's first coordinate, three steps read only 1,024 rows of the head."""
    first = text_ids(model, "<loc0000>")[0]
    coordinates = range(first, first + 1024)
    with torch.no_grad():
        logits, cache = pg.prefill(model.params, pg.prepare(model, image, f"detect {names}"), model.cfg, max_tokens)
    token, tokens, in_box = pg.sample.greedy(logits), [], 0  # in_box: coordinates of an unfinished box
    while (id := token.item()) != model.cfg.eos and len(tokens) < max_tokens:
        tokens.append(id)
        in_box = (in_box + 1) % 4 if id in coordinates else 0
        allowed = coordinates if in_box else None
        token, cache = step(model.params, token, cache, model.cfg, allowed)
    return pg.tokenizer.decode(tokenizer_of(model), tokens)


if __name__ == "__main__":
    print(boxes(pg.load(), sys.argv[1], sys.argv[2]))
