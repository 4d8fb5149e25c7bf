"""Samples on one prefix, and the most likely of them: `python examples/loops/best_of_n.py IMAGE PREFIX`."""

import sys

import torch

import pgfunc as pg
from pgfunc.generate import uniform
from pgfunc.prompt import tokenizer_of
from pgfunc.sample import draw, logprob


def advance(params, token, cache, cfg, temperature, u):
    logits, cache = pg.decode(params, token, cache, cfg)
    token = draw(logits / temperature, u)
    return token, logprob(logits, token), cache


step = pg.jit(advance, donate="cache")


def best_of_n(model: pg.Model, image, prefix: str, n: int = 8, tokens: int = 64, temperature: float = 0.7) -> str:
    with torch.no_grad():
        logits, cache = pg.prefill(model.params, pg.prepare(model, image, prefix), model.cfg, tokens)
    rows = torch.zeros(n, dtype=torch.int64, device=logits.device)
    logits, cache = logits[rows], pg.reorder(cache, rows)  # n rows of one prefix
    u = uniform(0, range(tokens), n).to(logits.device)
    token = draw(logits / temperature, u[0])
    said, total, open_ = [token], logprob(logits, token), token != model.cfg.eos
    for numbers in u[1:]:
        if not open_.any():
            break
        token, likely, cache = step(model.params, token, cache, model.cfg, temperature, numbers)
        said.append(torch.where(open_, token, model.cfg.eos))
        total, open_ = total + likely * open_, open_ & (token != model.cfg.eos)
    best = torch.stack(said, 1)[total.argmax()].tolist()
    return pg.tokenizer.decode(tokenizer_of(model), [id for id in best if id != model.cfg.eos])


if __name__ == "__main__":
    print(best_of_n(pg.load(), sys.argv[1], sys.argv[2]))
