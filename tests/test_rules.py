"""What compiled code computes in place of the formulas is what they compute, and is used only where it applies.

Code that is compiled for a GPU is simulated on the CPU: the rules are told that they are in compiled code on a GPU, and
the kernels are replaced by their formulas.
"""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from cases import CONFIGS, params, prompt
from hypothesis import given
from hypothesis import strategies as st
from watched import Watched

import pgfunc as pg
from pgfunc import gemma, masks, ops, packing, paligemma, siglip
from pgfunc.cache import by_layer
from pgfunc.kernels import operators, reference, rules
from pgfunc.lowering import RULES, lowered
from pgfunc.quant import lowbit

CPU = torch.device("cpu")
KERNELS = SimpleNamespace(**{
    **{name: getattr(reference, name) for name in ("matvec", "add_norm", "angles", "norm_geglu", "prefill_attention",
                                                   "rope_to_cache")},
    "norm_matvec": lambda x, scale, w, eps, just_written: reference.norm_matvec(x, scale, w, eps),
    "norm_qkv_rope": lambda *given: reference.norm_qkv_rope(*given[:-1]),
    "decode_attention": lambda *given: reference.decode_attention(*given[:-1]),
    "counters": lambda k: torch.zeros(1, dtype=torch.int32),
})  # fmt: skip


@contextmanager
def compiled_for(cuda: bool, compiling: bool = True) -> Iterator[None]:
    """The rules are told that they are in compiled code, and that tensors are on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "AMX", True)  # otherwise the product of one row on a CPU is a loop
        patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        patch.setattr(torch.Tensor, "is_cuda", cuda)
        yield


@contextmanager
def compiled_for_gpu() -> Iterator[Counter]:
    """`compiled_for` a GPU whose kernels are formulas; the operators that run are counted."""
    counts = Counter()

    def counted(name: str):
        operator = getattr(operators, name)
        return lambda *given: counts.update([name]) or operator(*given)

    with compiled_for(cuda=True), pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(operators, "calls", KERNELS)
        patch.setattr(rules, "TRITON", True)
        for name in ("block", "head", "prefill_attention", "rope_to_cache"):
            patch.setattr(operators, name, counted(name))
        patch.setitem(RULES, ops.angles, (rules.Rule(RULES[ops.angles][0].applies, counted("angles")),))
        yield counts


def test_each_rule_has_the_arguments_of_its_formula():
    for formula, several in RULES.items():
        for rule in several:
            for fn in (rule.applies, rule.run):
                if fn is not operators.angles:  # an operator has no signature
                    assert len(signature(fn).parameters) == len(signature(formula).parameters), formula.__name__


COMPILED = """
import torch
from pgfunc.lowering import RULES
from pgfunc.ops import angles, lowered

