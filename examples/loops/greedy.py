"""Greedy decoding, the loop that everything else varies: `python examples/loops/greedy.py IMAGE PREFIX`."""

import sys

import torch

import pgfunc as pg
from pgfunc.prompt import tokenizer_of


def advance(params, token, cache, cfg):
    logits, cache = pg.decode(params, token, cache, cfg)
    return pg.sample.greedy(logits), cache


step = pg.jit(advance, donate="cache")


def greedy(model: pg.Model, image, prefix: str, tokens: int = 64) -> str:
    with torch.no_grad():
        logits, cache = pg.prefill(model.params, pg.prepare(model, image, prefix), model.cfg, tokens)
    token, said = pg.sample.greedy(logits), []
    while token.item() != model.cfg.eos and len(said) < tokens:
        said.append(token.item())
        token, cache = step(model.params, token, cache, model.cfg)
    return pg.tokenizer.decode(tokenizer_of(model), said)


if __name__ == "__main__":
    print(greedy(pg.load(), sys.argv[1], sys.argv[2]))
