"""Compiled code means what the pure function means, whichever handle of a cache goes on, and is compiled rarely."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from weakref import ref

import pytest
import torch
from cases import CONFIGS, params, prompt
from graphs import played
from hypothesis import given, settings
from hypothesis import strategies as st

import pgfunc as pg
from pgfunc import bench
from pgfunc.errors import SettingError
from pgfunc.generate import begin, bucketed
from pgfunc.jit import Jitted
from pgfunc.jit.donation import bucket
from pgfunc.sample import Settings

LIMIT = {"atol": 1e-5, "rtol": 1e-4}  # float32, sums in another order


def close(one, other) -> None:
    torch.testing.assert_close(one, other, **LIMIT)


@pytest.fixture(scope="module")
def cfg():
    return CONFIGS["gemma"]


@pytest.fixture(scope="module")
def weights(cfg):
    return params(cfg)


@pytest.fixture(scope="module")
def step() -> Jitted:
    return pg.jit(pg.decode, donate="cache")


@pytest.fixture(scope="module")
def graphed_step() -> Jitted:
    return pg.jit(pg.decode, donate="cache")


def filled(weights, cfg, lengths: list[int], size: int = 20, seed: int = 0) -> pg.Cache:
    with torch.no_grad():
        return pg.prefill(weights, prompt(cfg, lengths, [0] * len(lengths), seed=seed), cfg, size)[1]


def addresses(cache: pg.Cache) -> list[int]:
    return [x.data_ptr() for x in (*cache.k, *cache.v)]


# --- the meaning ------------------------------------------------------------------------------------------------------

# what to do with one of the handles that are alive: continue it by a token and keep or forget it, go back from it,
# drop it, or edit it
moves = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 63), st.sampled_from(["keep", "forget", "rewind", "drop", "edit"])),
    min_size=1, max_size=14,
)  # fmt: skip


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
@settings(deadline=None, max_examples=60)
@given(moves=moves)
def test_every_handle_continues_as_its_own_past_says_whatever_was_appended_since(step, name, moves):
    follow(step, CONFIGS[name], moves)


@settings(deadline=None, max_examples=60)
@given(moves=moves)
def test_the_same_with_graphs(graphed_step, cfg, moves):
    with pytest.MonkeyPatch.context() as patch:
        played(patch)
        follow(graphed_step, cfg, moves)


def follow(step: Jitted, cfg: pg.Config, moves: list[tuple[int, int, str]]) -> None:
    """Make these moves with the step and with the pure function, and compare all that is alive at the end."""
    weights = params(cfg)
    start = filled(weights, cfg, [3, 2])
    alive = [(start, start)]  # the compiled handle beside the pure one
    for which, token, then in moves:
        mine, pure = alive[which % len(alive)]
        if then == "rewind":
            length = torch.maximum(mine.length - token % 4, start.length)
            alive[which % len(alive)] = pg.rewind(mine, length), pure._replace(length=length)
            continue
        if then == "drop":
            alive = [pair for i, pair in enumerate(alive) if i != which % len(alive) or len(alive) == 1]
            del mine, pure
            continue
        if then == "edit":
            changed = (cache._replace(k=tuple(2 * x for x in cache.k)) for cache in (mine, pure))
            alive[which % len(alive)] = tuple(changed)
            continue
        tokens = torch.tensor([token, 63 - token])
        logits, mine = step(weights, tokens, mine, cfg)
        expected, pure = pg.decode(weights, tokens, pure, cfg)
        close(logits, expected)
        if then == "forget":
            del alive[which % len(alive)]
        alive.append((mine, pure))
    for mine, pure in alive:
        assert torch.equal(mine.length, pure.length)
        seen = torch.arange(pure.slots) < pure.length[:, None]
        for one, other in zip((*mine.k, *mine.v), (*pure.k, *pure.v), strict=True):
            close(one[:, : pure.slots][seen], other[seen])


def test_a_handle_with_another_length_is_a_handle_of_its_own(step, cfg, weights):
    _, one = step(weights, torch.tensor([5, 6]), filled(weights, cfg, [3, 2]), cfg)
    _, two = step(weights, torch.tensor([7, 8]), one, cfg)
    back = two._replace(length=one.length.clone())  # goes back by hand
    kept = two._replace(length=two.length.clone())
    del one, two
    step(weights, torch.tensor([9, 9]), back, cfg)
    found, _ = step(weights, torch.tensor([1, 2]), kept, cfg)
    pure = filled(weights, cfg, [3, 2])
    for tokens in ([5, 6], [7, 8]):
        _, pure = pg.decode(weights, torch.tensor(tokens), pure, cfg)
    close(found, pg.decode(weights, torch.tensor([1, 2]), pure, cfg)[0])


def test_loops_over_prompt_after_prompt_replay_one_graph(cfg, weights, monkeypatch):
    counted, step = played(monkeypatch), pg.jit(pg.decode, donate="cache")
    for seed in range(3):
        cache = pure = filled(weights, cfg, [3, 2], seed=seed)
        for token in range(6):
            tokens = torch.tensor([token, 1])
            logits, cache = step(weights, tokens, cache, cfg)
            expected, pure = pg.decode(weights, tokens, pure, cfg)
            close(logits, expected)
    assert counted == {"captured": 1, "replayed": 17}  # the first step of all is none


def test_a_step_may_be_used_from_threads(cfg, weights, monkeypatch):
    played(monkeypatch)  # so that buffers are used again
    step, tokens = pg.jit(pg.decode, donate="cache"), [torch.tensor([i, 9 - i]) for i in range(4)]

    def loop(seed: int) -> list[torch.Tensor]:
        cache, said = filled(weights, cfg, [3, 2], seed=seed), []
        for token in tokens:
            logits, cache = step(weights, token, cache, cfg)
            said.append(logits)
        return said

    alone = [loop(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(loop, [*range(6)] * 3))
    for one, other in zip(alone * 3, together, strict=True):
        close(one, other)


def test_a_step_may_be_used_in_inference_mode_and_outside(cfg, weights, monkeypatch):
    played(monkeypatch)
    step, start = pg.jit(pg.decode, donate="cache"), filled(weights, cfg, [3, 2])
    found = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            cache = start
            for token in range(3):
                logits, cache = step(weights, torch.tensor([token, 1]), cache, cfg)
            found.append(logits.clone())
            del cache
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_several_tokens_are_appended_at_once(cfg, weights):
    start, tokens = filled(weights, cfg, [4, 2]), torch.tensor([[1, 2, 3], [4, 5, 6]])
    logits, cache = pg.jit(pg.extend, donate="cache")(weights, tokens, start, cfg)
    expected, pure = pg.extend(weights, tokens, start, cfg)
    close(logits, expected)
    assert torch.equal(cache.length, pure.length)


def test_results_of_any_structure_come_back_with_the_continuation_in_its_place(cfg, weights):
    def chosen(cache, token, scale):
        logits, cache = pg.decode(weights, token, cache, cfg)
        return {"cache": cache, "best": [logits.argmax(-1)], "scaled": (logits * scale,), "nothing": ()}

    start, token = filled(weights, cfg, [2]), torch.tensor([3])
    found, expected = (fn(start, token, scale=2.0) for fn in (pg.jit(chosen, donate="cache"), chosen))
    assert list(found) == list(expected)
    close(found["scaled"][0], expected["scaled"][0])
    assert torch.equal(found["best"][0], expected["best"][0])
    assert found["nothing"] == ()
    assert torch.equal(found["cache"].length, expected["cache"].length)


def test_other_results_do_not_change_when_the_loop_goes_on(cfg, weights):
    def seen(token, cache):
        logits, cache = pg.decode(weights, token, cache, cfg)
        return logits, cache.k[0], cache.v[1][:, :3], cache

    step = pg.jit(seen, donate="cache")
    logits, keys, values, cache = step(torch.tensor([1]), filled(weights, cfg, [3]))
    before = [x.clone() for x in (logits, keys, values)]
    step(torch.tensor([2]), cache)
    assert all(torch.equal(one, other) for one, other in zip((logits, keys, values), before, strict=True))


def test_what_made_a_handle_is_not_taken_for_what_continues_it(cfg, weights, monkeypatch):
    """Weights are looked at again where another tree of them comes, or another function, in the middle of a loop."""
    played(monkeypatch)
    others = params(cfg, 7)
    # in the second the first two arguments have changed places, so that what it learned of them has other numbers
    plain, turned = pg.jit(pg.decode, donate="cache"), pg.jit(
        lambda token, params, cache, cfg: pg.decode(params, token, cache, cfg), donate="cache"
    )  # fmt: skip
    for _ in range(2):
        cache = pure = filled(weights, cfg, [3])
        for place, tree in enumerate([weights, weights, weights, others, others, weights, others, weights]):
            token = torch.tensor([place])
            given = (token, tree) if place % 3 == 2 else (tree, token)
            logits, cache = (turned if place % 3 == 2 else plain)(*given, cache, cfg)
            expected, pure = pg.decode(tree, token, pure, cfg)
            close(logits, expected)
    for one in (plain, turned):
        (((_, run),),) = one._compiled.values()
        assert len(run.moving) == 2, "the token and the length are copied, and no weight"


def test_weights_are_free_again_with_the_last_handle_that_they_made(cfg, monkeypatch):
    played(monkeypatch)
    step, mine = pg.jit(pg.decode, donate="cache"), params(cfg, 3)._replace(projector=torch.zeros(3))
    cache = filled(params(cfg, 3), cfg, [3])
    for token in range(4):
        _, cache = step(mine, torch.tensor([token]), cache, cfg)
    seen = ref(mine.projector)
    del mine
    assert seen() is not None
    del cache
    assert seen() is None, "without the garbage collector"


def test_a_cache_of_two_handles_is_copied(step, cfg, weights):
    start = filled(weights, cfg, [3])
    one, two = (step(weights, torch.tensor([token]), start, cfg)[1] for token in (1, 2))
    kept = [x.clone() for x in two.v]
    step(weights, torch.tensor([3]), one._replace(v=two.v), cfg)
    assert all(torch.equal(x, y) for x, y in zip(two.v, kept, strict=True))


def test_numbers_are_told_apart_by_their_type():
    scaled = pg.jit(lambda x, by: x * by)
    assert [scaled(torch.tensor([3]), by).dtype for by in (2, 2.0)] == [torch.int64, torch.float32]


def test_without_donation_a_function_is_compiled_and_its_arguments_stay_what_they_are(cfg, weights):
    start, token = filled(weights, cfg, [2]), torch.tensor([3])
    before = [x.clone() for x in start.k]
    logits, cache = pg.jit(pg.decode)(weights, token, start, cfg)
    expected, pure = pg.decode(weights, token, start, cfg)
    close(logits, expected)
    close(cache.k[0], pure.k[0])
    assert all(torch.equal(one, other) for one, other in zip(start.k, before, strict=True))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_loop_writes_into_one_set_of_buffers_and_only_a_fork_copies(step, cfg, weights):
    token, cache = torch.tensor([1]), filled(weights, cfg, [3])
    foreign = addresses(cache)
    _, cache = step(weights, token, cache, cfg)
    first = addresses(cache)
    assert not set(first) & set(foreign), "what was not made here is copied"
    for _ in range(3):
        _, cache = step(weights, token, cache, cfg)
        assert addresses(cache) == first
    _, newer = step(weights, token, cache, cfg)
    _, fork = step(weights, token, cache, cfg)
    assert addresses(newer) == first
    assert not set(addresses(fork)) & set(first)
    del newer
    gc.collect()
    _, again = step(weights, token, cache, cfg)  # the newer handle is gone: nobody sees what it wrote
    assert addresses(again) == first


def test_going_back_copies_nothing_if_the_longer_handle_is_forgotten(step, cfg, weights):
    token = torch.tensor([1])
    _, cache = step(weights, token, filled(weights, cfg, [3]), cfg)
    at, length = addresses(cache), cache.length
    for _ in range(3):
        _, cache = step(weights, token, cache, cfg)
    longer, cache = cache, pg.rewind(cache, length)
    _, fork = step(weights, token, cache, cfg)
    assert not set(addresses(fork)) & set(at), "the longer one is alive"
    del longer
    _, cache = step(weights, token, cache, cfg)
    assert addresses(cache) == at


# --- compilations -----------------------------------------------------------------------------------------------------


def test_lengths_and_positions_share_the_code_and_batches_settings_and_buckets_do_not(cfg, weights):
    mine, compiled = pg.jit(pg.decode, donate="cache"), torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    for lengths, size in (([3, 2], 4), ([1, 4], 20), ([4, 4], 33), ([2, 2], 40)):
        cache = filled(weights, cfg, lengths, size)
        for _ in range(3):
            _, cache = mine(weights, torch.tensor([1, 2]), cache, cfg)
    assert mine.compilations == compiled["unique_graphs"] - before == 1
    mine(weights, torch.tensor([1]), filled(weights, cfg, [3]), cfg)
    assert mine.compilations == compiled["unique_graphs"] - before == 2
    other = pg.tree.map(torch.clone, weights)  # other weights of the same shapes
    mine(other, torch.tensor([1]), filled(other, cfg, [3]), cfg)
    mine(weights, torch.arange(6)[::2][:1], filled(weights, cfg, [3]), cfg)  # a slice is as good as a dense tensor
    assert mine.compilations == compiled["unique_graphs"] - before == 2
    warmer = replace(cfg, text=replace(cfg.text, theta=500.0))
    mine(weights, torch.tensor([1]), filled(weights, cfg, [3]), warmer)
    mine(weights, torch.tensor([1]), filled(weights, cfg, [3], size=60), cfg)
    assert mine.compilations == compiled["unique_graphs"] - before == 4


def test_a_prompt_is_compiled_a_block_at_a_time_however_many_layers_there_are(cfg, weights):
    deep = replace(cfg, text=replace(cfg.text, layers=12))
    many = weights._replace(language=weights.language._replace(layers=weights.language.layers * 4))
    given, counted = prompt(cfg, [3, 2], [0, 1]), torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    start = pg.jit(pg.prefill)
    for seen in (given, prompt(cfg, [2, 3], [1, 0], seed=5)):
        close(start(many, seen, deep, 4), pg.prefill(many, seen, deep, 4))
    assert start.compilations == 1
    # a layer of vision, one of the language model and its last, what stands between the towers, and the logits
    assert counted["unique_graphs"] - before == 5


def test_a_tap_has_code_of_its_own_in_each_of_many_layers(cfg, weights):
    def edit(name, x):
        return 2 * x if name == "language.8.mlp_out" else x

    deep = replace(cfg, text=replace(cfg.text, layers=9))
    many = weights._replace(language=weights.language._replace(layers=weights.language.layers * 3))
    given = prompt(cfg, [3], [0])
    close(pg.jit(pg.prefill)(many, given, deep, 4, tap=edit), pg.prefill(many, given, deep, 4, tap=edit))


def test_prompts_that_are_padded_begin_as_they_are_and_share_the_code(cfg, weights):
    start = pg.jit(begin)
    for tokens, size in ((1, 4), (9, 30), (16, 12)):
        given, u = bench.random_prompt(cfg, 1, tokens, torch.device("cpu"), seed=tokens), torch.zeros(1)
        padded, room = bucketed(given, size, cfg)
        token, likely, cache = start(weights, padded, cfg, room, Settings(), u)
        expected = begin(weights, given, cfg, size, Settings(), u)
        assert torch.equal(token, expected[0])
        close(likely, expected[1])
        assert torch.equal(cache.length, expected[2].length)
        assert cache.slots == bucket(cache.slots) >= expected[2].slots
        close(pg.decode(weights, token, cache, cfg)[0], pg.decode(weights, token, expected[2], cfg)[0])
    assert start.compilations == 1


def test_code_for_one_tensor_twice_is_not_code_for_two():
    add = pg.jit(lambda x, y: 2 * x + y)
    one, other = torch.tensor([1.0]), torch.tensor([5.0])
    assert [add(one, one).item(), add(one, other).item(), add(other, other).item()] == [3.0, 7.0, 15.0]
    assert add.compilations == 2


def test_code_is_for_the_settings_of_pytorch_that_it_met():
    product = pg.jit(lambda x: x @ x)
    x = torch.eye(4)
    assert product(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x).dtype == torch.bfloat16
    assert product(x).dtype == torch.float32
    assert product.compilations == 2


@pytest.mark.parametrize(
    "transform", [torch.func.vmap, torch.func.grad, lambda fn: lambda x: torch.func.jvp(fn, (x,), (x,))]
)
def test_compiled_code_says_that_it_cannot_be_transformed(transform):
    with pytest.raises(
        SettingError, match=r"cannot be transformed by vmap, grad or jvp; transform what goes into pg\.jit"
    ):
        transform(pg.jit(lambda x: (x * x).sum()))(torch.ones(3))


@given(st.integers(0, 10**6))
def test_a_bucket_holds_what_was_asked_for_and_wastes_a_third_at_most(slots):
    size = bucket(slots)
    assert size >= slots
    assert size == 64 or slots > size * 2 // 3
    assert bucket(size) == size


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_wrap_is_not_the_callers(cfg, weights):
    with pytest.raises(SettingError, match=r"wrap is given by pg\.jit, to compile a block at a time; leave it out"):
        pg.jit(pg.prefill)(weights, prompt(cfg, [3], [0]), cfg, 4, wrap=lambda part: part)


def test_mistakes_are_named(cfg, weights):
    token, cache = torch.tensor([1]), filled(weights, cfg, [3])
    with pytest.raises(SettingError, match="donate is 'kv', expected one of params, token, cache, cfg, tap"):
        pg.jit(pg.decode, donate="kv")
    with pytest.raises(SettingError, match="token is a Tensor, expected a Cache"):
        pg.jit(pg.decode, donate="token")(weights, token, cache, cfg)
    with pytest.raises(SettingError, match="without a name of their own"):
        pg.jit(lambda *tokens: tokens)
    with pytest.raises(SettingError, match="neither a tensor nor a value that can be hashed: ndarray"):
        pg.jit(lambda x: x)(token.numpy())
    for wrong, said in {
        (lambda cache: cache.length): "returns 0 caches, expected one",
        (lambda cache: (cache, cache._replace(length=cache.length + 1))): "returns 2 caches, expected one",
        (lambda cache: cache._replace(k=tuple(x + 1 for x in cache.k))): r"before its length.*pg\.reorder",
        (lambda cache: cache._replace(length=cache.length - 1)): "makes a donated cache shorter",
    }.items():
        with pytest.raises(SettingError, match=said):
            pg.jit(wrong, donate="cache")(cache)
