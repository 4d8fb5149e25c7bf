"""LoRA: laws of the merge, and PEFT as the independent reference, for numbers, gradients and files."""

import json
import re

import pytest
import reference
import torch
from cases import CONFIGS, configs, params, prompt, seeds
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import pgfunc as pg
from pgfunc import paligemma, tree
from pgfunc.errors import CheckpointError, SettingError
from pgfunc.train import finetune, lora

# PEFT asks transformers by a name that transformers has just renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CFG = CONFIGS["gemma2"]
TARGETS = ["language.layers.*", "vision.layers.?.q", "projector"]


def random(values, targets=TARGETS, rank: int = 3, alpha: float = 6.0, seed: int = 0) -> lora.Lora:
    """Pairs with a b that is not zero."""
    fresh = lora.init(values, targets, rank, alpha, seed)
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        path: pair._replace(b=0.3 * torch.randn(pair.b.shape, generator=generator))
        for path, pair in fresh.pairs.items()
    }
    return fresh._replace(pairs=pairs)


@given(configs, seeds)
def test_fresh_pairs_change_nothing(cfg, seed):
    values = params(cfg)
    merged = lora.merge(values, lora.init(values, ["*"], 2, 8.0, seed))
    assert all(torch.equal(a, b) for a, b in zip(*(tree.flatten(x).values() for x in (merged, values)), strict=True))


@given(configs, seeds, st.integers(1, 5), st.floats(0.1, 32))
def test_merging_adds_the_scaled_product_and_unmerging_takes_it_away(cfg, seed, rank, alpha):
    values = params(cfg)
    pairs = random(values, rank=rank, alpha=alpha, seed=seed)
    before, merged = tree.flatten(values), tree.flatten(lora.merge(values, pairs))
    back = tree.flatten(lora.unmerge(lora.merge(values, pairs), pairs))
    for path, leaf in before.items():
        torch.testing.assert_close(back[path], leaf, atol=1e-4, rtol=1e-4)  # float32: sums of up to 32 in size
        if path in pairs.pairs:
            a, b = (half.double().numpy() for half in pairs.pairs[path])
            expected = leaf.double().numpy() + alpha / rank * (b @ a)
            torch.testing.assert_close(merged[path].double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-4)
        else:
            assert merged[path] is leaf


def test_only_matrices_that_multiply_take_part():
    paths = lora.init(params(CFG), ["*"], 2, 2.0).pairs
    assert not paths.keys() & {"language.embed", "vision.position", "vision.patch", "language.norm"}
    assert {"projector", "language.layers.0.gate", "vision.layers.1.down"} <= paths.keys()
    assert len(paths) == 1 + 7 * CFG.text.layers + 6 * CFG.vision.layers


def test_pairs_come_from_shapes_alone_and_from_the_seed():
    abstract, real = (lora.init(p, TARGETS, 2, 2.0, 5) for p in (paligemma.abstract(CFG), params(CFG)))
    other = lora.init(params(CFG), TARGETS, 2, 2.0, 6)
    for path, pair in real.pairs.items():
        assert torch.equal(abstract.pairs[path].a, pair.a)
        assert not torch.equal(other.pairs[path].a, pair.a)
        assert 0.5 < float(pair.a.abs().max()) * pair.a.shape[1] ** 0.5 <= 1  # uniform in ±1/sqrt(inputs)


@pytest.mark.parametrize("targets", [["language.*.qq"], ["projector", "vision.position"], ["language.*norm"]])
def test_a_target_that_matches_no_weight_is_an_error(targets):
    with pytest.raises(SettingError, match=f"{re.escape(repr(targets[-1]))} matches none"):
        lora.init(params(CFG), targets, 2, 2.0)


@pytest.mark.parametrize("rank", [0, -1, 33, 10**9])
def test_a_rank_below_one_or_beyond_that_of_the_matrices_is_an_error(rank):
    with pytest.raises(SettingError, match=f"lora-rank is {rank}, expected 1 or more, and at most 24"):
        lora.init(params(CFG), ["*"], rank, 2.0)