assert not RULES
torch.compile(lambda x: lowered(angles)(x, 4, 1e4), backend="eager", fullgraph=True)(torch.ones(1, 1))
print(len(RULES))
"""


def test_compiling_any_part_of_the_model_fills_the_table():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(RULES)


def test_eager_code_computes_the_formulas():
    assert all(lowered(formula) is formula for formula in RULES)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_of_one_row_is_an_operator_a_layer_and_equals_the_formulas(name):
    cfg, tree = CONFIGS[name], params(CONFIGS[name])
    logits, cache = pg.prefill(tree, prompt(cfg, [3], [2]), cfg, 3)
    fast = cache
    for step in range(3):
        token = pg.sample.greedy(logits)
        logits, cache = pg.decode(tree, token, cache, cfg)
        with compiled_for_gpu() as counts:
            found, fast = pg.decode(tree, token, fast, cfg)
        torch.testing.assert_close((found, fast), (logits, cache), rtol=1e-4, atol=1e-5)  # float32, another order
        assert counts == {"block": cfg.text.layers, "head": 1, "angles": 1}, step


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("case", ["two rows", "two tokens", "a tap", "a gradient", "vmap", "float64"])
def test_what_the_kernels_cannot_compute_is_computed_by_the_formulas(name, case):
    cfg, tree = CONFIGS[name], params(CONFIGS[name])
    tree = pg.tree.map(torch.Tensor.double, tree) if case == "float64" else tree
    rows = 2 if case == "two rows" else 1
    _, cache = pg.prefill(tree, prompt(cfg, [3] * rows, [2] * rows), cfg, 3)
    tokens = torch.tensor([[1, 2]] if case == "two tokens" else [[1]] * rows)
    tap = (lambda name, x: x) if case == "a tap" else ops.identity

    def run() -> torch.Tensor:
        if case == "vmap":
            return torch.vmap(lambda x: pg.extend(tree, x, cache, cfg)[0])(tokens[None])[0]
        return pg.extend(tree, tokens, cache, cfg, tap)[0]

    expected = run()
    with compiled_for_gpu() as counts, torch.set_grad_enabled(case == "a gradient"):
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    assert counts.keys() <= {"angles", "head"}
    assert counts["head"] == (1 if case == "nothing" else 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_operator_computes_its_token_at_most_once(name):
    cfg, tree = CONFIGS[name].text, params(CONFIGS[name]).language
    _, cache = pg.prefill(params(CONFIGS[name]), prompt(CONFIGS[name], [3], [2]), CONFIGS[name], 3)
    x, positions = torch.randn(1, 1, cfg.width), cache.length[:, None]

    def run(queries: torch.Tensor) -> torch.Tensor:
        seen = masks.cached(cache.length, 1, cache.slots, cfg.window)
        return gemma.run(tree, x, positions, seen, cfg, cache, queries=queries)[0]

    def runs_as_an_operator(queries: gemma.Queries) -> bool:
        appended, past = masks.Appended(cache.length, 1, 0), by_layer(cache, 1, cfg.layers)[0]
        return rules.block_applies(
            tree.layers[0],
            x,
            ops.rotation(ops.angles(positions, cfg.head_dim, cfg.theta)),
            appended,
            cfg,
            past,
            ops.identity,
            queries,
        )

    once, twice = torch.tensor([[0]]), torch.tensor([[0, 0]])
    assert run(once).shape == (1, 1, cfg.width)
    torch.testing.assert_close(run(twice), run(once).expand(1, 2, -1))
    with compiled_for_gpu():
        assert runs_as_an_operator(())
        assert runs_as_an_operator(once)
        assert not runs_as_an_operator(twice), "an operator would return one token"


@pytest.mark.parametrize("allowed", [None, range(3, 9), torch.tensor([5, 2])], ids=["all", "range", "ids"])
def test_the_head_by_the_kernels_knows_whether_its_rows_were_just_written(allowed, monkeypatch):
    cfg, tree, written = CONFIGS["gemma2"].text, params(CONFIGS["gemma2"]).language, []
    x = torch.randn(1, 1, cfg.width)
    expected = gemma.unembed(tree, x, cfg, allowed=allowed)
    head = operators.head
    with compiled_for_gpu():
        monkeypatch.setattr(operators, "head", lambda *given: written.append(given[-1]) or head(*given))
        torch.testing.assert_close(gemma.unembed(tree, x, cfg, allowed=allowed), expected)
    assert written == [isinstance(allowed, torch.Tensor)], "ids copy these rows of the head, a range is a view"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_is_computed_with_spans_and_equals_the_formulas(name):
    cfg, wrapped = CONFIGS[name], []
    weights, rows = params(cfg), prompt(cfg, [3, 1], [0, 2])
    expected = pg.prefill(weights, rows, cfg, 2, tap=lambda name, x: x)
    with compiled_for_gpu() as counts:
        found = pg.prefill(weights, rows, cfg, 2, wrap=lambda part: wrapped.append(part.__name__) or part)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32, another order
    # the last layer computes one token only
    assert counts == {"prefill_attention": cfg.text.layers, "rope_to_cache": cfg.text.layers - 1, "angles": 1}


@pytest.mark.parametrize("name", CONFIGS)
def test_wrap_is_applied_to_every_block_and_to_what_is_between_and_after_them(name):
    cfg, wrapped = CONFIGS[name], []
    weights, rows = params(cfg), prompt(cfg, [3, 1], [0, 2])
    wrap = lambda part: wrapped.append(part) or part  # noqa: E731
    vision, language = [siglip.block] * cfg.vision.layers, [gemma.block] * cfg.text.layers
    torch.testing.assert_close(pg.prefill(weights, rows, cfg, 2, wrap=wrap), pg.prefill(weights, rows, cfg, 2))
    assert wrapped == [*vision, paligemma.embed_and_mask, *language, gemma.unembed]
    wrapped.clear()
    torch.testing.assert_close(pg.forward(weights, rows, cfg, wrap=wrap), pg.forward(weights, rows, cfg))
    assert wrapped == [*vision, *language, gemma.unembed]


@given(st.integers(0, 6), st.integers(1, 3), st.integers(0, 4), st.integers(7, 9))
def test_the_description_of_a_cached_mask_is_that_mask(length, tokens, size, slots):
    lengths = torch.tensor([length, 1])
    described, made = masks.appended(lengths, tokens, slots, size), masks.cached(lengths, tokens, slots, size)
    assert torch.equal(masks.dense(described.full, slots), made.full)
    assert (
        (described.window == made.window == ())
        if not size
        else torch.equal(masks.dense(described.window, slots), made.window)
    )


@given(st.booleans(), st.booleans(), st.booleans())
def test_one_product_for_several_matrices_is_their_products(beside, together, biased):
    """The operator that compiled code for GPUs calls, wherever the matrices and the biases lie."""
    weights, biases = [torch.randn(rows, 5) for rows in (3, 1, 4)], [torch.randn(rows) for rows in (3, 1, 4)]
    x, here = torch.randn(2, 3, 5), torch.device("cpu")
    given = packing.pack(weights, here) if beside else weights
    added = (packing.pack(biases, here) if together else biases) if biased else []
    found = operators.linear_many(x, given, added).split([3, 1, 4], -1)
    torch.testing.assert_close(found, ops.linear_many(x, weights, biases if biased else ()))
    torch.library.opcheck(operators.linear_many, (x, weights, added))


@pytest.mark.parametrize("amx", [False, True])
def test_one_row_is_written_out_on_cpus_without_amx_alone(amx, monkeypatch):
    monkeypatch.setattr(rules, "AMX", amx)
    w = torch.randn(4, 3)
    for one in (torch.randn(3), torch.randn(1, 3), torch.randn(1, 1, 3)):
        assert rules.one_row_on_cpu(one, w, None) is not amx
        assert not rules.one_row_on_cpu(one.double(), w, None)
        assert not rules.one_row_on_cpu(one.double(), w.double(), None)
        assert not rules.one_row_on_cpu(one.to("meta"), w.to("meta"), None)
    for several in (torch.randn(2, 3), torch.randn(1, 2, 3), torch.randn(2, 1, 3), torch.randn(0, 3)):
        assert not rules.one_row_on_cpu(several, w, None)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_the_loop_of_one_row_is_for_compiled_code_alone_and_changes_no_product(compiling, rows, biased, monkeypatch):
    monkeypatch.setattr(rules, "AMX", False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    asked, loop = [], lowbit.one_row
    monkeypatch.setattr(lowbit, "one_row", lambda x, w: asked.append(len(x)) or loop(x, w))
    x, w, bias = torch.randn(rows, 5), torch.randn(4, 5), torch.randn(4) if biased else None
    torch.testing.assert_close(ops.linear(x, w, bias), torch.nn.functional.linear(x, w, bias))
    assert asked == ([1] if compiling and rows == 1 else [])


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@given(st.booleans(), st.booleans(), st.sampled_from([(5,), (1, 5), (2, 3, 5)]))
def test_in_compiled_code_for_gpus_matrices_that_lie_together_are_one_product(
    compiling, cuda, grad, together, biased, shape
):
    weights, x = [torch.randn(rows, 5) for rows in (3, 1, 4)], torch.randn(shape)
    biases = [torch.randn(rows) for rows in (3, 1, 4)] if biased else []
    weights = packing.pack(weights, x.device) if together else weights
    expected, product, products = ops.linear_many(x, weights, biases), torch.nn.functional.linear, []
    with compiled_for(cuda, compiling), torch.set_grad_enabled(grad), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", lambda *parts: products.append(parts) or product(*parts))
        torch.testing.assert_close(ops.linear_many(x, weights, biases), expected)
    assert len(products) == (1 if together and compiling and cuda and not grad else 3)


def test_in_compiled_code_for_gpus_quantized_and_transformed_products_stay_apart():
    weights, x = packing.pack([torch.randn(rows, 5) for rows in (3, 1, 4)], torch.device("cpu")), torch.randn(2, 5)
    small = [lowbit.quantize(w, "int8") for w in weights]
    expected, quantized = ops.linear_many(x, weights), ops.linear_many(x, small)
    with compiled_for(True), torch.no_grad(), Watched() as watched:
        torch.testing.assert_close(ops.linear_many(x, small), quantized)
        torch.testing.assert_close(torch.vmap(lambda row: ops.linear_many(row, weights))(x), expected)
    assert "pgfunc::linear_many" not in watched.names


@given(st.booleans(), st.booleans())
def test_in_compiled_code_for_gpus_a_bias_is_added_to_the_product(compiling, cuda):
    x, w, bias = torch.randn(2, 5), torch.randn(4, 5), torch.randn(4)
    expected = torch.nn.functional.linear(x, w, bias)
    with compiled_for(cuda, compiling), Watched() as watched:
        torch.testing.assert_close(ops.linear(x, w, bias), expected)
        torch.testing.assert_close(ops.linear(x, w), expected - bias)
    assert ("aten::addmm" in watched.names) is not (compiling and cuda)


@given(st.booleans(), st.booleans(), st.sampled_from([1, 3]), st.sampled_from([0.0, 50.0]))
def test_attention_is_written_out_for_softcaps_and_for_one_query_in_compiled_code_for_gpus(
    compiling, cuda, queries, cap
):
    written, explicit = [], ops.attend_explicit
    q, k = torch.randn(1, queries, 2, 8), torch.randn(1, 5, 1, 8)
    expected = explicit(q, k, k, None, 0.3, cap)
    with compiled_for(cuda, compiling), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "attend_explicit", lambda *parts: written.append(parts[-1]) or explicit(*parts))
        torch.testing.assert_close(ops.attend(q, k, k, None, 0.3, cap), expected)
    assert written == ([cap] if cap or (compiling and cuda and queries == 1) else [])
