"""Mistakes in loops: full caches, unknown tokens, reordered rows, code that is compiled at each call."""

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from weakref import ref

import pytest
import torch
from cases import CONFIGS, params, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

import pgfunc as pg
from pgfunc.errors import CacheFullError, SettingError, TokenError

CFG = CONFIGS["gemma"]
WEIGHTS = params(CFG)
STEP = pg.jit(pg.decode, donate="cache")


def filled(lengths: list[int], size: int = 20) -> pg.Cache:
    with torch.no_grad():
        return pg.prefill(WEIGHTS, prompt(CFG, lengths, [0] * len(lengths)), CFG, size)[1]


# --- threads ----------------------------------------------------------------------------------------------------------


def test_two_functions_can_continue_the_same_handle_in_two_threads():
    steps = STEP, pg.jit(pg.decode, donate="cache")
    tokens = torch.tensor([3, 5]), torch.tensor([40, 41])
    mismatches = 0
    for _ in range(60):
        _, start = STEP(WEIGHTS, torch.tensor([1, 2]), filled([3, 2]), CFG)
        together = Barrier(2)

        def go(i, start=start, together=together):
            together.wait()
            return steps[i](WEIGHTS, tokens[i], start, CFG)[1]

        with ThreadPoolExecutor(2) as pool:
            handles = list(pool.map(go, range(2)))
        for token, handle in zip(tokens, handles, strict=True):
            _, pure = pg.decode(WEIGHTS, token, start, CFG)
            visible = torch.arange(start.slots) < pure.length[:, None]
            mismatches += not torch.allclose(handle.k[1][visible], pure.k[1][visible], atol=1e-5)
    assert not mismatches


# --- a full cache, and token ids outside the vocabulary ---------------------------------------------------------------


def test_a_full_cache_raises_an_error_and_changes_no_handle():
    cache = pg.reorder(filled([56, 3], 4), torch.tensor([0, 1]))
    for _ in range(cache.slots - 60):
        _, cache = STEP(WEIGHTS, torch.tensor([1, 2]), cache, CFG)
    assert cache.length.tolist() == [64, 11]
    visible = torch.arange(64) < cache.length[:, None]
    before = [x[visible] for x in (*cache.k, *cache.v)]
    for append in (lambda: STEP(WEIGHTS, torch.tensor([3, 4]), cache, CFG),
                   lambda: pg.decode(WEIGHTS, torch.tensor([3, 4]), cache, CFG)):  # fmt: skip
        with pytest.raises(CacheFullError, match="no room"):
            append()
        after = [x[visible] for x in (*cache.k, *cache.v)]
        assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


def test_if_lengths_are_not_known_on_the_host_a_token_without_a_slot_gives_nan_in_its_row_only():
    """As on a GPU. `torch.compile` alone does not check the lengths on the host either."""
    cache = filled([4, 2], size=1)  # rows of 9, 7 in 9 slots
    cache = cache._replace(length=torch.tensor([9, 7]))
    logits, after = torch.compile(pg.decode, fullgraph=True)(WEIGHTS, torch.tensor([1, 2]), cache, CFG)
    assert after.overflowed.tolist() == [True, False]
    assert logits[0].isnan().all()
    torch.testing.assert_close(logits[1], pg.decode(WEIGHTS, torch.tensor([1, 2]), filled([4, 2], 5)._replace(
        length=torch.tensor([8, 7])), CFG)[0][1], atol=1e-5, rtol=1e-4)  # fmt: skip
    assert torch.equal(after.k[0][0], cache.k[0][0]), "nothing is written"


@pytest.mark.parametrize("wrong", [CFG.text.vocab + CFG.text.padding, -1, 2**40])
def test_a_token_outside_the_vocabulary_raises_an_error_or_gives_nan(wrong):
    token, cache = torch.tensor([wrong, 2]), filled([3, 2])
    with pytest.raises(TokenError, match=f"token id {wrong} is outside 0..66"):
        pg.decode(WEIGHTS, token, cache, CFG)
    logits, after = torch.compile(pg.decode, fullgraph=True)(WEIGHTS, token, cache, CFG)
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()
    assert after.length.tolist() == (cache.length + 1).tolist()


