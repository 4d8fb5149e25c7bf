"""transformers' PaliGemma and PaliGemma 2 as a system, called as its documentation says: its cache is overwritten."""

import inspect
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc.config import Config
from pgfunc.laws.system import ROUNDING, System
from pgfunc.prompt import Prompt


class State(NamedTuple):
    """A cache that transformers writes, which of its slots hold a token, and the length of each row."""

    cache: Any
    mask: Int[Tensor, "b s"]
    length: Int[Tensor, "b"]


def transformers(model: Any, cfg: Config, name: str = "transformers", marked: bool = True) -> System:
    """A `PaliGemmaForConditionalGeneration` of that configuration.

    Without `marked` it is not told which tokens are the suffix (`token_type_ids`), which it does not insist on. Its
    attention must be the eager one for a PaliGemma 2: the other does not know softcaps.
    """

    # 5.24 has given it another name
    kept = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def inputs(prompt: Prompt) -> dict[str, Tensor]:
        batch, pictures = prompt.pixels.shape[:2]
        marks = torch.full((batch, pictures * cfg.vision.tokens), cfg.image, device=prompt.tokens.device)
        given = {
            "input_ids": torch.cat([marks, prompt.tokens], 1),
            "attention_mask": torch.cat([torch.ones_like(marks), prompt.valid.long()], 1),
        }
        if pictures:
            given["pixel_values"] = rearrange(prompt.pixels, "b i c y x -> (b i) c y x").to(model.dtype)
        if marked:
            given["token_type_ids"] = torch.cat([torch.zeros_like(marks), prompt.causal.long()], 1)
        return given

    def text(logits: Float[Tensor, "b s rows"], tokens: int) -> Float[Tensor, "b t v"]:
        return logits[:, logits.shape[1] - tokens :, : cfg.text.vocab].float()

    @torch.no_grad()
    def forward(prompt: Prompt) -> Float[Tensor, "b t v"]:
        return text(model(**inputs(prompt)).logits, prompt.tokens.shape[1])

    @torch.no_grad()
    def prefill(prompt: Prompt, size: int) -> tuple[Float[Tensor, "b v"], State]:
        given = inputs(prompt)
        out = model(**given, use_cache=True)
        last = prompt.valid.sum(1) - 1
        logits = text(out.logits, prompt.tokens.shape[1])[torch.arange(len(last)), last]
        length = given["attention_mask"].sum(1)
        return logits, State(out.past_key_values, given["attention_mask"], length)

    @torch.no_grad()
    def decode(token: Int[Tensor, "b"], state: State) -> tuple[Float[Tensor, "b v"], State]:
        mask = torch.cat([state.mask, torch.ones_like(state.mask[:, :1])], 1)
        given = {"input_ids": rearrange(token, "b -> b 1"), "position_ids": rearrange(state.length + 1, "b -> b 1")}
        out = model(**given, attention_mask=mask, use_cache=True, **{kept: state.cache})
        return text(out.logits, 1)[:, 0], State(out.past_key_values, mask, state.length + 1)

    rounding = ROUNDING[model.dtype]
    return System(
        name, cfg.text.vocab, cfg.vision.image_size, rounding, forward=forward, prefill=prefill, decode=decode
    )