def test_in_bfloat16_the_sum_is_rounded_once():
    values = params(CFG, dtype=torch.bfloat16)
    pairs = random(values)
    merged = tree.flatten(lora.merge(values, pairs))["projector"]
    a, b = pairs.pairs["projector"]
    expected = (values.projector.float() + pairs.scale * (b @ a)).bfloat16()
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, expected)


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["gemma-2kv", "gemma2"])
def checkpoint(request, tmp_path, monkeypatch):
    """The folder of a random checkpoint, without rows behind the vocabulary."""
    text = reference.VARIANTS[request.param] | {"vocab_size": reference.VOCAB}
    monkeypatch.setitem(reference.VARIANTS, request.param, text)
    reference.save_random(tmp_path / "base", request.param)
    return tmp_path / "base"


def test_peft_loads_ours_and_loss_and_gradient_are_equal(checkpoint, tmp_path):
    model = pg.load(checkpoint, device="cpu")
    ours = random(model.params)
    lora.save(tmp_path / "adapter", ours, model.cfg, str(checkpoint))
    other = PeftModel.from_pretrained(reference.load(checkpoint), tmp_path / "adapter", is_trainable=True)
    given = prompt(model.cfg, [2, 5, 3], [9, 1, 4], padding=2)
    theirs = reference.inputs(given, model.cfg)
    expected = other(**theirs, labels=theirs["input_ids"].masked_fill(theirs["token_type_ids"] == 0, -100)).loss
    expected.backward()

    def build(pairs):
        return lora.merge(model.params, ours._replace(pairs=pairs))

    grads, loss = finetune.gradient(build, ours.pairs, [given], model.cfg)
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=0)  # float32, losses near 5
    found = {name: weight.grad for name, weight in other.named_parameters() if weight.requires_grad}
    names = lora.modules(model.cfg)
    assert len(found) == 2 * len(grads)
    for path, pair in grads.items():
        for part, grad in zip("AB", pair, strict=True):
            theirs = found[f"base_model.model.model.{names[path]}.lora_{part}.default.weight"]
            torch.testing.assert_close(grad, theirs, atol=1e-4, rtol=1e-4)  # float32; merged here, apart there


def test_we_load_pefts(checkpoint, tmp_path):
    pattern = r".*language_model.*(q_proj|down_proj)|.*vision_tower.*fc1|.*multi_modal_projector.linear"
    other = get_peft_model(
        reference.load(checkpoint),
        LoraConfig(r=2, lora_alpha=5, target_modules=pattern, init_lora_weights="gaussian"),
    )
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    other.save_pretrained(tmp_path / "adapter")
    model = pg.load(checkpoint, device="cpu")
    found = lora.load(tmp_path / "adapter", model.cfg)
    assert found.scale == 2.5
    assert len(found.pairs) == 2 * model.cfg.text.layers + model.cfg.vision.layers + 1
    given = prompt(model.cfg, [2, 5], [3, 1])
    expected = reference.logits(other.eval(), given, model.cfg)
    ours = pg.forward(lora.merge(model.params, found), given, model.cfg)
    torch.testing.assert_close(ours[given.valid], expected[given.valid], atol=1e-4, rtol=0)  # float32


@pytest.mark.parametrize("old", [
    {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model.",
     "model.multi_modal_projector.": "multi_modal_projector."},
    {"model.vision_tower.": "model.vision_tower.vision_model."},
], ids=["before 4.52", "before 5"])  # fmt: skip
def test_names_of_older_transformers_are_read(old, tmp_path):
    ours = random(params(CFG))
    lora.save(tmp_path, ours, CFG, "base")
    arrays = load_file(tmp_path / lora.WEIGHTS)
    for new, name in old.items():
        arrays = {key.replace(f"base_model.model.{new}", f"base_model.model.{name}"): x for key, x in arrays.items()}
    save_file(arrays, tmp_path / lora.WEIGHTS)
    assert_equal(lora.load(tmp_path, CFG), ours)