def test_a_row_that_overflowed_still_overflows_in_a_copy():
    cache = filled([4, 2], size=1)._replace(length=torch.tensor([10, 7]))  # 9 slots
    assert pg.reorder(cache, torch.tensor([0, 1, 0])).overflowed.tolist() == [True, False, True]
    with pytest.raises(CacheFullError):
        STEP(WEIGHTS, torch.tensor([1, 2]), cache, CFG)


# --- inserted rows ---


def test_an_inserted_row_that_overflowed_still_overflows():
    full = filled([4], size=1)._replace(length=torch.tensor([10]))  # 9 slots
    cache = pg.insert(filled([4, 2], size=8), full, torch.tensor([1]))
    assert cache.overflowed.tolist() == [False, True]


@pytest.mark.parametrize(("rows", "message"), [
    ([0], "expected 2 whole numbers"), ([0, 2], "expected different numbers from 0 to 1"),
    ([-1, 0], "expected different numbers"), ([1, 1], "expected different numbers"),
])  # fmt: skip
def test_rows_to_insert_at_are_different_rows_of_the_cache(rows, message):
    with pytest.raises(SettingError, match=message):
        pg.insert(filled([4, 2]), filled([3, 3]), torch.tensor(rows))


def test_rows_with_more_slots_or_of_another_model_are_not_inserted():
    cache = filled([4, 2])
    for new in (filled([4], size=30), pg.tree.map(lambda x: x[..., :1] if x.dim() == 4 else x, filled([4]))):
        with pytest.raises(SettingError, match="do not fit"):
            pg.insert(cache, new, torch.tensor([0]))


def test_an_insertion_is_differentiable_in_both_caches():
    cache, new = filled([4, 2]), filled([3])
    x, y = cache.k[0].clone().requires_grad_(), new.k[0].clone().requires_grad_()
    both = pg.insert(cache._replace(k=(x, *cache.k[1:])), new._replace(k=(y, *new.k[1:])), torch.tensor([1]))
    both.k[0].sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad[0].min() == y.grad.min() == 1
    assert x.grad[1].max() == 0


# --- reordered rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reordered", [
    lambda cache, rows: pg.tree.map(lambda x: x[rows], cache),
    lambda cache, rows: pg.tree.map(lambda x: x.index_select(0, rows), cache),
    lambda cache, rows: pg.tree.map(lambda x: x.flip(0), cache),
    lambda cache, rows: pg.reorder(cache, rows),
    lambda cache, rows: cache._replace(k=tuple(x.copy_(x[rows]) for x in map(torch.clone, cache.k))),
    lambda cache, rows: cache._replace(k=cache.v, v=cache.k),
])  # fmt: skip
def test_a_step_that_reorders_rows_is_refused_even_if_all_rows_are_equal(reordered):
    def step(token, cache, rows):
        logits, cache = pg.decode(WEIGHTS, token, cache, CFG)
        return logits, reordered(cache, rows)

    one = filled([3])
    equal_rows = pg.tree.map(lambda x: x.repeat_interleave(2, 0), one)._replace(length=one.length.repeat(2))
    if reordered(equal_rows, torch.tensor([1, 0])).k is equal_rows.v:
        equal_rows = equal_rows._replace(v=equal_rows.k)
    with pytest.raises(SettingError, match=r"changes a donated cache by .*pg\.reorder"):
        pg.jit(step, donate="cache")(torch.tensor([1, 1]), equal_rows, torch.tensor([1, 0]))


def test_a_step_may_leave_finished_rows_unchanged():
    def step(token, cache, ended):
        logits, new = pg.decode(WEIGHTS, token, cache, CFG)
        kept = [torch.where(ended[:, None, None, None], old, x) for old, x in zip(cache.k, new.k, strict=True)]
        return logits, new._replace(k=tuple(kept), length=torch.where(ended, cache.length, new.length))

    arguments = torch.tensor([1, 2]), filled([3, 2]), torch.tensor([True, False])
    logits, cache = pg.jit(step, donate="cache")(*arguments)
    expected, pure = step(*arguments)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(cache.length, pure.length)


