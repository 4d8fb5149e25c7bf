"""Trees: paths name leaves, replace changes only what it names, unstack inverts stack, every value has a short repr."""

import copy
import pickle
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from cases import CONFIGS, params, prompt, text_model
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import pgfunc as pg
from pgfunc import paligemma, siglip_dual, tree
from pgfunc.config import SiglipConfig, SiglipTextConfig
from pgfunc.errors import SettingError


def test_paths_name_leaves():
    paths = tree.flatten(params(CONFIGS["gemma2"]))
    assert {"vision.layers.1.q_bias", "projector", "language.layers.2.post_mlp_norm", "language.embed"} <= paths.keys()
    assert not any("post_mlp_norm" in path for path in tree.flatten(params(CONFIGS["gemma"]))), "() has no leaf"


def test_replace_changes_one_leaf_and_shares_the_rest():
    old = params(CONFIGS["gemma"])
    new = tree.replace(old, {"language.norm": torch.zeros(16)})
    assert not new.language.norm.any()
    before, after = tree.flatten(old), tree.flatten(new)
    assert all(after[path] is before[path] for path in before.keys() - {"language.norm"})


def test_replace_names_the_path_that_is_not_there():
    with pytest.raises(KeyError, match=r"language\.nrom"):
        tree.replace(params(CONFIGS["gemma"]), {"language.nrom": torch.zeros(16)})


@pytest.mark.parametrize("paths", [[], ["a.b"]])
def test_a_pattern_that_matches_no_path_is_an_error(paths):
    with pytest.raises(SettingError, match=rf"'x' matches none of {len(paths)} paths"):
        tree.matching(paths, "x")


def test_unstack_inverts_stack():
    trees = [params(CONFIGS["gemma"], seed) for seed in range(3)]
    for before, after in zip(trees, tree.unstack(tree.stack(trees)), strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(tree.flatten(before).values(), tree.flatten(after).values(), strict=True)
        )


def test_count_and_bytes():
    leaves = {"a": torch.zeros(2, 3), "b": (torch.zeros(4, dtype=torch.bfloat16), ())}
    assert tree.count(leaves) == 10
    assert tree.nbytes(leaves) == 24 + 8


# --- short reprs


class Pair(NamedTuple):
    left: Any
    right: Any

    def __repr__(self) -> str:
        return tree.summary(self)


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("this object has no repr")


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch calls nested tensors a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def is_short(text: str) -> bool:
    lines = text.split("\n")
    return len(lines) <= tree.LINES and all(len(line) <= tree.WIDTH and line.isprintable() for line in lines)


def test_a_summary_is_the_totals_then_a_line_for_each_part():
    scale = torch.ones(3, dtype=torch.bfloat16)
    layers = (Pair(torch.zeros(64, 16), ()), Pair(torch.ones(64, 16), ()))
    assert tree.summary(Pair({"w": torch.zeros(2, 3), "scale": scale}, layers)) == (
        "Pair(2.06 k elements, 8.22 kB, bfloat16 and float32 on cpu)\n"
        "  left: dict(9 elements, 30 B, bfloat16 and float32 on cpu)\n"
        "  right: 2 x Pair(1.02 k elements, 4.1 kB, float32 on cpu)"
    )
    assert repr(layers[0]).splitlines() == [
        "Pair(1.02 k elements, 4.1 kB, float32 on cpu)",
        "  left: float32[64, 16] on cpu",
        "  right: ()",
    ]


def test_a_cache_shows_its_layers_its_slots_and_its_lengths():
    cfg = CONFIGS["gemma2"]
    _, cache = pg.prefill(params(cfg), prompt(cfg, [3, 2], [2, 1]), cfg, 5)
    assert repr(cache) == (
        "Cache(2.69 k elements, 10.8 kB, float32 and int64 on cpu)\n"
        "  k: 3 x float32[2, 14, 2, 8] on cpu\n"
        "  v: 3 x float32[2, 14, 2, 8] on cpu\n"
        "  length: int64[2] on cpu: 9, 7"
    )
    assert tree.summary(cache.length + 2**40) == "int64[2] on cpu: 1099511627785, 1099511627783"
    assert tree.summary(cache.length[None]) == "int64[1, 2] on cpu", "a table of numbers is not shown"
    on_meta = tree.map(lambda leaf: leaf.to("meta"), cache)
    assert repr(on_meta).endswith("length: int64[2] on meta"), "on another device the lengths are not read"


def test_parts_that_differ_are_listed_and_those_that_are_too_many_are_counted():
    assert tree.summary([torch.zeros(2), torch.zeros(3)]).splitlines()[1:] == [
        "  0: float32[2] on cpu",
        "  1: float32[3] on cpu",
    ]
    lines = tree.summary({f"w{i}": torch.zeros(i) for i in range(50)}).splitlines()
    assert len(lines) == tree.LINES
    assert lines[-1] == "  ... and 32 more parts"


