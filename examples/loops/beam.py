"""Beam search, by the mean log-probability of a token: `python examples/loops/beam.py IMAGE PREFIX`."""

import sys

import torch

import pgfunc as pg
from pgfunc.prompt import tokenizer_of

step = pg.jit(pg.decode, donate="cache")


def beam(model: pg.Model, image, prefix: str, width: int = 4, tokens: int = 64) -> str:
    eos = model.cfg.eos
    with torch.no_grad():
        logits, cache = pg.prefill(model.params, pg.prepare(model, image, prefix), model.cfg, tokens)
    total, ids = logits.log_softmax(-1)[0].topk(width)
    cache = pg.reorder(cache, torch.zeros_like(ids))  # a row for each beam
    said, done = ids[:, None], []
    for length in range(1, tokens):
        ended = said[:, -1] == eos
        over = zip(total[ended].tolist(), said[ended, :-1].tolist(), strict=True)
        done += [(score / length, row) for score, row in over]
        total = total.masked_fill(ended, -torch.inf)
        if ended.all() or (done and max(done)[0] > total.max() / (length + 1)):
            break
        logits, cache = step(model.params, said[:, -1], cache, model.cfg)
        scores = total[:, None] + logits.log_softmax(-1)
        total, flat = scores.flatten().topk(width)
        rows, ids = flat // logits.shape[-1], flat % logits.shape[-1]
        cache = pg.reorder(cache, rows)
        said = torch.cat([said[rows], ids[:, None]], 1)
    done += [(score / said.shape[1], row) for score, row in zip(total.tolist(), said.tolist(), strict=True)]
    return pg.tokenizer.decode(tokenizer_of(model), [id for id in max(done)[1] if id != eos])


if __name__ == "__main__":
    print(beam(pg.load(), sys.argv[1], sys.argv[2]))