def test_a_step_that_shortens_its_cache_in_a_later_call_is_refused():
    def step(token, cache, count):
        logits, new = pg.decode(WEIGHTS, token, cache, CFG)
        return logits, new._replace(length=new.length - count)

    fast, token = pg.jit(step, donate="cache"), torch.tensor([1, 2])
    _, cache = fast(token, filled([3, 2]), torch.tensor([0, 0]))
    with pytest.raises(SettingError, match="makes a donated cache shorter: rewind it outside"):
        fast(token, cache, torch.tensor([4, 0]))


def test_older_handles_are_freed_even_if_they_were_arguments():
    def step(token, cache, anchor):
        logits, new = pg.decode(WEIGHTS, token, cache, CFG)
        return logits + 0 * anchor.k[0].sum(), new

    fast, token, refs = pg.jit(step, donate="cache"), torch.tensor([1, 2]), []
    cache = pg.reorder(filled([3, 3]), torch.tensor([0, 1]))
    for _ in range(6):
        anchor = cache
        cache = pg.reorder(cache, torch.tensor([1, 0]))
        refs.append(ref(anchor.k[0]))
        for _ in range(2):
            _, cache = fast(token, cache, anchor)
    del anchor
    gc.collect()
    assert sum(each() is not None for each in refs) <= 1


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.booleans())
def test_reorder_returns_the_given_rows_of_compiled_and_other_caches(rows, compiled):
    start, rows = filled([3, 2, 1]), torch.tensor(rows)
    if compiled:
        _, start = STEP(WEIGHTS, torch.tensor([1, 2, 3]), start, CFG)
    cache = pg.reorder(start, rows)
    assert torch.equal(cache.length, start.length[rows])
    for one, other in zip((*cache.k, *cache.v), (*start.k, *start.v), strict=True):
        assert torch.equal(one[:, : start.slots], other[rows])


def test_a_beam_is_copied_once_in_each_step():
    step = pg.jit(pg.decode, donate="cache")
    cache = pg.reorder(filled([3]), torch.zeros(3, dtype=torch.int64))
    for i in range(4):
        _, cache = step(WEIGHTS, torch.tensor([i, i, i]), cache, CFG)
        cache = pg.reorder(cache, torch.tensor([2, 0, 0]))
    assert step.copies == 0, "the step appends in place to the copy of pg.reorder"


def test_reorder_and_rewind_refuse_wrong_arguments():
    cache = filled([3, 2])
    for rows in (torch.tensor([0, 2]), torch.tensor([-1, 0]), [0, 1], torch.tensor(1), torch.tensor([0.0])):
        with pytest.raises(SettingError, match="rows are"):
            pg.reorder(cache, rows)
    for length in (cache.length + 1, cache.length - 100, 3, cache.length[:1], cache.length.float(), None):
        with pytest.raises(SettingError, match="length is"):
            pg.rewind(cache, length)
    assert torch.equal(pg.rewind(cache, (cache.length - 1).int()).length, cache.length - 1)


# --- repeated compilation ---------------------------------------------------------------------------------------------


def test_slices_of_a_growing_tensor_defaults_and_keywords_share_the_code():
    double = pg.jit(lambda x, by=2.0, more=(): x * by)
    for size in range(3, 7):
        x = torch.arange(2.0 * size).reshape(2, size)
        assert torch.equal(double(x[:, -2:]), x[:, -2:] * 2)
        assert torch.equal(double(x[:1, -2:].expand(2, 2).contiguous(), 2.0), x[:1, -2:].expand(2, 2) * 2)
        assert torch.equal(double(x=x[:, :2], by=2.0), x[:, :2] * 2)
        assert torch.equal(double(x.T[-2:].T, more=()), x[:, -2:] * 2)
    assert double.compilations == 1
    row = pg.jit(lambda x: x + 1)
    for size in range(3, 7):
        row(torch.arange(float(size))[None, -2:])
    assert row.compilations == 1, "the stride of an axis of size 1 has no meaning"


