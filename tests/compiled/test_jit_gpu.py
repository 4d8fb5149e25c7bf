"""With CUDA graphs a step returns what the pure function returns: loops, forks, rewinds, other prompts and weights."""

import warnings

import pytest
import torch
from cases import CONFIGS, params, prompt

import pgfunc as pg
from pgfunc import bench, lab, laws
from pgfunc.jit import cuda_graphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LIMIT = {"atol": 1e-4, "rtol": 1e-4}  # float32, no tf32, sums in another order


def on_gpu(tree):
    return pg.tree.map(lambda leaf: leaf.cuda(), tree)


@pytest.mark.parametrize("name", CONFIGS)
def test_loops_forks_rewinds_and_other_weights_give_the_same_as_the_pure_function(name):
    cfg = CONFIGS[name]
    step = pg.jit(pg.decode, donate="cache")
    for seed in (0, 0, 1):  # the third loop has other weights
        weights, rows = on_gpu(params(cfg, seed)), on_gpu(prompt(cfg, [3, 2], [0, 0], seed=seed))
        with torch.no_grad():
            _, cache = pg.prefill(weights, rows, cfg, 20)
        pure, saved = cache, []
        for token in range(8):
            tokens = torch.tensor([token, 63 - token], device="cuda")
            logits, cache = step(weights, tokens, cache, cfg)
            expected, pure = pg.decode(weights, tokens, pure, cfg)
            torch.testing.assert_close(logits, expected, **LIMIT)
            if token == 3:
                saved = [(cache, pure), (pg.rewind(cache, cache.length - 2), pg.rewind(pure, pure.length - 2))]
        for mine, other in saved:
            tokens = torch.tensor([7, 9], device="cuda")
            logits, _ = step(weights, tokens, mine, cfg)
            torch.testing.assert_close(logits, pg.decode(weights, tokens, other, cfg)[0], **LIMIT)
        del cache, saved, mine
    assert step.compilations == 1
    (((_, run),),) = step._compiled.values()
    assert isinstance(run, cuda_graphs.GraphedFunction)
    assert len(run.graphs) > 1  # one for each tree of weights


@pytest.mark.parametrize("count", [1, 2])  # one row is decoded by our own kernels
@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_a_full_row_and_an_unknown_token_give_nan_and_change_no_other_row_or_handle(name, count):
    cfg, step = CONFIGS[name], pg.jit(pg.decode, donate="cache")
    weights, rows = on_gpu(params(cfg)), on_gpu(prompt(cfg, [56, 50][:count], [0] * count))
    with torch.no_grad():
        _, cache = pg.prefill(weights, rows, cfg, 4)
    token, handles = torch.tensor([1, 2][:count], device="cuda"), []
    for _ in range(cache.slots - 60 + 6):
        logits, cache = step(weights, token, cache, cfg)
        handles.append((cache, [x.clone() for x in (*cache.k, *cache.v)]))
    assert cache.slots == 64
    assert cache.overflowed.tolist() == [True, False][:count]
    assert logits[0].isnan().all()
    assert logits[1:].isfinite().all()
    for handle, copies in handles[:4]:  # those that are not full
        visible = torch.arange(64, device="cuda") < handle.length[:, None]
        for one, other in zip((*handle.k, *handle.v), copies, strict=True):
            assert torch.equal(one[visible], other[visible])
    eager, _ = pg.decode(weights, token, handles[-1][0], cfg)
    assert eager[0].isnan().all()
    logits, _ = step(weights, token + 10**6, handles[0][0], cfg)
    assert logits.isnan().all()
    logits, _ = step(weights, token, handles[0][0], cfg)
    torch.testing.assert_close(logits, pg.decode(weights, token, handles[0][0], cfg)[0], **LIMIT)


