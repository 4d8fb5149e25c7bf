"""Continuous batching: a finished row makes room for the next picture.

    python examples/loops/continuous.py "caption en" examples/images/*.png

`pg.generate_many` is this loop with worker processes that read the pictures, groups of equal length, sampling, errors.
"""

import sys
from collections import deque

import torch

import pgfunc as pg
from pgfunc.prompt import tokenizer_of


def advance(params, token, cache, cfg):
    logits, cache = pg.decode(params, token, cache, cfg)
    return pg.sample.greedy(logits), cache


step = pg.jit(advance, donate="cache")


def continuous(model: pg.Model, images, prefix: str, places: int = 4, max_tokens: int = 64) -> list[str]:
    waiting, places = deque(enumerate(images)), min(places, len(images))
    rows: list[tuple[int, list[int]] | None] = [None] * places  # in each place: number of the picture, tokens
    answers, token, cache = [""] * len(images), torch.zeros(places, dtype=torch.int64), None
    while waiting or any(rows):
        free = [place for place, row in enumerate(rows) if row is None][: len(waiting)]
        if free:
            new = [waiting.popleft() for _ in free]
            prompt = pg.prepare(model, [image for _, image in new], prefix)
            with torch.no_grad():
                logits, prefilled = pg.prefill(model.params, prompt, model.cfg, max_tokens)
            index = torch.tensor(free)
            token = token.to(logits.device).index_copy(0, index.to(logits.device), pg.sample.greedy(logits))
            cache = prefilled if cache is None else pg.insert(cache, prefilled, index)
            for place, (number, _) in zip(free, new, strict=True):
                rows[place] = number, []
        for place, (id, row) in enumerate(zip(token.tolist(), rows, strict=True)):
            if row and (id == model.cfg.eos or len(row[1]) == max_tokens):
                answers[row[0]], rows[place] = pg.tokenizer.decode(tokenizer_of(model), row[1]), None
            elif row:
                row[1].append(id)
        assert cache is not None
        kept = torch.tensor([row is not None for row in rows], device=cache.length.device)
        cache = pg.rewind(cache, cache.length * kept)  # an empty place starts again, so it never fills up
        token, cache = step(model.params, token, cache, model.cfg)
    return answers


if __name__ == "__main__":
    print("\n".join(continuous(pg.load(), sys.argv[2:], sys.argv[1])))
