"""What a compiled function closes over is read at each call, and the result is that of the function as it is now."""

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
