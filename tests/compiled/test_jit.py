"""A compiled function returns what the pure function returns, for any handle of a cache, and is compiled rarely."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from weakref import ref

import pytest
import torch
from cases import CONFIGS, params, prompt
from graphs import simulate_graphs
from hypothesis import given, settings
from hypothesis import strategies as st

import pgfunc as pg
from pgfunc import bench
from pgfunc.errors import SettingError
from pgfunc.generate import pad_to_bucket, prefill_step
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


# --- results ----------------------------------------------------------------------------------------------------------

# what to do with one of the living handles: continue it by a token and keep or forget it, rewind it, drop it, or edit
# its tensors
moves = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 63), st.sampled_from(["keep", "forget", "rewind", "drop", "edit"])),
    min_size=1, max_size=14,
)  # fmt: skip


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
@settings(deadline=None, max_examples=60)
@given(moves=moves)
def test_every_handle_continues_from_its_own_content_whatever_was_appended_since(step, name, moves):
    follow(step, CONFIGS[name], moves)


@settings(deadline=None, max_examples=60)
@given(moves=moves)
def test_every_handle_continues_from_its_own_content_also_with_graphs(graphed_step, cfg, moves):
    with pytest.MonkeyPatch.context() as patch:
        simulate_graphs(patch)
        follow(graphed_step, cfg, moves)


def follow(step: Jitted, cfg: pg.Config, moves: list[tuple[int, int, str]]) -> None:
    """Make these moves with the step and with the pure function, and compare all living handles at the end."""
    weights = params(cfg)
    start = filled(weights, cfg, [3, 2])
    alive = [(start, start)]  # pairs of a handle and the pure cache that it must equal
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
        visible = torch.arange(pure.slots) < pure.length[:, None]
        for one, other in zip((*mine.k, *mine.v), (*pure.k, *pure.v), strict=True):
            largest = other[visible].abs().amax().clamp(min=1)  # each edit doubles the keys, and their rounding errors
            close(one[:, : pure.slots][visible] / largest, other[visible] / largest)


def test_a_handle_whose_length_was_replaced_is_a_separate_handle(step, cfg, weights):
    _, one = step(weights, torch.tensor([5, 6]), filled(weights, cfg, [3, 2]), cfg)
    _, two = step(weights, torch.tensor([7, 8]), one, cfg)
    rewound = two._replace(length=one.length.clone())  # by hand
    longer = two._replace(length=two.length.clone())
    del one, two
    step(weights, torch.tensor([9, 9]), rewound, cfg)
    logits, _ = step(weights, torch.tensor([1, 2]), longer, cfg)
    pure = filled(weights, cfg, [3, 2])
    for tokens in ([5, 6], [7, 8]):
        _, pure = pg.decode(weights, torch.tensor(tokens), pure, cfg)
    close(logits, pg.decode(weights, torch.tensor([1, 2]), pure, cfg)[0])


def test_loops_over_several_prompts_replay_one_graph(cfg, weights, monkeypatch):
    counts, step = simulate_graphs(monkeypatch), pg.jit(pg.decode, donate="cache")
    for seed in range(3):
        cache = pure = filled(weights, cfg, [3, 2], seed=seed)
        for token in range(6):
            tokens = torch.tensor([token, 1])
            logits, cache = step(weights, tokens, cache, cfg)
            expected, pure = pg.decode(weights, tokens, pure, cfg)
            close(logits, expected)
    assert counts == {"captured": 1, "replayed": 17}  # the very first step runs without a graph


def test_a_step_may_be_used_from_threads(cfg, weights, monkeypatch):
    simulate_graphs(monkeypatch)  # with graphs, buffers are used again
    step, tokens = pg.jit(pg.decode, donate="cache"), [torch.tensor([i, 9 - i]) for i in range(4)]

    def loop(seed: int) -> list[torch.Tensor]:
        cache, results = filled(weights, cfg, [3, 2], seed=seed), []
        for token in tokens:
            logits, cache = step(weights, token, cache, cfg)
            results.append(logits)
        return results

    alone = [loop(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(loop, [*range(6)] * 3))
    for one, other in zip(alone * 3, together, strict=True):
        close(one, other)


def test_a_step_may_be_used_in_inference_mode_and_outside(cfg, weights, monkeypatch):
    simulate_graphs(monkeypatch)
    step, start = pg.jit(pg.decode, donate="cache"), filled(weights, cfg, [3, 2])
    results = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            cache = start
            for token in range(3):
                logits, cache = step(weights, torch.tensor([token, 1]), cache, cfg)
            results.append(logits.clone())
            del cache
    assert all(torch.equal(logits, results[0]) for logits in results)


def test_several_tokens_can_be_appended_at_once(cfg, weights):
    start, tokens = filled(weights, cfg, [4, 2]), torch.tensor([[1, 2, 3], [4, 5, 6]])
    logits, cache = pg.jit(pg.extend, donate="cache")(weights, tokens, start, cfg)
    expected, pure = pg.extend(weights, tokens, start, cfg)
    close(logits, expected)
    assert torch.equal(cache.length, pure.length)


def test_results_keep_their_structure_with_the_continuation_inside(cfg, weights):
    def chosen(cache, token, scale):
        logits, cache = pg.decode(weights, token, cache, cfg)
        return {"cache": cache, "best": [logits.argmax(-1)], "scaled": (logits * scale,), "nothing": ()}

    start, token = filled(weights, cfg, [2]), torch.tensor([3])
    results, expected = (fn(start, token, scale=2.0) for fn in (pg.jit(chosen, donate="cache"), chosen))
    assert list(results) == list(expected)
    close(results["scaled"][0], expected["scaled"][0])
    assert torch.equal(results["best"][0], expected["best"][0])
    assert results["nothing"] == ()
    assert torch.equal(results["cache"].length, expected["cache"].length)


def test_results_that_are_views_of_the_buffers_do_not_change_when_the_loop_continues(cfg, weights):
    def with_buffers(token, cache):
        logits, cache = pg.decode(weights, token, cache, cfg)
        return logits, cache.k[0], cache.v[1][:, :3], cache

    step = pg.jit(with_buffers, donate="cache")
    logits, keys, values, cache = step(torch.tensor([1]), filled(weights, cfg, [3]))
    before = [x.clone() for x in (logits, keys, values)]
    step(torch.tensor([2]), cache)
    assert all(torch.equal(one, other) for one, other in zip((logits, keys, values), before, strict=True))


def test_a_step_with_other_arguments_than_those_that_made_the_handle_uses_the_new_ones(cfg, weights, monkeypatch):
    """Weights are read again if another tree of them, or another function, is used in the middle of a loop."""
    simulate_graphs(monkeypatch)
    others = params(cfg, 7)
    # the second function swaps the first two arguments, so its specs have other indices
    plain, swapped = pg.jit(pg.decode, donate="cache"), pg.jit(
        lambda token, params, cache, cfg: pg.decode(params, token, cache, cfg), donate="cache"
    )  # fmt: skip
    for _ in range(2):
        cache = pure = filled(weights, cfg, [3])
        for i, tree in enumerate([weights, weights, weights, others, others, weights, others, weights]):
            token = torch.tensor([i])
            arguments = (token, tree) if i % 3 == 2 else (tree, token)
            logits, cache = (swapped if i % 3 == 2 else plain)(*arguments, cache, cfg)
            expected, pure = pg.decode(tree, token, pure, cfg)
            close(logits, expected)
    for step in (plain, swapped):
        (((_, run),),) = step._compiled.values()
        assert len(run.copied_indices) == 2, "the token and the length are copied, and no weight"


def test_weights_are_freed_with_the_last_handle_that_they_made(cfg, monkeypatch):
    simulate_graphs(monkeypatch)
    step, mine = pg.jit(pg.decode, donate="cache"), params(cfg, 3)._replace(projector=torch.zeros(3))
    cache = filled(params(cfg, 3), cfg, [3])
    for token in range(4):
        _, cache = step(mine, torch.tensor([token]), cache, cfg)
    projector = ref(mine.projector)
    del mine
    assert projector() is not None
    del cache
    assert projector() is None, "without the garbage collector"


def test_a_cache_that_mixes_two_handles_is_copied(step, cfg, weights):
    start = filled(weights, cfg, [3])
    one, two = (step(weights, torch.tensor([token]), start, cfg)[1] for token in (1, 2))
    before = [x.clone() for x in two.v]
    step(weights, torch.tensor([3]), one._replace(v=two.v), cfg)
    assert all(torch.equal(x, y) for x, y in zip(two.v, before, strict=True))


def test_equal_numbers_of_different_types_have_separate_code():
    scaled = pg.jit(lambda x, by: x * by)
    assert [scaled(torch.tensor([3]), by).dtype for by in (2, 2.0)] == [torch.int64, torch.float32]


def test_a_function_compiled_without_donation_does_not_change_its_arguments(cfg, weights):
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
    eager = addresses(cache)
    _, cache = step(weights, token, cache, cfg)
    first = addresses(cache)
    assert not set(first) & set(eager), "a cache that compiled code did not make is copied"
    for _ in range(3):
        _, cache = step(weights, token, cache, cfg)
        assert addresses(cache) == first
    _, newer = step(weights, token, cache, cfg)
    _, fork = step(weights, token, cache, cfg)
    assert addresses(newer) == first
    assert not set(addresses(fork)) & set(first)
    del newer
    gc.collect()
    _, again = step(weights, token, cache, cfg)  # the newer handle is dead, so nobody sees what it wrote
    assert addresses(again) == first


def test_a_rewound_handle_is_continued_in_place_if_the_longer_one_is_dead(step, cfg, weights):
    token = torch.tensor([1])
    _, cache = step(weights, token, filled(weights, cfg, [3]), cfg)
    first, length = addresses(cache), cache.length
    for _ in range(3):
        _, cache = step(weights, token, cache, cfg)
    longer, cache = cache, pg.rewind(cache, length)
    _, fork = step(weights, token, cache, cfg)
    assert not set(addresses(fork)) & set(first), "the longer handle is alive"
    del longer
    _, cache = step(weights, token, cache, cfg)
    assert addresses(cache) == first


# --- compilations -----------------------------------------------------------------------------------------------------


def test_code_is_shared_by_lengths_and_positions_but_not_by_batch_sizes_configs_and_buckets(cfg, weights):
    step, counts = pg.jit(pg.decode, donate="cache"), torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    for lengths, size in (([3, 2], 4), ([1, 4], 20), ([4, 4], 33), ([2, 2], 40)):
        cache = filled(weights, cfg, lengths, size)
        for _ in range(3):
            _, cache = step(weights, torch.tensor([1, 2]), cache, cfg)
    assert step.compilations == counts["unique_graphs"] - before == 1
    step(weights, torch.tensor([1]), filled(weights, cfg, [3]), cfg)
    assert step.compilations == counts["unique_graphs"] - before == 2
    other = pg.tree.map(torch.clone, weights)  # other weights of the same shapes
    step(other, torch.tensor([1]), filled(other, cfg, [3]), cfg)
    step(weights, torch.arange(6)[::2][:1], filled(weights, cfg, [3]), cfg)  # a slice shares the code of a dense tensor
    assert step.compilations == counts["unique_graphs"] - before == 2
    other_theta = replace(cfg, text=replace(cfg.text, theta=500.0))
    step(weights, torch.tensor([1]), filled(weights, cfg, [3]), other_theta)
    step(weights, torch.tensor([1]), filled(weights, cfg, [3], size=60), cfg)
    assert step.compilations == counts["unique_graphs"] - before == 4


def test_a_prefill_is_compiled_a_block_at_a_time_whatever_the_number_of_layers(cfg, weights):
    deep = replace(cfg, text=replace(cfg.text, layers=12))
    many = weights._replace(language=weights.language._replace(layers=weights.language.layers * 4))
    prompts, counts = [prompt(cfg, [3, 2], [0, 1]), prompt(cfg, [2, 3], [1, 0], seed=5)], torch._dynamo.utils.counters
    before = counts["stats"]["unique_graphs"]
    prefill = pg.jit(pg.prefill)
    for each in prompts:
        close(prefill(many, each, deep, 4), pg.prefill(many, each, deep, 4))
    assert prefill.compilations == 1
    # a vision layer, a language layer and the last one, the part between the towers, and the logits
    assert counts["stats"]["unique_graphs"] - before == 5


def test_with_a_tap_each_layer_can_have_its_own_code(cfg, weights):
    def edit(name, x):
        return 2 * x if name == "language.8.mlp_out" else x

    deep = replace(cfg, text=replace(cfg.text, layers=9))
    many = weights._replace(language=weights.language._replace(layers=weights.language.layers * 3))
    rows = prompt(cfg, [3], [0])
    close(pg.jit(pg.prefill)(many, rows, deep, 4, tap=edit), pg.prefill(many, rows, deep, 4, tap=edit))


def test_padded_prompts_give_the_same_first_token_and_cache_and_share_the_code(cfg, weights):
    step = pg.jit(prefill_step)
    for tokens, size in ((1, 4), (9, 30), (16, 12)):
        rows, u = bench.random_prompt(cfg, 1, tokens, torch.device("cpu"), seed=tokens), torch.zeros(1)
        padded, padded_size = pad_to_bucket(rows, size, cfg)
        token, logprob, cache = step(weights, padded, cfg, padded_size, Settings(), u)
        expected = prefill_step(weights, rows, cfg, size, Settings(), u)
        assert torch.equal(token, expected[0])
        close(logprob, expected[1])
        assert torch.equal(cache.length, expected[2].length)
        assert cache.slots == bucket(cache.slots) >= expected[2].slots
        close(pg.decode(weights, token, cache, cfg)[0], pg.decode(weights, token, expected[2], cfg)[0])
    assert step.compilations == 1


def test_code_for_the_same_tensor_twice_is_not_used_for_two_tensors():
    add = pg.jit(lambda x, y: 2 * x + y)
    one, other = torch.tensor([1.0]), torch.tensor([5.0])
    assert [add(one, one).item(), add(one, other).item(), add(other, other).item()] == [3.0, 7.0, 15.0]
    assert add.compilations == 2


def test_code_is_compiled_again_for_other_settings_of_pytorch():
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
def test_transforming_a_compiled_function_raises_an_error(transform):
    with pytest.raises(
        SettingError, match=r"cannot be transformed by vmap, grad or jvp; transform what goes into pg\.jit"
    ):
        transform(pg.jit(lambda x: (x * x).sum()))(torch.ones(3))


@given(st.integers(0, 10**6))
def test_a_bucket_has_the_requested_slots_and_wastes_at_most_a_third(slots):
    size = bucket(slots)
    assert size >= slots
    assert size == 64 or slots > size * 2 // 3
    assert bucket(size) == size


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_caller_cannot_pass_wrap(cfg, weights):
    with pytest.raises(SettingError, match=r"wrap is given by pg\.jit, to compile a block at a time; leave it out"):
        pg.jit(pg.prefill)(weights, prompt(cfg, [3], [0]), cfg, 4, wrap=lambda part: part)


def test_mistakes_have_clear_messages(cfg, weights):
    token, cache = torch.tensor([1]), filled(weights, cfg, [3])
    with pytest.raises(SettingError, match="donate is 'kv', expected one of params, token, cache, cfg, tap"):
        pg.jit(pg.decode, donate="kv")
    with pytest.raises(SettingError, match="token is a Tensor, expected a Cache"):
        pg.jit(pg.decode, donate="token")(weights, token, cache, cfg)
    with pytest.raises(SettingError, match="without a name of their own"):
        pg.jit(lambda *tokens: tokens)
    with pytest.raises(SettingError, match="neither a tensor nor a value that can be hashed: ndarray"):
        pg.jit(lambda x: x)(token.numpy())
    for wrong, message in {
        (lambda cache: cache.length): "returns 0 caches, expected one",
        (lambda cache: (cache, cache._replace(length=cache.length + 1))): "returns 2 caches, expected one",
        (lambda cache: cache._replace(k=tuple(x + 1 for x in cache.k))): r"before its length.*pg\.reorder",
        (lambda cache: cache._replace(length=cache.length - 1)): "makes a donated cache shorter",
    }.items():
        with pytest.raises(SettingError, match=message):
            pg.jit(wrong, donate="cache")(cache)
