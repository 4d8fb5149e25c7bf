"""The loops: a batch of completions, a stream of text, the score of given answers.

Each loop is a few lines over `prefill`, `decode` and `sample.choose`; copy one to change it. Rows with different
numbers of pictures are grouped; a row's random numbers depend on the seed and its place alone, so neither grouping nor
the other rows nor the number of tokens asked for change what is drawn.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc import paligemma, tokenizer, tree
from pgfunc.cache import Cache
from pgfunc.config import Config
from pgfunc.errors import NumericalError, SettingError
from pgfunc.jit import jit
from pgfunc.jit.donation import bucket, reorder
from pgfunc.ops import plain, upcast
from pgfunc.paligemma import Params, Prompt
from pgfunc.prompt import Model, Row, Text, as_rows, fits, prepare, text_ids, texts, tokenizer_of
from pgfunc.sample import Settings, choose, logprob, whole

POLL = 8  # tokens
AT_ONCE = 2**30  # bytes of the logits and caches of the answers that are scored together


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
    compile: bool = False,
) -> list[Completion]:
    """Complete each row; `images` and `prefixes` as in `prepare`, but rows may have different numbers of pictures.

    Temperature 0 is greedy. `compile` makes machine code of the decode step, on a GPU of the prompt too (`jit`): once
    for each batch size, bucket of lengths and settings, worth it for many tokens. Raises SettingError for a setting
    outside its range and PromptError for a prompt that does not fit.
    """
    settings = Settings(temperature, top_k, top_p, min_p)

    def run(places: list[int], prompt: Prompt) -> list[Completion]:
        return complete(model, prompt, settings, uniform(seed, places, max_new_tokens), compile)

    return grouped(model, as_rows(images, prefixes), max_new_tokens, run)


def complete(
    model: Model, prompt: Prompt, settings: Settings, u: Float[Tensor, "b n"], compile: bool = False
) -> list[Completion]:
    """The completions of one prompt, each up to its own end of sequence; decoding stops when every row has ended.

    A GPU is asked only every `POLL` tokens whether that is so: it must not wait for an answer a token.
    """
    tokens, logprobs, ended = [], [], torch.zeros((), dtype=torch.bool, device="cpu")
    for token, likely in steps(model.params, prompt, model.cfg, settings, u, compile):
        tokens.append(token)
        logprobs.append(likely)
        ended = ended.to(token.device) | (token == model.cfg.eos)
        if len(tokens) % (POLL if token.is_cuda else 1) == 0 and ended.all():
            break
    rows = zip(torch.stack(tokens, 1).cpu(), torch.stack(logprobs, 1).cpu(), strict=True)
    return [_completion(model, *row) for row in rows]


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
    compile: bool = False,
) -> Generator[str, None, str]:
    """Complete one row and yield its text piece by piece; the pieces joined are the text of `generate`.

    `images` is one picture or a list of 0..n. A piece is whole characters. The generator returns how it ended, as
    `Completion.finish`.
    """
    settings = Settings(temperature, top_k, top_p, min_p)
    prompt = prepare_with_room(model, [images], [prefix], max_new_tokens)
    u = uniform(seed, [0], max_new_tokens)

    vocabulary = tokenizer_of(model)

    def text() -> Generator[str, None, str]:
        finish = "length"

        def tokens() -> Iterator[int]:
            nonlocal finish
            for token, likely in steps(model.params, prompt, model.cfg, settings, u, compile):
                check_numbers(likely)
                if token == model.cfg.eos:
                    finish = "eos"
                    return
                yield int(token)

        yield from tokenizer.pieces(vocabulary, tokens())
        return finish

    return text()


@torch.no_grad()
def steps(
    params: Params, prompt: Prompt, cfg: Config, settings: Settings, u: Float[Tensor, "b n"], compile: bool = False
) -> Iterator[tuple[Int[Tensor, "b"], Float[Tensor, "b"]]]:
    """The tokens that follow a prompt, a column at a time, with their log-probabilities; as many as u has columns."""
    step = compiled_advance if compile else advance
    first, *columns = u.to(prompt.tokens.device).unbind(1)
    if compile and prompt.tokens.is_cuda:  # on a CPU a prompt is all products, and compiling gains nothing
        prompt, size = bucketed(prompt, u.shape[1], cfg)
        token, likely, cache = compiled_begin(params, prompt, cfg, size, settings, first)
    else:
        token, likely, cache = begin(params, prompt, cfg, u.shape[1], settings, first)
    yield token, likely
    for column in columns:
        token, likely, cache = step(params, token, cache, cfg, settings, column)
        yield token, likely


def begin(
    params: Params,
    prompt: Prompt,
    cfg: Config,
    size: int,
    settings: Settings,
    u: Float[Tensor, "b"],
    wrap=plain,
) -> tuple[Int[Tensor, "b"], Float[Tensor, "b"], Cache]:
    """Prefill a prompt: the first token, its log-probability, and a cache with room for `size` tokens."""
    logits, cache = paligemma.prefill(params, prompt, cfg, size, wrap=wrap)
    return *wrap(next_token)(logits, u, settings), cache


def bucketed(prompt: Prompt, size: int, cfg: Config) -> tuple[Prompt, int]:
    """The prompt, its rows padded, and the size of its cache, so that prompts of many lengths share compiled code."""
    tokens, images = prompt.tokens.shape[1], prompt.pixels.shape[1] * cfg.vision.tokens
    padded = bucket(tokens, 16)
    if padded > tokens:
        rows = {name: F.pad(getattr(prompt, name), (0, padded - tokens)) for name in ("tokens", "valid", "causal")}
        prompt = prompt._replace(**rows)
    return prompt, bucket(images + max(padded, tokens + size)) - images - padded


def advance(
    params: Params, token: Int[Tensor, "b"], cache: Cache, cfg: Config, settings: Settings, u: Float[Tensor, "b"]
) -> tuple[Int[Tensor, "b"], Float[Tensor, "b"], Cache]:
    """Append a token: the next one, its log-probability, and the new cache."""
    logits, cache = paligemma.decode(params, token, cache, cfg)
    return *next_token(logits, u, settings), cache


def next_token(
    logits: Float[Tensor, "b v"], u: Float[Tensor, "b"], settings: Settings
) -> tuple[Int[Tensor, "b"], Float[Tensor, "b"]]:
    """The next token, and its log-probability."""
    token = choose(logits, u, settings)
    return token, logprob(logits, token)


compiled_begin, compiled_advance = jit(begin), jit(advance, donate="cache")


@torch.no_grad()
def score(model: Model, images: Any, prefixes: Any, candidates: Any) -> Float[Tensor, "b c"]:
    """The log-probability of each candidate, a text or token ids, as the whole answer, its end of sequence included.

    A row is prefilled once, and all candidates extend it at once, as many as have room: see `AT_ONCE`.
    """
    if not texts("candidates", candidates):
        raise SettingError("candidates must be a list of one or more answers")
    answers = [[*text_ids(model, candidate), model.cfg.eos] for candidate in candidates]
    size = max(len(answer) for answer in answers)

    def run(places: list[int], prompt: Prompt) -> list[Tensor]:
        logits, cache = paligemma.prefill(model.params, prompt, model.cfg, size)
        many = max(1, AT_ONCE // (4 * logits.numel() * size + tree.nbytes((cache.k, cache.v))))
        parts = [answers[i : i + many] for i in range(0, len(answers), many)]
        scores = torch.cat([answer_scores(model, logits, cache, part) for part in parts], 1).cpu()
        check_numbers(scores)
        return list(scores)

    return torch.stack(grouped(model, as_rows(images, prefixes), size, run))


def answer_scores(
    model: Model, logits: Float[Tensor, "b v"], cache: Cache, answers: Sequence[Sequence[int]]
) -> Float[Tensor, "b c"]:
    """The log-probability of each answer after each row of a cache, whose last logits these are: in one extension."""
    count, width, device = len(answers), max(map(len, answers)), logits.device
    tokens = torch.tensor([[*answer, *[model.cfg.pad] * (width - len(answer))] for answer in answers], device=device)
    real = torch.tensor([[i < len(answer) for i in range(width)] for answer in answers], device=device)
    scores = upcast(logits).log_softmax(-1)[:, tokens[:, 0]]
    if width == 1:
        return scores
    rows = torch.arange(len(logits), device=device).repeat_interleave(count)  # answers of a row beside one another
    tokens, real = tokens.repeat(len(logits), 1), real.repeat(len(logits), 1)
    after, _ = paligemma.extend(model.params, tokens[:, :-1], reorder(cache, rows), model.cfg)
    rest = torch.where(real[:, 1:], logprob(after, tokens[:, 1:]), 0.0).sum(-1)
    return scores + rearrange(rest, "(b c) -> b c", c=count)


def uniform(seed: int, rows: Sequence[int], tokens: int) -> Float[Tensor, "rows tokens"]:
    """The random numbers of some rows: in [0, 1), float64, a stream of its own for each (seed, row)."""
    seed = whole("seed", seed, 0, 2**32 - 1)  # numpy reads a larger one as several words, and pairs would coincide
    return torch.from_numpy(np.stack([np.random.default_rng((seed, row)).random(tokens) for row in rows]))


def grouped(model: Model, rows: list[Row], size: int, run: Callable[[list[int], Prompt], list[Any]]) -> list[Any]:
    """Run rows that have equally many pictures together, and give the results back in the order of the rows."""
    counts = {len(row.images) for row in rows}
    groups = [[place for place, row in enumerate(rows) if len(row.images) == count] for count in sorted(counts)]
    prompts = [
        prepare_with_room(
            model, [rows[place].images for place in places], [rows[place].prefix for place in places], size
        )
        for places in groups
    ]
    results: dict[int, Any] = {}
    for places, prompt in zip(groups, prompts, strict=True):
        results |= zip(places, run(places, prompt), strict=True)
    return [results[place] for place in range(len(rows))]


def prepare_with_room(model: Model, images: Any, prefixes: Any, size: int) -> Prompt:
    """`prepare`, with a check that `size` tokens more fit the model's positions."""
    whole("max-new-tokens", size, 1)
    prompt = prepare(model, images, prefixes)
    fits(model.cfg, prompt.pixels.shape[1], prompt.tokens.shape[1] + size)
    return prompt


def check_numbers(logprobs: Tensor) -> None:
    """Raise NumericalError where a log-probability is nan."""
    if logprobs.isnan().any():
        raise NumericalError("the logits are not numbers (nan); float16 overflows where bfloat16 and float32 do not")


def _completion(model: Model, tokens: Int[Tensor, "t"], logprobs: Float[Tensor, "t"]) -> Completion:
    ids = tokens.tolist()
    end = ids.index(model.cfg.eos) if model.cfg.eos in ids else len(ids)
    check_numbers(logprobs[: end + 1])  # what was made behind the end does not count
    finish = "eos" if end < len(ids) else "length"
    return Completion(_text(model, ids[:end]), ids[:end], logprobs.tolist()[:end], finish)


def _text(model: Model, ids: list[int]) -> str:
    return tokenizer.decode(model.tokenizer, ids) if model.tokenizer else ""
