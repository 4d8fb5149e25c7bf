"""transformers' PaliGemma and PaliGemma 2 as a system, called as its documentation says. It overwrites its cache."""

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
    """A cache of transformers, a mask of the slots that hold a token, and the length of each row."""

    cache: Any
    mask: Int[Tensor, "b s"]
    length: Int[Tensor, "b"]


def transformers(model: Any, cfg: Config, name: str = "transformers", marked: bool = True) -> System:
    """The system of a `PaliGemmaForConditionalGeneration` with this configuration.

    If `marked` is false, the model is not told which tokens are the suffix (`token_type_ids`); the model allows this. A
    PaliGemma 2 needs eager attention, because its other implementation ignores softcaps.
    """

    # transformers 5.24 renamed `past_key_values` to `cache`
    cache_argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def inputs(prompt: Prompt) -> dict[str, Tensor]:
        batch, pictures = prompt.pixels.shape[:2]
        image_ids = torch.full((batch, pictures * cfg.vision.tokens), cfg.image, device=prompt.tokens.device)
        arguments = {
            "input_ids": torch.cat([image_ids, prompt.tokens], 1),
            "attention_mask": torch.cat([torch.ones_like(image_ids), prompt.valid.long()], 1),
        }
        if pictures:
            arguments["pixel_values"] = rearrange(prompt.pixels, "b i c y x -> (b i) c y x").to(model.dtype)
        if marked:
            arguments["token_type_ids"] = torch.cat([torch.zeros_like(image_ids), prompt.causal.long()], 1)
        return arguments

    def text_logits(logits: Float[Tensor, "b s rows"], tokens: int) -> Float[Tensor, "b t v"]:
        return logits[:, logits.shape[1] - tokens :, : cfg.text.vocab].float()

    @torch.no_grad()
    def forward(prompt: Prompt) -> Float[Tensor, "b t v"]:
        return text_logits(model(**inputs(prompt)).logits, prompt.tokens.shape[1])

    @torch.no_grad()
    def prefill(prompt: Prompt, size: int) -> tuple[Float[Tensor, "b v"], State]:
        arguments = inputs(prompt)
        out = model(**arguments, use_cache=True)
        last = prompt.valid.sum(1) - 1
        logits = text_logits(out.logits, prompt.tokens.shape[1])[torch.arange(len(last)), last]
        length = arguments["attention_mask"].sum(1)
        return logits, State(out.past_key_values, arguments["attention_mask"], length)

    @torch.no_grad()
    def decode(token: Int[Tensor, "b"], state: State) -> tuple[Float[Tensor, "b v"], State]:
        mask = torch.cat([state.mask, torch.ones_like(state.mask[:, :1])], 1)
        arguments = {"input_ids": rearrange(token, "b -> b 1"), "position_ids": rearrange(state.length + 1, "b -> b 1")}
        out = model(**arguments, attention_mask=mask, use_cache=True, **{cache_argument: state.cache})
        return text_logits(out.logits, 1)[:, 0], State(out.past_key_values, mask, state.length + 1)

    rounding = ROUNDING[model.dtype]
    return System(
        name, cfg.text.vocab, cfg.vision.image_size, rounding, forward=forward, prefill=prefill, decode=decode
    )
