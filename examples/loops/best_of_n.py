"""Draw n samples from one prefix and return the most probable: `python examples/loops/best_of_n.py IMAGE PREFIX`."""

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


def best_of_n(model: pg.Model, image, prefix: str, n: int = 8, max_tokens: int = 64, temperature: float = 0.7) -> str:
    with torch.no_grad():
        logits, cache = pg.prefill(model.params, pg.prepare(model, image, prefix), model.cfg, max_tokens)
    rows = torch.zeros(n, dtype=torch.int64, device=logits.device)
    logits, cache = logits[rows], pg.reorder(cache, rows)  # n rows that share one prefix
    u = uniform(0, range(max_tokens), n).to(logits.device)
    token = draw(logits / temperature, u[0])
    tokens, total, active = [token], logprob(logits, token), token != model.cfg.eos
    for numbers in u[1:]:
        if not active.any():
            break
        token, token_logprob, cache = step(model.params, token, cache, model.cfg, temperature, numbers)
        tokens.append(torch.where(active, token, model.cfg.eos))
        total, active = total + token_logprob * active, active & (token != model.cfg.eos)
    best = torch.stack(tokens, 1)[total.argmax()].tolist()
    return pg.tokenizer.decode(tokenizer_of(model), [id for id in best if id != model.cfg.eos])


if __name__ == "__main__":
    print(best_of_n(pg.load(), sys.argv[1], sys.argv[2]))
