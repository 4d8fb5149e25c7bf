"""Greedy decoding, the loop that the others vary: `python examples/loops/greedy.py IMAGE PREFIX`."""

import sys

import torch

import pgfunc as pg
from pgfunc.prompt import tokenizer_of


def advance(params, token, cache, cfg):
    logits, cache = pg.decode(params, token, cache, cfg)
    return pg.sample.greedy(logits), cache


step = pg.jit(advance, donate="cache")


def greedy(model: pg.Model, image, prefix: str, max_tokens: int = 64) -> str:
    with torch.no_grad():
        logits, cache = pg.prefill(model.params, pg.prepare(model, image, prefix), model.cfg, max_tokens)
    token, tokens = pg.sample.greedy(logits), []
    while token.item() != model.cfg.eos and len(tokens) < max_tokens:
        tokens.append(token.item())
        token, cache = step(model.params, token, cache, model.cfg)
    return pg.tokenizer.decode(tokenizer_of(model), tokens)


if __name__ == "__main__":
    print(greedy(pg.load(), sys.argv[1], sys.argv[2]))
