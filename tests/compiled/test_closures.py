"""What a compiled function closes over is read at each call, and the result is that of the function as it is now."""

from functools import partial

import pytest
import torch
from cases import CONFIGS, params, prompt
from graphs import played

import pgfunc as pg

CFG = CONFIGS["gemma"]
TABLE = torch.ones(3)
FACTOR = 2.0


class Holder:
    """An object with a tensor of its own."""

    def __init__(self, amount: torch.Tensor):
        self.amount = amount

    def scaled(self, x):
        return x * self.amount


@pytest.fixture(params=[False, True], ids=["as it is", "by graphs"])
def graphs(request, monkeypatch):
    if request.param:
        played(monkeypatch)


def same(compiled, pure, *args) -> None:
    """Three calls, for a graph is captured at the second."""
    for _ in range(3):
        torch.testing.assert_close(compiled(*args), pure(*args))


@pytest.mark.parametrize("value", [torch.full((3,), 5.0), torch.full((3,), 5.0, dtype=torch.float64),
                                   torch.arange(3), torch.full((1,), 7.0), torch.ones(6)[::2]])  # fmt: skip
def test_a_tensor_may_be_exchanged_for_any_other(graphs, value):
    amount = torch.ones(3)

    def scaled(x):
        return x * amount

    step, x = pg.jit(scaled), torch.tensor([1.0, 2.0, 3.0])
    same(step, scaled, x)
    amount = value
    same(step, scaled, x)
    amount = torch.zeros(3)
    same(step, scaled, x)
    assert step.compilations <= 2, "for tensors of one shape there is one code"


def test_globals_defaults_partials_objects_and_lists_are_read_too(graphs, monkeypatch):
    def of_globals(x):
        return x * TABLE * FACTOR

    held, parts = Holder(torch.ones(3)), [torch.ones(3), torch.ones(3)]
    fns = [of_globals, held.scaled, lambda x, by=parts[0]: x * by, lambda x: x * sum(parts)]
    steps, x = [pg.jit(fn) for fn in fns], torch.tensor([1.0, 2.0, 3.0])
    for step, fn in zip(steps, fns, strict=True):
        same(step, fn, x)
    monkeypatch.setitem(globals(), "TABLE", torch.tensor([4.0, 5.0, 6.0]))
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    held.amount = torch.full((3,), 9.0)
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


def test_tensors_that_were_one_may_become_two():
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
    """A tap that is an object."""

    def __init__(self, vector: torch.Tensor, amount: float):
        self.vector, self.amount = vector, amount

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x * self.vector * self.amount


def test_objects_partials_and_modules_among_the_arguments_are_read_as_they_are_now():
    x = torch.tensor([1.0, 2.0, 3.0])
    step, tap = pg.jit(lambda x, tap: tap("a", x)), Steer(torch.ones(3), 2.0)
    same(step, step.fn, x, tap)
    tap.amount = 5.0
    same(step, step.fn, x, tap)
    tap.vector = torch.arange(3)
    same(step, step.fn, x, tap)
    given = partial(lambda x, by, n: x * by * n, by=torch.ones(3), n=2.0)
    called = pg.jit(lambda x, fn: fn(x))
    same(called, called.fn, x, given)
    given.keywords.update(n=5.0, by=torch.arange(3))
    same(called, called.fn, x, given)


def test_what_a_set_an_object_or_a_class_holds_is_read_too():
    class Base:
        factor = 2.0

    class Derived(Base):
        pass

    places, held, x = {"a"}, Derived(), torch.tensor([1.0, 2.0, 3.0])
    fns = [
        lambda x: x * (2.0 if "b" in places else 3.0),
        lambda x: x * (7.0 if hasattr(held, "extra") else 1.0),
        lambda x: x * held.factor,
    ]
    steps = [pg.jit(fn) for fn in fns]
    for step in steps:
        same(step, step.fn, x)
    places.add("b")
    held.extra, Base.factor = 1, 4.0
    for step in steps:
        same(step, step.fn, x)
    held.factor = 9.0
    same(steps[2], steps[2].fn, x)


def test_numbers_that_are_equal_are_not_taken_for_one_another():
    divided, x = pg.jit(lambda x, by: x / by), torch.tensor([1.0, 2.0])
    assert [divided(x, by)[0].item() for by in (0.0, -0.0)] == [float("inf"), float("-inf")]


def test_code_that_has_no_module_is_watched_as_well():
    scope = {"TABLE": torch.ones(3), "FACTOR": 2.0}
    exec("def scaled(x): return x * TABLE * FACTOR", scope)
    step, x = pg.jit(scope["scaled"]), torch.tensor([1.0, 2.0, 3.0])
    same(step, scope["scaled"], x)
    scope.update(TABLE=torch.arange(3), FACTOR=5.0)
    same(step, scope["scaled"], x)


def test_blocks_by_graphs_are_captured_again_where_what_they_close_over_changed(monkeypatch):
    counted, amount = played(monkeypatch), 1.0

    def start(x, wrap=lambda part: part):
        return wrap(torch.neg)(x) * amount

    step, x = pg.jit(start), torch.tensor([1.0, 2.0])
    for _ in range(3):
        step(x)
    amount = 5.0
    assert step(x).tolist() == [-5.0, -10.0]
    assert step.why == "a value that it closes over is another"
    assert counted["captured"] == 1, "the new code has none yet"


def test_what_is_another_object_at_each_look_compiles_nothing_anew(graphs):
    class Fresh(Holder):
        @property
        def parts(self):
            return [self.amount]

    held, x = Fresh(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0])
    step = pg.jit(lambda x: held.scaled(x) + held.parts[0])
    same(step, step.fn, x)
    held.amount = torch.full((3,), 4.0)
    same(step, step.fn, x)
    assert step.compilations == 1