@pytest.mark.parametrize("count", [1, 2])
def test_tensors_that_are_closed_over_are_read_at_their_current_addresses(count):
    cfg = CONFIGS["gemma"]
    rows = on_gpu(prompt(cfg, [3, 2][:count], [0] * count))
    weights, vector = on_gpu(params(cfg)), torch.zeros(cfg.text.width, device="cuda")

    def tap(name, x):
        return x + vector if name == "language.1.resid_post" else x

    def prefill(params, prompt, cfg, wrap=lambda block: block):
        return pg.prefill(params, prompt, cfg, 20, tap=tap, wrap=wrap)

    def decode(token, cache):
        return pg.decode(weights, token, cache, cfg)

    start, step = pg.jit(prefill), pg.jit(decode, donate="cache")
    for seed in range(3):
        for _ in range(3):
            (logits, cache), (expected, pure) = start(weights, rows, cfg), prefill(weights, rows, cfg)
            torch.testing.assert_close(logits, expected, **LIMIT)
            for i in range(4):
                token = torch.tensor([i, 9][:count], device="cuda")
                (logits, cache), (expected, pure) = step(token, cache), decode(token, pure)
                torch.testing.assert_close(logits, expected, **LIMIT)
        weights, vector = on_gpu(params(cfg, seed + 1)), torch.randn(cfg.text.width, device="cuda")
    assert step.compilations == start.compilations == 1


@pytest.mark.parametrize("count", [1, 2])  # one row is decoded by our own kernels
def test_a_step_that_rewinds_by_an_argument_changes_no_older_handle(count):
    cfg = CONFIGS["gemma"]
    weights, rows = on_gpu(params(cfg)), on_gpu(prompt(cfg, [3] * count, [0] * count))

    def step(cache, number):
        return pg.decode(weights, 3 + number, pg.rewind(cache, cache.length - number), cfg)

    with torch.no_grad():
        _, cache = pg.prefill(weights, rows, cfg, 20)
    fast, pure, older = pg.jit(step, donate="cache"), cache, []
    for number in (0, 0, 2, 1, 0, 3):
        numbers = torch.full((count,), number, device="cuda")
        older.append((cache, pure))
        (logits, cache), (expected, pure) = fast(cache, numbers), step(pure, numbers)
        torch.testing.assert_close(logits, expected, **LIMIT)
        assert torch.equal(cache.length, pure.length)
    for mine, other in older:
        tokens = torch.full((count,), 7, device="cuda")
        torch.testing.assert_close(pg.decode(weights, tokens, mine, cfg)[0], pg.decode(weights, tokens, other, cfg)[0],
                                   **LIMIT)  # fmt: skip


def test_reordered_rows_reuse_the_buffers_that_graphs_read():
    cfg, step = CONFIGS["gemma"], pg.jit(pg.decode, donate="cache")
    weights, start = on_gpu(params(cfg)), on_gpu(prompt(cfg, [3], [0]))
    with torch.no_grad():
        _, cache = pg.prefill(weights, start, cfg, 30)
    cache = pure = pg.reorder(cache, torch.zeros(3, dtype=torch.int64))
    addresses = set()
    for i in range(12):
        tokens, rows = torch.tensor([i, i + 1, i + 2], device="cuda"), torch.tensor([2, 0, i % 3], device="cuda")
        logits, cache = step(weights, tokens, cache, cfg)
        expected, pure = pg.decode(weights, tokens, pure, cfg)
        torch.testing.assert_close(logits, expected, **LIMIT)
        cache, pure = pg.reorder(cache, rows), pg.tree.map(lambda x, rows=rows: x[rows], pure)
        addresses.add(cache.k[0].data_ptr())
    assert step.copies == 0
    assert len(addresses) <= 2, "two sets of buffers, alternately"
    (((_, run),),) = step._compiled.values()
    assert len(run.graphs) <= 2


def test_an_argument_on_the_cpu_warns_that_it_is_slow():
    step = pg.jit(lambda x, u: x + u)
    with pytest.warns(RuntimeWarning, match="runs slowly, without CUDA graphs; move to the GPU: u"):
        step(torch.ones(3, device="cuda"), torch.ones(()))


