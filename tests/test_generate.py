"""The loops give the same as the simple way: a forward pass over the whole text, one row at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import text_model
from hypothesis import given
from hypothesis import strategies as st

import pgfunc as pg
from pgfunc import tokenizer
from pgfunc.errors import NumericalError, PromptError, SettingError

MODEL = text_model()
RED, BLUE = np.full((5, 7, 3), (200, 0, 0), np.uint8), np.full((9, 4, 3), (0, 0, 200), np.uint8)
ATOL = 1e-4  # float32, few layers


def extended(prompt: pg.Prompt, tokens: torch.Tensor) -> pg.Prompt:
    """The prompt with more suffix tokens."""
    more = torch.ones_like(tokens, dtype=torch.bool)
    ends = zip(prompt[1:], (tokens, more, more), strict=True)
    return pg.Prompt(prompt.pixels, *(torch.cat(pair, 1) for pair in ends))


def greedy_without_cache(model: pg.Model, images, prefix: str, tokens: int) -> list[int]:
    """Each token by a forward pass over all earlier ones."""
    prompt = pg.prepare(model, [images], [prefix])
    for _ in range(tokens):
        prompt = extended(prompt, pg.forward(model.params, prompt, model.cfg)[:, -1].argmax(-1, keepdim=True))
    return prompt.tokens[0, -tokens:].tolist()


def test_greedy_equals_forward_without_a_cache_for_rows_with_different_numbers_of_pictures():
    images, prefixes = [RED, [], [BLUE, RED], BLUE], ["a", "bcd", "e", "what is it?"]
    completions = pg.generate(MODEL, images, prefixes, max_new_tokens=9)
    for completion, picture, prefix in zip(completions, images, prefixes, strict=True):
        expected = greedy_without_cache(MODEL, picture, prefix, 9)
        end = expected.index(MODEL.cfg.eos) if MODEL.cfg.eos in expected else 9
        assert completion.tokens == expected[:end]
        assert completion.finish == ("eos" if end < 9 else "length")
        assert completion.text == pg.generate(MODEL, [picture], [prefix], max_new_tokens=9)[0].text


def test_each_row_ends_at_its_own_end_of_sequence():
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 1}
    rows = pg.generate(MODEL, [RED, BLUE], ["a", "bcd"], **options)
    eos = next(token for token in rows[0].tokens if token not in rows[1].tokens)
    model = MODEL._replace(cfg=replace(MODEL.cfg, eos=eos))
    ended, unended = pg.generate(model, [RED, BLUE], ["a", "bcd"], **options)
    end = rows[0].tokens.index(eos)
    assert (ended.tokens, ended.finish) == (rows[0].tokens[:end], "eos")
    assert (unended.tokens, unended.finish) == (rows[1].tokens, "length")
    assert len(ended.logprobs) == end


def test_decoding_stops_when_every_row_has_ended(monkeypatch):
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 1}
    rows = pg.generate(MODEL, [RED, BLUE], ["a", "bcd"], **options)
    shared = set(rows[0].tokens) & set(rows[1].tokens)
    eos = min(shared, key=lambda token: max(row.tokens.index(token) for row in rows))
    ends = [row.tokens.index(eos) for row in rows]
    assert ends[0] != ends[1], "the rows end at different steps"
    calls = []
    decode = pg.paligemma.decode
    monkeypatch.setattr(pg.paligemma, "decode", lambda *args: calls.append(0) or decode(*args))
    model = MODEL._replace(cfg=replace(MODEL.cfg, eos=eos))
    assert [row.finish for row in pg.generate(model, [RED, BLUE], ["a", "bcd"], **options)] == ["eos", "eos"]
    assert len(calls) == max(ends)


def test_logprobs_equal_those_of_the_forward_pass():
    (completion,) = pg.generate(MODEL, RED, "ab", max_new_tokens=6, temperature=1.5, top_k=20, seed=3)
    prompt = pg.prepare(MODEL, RED, "ab")
    length = prompt.tokens.shape[1]
    tokens = torch.tensor([completion.tokens])
    logits = pg.forward(MODEL.params, extended(prompt, tokens), MODEL.cfg)[0, length - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, tokens[0, :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=ATOL, rtol=0)


@given(st.integers(0, 1000))
def test_a_row_draws_the_same_whatever_the_other_rows_are(seed):
    options = {"max_new_tokens": 5, "temperature": 1.0, "seed": seed}
    first, second = pg.generate(MODEL, [RED, BLUE], ["a", "b"], **options)
    _, again, _ = pg.generate(MODEL, [[], BLUE, [BLUE, RED]], ["xyz", "b", "a"], **options)
    assert again.tokens == second.tokens
    assert pg.generate(MODEL, [RED, BLUE], ["a", "b"], **options) == [first, second]


def test_a_longer_completion_begins_with_the_shorter_one():
    options = {"temperature": 1.0, "seed": 2}
    short, long = (pg.generate(MODEL, [RED, BLUE], ["a", "b"], tokens, **options) for tokens in (5, 9))
    assert [row.tokens for row in short] == [row.tokens[:5] for row in long]


def test_nan_logits_raise_an_error():
    params = MODEL.params._replace(projector_bias=MODEL.params.projector_bias * float("nan"))
    with pytest.raises(NumericalError, match="the logits are nan"):
        pg.score(MODEL._replace(params=params), RED, "a", ["yes"])
    for call in (pg.generate, lambda *args: list(pg.stream(*args))):
        for temperature in (0.0, 1.0):
            with pytest.raises(NumericalError, match="the logits are nan"):
                call(MODEL._replace(params=params), RED, "a", 3, temperature)


def test_scores_can_be_used_in_a_gradient():
    scores = pg.score(MODEL, RED, "a", ["yes", "no"])
    weight = torch.ones(2, requires_grad=True)
    (scores * weight).sum().backward()
    assert torch.equal(weight.grad, scores[0])


def test_seeds_and_temperature_change_what_is_drawn():
    drawn = {tuple(pg.generate(MODEL, RED, "a", 12, temperature=1.0, seed=seed)[0].tokens) for seed in range(5)}
    assert len(drawn) == 5
    greedy = pg.generate(MODEL, RED, "a", 12)[0].tokens
    assert pg.generate(MODEL, RED, "a", 12, temperature=2.0, top_k=1)[0].tokens == greedy


@given(st.integers(0, 1000))
def test_the_joined_pieces_of_a_stream_are_the_text_of_generate(seed):
    options = {"max_new_tokens": 12, "temperature": 1.3, "seed": seed}
    pieces = list(pg.stream(MODEL, RED, "a", **options))
    assert "".join(pieces) == pg.generate(MODEL, RED, "a", **options)[0].text
    assert all(pieces)


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_returns_how_the_text_ended(seed):
    options = {"temperature": 1.3, "seed": seed}
    model = MODEL._replace(cfg=replace(MODEL.cfg, eos=pg.generate(MODEL, RED, "a", 12, **options)[0].tokens[5]))
    for limit in (3, 12):
        stream, finish = pg.stream(model, RED, "a", limit, **options), None
        try:
            while True:
                next(stream)
        except StopIteration as end:
            finish = end.value
        assert finish == pg.generate(model, RED, "a", limit, **options)[0].finish
    assert finish == "eos"


def test_a_stream_holds_back_an_incomplete_character():
    ids = pg.prompt.text_ids(MODEL, "né漢")
    assert list(tokenizer.pieces(MODEL.tokenizer, ids)) == ["n", "é", "漢"]
    assert list(tokenizer.pieces(MODEL.tokenizer, ids[:-1])) == ["n", "é", "\N{REPLACEMENT CHARACTER}"]


def test_score_is_the_log_probability_of_the_answer_and_its_end():
    images, prefixes, candidates = [RED, [BLUE, RED], BLUE], ["a", "bc", "longer"], ["yes", "", "no!"]
    scores = pg.score(MODEL, images, prefixes, candidates)
    for i, (image, prefix) in enumerate(zip(images, prefixes, strict=True)):
        for j, candidate in enumerate(candidates):
            prompt = pg.prepare(MODEL, [image], [prefix], [candidate])
            logprobs = pg.forward(MODEL.params, prompt, MODEL.cfg).log_softmax(-1)[0, :-1]
            chosen = logprobs.gather(-1, prompt.tokens[0, 1:, None])[:, 0]
            expected = chosen[prompt.causal[0, 1:]].sum()
            torch.testing.assert_close(scores[i, j], expected, atol=ATOL, rtol=1e-5)


def test_settings_and_lengths_outside_their_range_are_errors():
    for settings in ({"temperature": -1.0}, {"top_p": 1.5}, {"top_k": 0}, {"min_p": 2.0}, {"max_new_tokens": 0},
                     {"seed": -1}, {"seed": 2**32}):  # fmt: skip
        with pytest.raises(SettingError):
            pg.generate(MODEL, RED, "a", **settings)
        with pytest.raises(SettingError):
            pg.stream(MODEL, RED, "a", **settings)
    with pytest.raises(PromptError, match="do not fit 120 positions"):
        pg.generate(MODEL, RED, "a", max_new_tokens=10**15)
    with pytest.raises(PromptError, match="do not fit 120 positions"):
        pg.stream(MODEL, RED, "a", max_new_tokens=10**15)
    with pytest.raises(PromptError, match="candidates are text or lists of token ids"):
        pg.score(MODEL, RED, "a", [None])
    for candidates in ([], "yes", [5, 6]):
        with pytest.raises(SettingError, match="candidates must be a list"):
            pg.score(MODEL, RED, "a", candidates)


def test_a_model_without_a_tokenizer_runs_on_token_ids():
    bare = MODEL._replace(tokenizer=None)
    ids = [MODEL.cfg.bos, *pg.prompt.text_ids(MODEL, "ab"), MODEL.tokenizer.newline]
    expected = pg.generate(MODEL, RED, "ab", 5)[0]
    assert pg.generate(bare, RED, [ids], 5)[0] == expected._replace(text="")
    with pytest.raises(PromptError, match="without a tokenizer"):
        pg.generate(bare, RED, "ab")


def test_a_completion_shows_its_text_its_length_its_log_probability_and_why_it_ended():
    done = pg.Completion("a cow\n", [5, 6, 7], [-0.5, -0.25, -1.0], "eos")
    assert repr(done) == r"Completion('a cow\n', 3 tokens, log-probability -1.75, eos)"
    assert repr(pg.Completion("", [], [], "length")) == "Completion('', 0 tokens, log-probability 0.00, length)"
    for text in ("x" * 10**5, "\U0001f404\x1b" * 10**4):
        shown = repr(pg.Completion(text, [1] * 10**5, [-1e-3] * 10**5, "length"))
        assert shown.isprintable()
        assert shown.endswith(" ..., 100000 tokens, log-probability -100.00, length)")
        assert len(shown) < 500