def test_why_says_what_differed_and_a_function_that_is_compiled_often_warns():
    scaled = pg.jit(lambda x, temperature, cfg: x / temperature)
    scaled(torch.ones(2), 0.5, CFG)
    assert scaled.why == ""
    scaled(torch.ones(2), 0.75, CFG)
    assert scaled.why == "temperature is 0.75, was 0.5"
    scaled(torch.ones(2, dtype=torch.int32), 0.75, CFG)
    assert scaled.why == "x is int32[2] on cpu, was float32[2] on cpu"
    other = CFG.__class__(CFG.vision, CFG.text, eos=7, image=CFG.image)
    scaled(torch.ones(2), 0.75, other)
    assert scaled.why == "cfg.eos is 7, was 1"
    with torch.autocast("cpu", torch.bfloat16):
        scaled(torch.ones(2), 0.75, other)
    assert scaled.why == "autocast on CPUs is torch.bfloat16, was False"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(2, 4):
            scaled(torch.ones(2), float(i), CFG)
    with pytest.warns(
        RuntimeWarning, match=r"was compiled 8 times, this time because temperature is 9\.0, was"
    ) as warned:
        scaled(torch.ones(2), 9.0, CFG)
    assert warned[0].filename == __file__, "the warning points to the call"


def test_copies_are_counted():
    step = pg.jit(pg.decode, donate="cache")
    token, cache = torch.tensor([1]), filled([3])
    _, cache = step(WEIGHTS, token, cache, CFG)
    assert step.copies == 1, "compiled code did not make it"
    _, newer = step(WEIGHTS, token, cache, CFG)
    assert step.copies == 1
    step(WEIGHTS, token, cache, CFG)
    assert step.copies == 2, "a fork is copied"
    assert newer.length.tolist() == [9]


# --- functions that cannot be compiled --------------------------------------------------------------------------------

inner = pg.jit(lambda x: x * 2)


def test_a_compiled_function_inside_another_is_compiled_with_it():
    assert pg.jit(lambda x: inner(x) + 1)(torch.ones(2)).tolist() == [3.0, 3.0]
    outer = pg.jit(lambda token, cache: STEP(WEIGHTS, token, cache, CFG), donate="cache")
    logits, _ = outer(torch.tensor([1]), filled([3]))
    torch.testing.assert_close(logits, pg.decode(WEIGHTS, torch.tensor([1]), filled([3]), CFG)[0], atol=1e-5, rtol=1e-4)
    assert outer.copies == 1


def branching(x):
    return x + 1 if x.sum().item() > 0 else x - 1


def conditional(x):
    return x + 1 if x.sum() > 0 else x - 1


def printing(x):
    print(x.shape)
    return x


@pytest.mark.parametrize(("fn", "message"), [
    (branching, r"branching cannot be compiled \(test_mistakes.py, line \d+\): it branches on a number in a tensor"),
    (conditional, r"it branches on a number in a tensor; use torch\.where"),
    (printing, r"printing cannot be compiled .*`print`"),
])  # fmt: skip
def test_a_function_that_cannot_be_compiled_raises_an_error_of_one_line(fn, message):
    with pytest.raises(SettingError, match=message) as error:
        pg.jit(fn)(torch.ones(3))
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__


def test_an_error_that_the_function_itself_raises_is_raised_unchanged():
    with pytest.raises(RuntimeError, match=r"cannot be multiplied|size mismatch"):
        pg.jit(lambda x: x @ torch.ones(7, 7))(torch.ones(3))
    with pytest.raises(KeyError, match="nothing"):
        pg.jit(lambda x: x * {}["nothing"])(torch.ones(3))


def test_generators_and_coroutines_are_refused_immediately():
    def generator(x):
        yield x

    async def coroutine(x):
        return x

    for fn in (generator, coroutine):
        with pytest.raises(SettingError, match="compile the step that it repeats"):
            pg.jit(fn)
