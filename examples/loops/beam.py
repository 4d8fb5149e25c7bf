"""Beam search, ranked by the mean log-probability of a token: `python examples/loops/beam.py IMAGE PREFIX`."""

import sys

import torch

import pgfunc as pg
from pgfunc.prompt import tokenizer_of

step = pg.jit(pg.decode, donate="cache")


def beam(model: pg.Model, image, prefix: str, width: int = 4, max_tokens: int = 64) -> str:
    eos = model.cfg.eos
    with torch.no_grad():
        logits, cache = pg.prefill(model.params, pg.prepare(model, image, prefix), model.cfg, max_tokens)
    total, ids = logits.log_softmax(-1)[0].topk(width)
    cache = pg.reorder(cache, torch.zeros_like(ids))  # one row for each beam
    beams, finished = ids[:, None], []  # finished: (mean log-probability, token ids)
    for length in range(1, max_tokens):
        ended = beams[:, -1] == eos
        over = zip(total[ended].tolist(), beams[ended, :-1].tolist(), strict=True)
        finished += [(score / length, row) for score, row in over]
        total = total.masked_fill(ended, -torch.inf)
        if ended.all() or (finished and max(finished)[0] > total.max() / (length + 1)):
            break
        logits, cache = step(model.params, beams[:, -1], cache, model.cfg)
        scores = total[:, None] + logits.log_softmax(-1)
        total, flat = scores.flatten().topk(width)
        rows, ids = flat // logits.shape[-1], flat % logits.shape[-1]
        cache = pg.reorder(cache, rows)
        beams = torch.cat([beams[rows], ids[:, None]], 1)
    finished += [(score / beams.shape[1], row) for score, row in zip(total.tolist(), beams.tolist(), strict=True)]
    return pg.tokenizer.decode(tokenizer_of(model), [id for id in max(finished)[1] if id != eos])


if __name__ == "__main__":
    print(beam(pg.load(), sys.argv[1], sys.argv[2]))
