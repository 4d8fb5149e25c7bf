"""Greedy decoding: the loop that everything else varies.

python examples/loops/greedy.py examples/images/scene.png "caption en"
"""

import sys

import torch

import pgfunc as pg


def greedy(model: pg.Model, image, prefix: str, tokens: int = 64) -> str:
    def advance(params, token, cache):
        logits, cache = pg.decode(params, token, cache, model.cfg)
        return pg.sample.greedy(logits), cache

    step = pg.jit(advance, donate="cache")
    with torch.no_grad():
        logits, cache = pg.prefill(model.params, pg.prepare(model, image, prefix), model.cfg, tokens)
    token, said = pg.sample.greedy(logits), []
    while token.item() != model.cfg.eos and len(said) < tokens:
        said.append(token.item())
        token, cache = step(model.params, token, cache)
    return pg.tokenizer.decode(model.tokenizer, said)


if __name__ == "__main__":
    print(greedy(pg.load(), *sys.argv[1:]))
