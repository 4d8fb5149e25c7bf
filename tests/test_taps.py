"""Taps: the tables of names are true, a tap gets what it asks for, and a layer of which nothing is asked has no tap."""

import pytest
import torch
from cases import CONFIGS, VISION, params, prompt

import pgfunc as pg
from pgfunc import gemma, paligemma, siglip, taps
from pgfunc.taps import COSTLY, identity, within


class Recorder:
    """A tap that asks for some names, or for all, and records the shapes of what it gets."""

    def __init__(self, *wanted: str):
        self.wanted, self.shapes = wanted, {}

    def asks(self, name):
        return not self.wanted or name in self.wanted

    def __call__(self, name, x):
        assert name not in self.shapes, f"{name} passes once"
        self.shapes[name] = tuple(x.shape)
        return x


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tap_that_asks_for_everything_gets_every_name_in_order(name):
    cfg, tree = CONFIGS[name], params(CONFIGS[name])
    rows, every = prompt(cfg, [3, 1], [2, 4]), paligemma.names(cfg)
    pg.forward(tree, rows, cfg, tap := Recorder())
    assert [*tap.shapes] == every
    _, cache = pg.prefill(tree, rows, cfg, 1, tap := Recorder())
    assert [*tap.shapes] == every
    pg.decode(tree, torch.tensor([1, 2]), cache, cfg, tap := Recorder())
    assert [*tap.shapes] == every[every.index("language.embed") :]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_axes_of_the_tables_are_true(name):
    cfg, tree = CONFIGS[name], params(CONFIGS[name])
    pg.forward(tree, prompt(cfg, [3, 1], [2, 4]), cfg, tap := Recorder())
    text, vision, length = cfg.text, cfg.vision, VISION.tokens + 5
    language = {"t": length, "s": length, "d": text.width, "n": text.heads, "k": text.kv_heads, "h": text.head_dim,
                "f": text.hidden}  # fmt: skip
    picture = {"p": vision.tokens, "s": vision.tokens, "d": vision.width, "n": vision.heads, "h": vision.head_dim,
               "f": vision.hidden}  # fmt: skip
    for part, table, sizes in (("language.1", gemma.TAPS, language), ("vision.1", siglip.TAPS, picture)):
        for last, axes in table.items():
            if f"{part}.{last}" in paligemma.names(cfg):
                expected = tuple({"b": 2, **sizes}[axis] for axis in axes.split())
                assert tap.shapes[f"{part}.{last}"] == expected, last


def test_a_tap_without_asks_gets_everything_that_costs_nothing():
    cfg, seen = CONFIGS["gemma2"], []
    pg.forward(params(cfg), prompt(cfg, [3], [2]), cfg, lambda name, x: seen.append(name) or x)
    cheap = [name for name in paligemma.names(cfg) if name.rpartition(".")[2] not in COSTLY]
    assert seen == cheap


def test_a_layer_of_which_nothing_is_asked_has_no_tap(monkeypatch):
    given, block = [], gemma.block
    monkeypatch.setattr(gemma, "block", lambda *args: given.append(args[6] is identity) or block(*args))
    cfg = CONFIGS["gemma2"]
    logits = pg.forward(params(cfg), prompt(cfg, [3], [2]), cfg, tap := Recorder("language.1.z"))
    assert given == [True, False, True]
    assert [*tap.shapes] == ["vision.embed", "vision.out", "projector", "language.embed", "language.1.resid_pre",
                             "language.1.attn_in", "language.1.q", "language.1.k", "language.1.v", "language.1.rot_q",
                             "language.1.rot_k", "language.1.z", "language.1.attn_out", "language.1.resid_mid",
                             "language.1.mlp_in", "language.1.gate", "language.1.up", "language.1.mlp_hidden",
                             "language.1.mlp_out", "language.1.resid_post", "language.out", "logits"]  # fmt: skip
    assert torch.equal(logits, pg.forward(params(cfg), prompt(cfg, [3], [2]), cfg))


