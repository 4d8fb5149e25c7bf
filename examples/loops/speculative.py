"""Greedy decoding with drafts from earlier text: `python examples/loops/speculative.py IMAGE PREFIX`."""

import sys

import torch

import pgfunc as pg
from pgfunc.prompt import tokenizer_of

step = pg.jit(pg.extend, donate="cache")


def draft(history: list[int], ahead: int) -> list[int]:
    """The tokens that followed the last token at its previous occurrence, padded to length `ahead`."""
    earlier = [i for i, id in enumerate(history[:-1]) if id == history[-1]]
    guess = history[earlier[-1] + 1 :][:ahead] if earlier else []
    return guess + [0] * (ahead - len(guess))


def speculative(model: pg.Model, image, prefix: str, max_tokens: int = 64, ahead: int = 4) -> tuple[str, int]:
    """The text, and the number of steps after the first token."""
    prompt = pg.prepare(model, image, prefix)
    with torch.no_grad():
        logits, cache = pg.prefill(model.params, prompt, model.cfg, max_tokens + ahead)
    prompt_ids, tokens, steps = prompt.tokens[0].tolist(), [int(logits.argmax())], 0
    while tokens[-1] != model.cfg.eos and len(tokens) < max_tokens:
        guess = draft(prompt_ids + tokens, ahead)
        inputs = torch.tensor([[tokens[-1], *guess]], device=logits.device)
        logits, longer = step(model.params, inputs, cache, model.cfg)
        right = logits[0].argmax(-1).tolist()
        count = next((i for i, (one, other) in enumerate(zip(guess, right, strict=False)) if one != other), ahead) + 1
        cache, longer = pg.rewind(longer, cache.length + count), None  # wrong guesses are overwritten
        tokens, steps = tokens + right[:count], steps + 1
    end = tokens.index(model.cfg.eos) if model.cfg.eos in tokens else max_tokens
    return pg.tokenizer.decode(tokenizer_of(model), tokens[:end][:max_tokens]), steps


if __name__ == "__main__":
    print(*speculative(pg.load(), sys.argv[1], sys.argv[2]), sep=" | steps: ")