def test_what_is_saved_is_read_again(tmp_path):
    ours = random(params(CFG))
    lora.save(tmp_path / "new" / "folder", ours, CFG, "base")
    assert_equal(lora.load(tmp_path / "new" / "folder", CFG), ours)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [lora.ADAPTER, lora.WEIGHTS]


@pytest.mark.parametrize(("base", "name", "revision"), [
    ("google/paligemma-3b-pt-224@bfloat16", "google/paligemma-3b-pt-224", "bfloat16"),
    ("google/paligemma-3b-pt-224", "google/paligemma-3b-pt-224", None),
    ("/a/folder@home", "/a/folder@home", None),
])  # fmt: skip
def test_a_revision_of_a_hub_id_is_said_as_peft_says_it(base, name, revision, tmp_path):
    lora.save(tmp_path, random(params(CFG)), CFG, base)
    found = LoraConfig.from_pretrained(tmp_path)
    assert (found.base_model_name_or_path, found.revision) == (name, revision)


def assert_equal(found: lora.Lora, expected: lora.Lora) -> None:
    assert found.scale == expected.scale
    assert found.pairs.keys() == expected.pairs.keys()
    assert all(
        torch.equal(a, b) for path, pair in expected.pairs.items() for a, b in zip(found.pairs[path], pair, strict=True)
    )


def test_an_adapter_of_another_model_is_named(tmp_path):
    lora.save(tmp_path, random(params(CONFIGS["gemma-mha"])), CONFIGS["gemma-mha"], "base")
    with pytest.raises(CheckpointError, match=r"language\.layers\.0\.k B: expected \(16, 3\), found \(32, 3\)"):
        lora.load(tmp_path, CFG)


@pytest.mark.parametrize(("change", "said"), [
    ("half", "projector A is missing, expected shape"), ("stranger", "lora_embedding_A.weight is not a linear weight"),
    ("config", "adapter_config.json: missing"),
])  # fmt: skip
def test_an_adapter_that_is_not_whole_is_named(change, said, tmp_path):
    lora.save(tmp_path, random(params(CFG)), CFG, "base")
    arrays = load_file(tmp_path / lora.WEIGHTS)
    key = "base_model.model.model.multi_modal_projector.linear.lora_A.weight"
    if change == "half":
        del arrays[key]
    if change == "stranger":
        arrays[key.replace("lora_", "lora_embedding_")] = torch.zeros(2)
    save_file(arrays, tmp_path / lora.WEIGHTS)
    if change == "config":
        (tmp_path / lora.ADAPTER).unlink()
    with pytest.raises(CheckpointError, match=said):
        lora.load(tmp_path, CFG)


@pytest.mark.parametrize(("name", "value"), [
    ("use_dora", True), ("use_rslora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]),
    ("alpha_pattern", {"q_proj": 3}), ("init_lora_weights", "pissa_niter_4"), ("r", 0),
])  # fmt: skip
def test_more_than_plain_lora_is_refused(name, value, tmp_path):
    lora.save(tmp_path, random(params(CFG)), CFG, "base")
    settings = json.loads((tmp_path / lora.ADAPTER).read_text())
    (tmp_path / lora.ADAPTER).write_text(json.dumps(settings | {name: value}))
    with pytest.raises(CheckpointError, match=f"{name} is "):
        lora.load(tmp_path, CFG)


@pytest.mark.parametrize("changed", [{"peft_type": "IA3"}, {"r": None}, {"lora_alpha": "much"}])
def test_what_is_no_lora_is_refused(changed, tmp_path):
    lora.save(tmp_path, random(params(CFG)), CFG, "base")
    settings = json.loads((tmp_path / lora.ADAPTER).read_text())
    (tmp_path / lora.ADAPTER).write_text(json.dumps(settings | changed))
    with pytest.raises(CheckpointError, match="not a LoRA adapter"):
        lora.load(tmp_path, CFG)