def test_pictures_that_all_rows_share_are_encoded_once_unless_their_activations_are_asked_for():
    cfg, tree = CONFIGS["gemma"], params(CONFIGS["gemma"])
    rows = prompt(cfg, [3, 1], [2, 4])
    rows = rows._replace(pixels=rows.pixels[:1].expand(2, -1, -1, -1, -1))
    for wanted, batch in (("language.1.z", 1), ("vision.0.z", 2), ("projector", 2)):
        sizes = []
        encode = siglip.encode_image
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(siglip, "encode_image", lambda p, x, *rest: sizes.append(len(x)) or encode(p, x, *rest))  # noqa: B023
            pg.forward(tree, rows, cfg, Recorder(wanted))
        assert sizes == [batch]


@pytest.mark.parametrize("name", ["language.2.resid_mid", "language.0.resid_mid"])
def test_a_prefill_computes_one_token_in_the_last_layer_unless_it_is_asked_of(name):
    cfg, tree = CONFIGS["gemma2"], params(CONFIGS["gemma2"])
    rows, queries, block = prompt(cfg, [3, 1], [2, 4]), [], gemma.block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma, "block", lambda *args: queries.append(args[7] != ()) or block(*args))
        logits, cache = pg.prefill(tree, rows, cfg, 2, tap := Recorder(name))
    assert queries == [False, False, name == "language.0.resid_mid"]
    assert tap.shapes[name] == (2, VISION.tokens + 5, cfg.text.width)
    assert tap.shapes["language.out"] == (2, 1, cfg.text.width)
    expected, other = pg.prefill(tree, rows, cfg, 2)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cache.k, other.k)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_forward_have_one_order_of_positions(name):
    """Padding stands anywhere in a row; the valid tokens come first in both."""
    cfg, tree = CONFIGS[name], params(CONFIGS[name])
    rows = prompt(cfg, [3, 1], [2, 1], padding=3)
    seen = {}

    def tap(kind):
        return lambda name, x: seen.setdefault((kind, name), x) if name != "logits" else x

    pg.forward(tree, rows, cfg, tap("forward"))
    _, cache = pg.prefill(tree, rows, cfg, 1, tap("prefill"))
    for last in gemma.TAPS.keys() - COSTLY:
        one, other = (seen[kind, f"language.1.{last}"] for kind in ("forward", "prefill"))
        for row, length in enumerate(cache.length):
            torch.testing.assert_close(one[row, :length], other[row, :length], atol=1e-5, rtol=1e-4)


def test_a_part_has_names_with_its_prefix_and_the_default_has_no_parts():
    assert within("a", identity, ["b"]) is identity
    nested = within("a", within("b", lambda name, value: (name, value), ["c"]), ["c"])
    assert nested("c", 5) == ("b.a.c", 5)
    assert within("a", Recorder("a.b"), ["c"]) is identity
    assert taps.asks(within("a", Recorder("a.b"), ["b", "c"]), "b")
    assert not taps.asks(within("a", Recorder("a.b"), ["b", "c"]), "c")


def test_the_mask_and_the_pattern_that_a_tap_returns_are_used():
    cfg, tree = CONFIGS["gemma2"], params(CONFIGS["gemma2"])
    rows = prompt(cfg, [3], [2])

    class Change(Recorder):
        def __init__(self, wanted, fn):
            super().__init__(wanted)
            self.fn = fn

        def __call__(self, name, x):
            return self.fn(super().__call__(name, x)) if name in self.wanted else x

    plain = pg.forward(tree, rows, cfg)
    for wanted, fn in (("language.1.mask", lambda m: m & False), ("language.1.pattern", torch.zeros_like),
                       ("language.1.z", torch.zeros_like)):  # fmt: skip
        without = pg.forward(tree, rows, cfg, Change(wanted, fn))
        assert not torch.equal(without, plain)
        torch.testing.assert_close(
            without, pg.forward(tree, rows, cfg, Change("language.1.attn_out", torch.zeros_like))
        )
    lowest = pg.forward(tree, rows, cfg, Change("language.1.attn_scores", torch.zeros_like))
    assert not torch.equal(lowest, plain)
