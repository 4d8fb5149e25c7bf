"""Any sequence of operations on the handles of a cache, also in threads, gives what the pure function gives."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CONFIGS, params, prompt
from graphs import simulate_graphs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pgfunc as pg
from pgfunc.errors import CacheFullError

LIMIT = {"atol": 1e-5, "rtol": 1e-4}  # float32, sums in another order
CFG = CONFIGS["gemma2"]
WEIGHTS = params(CFG), params(CFG, 7)
SLOTS = 64  # of a compiled cache, and here also of the pure one, so that both are full at the same time
STEPS = {graphs: tuple(pg.jit(pg.decode, donate="cache") for _ in range(2)) for graphs in (False, True)}

which, tokens = st.integers(0, 99), st.tuples(*[st.integers(0, CFG.text.vocab - 1)] * 2).map(torch.tensor)
chosen = st.booleans()


class Machine(RuleBasedStateMachine):
    """Pairs of a handle and the pure cache that it must equal, continued by two functions with two trees of weights."""

    graphs = False

    def __init__(self):
        super().__init__()
        self.alive: list[tuple[pg.Cache, pg.Cache]] = []
        self.patch = pytest.MonkeyPatch()
        if self.graphs:
            simulate_graphs(self.patch)

    def teardown(self):
        self.patch.undo()

    def pick(self, which: int) -> tuple[pg.Cache, pg.Cache]:
        return self.alive[which % len(self.alive)]

    def step(self, second: bool) -> Callable:
        return STEPS[self.graphs][second]

    @initialize(seed=st.integers(0, 3))
    def begin(self, seed):
        rows = prompt(CFG, [56, 3], [0, 0], seed=seed)
        with torch.no_grad():
            _, cache = pg.prefill(WEIGHTS[0], rows, CFG, SLOTS - 60)
        assert cache.slots == SLOTS
        self.alive = [(cache, cache)]

    @rule(which=which, token=tokens, second=chosen, other=chosen, keep=chosen)
    def continue_(self, which, token, second, other, keep):
        """Use either function and either weights. If the old handle is kept, it can be forked later."""
        index = which % len(self.alive)
        mine, pure = self.alive[index]
        weights = WEIGHTS[other]
        try:
            expected, pure = pg.decode(weights, token, pure, CFG)
        except CacheFullError:
            with pytest.raises(CacheFullError):
                self.step(second)(weights, token, mine, CFG)
            return
        logits, mine = self.step(second)(weights, token, mine, CFG)
        torch.testing.assert_close(logits, expected, **LIMIT)
        if keep:
            self.alive.append((mine, pure))
        else:
            self.alive[index] = mine, pure

    @rule(which=which, pairs=st.lists(tokens, min_size=2, max_size=4))
    def continue_in_threads(self, which, pairs):
        """Continue one handle by both functions at the same time."""
        mine, pure = self.pick(which)
        if pure.length.max() == SLOTS:
            return
        with ThreadPoolExecutor(len(pairs)) as pool:
            steps = pool.map(lambda i: self.step(bool(i % 2))(WEIGHTS[0], pairs[i], mine, CFG), range(len(pairs)))
            results = list(steps)
        for token, (logits, handle) in zip(pairs, results, strict=True):
            expected, after = pg.decode(WEIGHTS[0], token, pure, CFG)
            torch.testing.assert_close(logits, expected, **LIMIT)
            self.alive.append((handle, after))

    @rule(which=which, count=st.tuples(st.integers(0, 4), st.integers(0, 3)).map(torch.tensor))
    def rewind(self, which, count):
        mine, pure = self.pick(which)
        length = (pure.length - count).clamp(min=1)
        self.alive[which % len(self.alive)] = pg.rewind(mine, length), pure._replace(length=length)

    @rule(which=which, rows=st.tuples(st.integers(0, 1), st.integers(0, 1)).map(torch.tensor), keep=chosen)
    def reorder(self, which, rows, keep):
        mine, pure = self.pick(which)
        pair = pg.reorder(mine, rows), pg.tree.map(lambda x: x[rows], pure)
        if keep:
            self.alive.append(pair)
        else:
            self.alive[which % len(self.alive)] = pair

    @rule(which=which, other=which, taken=st.integers(0, 1), place=st.integers(0, 1), keep=chosen)
    def insert(self, which, other, taken, place, keep):
        """Replace a row by one of another handle, or of the same one."""
        (mine, pure), (mine2, pure2), rows = self.pick(which), self.pick(other), torch.tensor([place])
        one = pg.tree.map(lambda x: x[[taken]], pure2)
        expected = pg.tree.map(lambda x, y: x.index_copy(0, rows, y), pure, one)
        pair = pg.insert(mine, pg.tree.map(lambda x: x[[taken]], mine2), rows), expected
        if keep:
            self.alive.append(pair)
        else:
            self.alive[which % len(self.alive)] = pair

    @precondition(lambda self: len(self.alive) > 1)
    @rule(which=which)
    def drop(self, which):
        del self.alive[which % len(self.alive)]

    @invariant()
    def every_handle_equals_its_pure_cache(self):
        for mine, pure in self.alive:
            assert torch.equal(mine.length, pure.length)
            assert not mine.overflowed.any()
            visible = torch.arange(pure.slots) < pure.length[:, None]
            for one, other in zip((*mine.k, *mine.v), (*pure.k, *pure.v), strict=True):
                torch.testing.assert_close(one[:, : pure.slots][visible], other[visible], **LIMIT)


class Graphs(Machine):
    """The same with graphs."""

    graphs = True


Machine.TestCase.settings = Graphs.TestCase.settings = settings(deadline=None, max_examples=30, stateful_step_count=16)
TestMachine, TestGraphs = Machine.TestCase, Graphs.TestCase