@pytest.mark.parametrize("name", ["paligemma-3b-224", "paligemma2-28b-896"])
def test_the_parameters_of_a_published_model_have_short_reprs(name):
    cfg = pg.PUBLISHED[name]
    plain = paligemma.abstract(cfg)
    model = pg.Model(cfg, plain, None)
    small = pg.quant.quantize(tree.map(lambda leaf: leaf.bfloat16(), plain), "int4", ["language.layers.3.*"])
    vision, language = plain.vision, plain.language
    values = [plain, vision, vision.layers[0], language, language.layers[0], model, small, small.language,
              small.language.layers[3], small.language.layers[3].q]  # fmt: skip
    for value in values:
        assert repr(value) == tree.summary(value)
        assert is_short(repr(value))
    assert f"layers: {cfg.text.layers} x Layer(" in repr(language)
    assert "q: Int4(" in repr(small.language.layers[3])


def test_every_value_that_a_user_meets_has_a_short_repr():
    model = text_model()
    cfg = SiglipConfig(model.cfg.vision, SiglipTextConfig(9, 8, 1, 2, 8, 8))
    dual = siglip_dual.init(cfg)
    row = pg.prepare(model, torch.zeros(4, 4, 3), "a")
    values = [model, model.params, row, pg.SiglipModel(cfg, dual, None), dual, dual.text, dual.pool]
    for value in values:
        assert repr(value) == tree.summary(value)
        assert repr(value).startswith(type(value).__name__ + "(")
        assert is_short(repr(value))
    assert f"tokenizer: Tokenizer({model.tokenizer.backend.get_vocab_size()} tokens)" in repr(model)


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool,
                          torch.complex64])  # fmt: skip
tensors = st.builds(
    lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device),
    st.lists(st.integers(0, 5), max_size=7),
    dtypes,
    st.sampled_from(["cpu", "meta"]),
)
ODD = [
    torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.ones(2, 2)), torch.eye(3).to_sparse(),
    nested(torch.strided), nested(torch.jagged), torch.zeros(2**40, device="meta"),
    torch.zeros(1).expand(10**9), Broken(), None, (), [], {}, "x" * 10**5, "a\nb\x1b[2J", CONFIGS["gemma"],
    torch.float32, 3, 0.5, object(),
]  # fmt: skip
odd = st.integers(0, len(ODD) - 1).map(lambda i: ODD[i])  # Hypothesis prints what it samples from
keys = st.text(max_size=200) | st.integers() | st.builds(Broken)
trees = st.recursive(
    tensors | odd,
    lambda inner: (
        st.lists(inner, max_size=30)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.builds(Pair, inner, inner)
    ),
)


@given(trees)
def test_a_summary_is_short_and_never_fails(value):
    assert is_short(tree.summary(value))


@given(trees)
def test_a_summary_does_not_depend_on_the_numbers_of_a_tensor_of_more_than_eight(value):
    def other(leaf: Any) -> Any:
        plain = type(leaf) is torch.Tensor and leaf.layout is torch.strided and not leaf.is_nested
        return torch.empty_like(leaf) if plain and leaf.is_contiguous() and 8 < leaf.numel() < 10**6 else leaf

    assert tree.summary(tree.map(other, value)) == tree.summary(value)


def test_a_summary_can_be_made_inside_transforms_and_while_tracing():
    reprs = []

    def f(x):
        reprs.append(repr(Pair(x, (x.long(), x.long()))))
        return x.sum()

    x = torch.ones(4, 3)
    torch.func.vmap(f)(x)
    torch.func.grad(f)(x)
    torch.func.jvp(f, (x,), (x,))
    torch.func.vmap(torch.func.grad(f))(x)
    make_fx(f)(x)
    make_fx(f, tracing_mode="fake")(x)
    make_fx(f, tracing_mode="symbolic")(x)
    with FakeTensorMode() as mode:
        f(mode.from_tensor(x))
    assert len(reprs) == 8
    assert all(is_short(text) and text.startswith("Pair(") for text in reprs)
    assert "left: float32[3] on cpu" in reprs[0], "vmap hides the batch"


def test_a_summary_leaves_no_trace_in_a_traced_graph():
    def f(x):
        repr(Pair(x, x))
        return x + 1

    x = torch.ones(3, dtype=torch.int64)
    assert [node.target for node in make_fx(f)(x).graph.nodes] == [
        node.target for node in make_fx(lambda x: x + 1)(x).graph.nodes
    ]


def test_a_tuple_with_a_short_repr_is_a_plain_named_tuple():
    value = params(CONFIGS["gemma"])
    for again in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert type(again) is type(value)
        assert repr(again) == repr(value) == str(value)
    assert Pair(1, 2) == (1, 2)
    assert tree.map(lambda leaf: leaf + 1, Pair(1, 2)) == Pair(2, 3)
