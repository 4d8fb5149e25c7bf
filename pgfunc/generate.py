"""The loops: a batch of completions, a stream of text, the score of given answers.

Each loop is a few lines over `prefill`, `decode` and `sample.choose`; copy one to change it. Rows with different
numbers of pictures are grouped, and a row's random numbers depend on the seed and its place alone, so grouping and
batch size do not change what is drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc import paligemma, tokenizer
from pgfunc.config import Config
from pgfunc.errors import SettingError
from pgfunc.paligemma import Params, Prompt
from pgfunc.prompt import Model, Row, Text, as_rows, fits, needed, prepare, text_ids
from pgfunc.sample import Settings, choose


class Completion(NamedTuple):
    """What the model wrote: without the end-of-sequence token, which `finish` reports."""

    text: str  # "" when the model has no tokenizer
    tokens: list[int]
    logprobs: list[float]  # of each token, before temperature and filters
    finish: Literal["eos", "length"]


def generate(
    model: Model,
    images: Any,
    prefixes: Any,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
) -> list[Completion]:
    """Complete each row; `images` and `prefixes` as in `prepare`, but rows may have different numbers of pictures.

    Temperature 0 is greedy. Raises SettingError for a setting outside its range and PromptError for a prompt that
    does not fit.
    """
    settings = Settings(temperature, top_k, top_p, min_p)
    rows = as_rows(images, prefixes)
    u = uniform(seed, len(rows), max_new_tokens)

    def complete(places: list[int], prompt: Prompt) -> list[Completion]:
        tokens, logprobs = [], []
        ended = torch.zeros(len(places), dtype=torch.bool)
        for token, logprob in steps(model.params, prompt, model.cfg, settings, u[places]):
            tokens.append(token.cpu())
            logprobs.append(logprob.cpu())
            ended |= tokens[-1] == model.cfg.eos
            if ended.all():
                break
        return [_completion(model, *row) for row in zip(torch.stack(tokens, 1), torch.stack(logprobs, 1), strict=True)]

    return grouped(model, rows, max_new_tokens, complete)


def stream(
    model: Model,
    images: Any,
    prefix: Text,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Complete one row and yield its text piece by piece; the pieces joined are the text of `generate`.

    `images` is one picture or a list of 0..n. A piece is whole characters.
    """
    settings = Settings(temperature, top_k, top_p, min_p)
    u = uniform(seed, 1, max_new_tokens)
    prompt = prepare(model, [images], [prefix])
    fits(model.cfg, prompt.pixels.shape[1], prompt.tokens.shape[1] + max_new_tokens)
    tokens = (int(token) for token, _ in steps(model.params, prompt, model.cfg, settings, u))
    return tokenizer.pieces(needed(model), takewhile(lambda token: token != model.cfg.eos, tokens))


@torch.inference_mode()
def steps(
    params: Params, prompt: Prompt, cfg: Config, settings: Settings, u: Float[Tensor, "b n"]
) -> Iterator[tuple[Int[Tensor, "b"], Float[Tensor, "b"]]]:
    """The tokens that follow a prompt, a column at a time, with their log-probabilities; as many as u has columns."""
    logits, cache = paligemma.prefill(params, prompt, cfg, u.shape[1])
    columns = u.to(logits.device).unbind(1)
    for i, column in enumerate(columns):
        token = choose(logits, column, settings)
        yield token, logprob(logits, token)
        if i + 1 < len(columns):
            logits, cache = paligemma.decode(params, token, cache, cfg)


@torch.inference_mode()
def score(model: Model, images: Any, prefixes: Any, candidates: Sequence[Text]) -> Float[Tensor, "b c"]:
    """The log-probability of each candidate as the whole answer, its end of sequence included.

    A row is prefilled once, and every candidate continues the same handle of its cache.
    """
    if isinstance(candidates, str) or not candidates:
        raise SettingError("candidates must be a list of one or more answers")
    answers = [[*text_ids(model, candidate), model.cfg.eos] for candidate in candidates]
    size = max(len(answer) for answer in answers)

    def rate(places: list[int], prompt: Prompt) -> list[Tensor]:
        logits, cache = paligemma.prefill(model.params, prompt, model.cfg, size)
        columns: list[Tensor] = []
        for answer in answers:
            tokens = torch.tensor(answer, device=logits.device).expand(len(logits), -1)
            rest, _ = paligemma.extend(model.params, tokens[:, :-1], cache, model.cfg)
            every = torch.cat([rearrange(logits, "b v -> b 1 v"), rest], dim=1)
            columns.append(logprob(every, tokens).sum(-1))
        return list(torch.stack(columns, 1).cpu())

    return torch.stack(grouped(model, as_rows(images, prefixes), size, rate))


def logprob(logits: Float[Tensor, "*b v"], token: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The log-probability of each token under its logits."""
    chosen = rearrange(token, "... -> ... 1")
    return rearrange(logits.log_softmax(-1).gather(-1, chosen), "... 1 -> ...")


def uniform(seed: int, rows: int, tokens: int) -> Float[Tensor, "rows tokens"]:
    """The random numbers of a run: in [0, 1), float64, the same on every device."""
    if tokens < 1:
        raise SettingError(f"max-new-tokens is {tokens}, expected 1 or more")
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grouped(model: Model, rows: list[Row], size: int, run: Callable[[list[int], Prompt], list[Any]]) -> list[Any]:
    """Run rows that have equally many pictures together, and give the results back in the order of the rows."""
    results: dict[int, Any] = {}
    for count in sorted({len(row.images) for row in rows}):
        places = [place for place, row in enumerate(rows) if len(row.images) == count]
        prompt = prepare(model, [rows[place].images for place in places], [rows[place].prefix for place in places])
        fits(model.cfg, count, prompt.tokens.shape[1] + size)
        results |= zip(places, run(places, prompt), strict=True)
    return [results[place] for place in range(len(rows))]


def _completion(model: Model, tokens: Int[Tensor, "t"], logprobs: Float[Tensor, "t"]) -> Completion:
    ids = tokens.tolist()
    end = ids.index(model.cfg.eos) if model.cfg.eos in ids else len(ids)
    finish = "eos" if end < len(ids) else "length"
    return Completion(_text(model, ids[:end]), ids[:end], logprobs.tolist()[:end], finish)


def _text(model: Model, ids: list[int]) -> str:
    return tokenizer.decode(model.tokenizer, ids) if model.tokenizer else ""
