"""Boxes, whose places are chosen among places alone: `python examples/loops/boxes.py IMAGE "cat ; bus"`."""

import sys

import torch

import pgfunc as pg
from pgfunc.prompt import text_ids, tokenizer_of


def advance(params, token, cache, cfg, allowed=None):
    logits, cache = pg.decode(params, token, cache, cfg, allowed=allowed)
    token = pg.sample.greedy(logits)
    return token if allowed is None else pg.sample.among(allowed, token), cache


step = pg.jit(advance, donate="cache")


def boxes(model: pg.Model, image, names: str, tokens: int = 64) -> str:
    """After a box's first place come three more: their steps read 1,024 rows of the head, not all of it."""
    first = text_ids(model, "<loc0000>")[0]
    places = range(first, first + 1024)
    with torch.no_grad():
        logits, cache = pg.prefill(model.params, pg.prepare(model, image, f"detect {names}"), model.cfg, tokens)
    token, said, open_ = pg.sample.greedy(logits), [], 0
    while (id := token.item()) != model.cfg.eos and len(said) < tokens:
        said.append(id)
        open_ = (open_ + 1) % 4 if id in places else 0
        allowed = places if open_ else None
        token, cache = step(model.params, token, cache, model.cfg, allowed)
    return pg.tokenizer.decode(tokenizer_of(model), said)


if __name__ == "__main__":
    print(boxes(pg.load(), sys.argv[1], sys.argv[2]))
