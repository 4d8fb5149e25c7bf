"""SigLIP checkpoints: parity with transformers, loading and saving in both directions, damaged files."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from cases import CONFIGS
from cases import params as paligemma_params
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import pgfunc as pg
from pgfunc import siglip_dual
from pgfunc.checkpoint import hf
from pgfunc.config import SiglipConfig, SiglipTextConfig
from pgfunc.errors import CheckpointError
from pgfunc.siglip_dual import prompt as dual_prompt

VISION = CONFIGS["gemma"].vision
CFG = SiglipConfig(VISION, SiglipTextConfig(vocab=40, width=16, layers=3, heads=4, hidden=20, out=24, positions=8))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32, 3 layers


def params(cfg: SiglipConfig = CFG, seed: int = 0) -> siglip_dual.DualParams:
    """Random parameters without zeros, so that every leaf matters."""
    generator = torch.Generator().manual_seed(seed)
    return pg.tree.map(
        lambda leaf: leaf + 0.2 * torch.randn(leaf.shape, generator=generator) if leaf.dim() < 2 else leaf,
        siglip_dual.init(cfg, seed),
    )


def inputs(cfg: SiglipConfig = CFG, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures and three texts."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(2, 3, cfg.vision.image_size, cfg.vision.image_size, generator=generator) * 2 - 1
    return pixels, torch.randint(0, cfg.text.vocab, (3, cfg.text.positions), generator=generator)


def words(*control: str) -> Backend:
    """A tokenizer with these control tokens, then a few words."""
    known = [*control, "<unk>", "a", "red", "star", "!", "it", "s", "its", "'", "<", ">", "/", "eos"]
    backend = Backend(models.WordLevel({word: id for id, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(control))
    return backend


def model(seed: int = 0, control: tuple[str, ...] = ("<pad>", "<eos>")) -> pg.SiglipModel:
    return pg.SiglipModel(CFG, params(seed=seed), dual_prompt.wrap(words(*control), "the tests' tokenizer"))


def theirs(seed: int = 0, vision: dict | None = None, **text) -> transformers.SiglipModel:
    """A random model of transformers with the shape of CFG; attributes equal to a default are left out."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"vocab_size": 40, "max_position_embeddings": 8, "projection_size": 24, "bos_token_id": 1}
    own = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    own |= {"image_size": 28, "patch_size": 14} | (vision or {})
    config = transformers.SiglipConfig(text_config=shape | {"eos_token_id": 1} | text, vision_config=own)
    model = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def assert_parity(found: pg.SiglipModel, expected: transformers.SiglipModel) -> None:
    pixels, ids = inputs(found.cfg)
    with torch.no_grad():
        out = expected(pixel_values=pixels, input_ids=ids)
    images, texts = (
        siglip_dual.embed_images(found.params, pixels, found.cfg),
        siglip_dual.embed_texts(found.params, ids, found.cfg),
    )
    torch.testing.assert_close(images, out.image_embeds, **CLOSE)
    torch.testing.assert_close(texts, out.text_embeds, **CLOSE)
    torch.testing.assert_close(siglip_dual.logits(found.params, images, texts), out.logits_per_image, **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_what_transformers_saves_we_load(tmp_path, seed):
    expected = theirs(seed)
    expected.save_pretrained(tmp_path)
    found = pg.load_siglip(tmp_path, device="cpu")
    assert found.cfg == CFG
    assert_parity(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_what_we_save_transformers_loads(tmp_path, seed):
    before = model(seed)
    pg.save_siglip(before, tmp_path)
    after, info = transformers.SiglipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_parity(before, after.eval())


def test_sharded_weights_load_and_a_save_replaces_them(tmp_path):
    expected = theirs()
    expected.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / hf.INDEX).exists()
    found = pg.load_siglip(tmp_path, device="cpu")
    assert_parity(found, expected)
    pg.save_siglip(found, tmp_path)
    assert {path.name for path in tmp_path.glob("model*")} == {hf.SINGLE}
    assert_parity(pg.load_siglip(tmp_path, device="cpu"), expected)


def test_shards_hold_the_same_weights(tmp_path):
    before = model()
    pg.save_siglip(before, tmp_path, shard_bytes=5000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_parity(before, transformers.SiglipModel.from_pretrained(tmp_path).eval())
    assert_parity(pg.load_siglip(tmp_path, device="cpu"), transformers.SiglipModel.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", ["learned", "rope2d"])
def test_save_and_load_change_no_bit(tmp_path, position, dtype):
    cfg = replace(CFG, vision=replace(VISION, position=position), resample="bilinear")
    before = pg.SiglipModel(cfg, pg.tree.map(lambda leaf: leaf.to(dtype), params(cfg)), model().tokenizer)
    pg.save_siglip(before, tmp_path)
    after = pg.load_siglip(tmp_path, device="cpu")
    assert after.cfg == cfg
    assert pg.tree.map(lambda a, b: torch.equal(a, b) and a.dtype == b.dtype, after.params, before.params) == (
        pg.tree.map(lambda leaf: True, before.params)
    )
    assert torch.equal(dual_prompt.text_ids(after, ["a red star"]), dual_prompt.text_ids(before, ["a red star"]))
    shapes = pg.tree.map(lambda leaf: tuple(leaf.shape), pg.load_siglip(tmp_path, device="meta").params)
    assert shapes == pg.tree.map(lambda leaf: tuple(leaf.shape), before.params)


def test_defaults_that_a_published_config_leaves_out(tmp_path):
    """google/siglip-base-patch16-224 says little more than its model types."""
    parts = {"text_config": {"model_type": "siglip_text_model"}, "vision_config": {"model_type": "siglip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"} | parts))
    cfg = pg.checkpoint.siglip_config.read_config(tmp_path)
    config = transformers.SiglipConfig()
    with torch.device("meta"):
        expected = transformers.SiglipModel(config)
    assert pg.tree.count(siglip_dual.abstract(cfg)) == sum(p.numel() for p in expected.parameters()) == 203_155_970
    assert (cfg.text.eps, cfg.text.heads, cfg.vision.heads, cfg.resample) == (1e-6, 12, 12, "bicubic")


@pytest.mark.parametrize(("side", "patch"), [(33, 14), (27, 14), (41, 14), (15, 4), (14, 14)])
def test_pixels_beyond_the_last_whole_patch_are_not_read(tmp_path, side, patch):
    """The side of so400m-patch14-384 is 27 patches and 6 pixels."""
    expected = theirs(vision={"image_size": side, "patch_size": patch})
    expected.save_pretrained(tmp_path)
    found = pg.load_siglip(tmp_path, device="cpu")
    assert found.cfg.vision.tokens == (side // patch) ** 2
    assert_parity(found, expected)
    pixels, _ = inputs(found.cfg)
    cut = pixels.clone()
    cut[..., side // patch * patch :], cut[..., side // patch * patch :, :] = 9.0, 9.0
    assert torch.equal(*(siglip_dual.embed_images(found.params, each, found.cfg) for each in (pixels, cut)))


def test_texts_of_another_width_than_pictures_are_projected(tmp_path):
    """Texts of SigLIP 2 giant-opt are 1152 wide and become vectors of 1536."""
    expected = theirs(hidden_size=12, intermediate_size=28)
    expected.save_pretrained(tmp_path)
    assert_parity(pg.load_siglip(tmp_path, device="cpu"), expected)


BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
GIANT = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 40, "num_attention_heads": 16}


def published(vision: dict, text: dict, patch: int, side: int, vocab: int, **more) -> dict:
    """A `config.json` as on the hub."""
    return {
        "model_type": "siglip",
        "text_config": text | {"model_type": "siglip_text_model", "vocab_size": vocab} | more,
        "vision_config": vision | {"model_type": "siglip_vision_model", "patch_size": patch, "image_size": side},
    }


# name -> config, and the millions of parameters in open_clip's docs/model_profile.csv, where they are
PUBLISHED = {
    "siglip-base-patch16-224": (published(BASE, BASE, 16, 224, 32_000), 203.16),
    "siglip-base-patch16-256": (published(BASE, BASE, 16, 256, 32_000), 203.20),
    "siglip-base-patch16-384": (published(BASE, BASE, 16, 384, 32_000), 203.45),
    "siglip-base-patch16-512": (published(BASE, BASE, 16, 512, 32_000), 203.79),
    "siglip-base-patch16-256-multilingual": (published(BASE, BASE, 16, 256, 250_000), 370.63),
    "siglip-large-patch16-256": (published(LARGE, LARGE, 16, 256, 32_000), 652.15),
    "siglip-large-patch16-384": (published(LARGE, LARGE, 16, 384, 32_000), 652.48),
    "siglip-so400m-patch14-224": (published(SO400M, SO400M, 14, 224, 32_000, max_position_embeddings=16), 877.36),
    "siglip-so400m-patch14-384": (published(SO400M, SO400M, 14, 384, 32_000), 877.96),
    "siglip-so400m-patch16-256-i18n": (published(SO400M, SO400M, 16, 256, 250_000), None),
} | {
    f"siglip2-{name}-patch{patch}-{side}": (published(vision, text, patch, side, 256_000, **more), None)
    for name, vision, text, patch, sides, more in (
        ("base", BASE, BASE, 16, (224, 256, 384, 512), {}),
        ("base", BASE, BASE, 32, (256,), {}),
        ("large", LARGE, LARGE, 16, (256, 384, 512), {}),
        ("so400m", SO400M, SO400M, 14, (224, 384), {}),
        ("so400m", SO400M, SO400M, 16, (256, 384, 512), {}),
        ("giant-opt", GIANT, SO400M, 16, (256, 384), {"projection_size": 1536}),
    )
    for side in sides
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_shape_has_transformers_parameters(name):
    raw, millions = PUBLISHED[name]
    cfg = pg.checkpoint.siglip_config.parse(raw)
    with torch.device("meta"):
        expected = transformers.SiglipModel(transformers.SiglipConfig(**raw))
    counted = pg.tree.count(siglip_dual.abstract(cfg))
    assert counted == sum(parameter.numel() for parameter in expected.parameters())
    assert millions is None or counted / 1e6 == pytest.approx(millions, abs=0.006)
    assert f"{cfg.vision.patch}-{cfg.vision.image_size}" in name


def test_pictures_of_any_shape_are_refused_by_name(tmp_path):
    transformers.Siglip2Config().save_pretrained(tmp_path)
    (tmp_path / hf.SINGLE).touch()
    with pytest.raises(CheckpointError, match=r"NaFlex.* such as google/siglip2-base-patch16-224"):
        pg.load_siglip(tmp_path)


# the other half of a locked vision encoder


@pytest.fixture
def nested(tmp_path):
    """A PaliGemma, and inside its folder a SigLIP that has all but the vision encoder."""
    above = pg.Model(CONFIGS["gemma"], paligemma_params(CONFIGS["gemma"], seed=5), None)
    pg.save(above, tmp_path)
    pg.save_siglip(model(), tmp_path / "siglip", vision=False)
    return tmp_path


def test_a_folder_without_a_tower_takes_that_of_the_paligemma_above(nested):
    stored = load_file(nested / "siglip" / hf.SINGLE)
    assert not any(key.startswith(("vision_model.embeddings", "vision_model.encoder")) for key in stored)
    found = pg.load_siglip(nested / "siglip", device="cpu").params
    expected = params()._replace(vision=pg.load(nested, device="cpu").params.vision)
    assert all(torch.equal(a, b) for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True))


def test_the_shipped_model_lies_in_the_folder_of_the_shipped_paligemma(nested, monkeypatch):
    monkeypatch.setattr(pg.checkpoint.siglip, "shipped", lambda: nested)
    assert pg.load_siglip(device="cpu").cfg == CFG


def test_a_tower_that_is_nowhere_or_another_is_named(nested):
    shutil.copytree(nested / "siglip", nested / "alone" / "siglip")
    with pytest.raises(CheckpointError, match=r"holds no vision encoder, and .*alone holds no PaliGemma"):
        pg.load_siglip(nested / "alone" / "siglip")
    other = replace(CONFIGS["gemma"], vision=replace(VISION, heads=4))
    pg.save(pg.Model(other, paligemma_params(other), None), nested)
    with pytest.raises(CheckpointError, match="its vision_config differs from that of"):
        pg.load_siglip(nested / "siglip")


# damage


def edit_config(folder, part: str | None = None, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (raw[part] if part else raw).update(changes)
    (folder / "config.json").write_text(json.dumps(raw))


def edit_arrays(folder, change) -> None:
    arrays = {key: value.clone() for key, value in load_file(folder / hf.SINGLE).items()}
    change(arrays)
    save_file(arrays, folder / hf.SINGLE)


IN = "vision_model.head.attention.in_proj_weight"
DAMAGE = {
    "missing key": (lambda d: edit_arrays(d, lambda a: a.pop("logit_scale")), r"logit_scale is missing"),
    "missing fused key": (lambda d: edit_arrays(d, lambda a: a.pop(IN)), rf"{IN} is missing"),
    "key too many": (lambda d: edit_arrays(d, lambda a: a.update(x=torch.ones(2))), r"x with shape \(2,\) is not part"),
    "a number for a fused array": (
        lambda d: edit_arrays(d, lambda a: a.update({IN: torch.tensor(1.0)})),
        r"found \(\)",
    ),
    "wrong fused shape": (
        lambda d: edit_arrays(d, lambda a: a.update({IN: torch.ones(75, 24)})),
        rf"{IN}: expected .* found \(75, 24\)",
    ),
    "wrong shape": (
        lambda d: edit_arrays(d, lambda a: a.update({"text_model.head.bias": torch.ones(7)})),
        r"text_model.head.bias: expected \(24,\), found \(7,\)",
    ),
    "part of a tower": (
        lambda d: edit_arrays(d, lambda a: a.pop("vision_model.post_layernorm.bias")),
        r"vision_model.post_layernorm.bias is missing",
    ),
    "another model": (lambda d: edit_config(d, model_type="clip"), "model_type is 'clip', expected 'siglip'"),
    "no pooling head": (lambda d: edit_config(d, "vision_config", vision_use_head=False), "vision_use_head is false"),
    "another activation": (lambda d: edit_config(d, "text_config", hidden_act="relu"), "hidden_act is 'relu'"),
    "odd heads": (lambda d: edit_config(d, "text_config", num_attention_heads=3), "16 is not a multiple of its 3"),
    "lengths that differ": (
        lambda d: edit_config(d, "text_config", projection_size=16),
        "text embeddings have length 16, image embeddings 24",
    ),
    "not a number": (lambda d: edit_config(d, "text_config", vocab_size="40"), "vocab_size is '40', expected a whole"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "no tokenizer in it": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
    "no end in it": (lambda d: words("<s>").save(str(d / "tokenizer.json")), "has neither </s>.* nor <eos> and <pad>"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_in_one_line(tmp_path, damage, said):
    pg.save_siglip(model(), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        pg.load_siglip(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_source_that_is_no_folder(tmp_path):
    (tmp_path / "a.npz").touch()
    with pytest.raises(CheckpointError, match="not a folder; expected a SigLIP checkpoint"):
        pg.load_siglip(tmp_path / "a.npz")


def test_a_failed_save_says_why_and_a_model_without_weights_is_not_saved(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        pg.save_siglip(model(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="no weights to save"):
        pg.save_siglip(model()._replace(params=siglip_dual.abstract(CFG)), tmp_path / "meta")
