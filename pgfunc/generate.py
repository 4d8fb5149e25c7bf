"""The loops: complete a batch of prompts, stream the text of one, score given answers.

Each loop is a few lines over `prefill`, `decode` and `sample.choose`; copy one to change it. Rows with the same number
of pictures run together. The random numbers of a row depend only on the seed and the row's index, so a row draws the
same tokens whatever the other rows are, and however many tokens are requested.
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
from pgfunc.image import Pictures, Source
from pgfunc.jit import jit
from pgfunc.jit.donation import bucket
from pgfunc.jit.rows import reorder
from pgfunc.ops import upcast
from pgfunc.paligemma import Params, Prompt
from pgfunc.prompt import Model, Row, Text, as_rows, check_fits, prepare, text_ids, texts_per_row, tokenizer_of
from pgfunc.sample import Settings, checked_int, choose, logprob
from pgfunc.taps import Tap, Wrap, bind, identity, plain

POLL = 8  # tokens between two checks on a GPU whether all rows have ended
MAX_REPR_TEXT = 400  # characters of the text in the repr of a completion
SCORED_BYTES = 2**30  # of logits and caches, for the answers that are scored together


class Completion(NamedTuple):
    """The generated text and tokens, without the end-of-sequence token; `finish` tells whether there was one."""

    text: str  # "" when the model has no tokenizer
    tokens: list[int]
    logprobs: list[float]  # of each token, before temperature and filters
    finish: Literal["eos", "length"]

    def __repr__(self) -> str:
        text = repr(self.text)
        text = text if len(text) <= MAX_REPR_TEXT else f"{text[: MAX_REPR_TEXT - 4]} ..."
        return f"Completion({text}, {len(self.tokens)} tokens, log-probability {sum(self.logprobs):.2f}, {self.finish})"


def generate(
    model: Model,
    images: Pictures,
    prefixes: Any,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    compile: bool = False,
    tap: Tap = identity,
) -> list[Completion]:
    """Complete each row. `images` and `prefixes` are as in `prepare`, but rows may have different numbers of pictures.

    Temperature 0 is greedy. `compile` compiles the decode step, and on a GPU also the prefill (`jit`): once per batch
    size, bucket of lengths and settings, so it pays for many tokens. `tap` gets the activations of the prefill and of
    each step, see `pgfunc.taps`; compiled code takes the tensors of `lab.edits` as arguments, so that it also serves
    other values of them. Raises SettingError if a setting is outside its range, or if the tap asks for an unknown
    activation; PromptError if a prompt does not fit; and NumericalError if logits are nan.
    """
    settings = Settings(temperature, top_k, top_p, min_p)

    def run(rows: list[int], prompt: Prompt) -> list[Completion]:
        return complete(model, prompt, settings, uniform(seed, rows, max_new_tokens), compile, tap)

    return run_grouped(model, as_rows(images, prefixes), max_new_tokens, run)


def complete(
    model: Model,
    prompt: Prompt,
    settings: Settings,
    u: Float[Tensor, "b n"],
    compile: bool = False,
    tap: Tap = identity,
) -> list[Completion]:
    """The completions of one prompt, each up to its own end of sequence. Decoding stops when every row has ended.

    On a GPU this is checked only every `POLL` tokens, because each check waits for the GPU.
    """
    tap = bind(tap, paligemma.names(model.cfg))
    tokens, logprobs, ended = [], [], torch.zeros((), dtype=torch.bool, device="cpu")
    for token, token_logprob in steps(model.params, prompt, model.cfg, settings, u, compile, tap):
        tokens.append(token)
        logprobs.append(token_logprob)
        ended = ended.to(token.device) | (token == model.cfg.eos)
        if len(tokens) % (POLL if token.is_cuda else 1) == 0 and ended.all():
            break
    rows = zip(torch.stack(tokens, 1).cpu(), torch.stack(logprobs, 1).cpu(), strict=True)
    return [completion(model, ids.tolist(), logprobs) for ids, logprobs in rows]


def stream(
    model: Model,
    images: Source | Sequence[Source],
    prefix: Text,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    compile: bool = False,
    tap: Tap = identity,
) -> Generator[str, None, str]:
    """Complete one row and yield its text in pieces. The joined pieces are the text of `generate`.

    `images` is one picture or a list of any number of them. A piece consists of complete characters. The generator
    returns how the text ended, as `Completion.finish` does. Raises the errors of `generate`.
    """
    settings = Settings(temperature, top_k, top_p, min_p)
    prompt = prepare_checked(model, [images], [prefix], max_new_tokens)
    u = uniform(seed, [0], max_new_tokens)
    vocabulary, tap = tokenizer_of(model), bind(tap, paligemma.names(model.cfg))  # an error is raised at the call

    def text() -> Generator[str, None, str]:
        finish = "length"

        def tokens() -> Iterator[int]:
            nonlocal finish
            for token, token_logprob in steps(model.params, prompt, model.cfg, settings, u, compile, tap):
                check_not_nan(token_logprob)
                if token == model.cfg.eos:
                    finish = "eos"
                    return
                yield int(token)

        yield from tokenizer.pieces(vocabulary, tokens())
        return finish

    return text()


@torch.no_grad()
def steps(
    params: Params,
    prompt: Prompt,
    cfg: Config,
    settings: Settings,
    u: Float[Tensor, "b n"],
    compile: bool = False,
    tap: Tap = identity,
) -> Iterator[tuple[Int[Tensor, "b"], Float[Tensor, "b"]]]:
    """Yield the next token of every row, and its log-probability, once for each column of u."""
    step = compiled_decode_step if compile else decode_step
    first, *columns = u.to(prompt.tokens.device).unbind(1)
    if compile and prompt.tokens.is_cuda:  # on a CPU a prefill is all matrix products, and compiling gains nothing
        prompt, size = pad_to_bucket(prompt, u.shape[1], cfg)
        token, token_logprob, cache = compiled_prefill_step(params, prompt, cfg, size, settings, first, tap=tap)
    else:
        token, token_logprob, cache = prefill_step(params, prompt, cfg, u.shape[1], settings, first, tap)
    yield token, token_logprob
    for column in columns:
        token, token_logprob, cache = step(params, token, cache, cfg, settings, column, tap)
        yield token, token_logprob


def prefill_step(
    params: Params,
    prompt: Prompt,
    cfg: Config,
    size: int,
    settings: Settings,
    u: Float[Tensor, "b"],
    tap: Tap = identity,
    wrap: Wrap = plain,
) -> tuple[Int[Tensor, "b"], Float[Tensor, "b"], Cache]:
    """Prefill a prompt. Returns the first token, its log-probability, and a cache with `size` free slots."""
    image = paligemma.encode_images(params, prompt.pixels, cfg, tap, wrap)
    return encoded_prefill_step(params, image, prompt, cfg, size, settings, u, tap, wrap)


def encoded_prefill_step(
    params: Params,
    image: Float[Tensor, "b ip d"],
    prompt: Prompt,
    cfg: Config,
    size: int,
    settings: Settings,
    u: Float[Tensor, "b"],
    tap: Tap = identity,
    wrap: Wrap = plain,
) -> tuple[Int[Tensor, "b"], Float[Tensor, "b"], Cache]:
    """`prefill_step`, for pictures that are already encoded."""
    logits, cache = paligemma.prefill_encoded(params, image, prompt, cfg, size, tap, wrap=wrap)
    return *wrap(next_token)(logits, u, settings), cache


def pad_to_bucket(prompt: Prompt, size: int, cfg: Config) -> tuple[Prompt, int]:
    """Pad the prompt, and choose the number of free slots after it, so that prompts of many lengths share code."""
    tokens, images = prompt.tokens.shape[1], prompt.pixels.shape[1] * cfg.vision.tokens
    padded = bucket(tokens, 16)
    if padded > tokens:
        rows = {name: F.pad(getattr(prompt, name), (0, padded - tokens)) for name in ("tokens", "valid", "causal")}
        prompt = prompt._replace(**rows)
    return prompt, bucket(images + max(padded, tokens + size)) - images - padded


def decode_step(
    params: Params,
    token: Int[Tensor, "b"],
    cache: Cache,
    cfg: Config,
    settings: Settings,
    u: Float[Tensor, "b"],
    tap: Tap = identity,
) -> tuple[Int[Tensor, "b"], Float[Tensor, "b"], Cache]:
    """Append a token. Returns the next token, its log-probability, and the new cache."""
    logits, cache = paligemma.decode(params, token, cache, cfg, tap)
    return *next_token(logits, u, settings), cache


def next_token(
    logits: Float[Tensor, "b v"], u: Float[Tensor, "b"], settings: Settings
) -> tuple[Int[Tensor, "b"], Float[Tensor, "b"]]:
    """The next token and its log-probability."""
    token = choose(logits, u, settings)
    return token, logprob(logits, token)


compiled_prefill_step, compiled_decode_step = jit(prefill_step), jit(decode_step, donate="cache")


@torch.no_grad()
def score(model: Model, images: Pictures, prefixes: Any, candidates: Any, tap: Tap = identity) -> Float[Tensor, "b c"]:
    """The log-probability that the answer is exactly the candidate, including its end of sequence.

    A candidate is text or a list of token ids. Each row is prefilled once; as many candidates as `SCORED_BYTES` allows
    extend it together. `tap` gets the activations of both, see `pgfunc.taps`. Raises SettingError if `candidates` is
    not a list of one or more answers, or if the tap asks for an unknown activation; PromptError if a prompt or a
    candidate does not fit; and NumericalError if logits are nan.
    """
    if not texts_per_row("candidates", candidates):
        raise SettingError("candidates must be a list of one or more answers")
    answers = [[*text_ids(model, candidate), model.cfg.eos] for candidate in candidates]
    size, tap = max(len(answer) for answer in answers), bind(tap, paligemma.names(model.cfg))

    def run(rows: list[int], prompt: Prompt) -> list[Tensor]:
        logits, cache = paligemma.prefill(model.params, prompt, model.cfg, size, tap)
        bytes_per_answer = 4 * logits.numel() * size + tree.nbytes((cache.k, cache.v))
        answers_per_batch = max(1, SCORED_BYTES // bytes_per_answer)
        parts = [answers[i : i + answers_per_batch] for i in range(0, len(answers), answers_per_batch)]
        scores = torch.cat([answer_scores(model, logits, cache, part, tap) for part in parts], 1).cpu()
        check_not_nan(scores)
        return list(scores)

    return torch.stack(run_grouped(model, as_rows(images, prefixes), size, run))


def answer_scores(
    model: Model,
    logits: Float[Tensor, "b v"],
    cache: Cache,
    answers: Sequence[Sequence[int]],
    tap: Tap = identity,
) -> Float[Tensor, "b c"]:
    """The log-probability of each answer after each row of a cache, computed in one extension.

    `logits` are those after the last token of each row.
    """
    count, width, device = len(answers), max(map(len, answers)), logits.device
    tokens = torch.tensor([[*answer, *[model.cfg.pad] * (width - len(answer))] for answer in answers], device=device)
    not_padding = torch.tensor([[i < len(answer) for i in range(width)] for answer in answers], device=device)
    scores = upcast(logits).log_softmax(-1)[:, tokens[:, 0]]
    if width == 1:
        return scores
    rows = torch.arange(len(logits), device=device).repeat_interleave(count)  # the answers of a row are adjacent
    tokens, not_padding = tokens.repeat(len(logits), 1), not_padding.repeat(len(logits), 1)
    later_logits, _ = paligemma.extend(model.params, tokens[:, :-1], reorder(cache, rows), model.cfg, tap)
    rest = torch.where(not_padding[:, 1:], logprob(later_logits, tokens[:, 1:]), 0.0).sum(-1)
    return scores + rearrange(rest, "(b c) -> b c", c=count)


def uniform(seed: int, rows: Sequence[int], tokens: int) -> Float[Tensor, "rows tokens"]:
    """Random numbers for the rows with these indices: float64, in [0, 1), one stream for each (seed, row)."""
    # numpy splits a larger seed into words, so (seed, row) pairs could collide
    seed = checked_int("seed", seed, 0, 2**32 - 1)
    return torch.from_numpy(np.stack([np.random.default_rng((seed, row)).random(tokens) for row in rows]))


def run_grouped(model: Model, rows: list[Row], size: int, run: Callable[[list[int], Prompt], list[Any]]) -> list[Any]:
    """Run the rows with the same number of pictures together. Returns the results in the order of the rows.

    `run` takes the indices of some rows and their prompt.
    """
    counts = {len(row.images) for row in rows}
    groups = [[i for i, row in enumerate(rows) if len(row.images) == count] for count in sorted(counts)]
    prompts = [
        prepare_checked(model, [rows[i].images for i in group], [rows[i].prefix for i in group], size)
        for group in groups
    ]
    results: dict[int, Any] = {}
    for group, prompt in zip(groups, prompts, strict=True):
        results |= zip(group, run(group, prompt), strict=True)
    return [results[i] for i in range(len(rows))]


def prepare_checked(model: Model, images: Pictures, prefixes: Any, size: int) -> Prompt:
    """`prepare`. Raises PromptError if `size` more tokens do not fit the model's positions."""
    checked_int("max-new-tokens", size, 1)
    prompt = prepare(model, images, prefixes)
    check_fits(model.cfg, prompt.pixels.shape[1], prompt.tokens.shape[1] + size)
    return prompt


def check_not_nan(logprobs: Tensor) -> None:
    """Raise NumericalError if a log-probability is nan."""
    if logprobs.isnan().any():
        raise NumericalError("the logits are nan; float16 may overflow, so set dtype= to bfloat16 or float32")


def completion(model: Model, ids: list[int], logprobs: Float[Tensor, "t"]) -> Completion:
    """The completion that consists of these tokens, up to the end of sequence. Raises NumericalError for nan."""
    end = ids.index(model.cfg.eos) if model.cfg.eos in ids else len(ids)
    check_not_nan(logprobs[: end + 1])  # tokens after the end do not matter
    finish = "eos" if end < len(ids) else "length"
    return Completion(_text(model, ids[:end]), ids[:end], logprobs.tolist()[:end], finish)


def _text(model: Model, ids: list[int]) -> str:
    return tokenizer.decode(model.tokenizer, ids) if model.tokenizer else ""
