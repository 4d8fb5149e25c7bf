"""SigLIP: parity with transformers, both ways through files; text as it was trained to be read; pure functions."""

import copy
import io
import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from cases import CONFIGS, seeds
from cases import params as paligemma_params
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import pgfunc as pg
from pgfunc import ops, siglip, siglip_dual
from pgfunc.checkpoint import hf
from pgfunc.config import SiglipConfig, SiglipTextConfig
from pgfunc.errors import CheckpointError, ImageError, PromptError
from pgfunc.siglip_dual import prompt as dual_prompt
from pgfunc.siglip_dual.prompt import canonical

VISION = CONFIGS["gemma"].vision
CFG = SiglipConfig(VISION, SiglipTextConfig(vocab=40, width=16, layers=3, heads=4, hidden=20, out=24, positions=8))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32, 3 layers


def params(cfg: SiglipConfig = CFG, seed: int = 0) -> siglip_dual.DualParams:
    """Random parameters of which none is zero, so that every leaf matters."""
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
    """A tokenizer of a few words, after the given control tokens."""
    known = [*control, "<unk>", "a", "red", "star", "!", "it", "s", "its", "'", "<", ">", "/", "eos"]
    backend = Backend(models.WordLevel({word: id for id, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(control))
    return backend


def model(seed: int = 0, control: tuple[str, ...] = ("<pad>", "<eos>")) -> pg.SiglipModel:
    return pg.SiglipModel(CFG, params(seed=seed), dual_prompt.wrap(words(*control), "the tests' tokenizer"))


def theirs(seed: int = 0, vision: dict | None = None, **text) -> transformers.SiglipModel:
    """A random model of transformers with CFG's shape; attributes that equal a default stay unsaid."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"vocab_size": 40, "max_position_embeddings": 8, "projection_size": 24, "bos_token_id": 1}
    own = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    own |= {"image_size": 28, "patch_size": 14} | (vision or {})
    config = transformers.SiglipConfig(text_config=shape | {"eos_token_id": 1} | text, vision_config=own)
    found = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return found


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


# text and pictures


@pytest.mark.parametrize(
    ("text", "siglip1", "siglip2"),
    [
        ("A Red  Star!", "a red star", "a red  star!"),
        (" it's\ta\nstar. ", "its a star", " it's\ta\nstar. "),
        ("x▁y", "x y", "x▁y"),
        ("!?", "", "!?"),
        ("ÉTOILE…", "étoile…", "étoile…"),  # only ASCII punctuation goes
    ],
)
def test_text_is_read_as_it_was_in_training(text, siglip1, siglip2):
    assert canonical(text, bare=True) == siglip1
    assert canonical(text, bare=False) == siglip2


@given(st.text(st.sampled_from("aBÉ .,'!▁\t\n<>/")), st.booleans())
def test_canonical_text_stays(text, bare):
    once = canonical(text, bare)
    assert canonical(once, bare) == once


def test_texts_are_ended_and_padded():
    """<eos> and <pad> as SigLIP 2; </s> for both as SigLIP, which also drops punctuation."""
    found = dual_prompt.text_ids(model(), ["a Red star!", "it's"])
    assert found.tolist() == [[3, 4, 5, 6, 1, 0, 0, 0], [7, 10, 8, 1, 0, 0, 0, 0]]
    first = dual_prompt.text_ids(model(control=("<pad>", "</s>")), ["a Red star!", "it's"])
    assert first.tolist() == [[3, 4, 5, 1, 1, 1, 1, 1], [9, 1, 1, 1, 1, 1, 1, 1]]
    assert dual_prompt.text_ids(model(control=("<pad>", "<eos>", "</s>")), ["a"]).tolist() == [[4, 1, *[0] * 6]]


@pytest.fixture(scope="module", params=[("<pad>", "<eos>"), ("</s>",)], ids=["siglip2", "siglip"])
def saved(request, tmp_path_factory):
    """A model with either rule of texts, and what transformers makes of its folder."""
    folder, before = tmp_path_factory.mktemp("saved"), model(control=request.param)
    pg.save_siglip(before, folder)
    return before, folder, transformers.AutoTokenizer.from_pretrained(folder)


@given(
    st.lists(
        st.sampled_from(["A", "red", " Star", "  ", "it's", "!", "<eos>", "\t\n", "É", "▁", "]", "</s>"]), max_size=2
    )
)
def test_transformers_reads_text_the_same_way(saved, parts):
    before, _, theirs = saved
    text = "".join(parts)
    assert theirs(text, padding="max_length").input_ids == dual_prompt.text_ids(before, [text])[0].tolist()


def test_the_processor_of_transformers_reads_pictures_and_text_the_same_way(saved):
    before, folder, _ = saved
    picture = Image.new("RGB", (28, 28), (200, 100, 0))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    found = processor(text=["A star!", "it"], images=[picture], padding="max_length", return_tensors="pt")
    assert set(found) == {"input_ids", "pixel_values"}
    assert torch.equal(found["input_ids"], dual_prompt.text_ids(before, ["A star!", "it"]))
    torch.testing.assert_close(found["pixel_values"], dual_prompt.pixels(before, [picture]), **CLOSE)


def test_a_tokenizer_saved_twice_is_the_same_file(saved, tmp_path):
    before, folder, _ = saved
    pg.save_siglip(pg.load_siglip(folder, device="cpu"), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    again = pg.load_siglip(tmp_path, device="cpu")
    assert torch.equal(dual_prompt.text_ids(again, ["A star!"]), dual_prompt.text_ids(before, ["A star!"]))


def test_tokens_that_a_tokenizer_defines_are_one_id_here_and_in_transformers(tmp_path):
    """Special or not; a control token beside them is spelled out."""
    backend = words("<pad>", "<eos>")
    backend.add_tokens([AddedToken("<task>", special=True), AddedToken("<part>", normalized=False)])
    before = model()._replace(tokenizer=dual_prompt.wrap(backend, "the tests' tokenizer"))
    task, part = (backend.token_to_id(name) for name in ("<task>", "<part>"))
    assert dual_prompt.encode(before.tokenizer, "a <task>star<part>") == [3, task, 5, part]
    assert dual_prompt.encode(before.tokenizer, "<task><eos>") == [task, 11, 14, 12]
    pg.save_siglip(before, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = pg.load_siglip(tmp_path, device="cpu")
    for text in ("a <task>star<part>", "<task><eos>"):
        ids = dual_prompt.text_ids(before, [text])[0].tolist()
        assert theirs(text, padding="max_length").input_ids == ids
        assert dual_prompt.text_ids(again, [text])[0].tolist() == ids


@pytest.mark.parametrize("control", [("<pad>", "<eos>"), ("</s>",)])
def test_a_copy_reads_as_the_original(control):
    before, file = model(control=control), io.BytesIO()
    said = ["a red star", "<eos>", "a<pad></s>", "<unk> it's"]
    expected = [dual_prompt.text_ids(before, [text]) for text in said]
    torch.save(before, file)
    file.seek(0)
    stored = torch.load(file, weights_only=False)
    for copied in (copy.deepcopy(before), pickle.loads(pickle.dumps(before)), stored):
        assert copied.cfg == before.cfg
        assert all(map(torch.equal, [dual_prompt.text_ids(copied, [text]) for text in said], expected))


def test_a_backend_is_not_shared():
    backend = words("<pad>", "<eos>")
    found = dual_prompt.wrap(backend, "the tests' tokenizer")
    backend.add_tokens(["<later>"])
    backend.enable_padding(length=20)
    assert dual_prompt.encode(found, "<later>") == dual_prompt.encode(model().tokenizer, "<later>")


def test_control_tokens_cannot_be_written():
    assert dual_prompt.text_ids(model(), ["<eos>"]).tolist()[0] == [11, 14, 12, 1, 0, 0, 0, 0]


def test_a_text_that_does_not_fit_is_an_error():
    full = model()
    assert dual_prompt.text_ids(full, ["a " * 7]).tolist()[0] == [3] * 7 + [1]
    with pytest.raises(PromptError, match="is 8 tokens, this model has room for 7"):
        dual_prompt.text_ids(full, ["a " * 8])
    with pytest.raises(PromptError, match="not text that can be encoded"):
        dual_prompt.text_ids(full, ["\ud800"])
    with pytest.raises(PromptError, match=r"without a tokenizer\.json"):
        dual_prompt.text_ids(full._replace(tokenizer=None), ["a"])
    few = full._replace(cfg=replace(CFG, text=replace(CFG.text, vocab=4)))
    with pytest.raises(PromptError, match=r"token id 5 is outside 0\.\.3"):
        dual_prompt.text_ids(few, ["star"])


def test_pictures_are_those_of_paligemma():
    picture = Image.new("RGB", (9, 6), (200, 100, 0))
    found = dual_prompt.pixels(model(), [picture, picture])
    torch.testing.assert_close(found[1], pg.image.pixels(picture, CONFIGS["gemma"]))
    assert dual_prompt.pixels(model(), []).shape == (0, 3, 28, 28)
    with pytest.raises(ImageError, match="no such file"):
        dual_prompt.pixels(model(), ["absent.png"])


# laws of the functions


@given(seeds)
def test_vectors_have_length_one_and_rows_do_not_mix(seed):
    pixels, ids = inputs(seed=seed)
    for embed, x in ((siglip_dual.embed_images, pixels), (siglip_dual.embed_texts, ids)):
        found = embed(params(), x, CFG)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(x)))
        torch.testing.assert_close(embed(params(), x[1:], CFG), found[1:], **CLOSE)


def test_the_first_half_of_a_head_turns_with_the_row_of_its_patch_and_the_second_with_the_column():
    cfg = replace(VISION, position="rope2d", image_size=42)  # 3 x 3 patches, heads of 12
    x, turn = torch.randn(2, 9, 2, 12), siglip.grid_angles(cfg, torch.device("cpu"))
    found = siglip.rotate_grid(x, turn)
    for patch in range(9):
        for half, place in ((slice(0, 6), patch // 3), (slice(6, 12), patch % 3)):
            angle = ops.angles(torch.tensor([[place]]), 6, cfg.theta)
            here = x[:, patch : patch + 1, :, half], found[:, patch : patch + 1, :, half]
            torch.testing.assert_close(ops.rotate(here[0], angle), here[1])
    assert siglip.grid_angles(cfg, torch.device("meta")).is_meta


@given(st.permutations(range(VISION.tokens)), seeds)
def test_pooling_does_not_see_the_order_of_the_patches(order, seed):
    x = torch.randn(2, VISION.tokens, VISION.width, generator=torch.Generator().manual_seed(seed))
    head = params().pool
    torch.testing.assert_close(siglip.pool(head, x[:, order], VISION), siglip.pool(head, x, VISION), **CLOSE)


def test_every_token_of_a_text_matters_padding_too():
    ids = torch.zeros(1, 8, dtype=torch.int64)
    whole = siglip_dual.embed_texts(params(), ids, CFG)
    for place in range(8):
        changed = ids.clone()
        changed[0, place] = 1
        assert (siglip_dual.embed_texts(params(), changed, CFG) - whole).abs().max() > 1e-3


PIXELS, IDS = inputs()


def objective(p: siglip_dual.DualParams) -> torch.Tensor:
    return (
        siglip_dual.logits(p, siglip_dual.embed_images(p, PIXELS, CFG), siglip_dual.embed_texts(p, IDS, CFG))
        .square()
        .mean()
    )


def test_grad_reaches_every_parameter_and_jvp_agrees():
    p, along = params(), params(seed=1)
    grads = torch.func.grad(objective)(p)
    # a key's bias shifts all scores of a query alike, so its gradient is zero in exact arithmetic
    idle = [path for path, leaf in pg.tree.flatten(grads).items() if not leaf.abs().max() > 1e-9]
    assert all(path.endswith("k_bias") for path in idle)
    _, slope = torch.func.jvp(objective, (p,), (along,))
    dots = pg.tree.map(lambda a, b: (a * b).sum(), grads, along)
    expected = sum(torch.utils._pytree.tree_leaves(dots))
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-4)  # float32, a sum over all parameters


def test_vmap_takes_an_ensemble():
    several = [params(seed=seed) for seed in range(3)]
    found = torch.func.vmap(objective)(pg.tree.stack(several))
    torch.testing.assert_close(found, torch.stack([objective(p) for p in several]), **CLOSE)


def test_taps_see_and_replace():
    names, (pixels, ids) = [], inputs()

    def tap(name, x):
        names.append(name)
        return torch.zeros_like(x) if name.endswith("vector") else x

    assert not siglip_dual.embed_images(params(), pixels, CFG, tap).any()
    assert not siglip_dual.embed_texts(params(), ids, CFG, tap).any()
    block = ("q", "k", "v", "attn_out", "resid_mid", "mlp_hidden", "mlp_out", "resid_post")
    blocks = ["vision.0", "vision.1", "vision.pool", "text.0", "text.1", "text.2"]
    between = {f"{tower}.{value}" for tower in ("vision", "text") for value in ("embed", "out", "vector")}
    assert set(names) == {f"{place}.{value}" for place in blocks for value in block} | between
    assert len(names) == len(set(names))


def test_half_precision_weights_give_vectors_in_float32():
    pixels, ids = inputs()
    half = pg.tree.map(lambda leaf: leaf.bfloat16(), params())
    for embed, x in ((siglip_dual.embed_images, pixels), (siglip_dual.embed_texts, ids)):
        found = embed(half, x, CFG)
        assert found.dtype == torch.float32
        assert (found * embed(params(), x, CFG)).sum(-1).min() > 0.99  # bf16
    assert siglip_dual.logits(half, found, found).dtype == torch.float32


def test_training_starts_at_factor_10_and_bias_minus_10():
    start = siglip_dual.init(CFG)
    torch.testing.assert_close(siglip_dual.logits(start, torch.eye(24)[:2], torch.eye(24)[:2]), torch.eye(2) * 10 - 10)
    assert torch.equal(start.text.layers[0].norm1_scale, torch.ones(16))
    assert start.pool.probe.abs().max() > 0
