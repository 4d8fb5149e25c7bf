"""Greedy, with drafts from what was said (prompt lookup): `python examples/loops/speculative.py IMAGE PREFIX`."""

import sys

import torch

import pgfunc as pg
from pgfunc.prompt import tokenizer_of

step = pg.jit(pg.extend, donate="cache")


def draft(history: list[int], ahead: int) -> list[int]:
    """What followed the last token where it stood before; padded, for a wrong guess costs nothing but its place."""
    places = [i for i, id in enumerate(history[:-1]) if id == history[-1]]
    found = history[places[-1] + 1 :][:ahead] if places else []
    return found + [0] * (ahead - len(found))


def speculative(model: pg.Model, image, prefix: str, tokens: int = 64, ahead: int = 4) -> tuple[str, int]:
    prompt = pg.prepare(model, image, prefix)
    with torch.no_grad():
        logits, cache = pg.prefill(model.params, prompt, model.cfg, tokens + ahead)
    known, said, steps = prompt.tokens[0].tolist(), [int(logits.argmax())], 0
    while said[-1] != model.cfg.eos and len(said) < tokens:
        guess = draft(known + said, ahead)
        given = torch.tensor([[said[-1], *guess]], device=logits.device)
        logits, longer = step(model.params, given, cache, model.cfg)
        right = logits[0].argmax(-1).tolist()
        count = next((i for i, (one, other) in enumerate(zip(guess, right, strict=False)) if one != other), ahead) + 1
        cache, longer = pg.rewind(longer, cache.length + count), None  # the slots of wrong guesses are written again
        said, steps = said + right[:count], steps + 1
    end = said.index(model.cfg.eos) if model.cfg.eos in said else tokens
    return pg.tokenizer.decode(tokenizer_of(model), said[:end][:tokens]), steps


if __name__ == "__main__":
    print(*speculative(pg.load(), sys.argv[1], sys.argv[2]), sep=" | steps: ")
