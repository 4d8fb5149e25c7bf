"""A compiled function reads the values that it closes over at each call, and uses their current values."""

from functools import partial

import pytest
import torch
from cases import CONFIGS, params, prompt
from graphs import simulate_graphs

import pgfunc as pg
from pgfunc.jit import compilation

CFG = CONFIGS["gemma"]
TABLE = torch.ones(3)
FACTOR = 2.0


class Holder:
    """An object that has a tensor."""

    def __init__(self, amount: torch.Tensor):
        self.amount = amount

    def scaled(self, x):
        return x * self.amount


@pytest.fixture(params=[False, True], ids=["without graphs", "with graphs"])
def graphs(request, monkeypatch):
    if request.param:
        simulate_graphs(monkeypatch)


def same(compiled, pure, *args) -> None:
    """Compare the results of three calls; the second one captures a graph."""
    for _ in range(3):
        torch.testing.assert_close(compiled(*args), pure(*args))


def test_a_function_of_the_package_reads_nothing_but_its_constants(monkeypatch):
    found, find = [], compilation.free_variables
    monkeypatch.setattr(compilation, "free_variables", lambda *given: found.append(find(*given)) or found[-1])
    tree = params(CFG)
    logits, cache = pg.prefill(tree, prompt(CFG, [3], [2]), CFG, 3)
    pg.jit(pg.decode, donate="cache")(tree, pg.sample.greedy(logits), cache, CFG)
    (variables,) = found
    assert "specs['cfg'].constants[0].text.heads" in variables.expressions
    assert [name for name in variables.expressions if not name.startswith("specs[")] == ["fn"]


@pytest.mark.parametrize("value", [torch.full((3,), 5.0), torch.full((3,), 5.0, dtype=torch.float64),
                                   torch.arange(3), torch.full((1,), 7.0), torch.ones(6)[::2]])  # fmt: skip
def test_a_tensor_may_be_replaced_by_any_other(graphs, value):
    amount = torch.ones(3)

    def scaled(x):
        return x * amount

    step, x = pg.jit(scaled), torch.tensor([1.0, 2.0, 3.0])
    same(step, scaled, x)
    amount = value
    same(step, scaled, x)
    amount = torch.zeros(3)
    same(step, scaled, x)
    assert step.compilations <= 2, "tensors of the same shape share the code"


def test_globals_defaults_objects_and_lists_are_read_at_each_call(graphs, monkeypatch):
    def with_globals(x):
        return x * TABLE * FACTOR

    holder, parts = Holder(torch.ones(3)), [torch.ones(3), torch.ones(3)]
    fns = [with_globals, holder.scaled, lambda x, by=parts[0]: x * by, lambda x: x * sum(parts)]
    steps, x = [pg.jit(fn) for fn in fns], torch.tensor([1.0, 2.0, 3.0])
    for step, fn in zip(steps, fns, strict=True):
        same(step, fn, x)
    monkeypatch.setitem(globals(), "TABLE", torch.tensor([4.0, 5.0, 6.0]))
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    holder.amount = torch.full((3,), 9.0)
    parts.append(torch.full((3,), 10.0))
    for step, fn in zip(steps, fns, strict=True):
        same(step, fn, x)


def test_a_step_may_close_over_its_weights_and_an_edit_over_its_vector(graphs):
    weights, vector, amount = params(CFG), torch.zeros(CFG.text.width), 1.0

    def tap(name, x):
        return x + amount * vector if name == "language.1.resid_post" else x

    def step(token, cache):
        return pg.decode(weights, token, cache, CFG, tap)

    fast = pg.jit(step, donate="cache")
    with torch.no_grad():
        _, start = pg.prefill(weights, prompt(CFG, [3], [0]), CFG, 20)

    def loops_agree():
        mine = pure = start
        for token in range(4):
            logits, mine = fast(torch.tensor([token]), mine)
            expected, pure = step(torch.tensor([token]), pure)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)

    loops_agree()
    vector = torch.randn(CFG.text.width)
    loops_agree()
    weights = params(CFG, 5)
    loops_agree()
    assert fast.compilations == 1
    amount = 2.0
    loops_agree()
    assert fast.compilations == 2


