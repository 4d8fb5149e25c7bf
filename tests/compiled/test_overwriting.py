"""A step with a donated cache is a function of its arguments, also if these decide where it writes.

The graph of a step proves that it only appends, or the cache is copied first.
"""

import pytest
import torch
from cases import CONFIGS, params, prompt

import pgfunc as pg
from pgfunc.errors import SettingError
from pgfunc.jit import compilation, function
from pgfunc.jit.overwriting import Appends

CFG = CONFIGS["gemma"]
WEIGHTS = params(CFG)
TOKEN = torch.tensor([3, 5])


def decoded(cache: pg.Cache, number: torch.Tensor):
    return pg.decode(WEIGHTS, TOKEN, cache, CFG)


def decoded_twice_unless_done(cache: pg.Cache, number: torch.Tensor):
    logits, new = pg.decode(WEIGHTS, TOKEN, cache, CFG)
    new = new._replace(length=torch.where(number > 0, cache.length, new.length))
    return pg.decode(WEIGHTS, pg.sample.greedy(logits), new, CFG)


def accepted(cache: pg.Cache, number: torch.Tensor):
    """Appends a draft of two tokens and keeps so many of them."""
    logits, new = pg.extend(WEIGHTS, torch.stack([TOKEN, TOKEN], 1), cache, CFG)
    return logits, new._replace(length=cache.length + number)


def rewound(cache: pg.Cache, number: torch.Tensor):
    """Forgets so many tokens and appends one."""
    return pg.decode(WEIGHTS, TOKEN + number, pg.rewind(cache, cache.length - number), CFG)


def written_at(cache: pg.Cache, number: torch.Tensor):
    """Writes a key at a position that is given, counted from the length."""
    logits, new = pg.decode(WEIGHTS, TOKEN, cache, CFG)
    rows, slot = torch.arange(2), cache.length + number
    changed = torch.index_put(new.k[0], (rows, slot), torch.zeros_like(new.k[0][:, 0]) + number[:, None, None])
    return logits, new._replace(k=(changed, *new.k[1:]), length=cache.length + 2)


def written_by_setitem(cache: pg.Cache, number: torch.Tensor):
    logits, new = pg.decode(WEIGHTS, TOKEN, cache, CFG)
    k = new.k[0].clone()
    k[torch.arange(2), 1 + cache.length] = number[:, None, None].to(k.dtype)
    return logits, new._replace(k=(k, *new.k[1:]), length=cache.length + 2)


def masked(cache: pg.Cache, number: torch.Tensor):
    """Overwrites the slots from a position on, by a mask."""
    logits, new = pg.decode(WEIGHTS, TOKEN, cache, CFG)
    later = torch.arange(new.slots) > (cache.length + number)[:, None]
    return logits, new._replace(k=tuple(x.masked_fill(later[:, :, None, None], 1.0) for x in new.k))


PROVED = {
    decoded: Appends(True, True),
    decoded_twice_unless_done: Appends(True, True),
    written_by_setitem: Appends(True, True),
    accepted: Appends(True, False),
    written_at: Appends(False, True),
    masked: Appends(False, True),
    rewound: Appends(False, False),
}


def handle() -> pg.Cache:
    _, cache = pg.prefill(WEIGHTS, prompt(CFG, [3, 2], [2, 0]), CFG, 20)
    return pg.reorder(cache, torch.tensor([0, 1]))


def visible(cache: pg.Cache) -> list[torch.Tensor]:
    seen = torch.arange(cache.slots) < cache.length[:, None]
    return [x[seen] for x in (*cache.k, *cache.v)]


@pytest.mark.parametrize("step", PROVED)
def test_the_graph_proves_that_a_step_appends_or_it_copies(step, monkeypatch):
    found, appends = [], compilation.appends
    monkeypatch.setattr(compilation, "appends", lambda graph: found.append(appends(graph)) or found[-1])
    fast, cache, zeros = pg.jit(step, donate="cache"), handle(), torch.tensor([0, 0])
    for _ in range(3):
        _, cache = fast(cache, zeros)
    assert found == [PROVED[step]]
    assert fast.copies == (0 if PROVED[step].positions else 2), "the first call was checked eagerly"


@pytest.mark.parametrize("step", [accepted, rewound, written_at, masked])
def test_arguments_decide_where_a_step_writes_and_no_older_handle_changes(step):
    fast, zeros = pg.jit(step, donate="cache"), torch.tensor([0, 0])
    _, first = fast(handle(), zeros)
    _, cache = fast(first, torch.tensor([1, 1]) if step is accepted else zeros)
    before = [x.clone() for x in visible(cache)]
    number = torch.tensor([1, 0]) if step is rewound else torch.tensor([-2, 0]) if step is not accepted else zeros
    expected, pure = step(pg.tree.map(torch.clone, cache), number)
    logits, new = fast(cache, number)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(new.length, pure.length)
    torch.testing.assert_close(visible(new), visible(pure), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(visible(cache), before, atol=0, rtol=0)


def test_a_shorter_continuation_does_not_write_over_what_an_older_handle_sees(monkeypatch):
    """On a GPU no length is read: a continuation whose length is not proved counts as rewound."""
    monkeypatch.setattr(function, "on_host", lambda x: False)
    fast, plain = pg.jit(accepted, donate="cache"), pg.jit(decoded, donate="cache")
    _, first = fast(handle(), torch.tensor([1, 2]))
    before = [x.clone() for x in visible(first)]
    _, shorter = fast(first, torch.tensor([-2, -1]))
    _, new = plain(shorter, torch.tensor([0, 0]))
    _, pure = decoded(shorter, torch.tensor([0, 0]))
    torch.testing.assert_close(visible(new), visible(pure), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(visible(first), before, atol=0, rtol=0)
    assert plain.copies == 1


def test_a_loop_that_accepts_some_of_its_draft_copies_nothing():
    fast, cache = pg.jit(accepted, donate="cache"), handle()
    for number in ([1, 2], [2, 0], [0, 1], [2, 2]):
        _, cache = fast(cache, torch.tensor(number))
    assert fast.copies == 0


def test_a_step_that_writes_before_the_length_at_first_is_refused():
    with pytest.raises(SettingError, match="changes a donated cache before its length"):
        pg.jit(written_at, donate="cache")(handle(), torch.tensor([-1, 0]))


def test_a_function_that_copies_into_an_argument_is_refused():
    with pytest.raises(SettingError, match="copies into an argument: return a new tensor"):
        pg.jit(lambda x, y: x.copy_(y))(torch.zeros(3), torch.ones(3))