@pytest.mark.parametrize("rows", [[3], [3, 4, 2]])  # one row is decoded by our own kernels
@pytest.mark.parametrize("name", CONFIGS)
def test_a_loop_that_feeds_tokens_back_on_the_device_equals_the_eager_loop(name, rows):
    cfg = CONFIGS[name]
    weights, start = on_gpu(params(cfg)), on_gpu(prompt(cfg, rows, [0] * len(rows)))

    def advance(params, token, cache):
        logits, cache = pg.decode(params, token, cache, cfg)
        return pg.sample.greedy(logits), cache

    results = []
    for step in (advance, pg.jit(advance, donate="cache")):
        with torch.no_grad():
            logits, cache = pg.prefill(weights, start, cfg, 30)
            tokens = [pg.sample.greedy(logits)]
            for _ in range(29):
                token, cache = step(weights, tokens[-1], cache)
                tokens.append(token)
        results.append(torch.stack(tokens).tolist())
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])  # one row is decoded by our own kernels
@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_the_laws_of_the_cache_hold_for_compiled_steps(name, rows, dtype):
    cfg = CONFIGS[name]
    drawn = laws.ragged(rows=rows).filter(lambda drawn: len(drawn.prefix) == rows)
    system = laws.compiled(on_gpu(laws.parameters(cfg, dtype=dtype)), cfg)
    chosen = [law for law in laws.MODEL if "decode" in law.needs]
    results = laws.check(system, chosen, laws.Strategies(rows=drawn), 20, derandomize=True)
    assert [result for result in results if result.verdict != "holds"] == []
    assert len(results) == 4


@pytest.mark.parametrize("name", ["paligemma-3b-224", "paligemma2-3b-224"])
def test_at_full_size_the_laws_of_the_cache_hold_for_compiled_steps(name):
    cfg = pg.PUBLISHED[name]
    tree = bench.random_params(cfg, torch.bfloat16, torch.device("cuda"))
    chosen = [law for law in laws.MODEL if "decode" in law.needs]
    rows = laws.Strategies(rows=laws.ragged(rows=1))
    results = laws.check(laws.compiled(tree, cfg), chosen, rows, 5, derandomize=True)
    for result in results:
        print(f"{name} {result.law.name} {result.verdict} {result.examples} {result.worst:.1e} {result.why}")
    assert {result.verdict for result in results} == {"holds"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("built", [False, True])
def test_a_step_may_build_its_masks_or_close_over_them(device, built):
    """If it closes over a tensor on the CPU, the step is right too, but slow, and says so."""
    cfg, slow = CONFIGS["gemma2"], device == "cpu" and not built
    weights, rows = on_gpu(params(cfg)), on_gpu(prompt(cfg, [3, 2], [0, 0]))
    first, vector = lab.heads(0, n=cfg.text.heads, device=device), torch.randn(cfg.text.width, device=device)

    def ablated(params, token, cache, cfg):
        mask = lab.heads(0, n=cfg.text.heads, device=device) if built else first
        changes = {"language.0.z": lab.put(0.0, mask)}
        if not built:
            changes["language.1.resid_post"] = lab.add(vector)
        return lab.edit(pg.decode, changes)(params, token, cache, cfg)

    step = pg.jit(ablated, donate="cache")
    with torch.no_grad():
        _, cache = pg.prefill(weights, rows, cfg, 20)
    pure, warned = cache, []
    for token in range(6):
        tokens = torch.tensor([token, 63 - token], device="cuda")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits, cache = step(weights, tokens, cache, cfg)
        warned += [str(each.message) for each in caught if "without CUDA graphs" in str(each.message)]
        expected, pure = ablated(weights, tokens, pure, cfg)
        torch.testing.assert_close(logits, expected, **LIMIT)
    assert step.compilations == 1
    assert len(warned) == slow
    (((_, run),),) = step._compiled.values()
    assert bool(run.graphs) != slow