def test_two_variables_that_held_the_same_tensor_may_hold_different_ones():
    amount = torch.tensor([10.0, 20.0, 30.0])
    step = pg.jit(lambda x: x + 2 * amount)
    same(step, step.fn, amount)
    same(step, step.fn, torch.ones(3))
    one = other = torch.full((3,), 4.0)
    both = pg.jit(lambda x: x + 2 * one + 3 * other)
    same(both, both.fn, torch.ones(3))
    other = torch.ones(3)
    same(both, both.fn, torch.ones(3))


class Steer:
    """A tap that is a callable object."""

    def __init__(self, vector: torch.Tensor, amount: float):
        self.vector, self.amount = vector, amount

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x * self.vector * self.amount


def test_objects_and_partials_among_the_arguments_are_read_at_each_call():
    x = torch.tensor([1.0, 2.0, 3.0])
    step, tap = pg.jit(lambda x, tap: tap("a", x)), Steer(torch.ones(3), 2.0)
    same(step, step.fn, x, tap)
    tap.amount = 5.0
    same(step, step.fn, x, tap)
    tap.vector = torch.arange(3)
    same(step, step.fn, x, tap)
    scaled = partial(lambda x, by, n: x * by * n, by=torch.ones(3), n=2.0)
    called = pg.jit(lambda x, fn: fn(x))
    same(called, called.fn, x, scaled)
    scaled.keywords.update(n=5.0, by=torch.arange(3))
    same(called, called.fn, x, scaled)


def test_the_content_of_sets_objects_and_classes_is_read_at_each_call():
    class Base:
        factor = 2.0

    class Derived(Base):
        pass

    names, holder, x = {"a"}, Derived(), torch.tensor([1.0, 2.0, 3.0])
    fns = [
        lambda x: x * (2.0 if "b" in names else 3.0),
        lambda x: x * (7.0 if hasattr(holder, "extra") else 1.0),
        lambda x: x * holder.factor,
    ]
    steps = [pg.jit(fn) for fn in fns]
    for step in steps:
        same(step, step.fn, x)
    names.add("b")
    holder.extra, Base.factor = 1, 4.0
    for step in steps:
        same(step, step.fn, x)
    holder.factor = 9.0
    same(steps[2], steps[2].fn, x)


def test_zero_and_minus_zero_are_distinguished():
    divided, x = pg.jit(lambda x, by: x / by), torch.tensor([1.0, 2.0])
    assert [divided(x, by)[0].item() for by in (0.0, -0.0)] == [float("inf"), float("-inf")]


def test_globals_of_a_function_without_a_module_are_read_at_each_call():
    scope = {"TABLE": torch.ones(3), "FACTOR": 2.0}
    exec("def scaled(x): return x * TABLE * FACTOR", scope)
    step, x = pg.jit(scope["scaled"]), torch.tensor([1.0, 2.0, 3.0])
    same(step, scope["scaled"], x)
    scope.update(TABLE=torch.arange(3), FACTOR=5.0)
    same(step, scope["scaled"], x)


def test_code_with_graphs_is_compiled_again_if_a_number_that_it_closes_over_changed(monkeypatch):
    counts, amount = simulate_graphs(monkeypatch), 1.0

    def start(x, wrap=lambda block: block):
        return wrap(torch.neg)(x) * amount

    step, x = pg.jit(start), torch.tensor([1.0, 2.0])
    for _ in range(3):
        step(x)
    amount = 5.0
    assert step(x).tolist() == [-5.0, -10.0]
    assert step.why == "a value that the function closes over has changed"
    assert counts["captured"] == 1, "the new code has no graph yet"


def test_a_property_that_makes_a_new_object_at_each_access_does_not_compile_again(graphs):
    class Fresh(Holder):
        @property
        def parts(self):
            return [self.amount]

    holder, x = Fresh(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0])
    step = pg.jit(lambda x: holder.scaled(x) + holder.parts[0])
    same(step, step.fn, x)
    holder.amount = torch.full((3,), 4.0)
    same(step, step.fn, x)
    assert step.compilations == 1
