"""Quantized trees: what is quantized, that every function of the model takes them, and that files give them back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from cases import CONFIGS, configs, edit_arrays, made, params, prompt, seeds
from hypothesis import given
from hypothesis import strategies as st

import pgfunc as pg
from pgfunc import paligemma, quant
from pgfunc.checkpoint import bigvision, hf
from pgfunc.config import Config
from pgfunc.errors import CheckpointError, NumericalError, SettingError
from pgfunc.laws import ragged
from pgfunc.quant import lowbit
from pgfunc.quant.lowbit import GROUPS, TYPES
from pgfunc.train import finetune, lora

CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # float32, three layers; kernels sum in another order
WIDE = {
    "width": 128,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 64,
    "hidden": 256,
    "query_scale": 0.125,
}  # sizes that int4 takes
WIDE_CONFIGS = {name: replace(CONFIGS[name], text=replace(CONFIGS[name].text, **WIDE)) for name in ("gemma", "gemma2")}
IMAGES = Path(__file__).parent.parent / "examples/images"
METHODS = ["int8", "fp8", "int4", "int4-64", "int4-32"]

wide_configs = st.sampled_from(sorted(WIDE_CONFIGS)).map(WIDE_CONFIGS.__getitem__)
methods = st.sampled_from(METHODS)


def small(cfg: Config, method: str = "int4", seed: int = 0, dtype: torch.dtype = torch.float32) -> pg.Params:
    return quant.quantize(params(cfg, seed, dtype), method)


def bits(tree) -> dict:
    return {path: (leaf.dtype, leaf.tolist()) for path, leaf in pg.tree.flatten(tree).items()}


# --- trees ------------------------------------------------------------------------------------------------------------


@given(wide_configs, methods)
def test_the_matrices_of_the_language_model_are_quantized_and_nothing_else(cfg, method):
    plain = params(cfg)
    before = bits(plain)
    found = quant.quantize(plain, method)
    assert bits(plain) == before, "the given tree is not changed"
    chosen = {f"language.layers.{i}.{name}" for i in range(3) for name in ("q", "k", "v", "out", "gate", "up", "down")}
    table = method if GROUPS[method] == 0 else "int8"
    assert quant.methods(found) == dict.fromkeys(["language.embed"], table) | dict.fromkeys(chosen, method)
    leaves = pg.tree.flatten(plain)
    for path, w in quant.weights(found).items():
        assert w is leaves[path] or path in chosen | {"language.embed"}
        assert isinstance(w, TYPES[table if path == "language.embed" else method]) or w is leaves[path]
    back = pg.tree.flatten(quant.dequantize(found))
    assert [(path, leaf.shape) for path, leaf in back.items()] == [(path, leaf.shape) for path, leaf in leaves.items()]
    errors = quant.errors(plain, found)
    assert errors.keys() == quant.methods(found).keys()
    assert 0.001 < errors["language.embed"] < (0.03 if method == "fp8" else 0.01)  # normal rows of 128: 0.026, 0.0063
    assert max(errors.values()) < {"int8": 0.01, "fp8": 0.03}.get(method, 0.11)  # groups of 128 normal numbers: 0.099


def test_patterns_choose_and_what_is_quantized_so_already_stays():
    plain = params(WIDE_CONFIGS["gemma"])
    some = quant.quantize(plain, "int8", ["language.layers.*.gate", "vision.layers.0.q"])
    assert set(quant.methods(some)) == {"vision.layers.0.q", *(f"language.layers.{i}.gate" for i in range(3))}
    both = quant.quantize(some, "int4", ["language.layers.1.up", "language.embed"])
    assert quant.methods(both) == quant.methods(some) | {"language.layers.1.up": "int4", "language.embed": "int8"}
    again = quant.quantize(both, "int8", ["*.gate"])
    assert quant.weights(again)["language.layers.0.gate"] is quant.weights(both)["language.layers.0.gate"]


WRONG = {
    "method": (
        lambda p: quant.quantize(p, "int3"),
        r"quantize is 'int3', expected one of int8, fp8, int4, int4-64, int4-32",
    ),
    "table": (lambda p: quant.quantize(p, "int3", ["language.embed"]), r"quantize is 'int3'"),
    "pattern": (lambda p: quant.quantize(p, "int8", ["language.gate"]), r"'language\.gate' matches none of 34 paths"),
    "vector": (lambda p: quant.quantize(p, "int8", ["*norm*"]), r"matches none"),
    "position": (lambda p: quant.apply(p, {"vision.position": "int8"}), r"vision\.position is no matrix that can be"),
    "twice": (
        lambda p: quant.quantize(quant.quantize(p, "int8"), "int4"),
        r"language\.layers\.0\.q is int8 already, expected plain weights or int4; dequantize it first",
    ),
    "size": (
        lambda p: quant.quantize(p, "int4", ["vision.layers.0.q"]),
        r"vision\.layers\.0\.q: int4 takes outputs in multiples of 64 and inputs in multiples of 128, found 24 x 24",
    ),
    "training": (
        lambda p: finetune.select(quant.quantize(p, "int8")),
        r"training needs plain weights, language\.embed",
    ),
    "lora": (lambda p: lora.init(quant.quantize(p, "int8"), ["language.*.q"], 2, 4.0), r"LoRA needs plain weights"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_quantized_is_said_in_one_line(what):
    make, message = WRONG[what]
    with pytest.raises(SettingError, match=message) as found:
        make(params(WIDE_CONFIGS["gemma"]))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", pg.PUBLISHED)
@pytest.mark.parametrize(("method", "share"), [("int8", 0.501), ("fp8", 0.501), ("int4", 0.35)])
def test_every_published_size_can_be_quantized(name, method, share):
    plain = paligemma.abstract(pg.PUBLISHED[name])
    plain = pg.tree.map(lambda leaf: leaf.bfloat16(), plain)
    found = quant.quantize(plain, method)
    assert len(quant.methods(found)) == 1 + 7 * pg.PUBLISHED[name].text.layers
    assert pg.tree.nbytes(found.language) < share * pg.tree.nbytes(plain.language)


@pytest.mark.parametrize(("method", "inputs"), [("int4", 192), ("int4-64", 96), ("int4-32", 16)])
def test_int4_takes_whole_groups_and_whole_blocks(method, inputs):
    for shape in ((64, inputs), (96, 256)):
        tree = {"w": torch.ones(shape)}
        with pytest.raises(SettingError, match=rf"w: {method} takes outputs .* found {shape[0]} x {shape[1]}"):
            quant.quantize(tree, method, ["w"])
        assert quant.methods(quant.quantize(tree, "int8", ["w"])) == {"w": "int8"}
    assert quant.methods(quant.quantize({"w": torch.ones(64, 2 * inputs)}, "int4-32", ["w"])) == {"w": "int4-32"}


def test_a_gpu_without_fp8_says_so(monkeypatch):
    small, cuda = quant.quantize(params(WIDE_CONFIGS["gemma"]), "fp8", ["*.gate"]), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for refused in (lambda: quant.check_device("fp8", cuda), lambda: quant.to_device_layout(small, cuda)):
        with pytest.raises(SettingError, match=r"fp8 needs .* 8\.9 or more, cuda:0 has 8\.0; take int8"):
            refused()
    quant.check_device("int8", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    quant.check_device("fp8", cuda)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_an_error_that_names_the_weight(number):
    plain = params(WIDE_CONFIGS["gemma"])
    broken = plain.language.layers[1].up.clone()
    broken[3, 4] = number
    with pytest.raises(NumericalError, match=r"language\.layers\.1\.up: has numbers that are not finite"):
        quant.quantize(pg.tree.replace(plain, {"language.layers.1.up": broken}), "int4")


# --- the model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@given(wide_configs, methods, st.data())
def test_logits_are_those_of_the_dequantized_tree(cfg, method, data):
    found, asked = small(cfg, method, data.draw(seeds)), made(data.draw(ragged()), cfg)
    plain = quant.dequantize(found)
    logits = pg.forward(found, asked, cfg)
    assert logits.shape[-1] == cfg.text.vocab, "without the padding of the table"
    torch.testing.assert_close(logits, pg.forward(plain, asked, cfg), **CLOSE)


@torch.no_grad()
@given(configs, st.data())
def test_logits_of_int8_are_those_of_the_dequantized_tree_for_every_size(cfg, data):
    found, asked = small(cfg, "int8", data.draw(seeds)), made(data.draw(ragged()), cfg)
    torch.testing.assert_close(pg.forward(found, asked, cfg), pg.forward(quant.dequantize(found), asked, cfg), **CLOSE)


@torch.no_grad()
@given(wide_configs, st.sampled_from(["int8", "int4-64"]), st.integers(1, 4), seeds)
def test_decode_equals_the_longer_prefill(cfg, method, count, seed):
    found, whole = small(cfg, method, seed), prompt(cfg, [3, 2], [count, count], seed=seed)
    start = prompt(cfg, [3, 2], [0, 0], seed=seed)
    start = start._replace(tokens=whole.tokens[:, :3], pixels=whole.pixels)
    _, cache = pg.prefill(found, start, cfg, count)
    for i in range(count):
        rows = torch.tensor([3, 2]) + i
        token = whole.tokens.gather(1, rows[:, None])[:, 0]
        logits, cache = pg.decode(found, token, cache, cfg)
    torch.testing.assert_close(logits, pg.prefill(found, whole, cfg, 0)[0], **CLOSE)


@torch.no_grad()
def test_an_ensemble_of_quantized_trees_is_mapped_over():
    cfg = WIDE_CONFIGS["gemma2"]
    members, asked = [small(cfg, "int4", seed) for seed in (1, 2)], prompt(cfg, [3], [2])
    both = torch.func.vmap(lambda p: pg.forward(p, asked, cfg))(pg.tree.stack(members))
    for found, member in zip(both, members, strict=True):
        torch.testing.assert_close(found, pg.forward(member, asked, cfg), **CLOSE)


def test_gradients_of_the_pixels_are_those_of_the_dequantized_tree():
    cfg = WIDE_CONFIGS["gemma"]
    found, asked = small(cfg), prompt(cfg, [3], [2])

    def loss(pixels, weights):
        return finetune.loss(weights, asked._replace(pixels=pixels), cfg)

    slope = torch.func.grad(loss)(asked.pixels, found)
    assert slope.any()
    torch.testing.assert_close(slope, torch.func.grad(loss)(asked.pixels, quant.dequantize(found)), **CLOSE)


# --- files ------------------------------------------------------------------------------------------------------------


def in_rows(tree):
    """The tree with its 4 bits in the order for GPUs."""
    return quant._map(lambda path, w: lowbit.ordered(w, rows=True) if isinstance(w, lowbit.Int4) else w, tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_files_give_back_every_bit(tmp_path, method, dtype):
    cfg = WIDE_CONFIGS["gemma2"]
    plain = params(cfg, 1, dtype)
    mixed = quant.quantize(quant.quantize(plain, "int8", ["language.layers.0.up"]), "int4-64", ["language.layers.2.q"])
    for tree in (quant.quantize(plain, method), mixed):
        pg.save(pg.Model(cfg, tree, None), tmp_path, shard_bytes=10**5)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        back = pg.load(tmp_path, device="cpu")
        assert back.cfg == cfg
        assert quant.methods(back.params) == quant.methods(tree)
        assert bits(back.params) == bits(tree)
        pg.save(pg.Model(cfg, in_rows(tree), None), tmp_path / "from a GPU", shard_bytes=10**5)
        assert bits(pg.load(tmp_path / "from a GPU", device="cpu").params) == bits(tree)
        headers = pg.tree.flatten(pg.load(tmp_path, device="meta").params)
        assert {path: (leaf.shape, leaf.dtype) for path, leaf in headers.items()} == {
            path: (leaf.shape, leaf.dtype) for path, leaf in pg.tree.flatten(tree).items()
        }


def test_scales_of_float32_survive_bfloat16(tmp_path):
    cfg, tree = WIDE_CONFIGS["gemma"], small(WIDE_CONFIGS["gemma"])
    pg.save(pg.Model(cfg, tree, None), tmp_path)
    back = quant.weights(pg.load(tmp_path, dtype="bfloat16", device="cpu").params)
    for path in quant.methods(tree):
        given = quant.weights(tree)[path]
        assert back[path].scale.dtype == torch.bfloat16
        assert back[path].values.dtype == given.values.dtype
        assert torch.equal(back[path].scale.float(), given.scale)
        assert torch.equal(back[path].values, given.values)


def test_load_and_convert_quantize(tmp_path):
    cfg, plain = WIDE_CONFIGS["gemma"], params(WIDE_CONFIGS["gemma"])
    pg.save(pg.Model(cfg, plain, None), tmp_path / "plain")
    pg.convert(tmp_path / "plain", tmp_path / "small", quantize="int4")
    expected = bits(quant.quantize(plain, "int4"))
    assert bits(pg.load(tmp_path / "small", device="cpu").params) == expected
    assert bits(pg.load(tmp_path / "plain", device="cpu", quantize="int4").params) == expected
    pg.save(pg.Model(cfg, plain, None), tmp_path / "small")
    assert bits(pg.load(tmp_path / "small", device="cpu").params) == bits(plain), (
        "nothing of the quantized model is left"
    )
    with pytest.raises(SettingError, match=r"x\.npz: big_vision's layout needs plain weights, language\.embed is int8"):
        bigvision.save(tmp_path / "x.npz", cfg, quant.quantize(plain, "int8"))
    assert not list(tmp_path.glob("x.npz*"))


KEY = "language_model.model.layers.0.self_attn.q_proj.weight"
DAMAGE = {
    "part missing": (lambda a: a.pop(f"{KEY}.scale"), rf"{KEY}\.scale is missing, expected shape \(1, 128, 2\)"),
    "plain weight": (
        lambda a: a.update({KEY: torch.zeros(128, 128)}) or a.pop(f"{KEY}.scale") is a.pop(f"{KEY}.values"),
        rf"{KEY}\.scale \(and 1 more\) is missing",
    ),
    "shape": (
        lambda a: a.update({f"{KEY}.values": torch.zeros(2, 64, 32, dtype=torch.uint8)}),
        rf"{KEY}\.values: expected \(2, 128, 32\), found \(2, 64, 32\)",
    ),
    "signed": (
        lambda a: a.update({f"{KEY}.values": torch.zeros(2, 128, 32, dtype=torch.int8)}),
        rf"{KEY}\.values: expected torch\.uint8, found torch\.int8",
    ),
    "floats": (
        lambda a: a.update({f"{KEY}.values": torch.zeros(2, 128, 32)}),
        rf"{KEY}\.values: expected torch\.uint8, found torch\.float32",
    ),
    "whole scale": (
        lambda a: a.update({f"{KEY}.scale": torch.zeros(1, 128, 2, dtype=torch.int8)}),
        rf"{KEY}\.scale: expected floating point numbers, found torch\.int8",
    ),
    "other dtype": (lambda a: a.update({f"{KEY}.scale": torch.zeros(1, 128, 2).half()}), r"choose one with dtype="),
    "head": (lambda a: a.update({"lm_head.weight": torch.zeros(3, 3)}), r"lm_head\.weight differs"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_one_line_that_names_key_and_shapes(what, tmp_path):
    change, message = DAMAGE[what]
    pg.save(pg.Model(WIDE_CONFIGS["gemma"], small(WIDE_CONFIGS["gemma"]), None), tmp_path)
    edit_arrays(tmp_path / hf.SINGLE, change)
    with pytest.raises(CheckpointError, match=message) as found:
        pg.load(tmp_path, device="cpu")
    assert "\n" not in str(found.value)


ENTRIES = {
    "another library's": (
        {"quant_method": "bitsandbytes"},
        "quantization_config is not one of pgfunc's; load the original weights",
    ),
    "no table": ({"format": "pgfunc", "weights": ["q"]}, "does not map paths to methods"),
    "another's table": ({"quant_method": "x", "weights": {"language.embed": "int8"}}, "is not one of pgfunc's"),
    "no names": (
        {"format": "pgfunc", "weights": {"language.embed": [8]}},
        "does not map paths to methods",
    ),
    "no such method": ({"format": "pgfunc", "weights": {"language.embed": "8"}}, "quantize is '8', expected"),
    "no such weight": ({"format": "pgfunc", "weights": {"language.q": "int8"}}, "language.q is no matrix"),
    "a size": ({"format": "pgfunc", "weights": {"vision.layers.0.q": "int4"}}, "found 24 x 24"),
    "less than there is": ({"format": "pgfunc", "weights": {}}, "is missing"),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_a_quantization_config_that_does_not_fit_is_one_line(what, tmp_path):
    entry, message = ENTRIES[what]
    pg.save(pg.Model(WIDE_CONFIGS["gemma"], small(WIDE_CONFIGS["gemma"]), None), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": entry}))
    with pytest.raises(CheckpointError) as found:
        pg.load(tmp_path, device="cpu")
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_transformers_refuses_a_quantized_folder(tmp_path):
    pg.save(pg.Model(WIDE_CONFIGS["gemma"], small(WIDE_CONFIGS["gemma"]), None), tmp_path)
    with pytest.raises(ValueError, match="quantization config"):
        reference.load(tmp_path)


# --- the shipped checkpoint -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(shipped) -> tuple[pg.Prompt, torch.Tensor]:
    """The shipped checkpoint's own answers about its pictures as suffixes, and the logits that predict them."""
    pictures = [str(IMAGES / f"{name}.png") for name in ("scene", "cars", "shapes", "cat-and-bus")]
    asked = ["caption en"] * 4 + ["detect cat ; bus"] * 4 + ["segment car"] * 4
    answers = pg.generate(shipped, pictures * 3, asked, max_new_tokens=24)
    whole = pg.prepare(shipped, pictures * 3, asked, [done.text for done in answers])
    return whole, predicting(shipped.params, whole, shipped.cfg)


@torch.no_grad()
def predicting(weights: pg.Params, whole: pg.Prompt, cfg: Config) -> torch.Tensor:
    """The logits where the next token is one of the suffix."""
    return pg.forward(weights, whole, cfg)[:, :-1][(whole.causal & whole.valid)[:, 1:]]


@pytest.mark.parametrize(
    ("method", "logits", "agreement"),
    # the change's root mean square over the logits' standard deviation, and equal tokens; measured on 129 tokens:
    [
        ("int8", 0.03, 0.97),  # 0.011, 0.99
        ("fp8", 0.1, 0.95),  # 0.050, 0.98
        ("int4", 0.2, 0.75),  # 0.127, 0.90
        ("int4-32", 0.15, 0.8),  # 0.110, 0.95
    ],
)
def test_the_shipped_checkpoint_says_almost_the_same(shipped, answered, method, logits, agreement):
    whole, plain = answered
    found = predicting(quant.quantize(shipped.params, method), whole, shipped.cfg)
    error = (found - plain).square().mean().sqrt() / plain.std()
    equal = found.argmax(-1).eq(plain.argmax(-1)).float().mean()
    assert 0.001 < error < logits
    assert equal > agreement
