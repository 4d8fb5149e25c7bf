"""Checkpoints: what is loaded is what was saved, in every format and key layout."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from cases import CONFIGS, bits, configs, edit_arrays, params, seeds, text_model
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import pgfunc as pg
from pgfunc import paligemma
from pgfunc.checkpoint import bigvision, hf, hf_config, shards, source
from pgfunc.checkpoint.tables import Slot, to_arrays
from pgfunc.errors import CheckpointError
from pgfunc.train import lora


def model(name: str = "gemma", dtype: torch.dtype = torch.float32, seed: int = 0) -> pg.Model:
    return pg.Model(CONFIGS[name], params(CONFIGS[name], seed, dtype), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_hf_to_bigvision_to_hf_is_bit_equal(tmp_path, name, dtype):
    before = model(name, dtype)
    pg.save(before, tmp_path / "hf")
    pg.convert(tmp_path / "hf", tmp_path / "bv.npz")
    pg.convert(tmp_path / "bv.npz", tmp_path / "back", config=tmp_path / "hf" / "config.json")
    after = pg.load(tmp_path / "back", device="cpu")
    assert after.cfg == before.cfg
    assert bits(after.params) == bits(before.params)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bigvision_to_hf_to_bigvision_is_bit_equal(tmp_path, dtype):
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    cfg = CONFIGS["gemma2"]
    bigvision.save(first, cfg, params(cfg, dtype=dtype))
    pg.save(pg.Model(cfg, paligemma.abstract(cfg), None)._replace(params=params(cfg)), tmp_path / "cfg")
    pg.convert(first, tmp_path / "hf", config=tmp_path / "cfg" / "config.json")
    pg.convert(tmp_path / "hf", second)
    with np.load(first, allow_pickle=False) as one, np.load(second, allow_pickle=False) as two:
        assert set(one.files) == set(two.files)
        assert all(one[key].dtype == two[key].dtype and one[key].tobytes() == two[key].tobytes() for key in one.files)


def test_npz_has_the_shapes_of_big_vision(tmp_path):
    published = pg.PUBLISHED["paligemma2-3b-224"]
    cfg = replace(published, vision=replace(published.vision, layers=2), text=replace(published.text, layers=3))
    shapes = {key: tuple(x.shape) for key, x in to_arrays(bigvision.table(cfg), paligemma.abstract(cfg)).items()}
    expected = {
        "img/embedding/kernel": (14, 14, 3, 1152),
        "img/pos_embedding": (1, 256, 1152),
        "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel": (2, 1152, 16, 72),
        "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/bias": (2, 16, 72),
        "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel": (2, 16, 72, 1152),
        "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": (2, 1152, 4304),
        "img/Transformer/encoderblock/MlpBlock_0/Dense_1/kernel": (2, 4304, 1152),
        "img/head/kernel": (1152, 2304),
        "llm/embedder/input_embedding": (257152, 2304),
        "llm/layers/attn/q_einsum/w": (3, 8, 2304, 256),
        "llm/layers/attn/kv_einsum/w": (3, 2, 4, 2304, 256),
        "llm/layers/attn/attn_vec_einsum/w": (3, 8, 256, 2304),
        "llm/layers/mlp/gating_einsum": (3, 2, 2304, 9216),
        "llm/layers/mlp/linear": (3, 9216, 2304),
        "llm/layers/post_ffw_norm/scale": (3, 2304),
        "llm/final_norm/scale": (2304,),
    }
    assert expected.items() <= shapes.items()
    equal_heads = replace(cfg, text=replace(cfg.text, kv_heads=8))
    keys = to_arrays(bigvision.table(equal_heads), paligemma.abstract(equal_heads))
    assert tuple(keys["llm/layers/attn/qkv_einsum/w"].shape) == (3, 3, 8, 2304, 256)


def test_npz_weights_give_the_products_of_big_visions_einsums(tmp_path):
    """The einsums of big_vision's gemma.py on big_vision's arrays equal our linear maps on our parameters."""
    cfg, tree = CONFIGS["gemma2"], params(CONFIGS["gemma2"])
    arrays = to_arrays(bigvision.table(cfg), tree)
    x, layer = torch.randn(5, cfg.text.width), tree.language.layers[1]
    q = torch.einsum("td,ndh->tnh", x, arrays["llm/layers/attn/q_einsum/w"][1])
    k, v = torch.einsum("td,ckdh->ctkh", x, arrays["llm/layers/attn/kv_einsum/w"][1])
    out = torch.einsum("tnh,nhd->td", q, arrays["llm/layers/attn/attn_vec_einsum/w"][1])
    gate, up = torch.einsum("td,cdf->ctf", x, arrays["llm/layers/mlp/gating_einsum"][1])
    for actual, expected in (
        (q, x @ layer.q.T), (k, x @ layer.k.T), (v, x @ layer.v.T), (gate, x @ layer.gate.T), (up, x @ layer.up.T),
        (out, q.flatten(1) @ layer.out.T),
    ):  # fmt: skip
        torch.testing.assert_close(actual.flatten(1), expected, atol=1e-5, rtol=1e-5)
    pixels = torch.randn(14, 14, 3)
    patch = torch.einsum("yxc,yxcd->d", pixels, arrays["img/embedding/kernel"])
    flat = pg.paligemma.siglip.patchify(pixels.permute(2, 0, 1)[None], replace(cfg.vision, image_size=14))[0, 0]
    torch.testing.assert_close(tree.vision.patch.flatten(1) @ flat, patch, atol=1e-5, rtol=1e-5)


def test_the_two_leaves_drawn_in_tables_read_and_write_as_drawn():
    slots = pg.tree.flatten(bigvision.table(pg.PUBLISHED["paligemma-3b-224"]))
    projector, down = slots["projector"], slots["language.layers.3.down"]
    assert (projector, down) == (
        Slot("img/head/kernel", (), "e d -> d e"),
        Slot("llm/layers/mlp/linear", (3,), "f d -> d f"),
    )
    kernel, linear = torch.randn(2, 3), torch.randn(4, 2, 3)
    assert torch.equal(projector.from_array(kernel), kernel.T)
    assert torch.equal(down.from_array(linear), linear[3].T)
    assert torch.equal(projector.to_array(kernel.T), kernel)
    assert torch.equal(down.to_array(linear[3].T), linear[3])


def test_npz_without_the_params_prefix_loads_too(tmp_path):
    cfg, tree = CONFIGS["gemma"], params(CONFIGS["gemma"])
    arrays = to_arrays(bigvision.table(cfg), tree)
    np.savez(tmp_path / "bare.npz", **{key: value.numpy() for key, value in arrays.items()})
    assert bits(bigvision.load(tmp_path / "bare.npz", cfg, None, torch.device("cpu"))) == bits(tree)


@given(configs, seeds, st.integers(2_000, 30_000))
def test_shards_of_any_size_hold_the_same_weights(tmp_path_factory, cfg, seed, shard_bytes):
    folder, before = tmp_path_factory.mktemp("shards"), params(cfg, seed)
    pg.save(pg.Model(cfg, before, None), folder, shard_bytes)
    assert bits(pg.load(folder, device="cpu").params) == bits(before)
    assert len(list(folder.glob("*.safetensors"))) > 1
    pg.save(pg.Model(cfg, before, None), folder)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"], "no stale shard or index remains"


def test_a_single_file_is_preferred_to_an_index(tmp_path):
    pg.save(model(seed=1), tmp_path, shard_bytes=10_000)
    pg.save(model(seed=2), tmp_path / "other")
    (tmp_path / "other" / hf.SINGLE).rename(tmp_path / hf.SINGLE)
    assert bits(pg.load(tmp_path, device="cpu").params) == bits(model(seed=2).params)


def test_saving_leaves_other_files_alone(tmp_path):
    pg.save(model(), tmp_path, shard_bytes=10_000)
    for name in ("model_backup.safetensors", "model-lora.safetensors", "notes.txt"):
        (tmp_path / name).write_text("user's")
    pg.save(model(), tmp_path)
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {"model_backup.safetensors", "model-lora.safetensors", "notes.txt", hf.SINGLE, "config.json",
                    "preprocessor_config.json"}  # fmt: skip


def test_an_interrupted_save_leaves_the_old_weights(tmp_path, monkeypatch):
    pg.save(model(seed=1), tmp_path, shard_bytes=10_000)
    files, write = [], shards.write_safetensors

    def interrupted(file, arrays, metadata):
        files.append(file)
        if len(files) == 3:
            raise OSError("no space left")
        write(file, arrays, metadata)

    monkeypatch.setattr(shards, "write_safetensors", interrupted)
    with pytest.raises(CheckpointError, match="cannot be written"):
        pg.save(model(seed=2), tmp_path, shard_bytes=10_000)
    assert bits(pg.load(tmp_path, device="cpu").params) == bits(model(seed=1).params)
    assert not list(tmp_path.glob(".*"))


def test_a_failed_conversion_leaves_no_files(tmp_path):
    pg.save(model(), tmp_path / "hf")
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(CheckpointError, match=r"x\.npz: cannot be written"):
        pg.convert(tmp_path / "hf", tmp_path / "x.npz")
    assert not list(tmp_path.glob(".*"))


def test_layers_that_share_tensors_are_saved_separately(tmp_path):
    tree = params(CONFIGS["gemma"])
    first = tree.language.layers[0]
    tied = tree._replace(language=tree.language._replace(layers=(first,) * 3))
    pg.save(pg.Model(CONFIGS["gemma"], tied, None), tmp_path)
    assert bits(pg.load(tmp_path, device="cpu").params) == bits(tied)


@pytest.mark.parametrize(
    "change", [{"final_softcap": 3.0}, {"query_scale": 1.0}, {"window": 4}, {"eps": 0.0}, {"positions": 2**21}]
)
def test_a_config_that_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, change):
    cfg = replace(CONFIGS["gemma"], text=replace(CONFIGS["gemma"].text, **change))
    with pytest.raises(CheckpointError, match=r"config\.json cannot hold"):
        pg.save(pg.Model(cfg, params(cfg), None), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_model_without_weights_is_not_saved(tmp_path):
    cfg = CONFIGS["gemma"]
    with pytest.raises(CheckpointError, match="no weights to save"):
        pg.save(pg.Model(cfg, paligemma.abstract(cfg), None), tmp_path)


def test_gemma_2_without_a_window_round_trips(tmp_path):
    cfg = replace(CONFIGS["gemma2"], text=replace(CONFIGS["gemma2"].text, window=0, final_softcap=0.0))
    assert hf_config.parse(hf_config.render(cfg, "float32")) == cfg


def test_an_npz_with_padding_rows_loads_with_a_published_config(tmp_path, monkeypatch):
    cfg = CONFIGS["gemma"]
    bigvision.save(tmp_path / "x.npz", cfg, params(cfg))
    monkeypatch.setitem(pg.PUBLISHED, "small", replace(cfg, text=replace(cfg.text, padding=0)))
    assert pg.load(tmp_path / "x.npz", device="meta", config="small").cfg == cfg


def test_a_model_can_be_saved_over_the_files_that_it_is_mapped_from(tmp_path):
    before = model()
    pg.save(before, tmp_path)
    pg.save(pg.load(tmp_path, device="cpu"), tmp_path)
    assert bits(pg.load(tmp_path, device="cpu").params) == bits(before.params)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the mappings where Linux lists them")
def test_loading_maps_the_file_without_a_copy(tmp_path):
    pg.save(model(), tmp_path)
    leaves = pg.tree.flatten(pg.load(tmp_path, device="cpu").params).values()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    assert all(any(start <= leaf.data_ptr() < stop for start, stop in spans) for leaf in leaves)


def test_dtype_casts_every_leaf(tmp_path):
    pg.save(model(), tmp_path)
    for name in ("bfloat16", torch.float64):
        dtypes = {leaf.dtype for leaf in pg.tree.flatten(pg.load(tmp_path, name, "cpu").params).values()}
        assert dtypes == {torch.bfloat16 if name == "bfloat16" else torch.float64}


@given(configs)
def test_config_json_round_trips(cfg):
    assert hf_config.parse(hf_config.render(cfg, "float32")) == cfg


@pytest.mark.parametrize("name", ["paligemma-3b-224", "paligemma2-3b-448", "paligemma2-10b-896", "paligemma2-28b-224"])
def test_published_config_json_gives_the_published_value(name):
    """The text_config is as on the hub: defaults of the class are omitted, and there are 64 padding rows."""
    cfg = pg.PUBLISHED[name]
    text = {"hidden_size": cfg.text.width, "intermediate_size": cfg.text.hidden, "num_hidden_layers": cfg.text.layers,
            "num_attention_heads": cfg.text.heads, "num_key_value_heads": cfg.text.kv_heads,
            "vocab_size": 257_216}  # fmt: skip
    text["model_type"] = "gemma2" if cfg.text.post_norms else "gemma"
    if "28b" in name:
        text |= {"head_dim": 128, "query_pre_attn_scalar": 144}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model", "patch_size": 14,
              "num_attention_heads": 16, "num_hidden_layers": 27, "image_size": cfg.vision.image_size}  # fmt: skip
    raw = {"model_type": "paligemma", "image_token_index": 257_152, "text_config": text, "vision_config": vision}
    assert hf_config.parse(raw) == replace(cfg, text=replace(cfg.text, padding=64))


@pytest.mark.parametrize("resample", ["bilinear", "lanczos", "bicubic"])
def test_the_resize_filter_of_the_checkpoint_is_kept(tmp_path, resample):
    pg.save(model()._replace(cfg=replace(CONFIGS["gemma"], resample=resample)), tmp_path)
    assert pg.load(tmp_path, device="cpu").cfg.resample == resample
    pg.convert(tmp_path, tmp_path / "x.npz")
    assert pg.load(tmp_path / "x.npz", device="cpu", config=tmp_path).cfg.resample == resample
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert pg.load(tmp_path, device="cpu").cfg.resample == resample, "newer folders keep it in this file"


def test_a_hub_id_is_read_from_the_local_cache_when_offline(tmp_path):
    revision = "a" * 40
    repository = tmp_path / "models--someone--tiny"
    pg.save(model(), repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    script = "import sys, pgfunc as pg; print(pg.tree.count(pg.load(sys.argv[1], device='cpu').params))"

    def run(name: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", script, name], env=os.environ | environment, capture_output=True, text=True
        )

    assert int(run("someone/tiny").stdout) == pg.tree.count(model().params)
    assert int(run("someone/tiny@main").stdout) == pg.tree.count(model().params)
    assert "someone/other: no such folder, not in the hub's local cache" in run("someone/other").stderr


NAMES = {
    "google/paligemma-3b-pt-224-jax": "paligemma-3b-224",
    "google/paligemma-3b-mix-448-jax": "paligemma-3b-448",
    "google/paligemma-3b-ft-refcoco-seg-896-jax": "paligemma-3b-896",
    "google/paligemma2-10b-ft-docci-448-jax@bfloat16": "paligemma2-10b-448",
    "paligemma2-28b-pt-896.b16.npz": "paligemma2-28b-896",
    "/data/paligemma-3b-448/PaliGemma2-3b-pt-224.npz": "paligemma2-3b-224",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_config_of_an_npz_follows_from_its_name(name, tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **{"params/img/head/bias": np.zeros(2, "f4")})
    assert source.named_config(None, path, name) == pg.PUBLISHED[NAMES[name]]


def test_a_hub_repository_with_one_npz_is_read_from_the_cache_with_the_config_in_its_name(tmp_path, monkeypatch):
    cfg = CONFIGS["gemma2"]
    revision, repository = "a" * 40, tmp_path / "models--google--paligemma2-3b-pt-224-jax"
    (repository / "snapshots" / revision).mkdir(parents=True)
    bigvision.save(repository / "snapshots" / revision / "weights.npz", cfg, params(cfg))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    patterns = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return huggingface_hub.hf_api.HfApi().snapshot_download(
            name, revision=revision, allow_patterns=allow_patterns, cache_dir=tmp_path, local_files_only=True
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setitem(pg.PUBLISHED, "paligemma2-3b-224", cfg)
    loaded = pg.load("google/paligemma2-3b-pt-224-jax", device="cpu")
    assert loaded.cfg == cfg
    assert bits(loaded.params) == bits(params(cfg))
    assert patterns == ["*.json", "*.safetensors", "*.npz"]
    pg.save(model(), repository / "snapshots" / revision)
    patterns.clear()
    assert pg.load("google/paligemma2-3b-pt-224-jax", device="cpu").cfg == model().cfg
    assert patterns == ["*.json", "*.safetensors"], "no .npz is fetched beside safetensors"


def test_ignored_arrays_are_reported_once(tmp_path, caplog):
    pg.save(model(), tmp_path)
    ignored = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(4)[None],
        "rotary_emb.inv_freq": torch.ones(2),
    }
    edit_arrays(tmp_path / hf.SINGLE, lambda arrays: arrays.update(ignored))
    for _ in range(2):
        pg.load(tmp_path, device="cpu")
    (record,) = caplog.records
    message = f"{tmp_path}: rotary_emb.inv_freq (and 1 more) is ignored: no model uses it"
    assert (record.name, record.levelname, record.getMessage()) == ("pgfunc", "WARNING", message)


@pytest.mark.parametrize("family", ["paligemma", "siglip"])
def test_only_a_copied_model_survives_writing_into_its_file(tmp_path, family):
    """A mapped model changes, as the docstring of `load` says."""
    if family == "siglip":
        shutil.copytree(pg.checkpoint.shipped() / "siglip", tmp_path / "siglip")
        shutil.copy(pg.checkpoint.shipped() / hf.SINGLE, tmp_path)
        shutil.copy(pg.checkpoint.shipped() / "config.json", tmp_path)
        folder, load = tmp_path / "siglip", pg.load_siglip
    else:
        pg.save(model(), tmp_path)
        folder, load = tmp_path, pg.load
    mapped, copied = (load(folder, device="cpu", mmap=each).params for each in (True, False))
    before = pg.tree.map(torch.clone, copied)
    for path in tmp_path.rglob(hf.SINGLE):
        with path.open("r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(start)
            file.write(bytes(path.stat().st_size - start))
    assert all(torch.equal(*leaves) for leaves in zip(*map(tree_leaves, (copied, before)), strict=True))
    assert not any(leaf.any() for leaf in pg.tree.flatten(mapped).values())


def test_the_meta_device_reads_shapes_and_dtypes_only(tmp_path):
    pg.save(model("gemma2", torch.bfloat16), tmp_path)
    tree = pg.load(tmp_path, device="meta").params
    assert all(leaf.is_meta and leaf.dtype == torch.bfloat16 for leaf in pg.tree.flatten(tree).values())


def test_a_git_lfs_pointer_is_refused(tmp_path):
    pg.save(model(), tmp_path)
    (tmp_path / hf.SINGLE).write_text("version 1\noid sha256:00\nsize 3\n")
    with pytest.raises(CheckpointError, match="a Git LFS pointer; run git lfs pull"):
        pg.load(tmp_path, device="cpu")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_other_end_of_sequence_ids_are_reported(tmp_path, caplog, file):
    pg.save(model(), tmp_path)
    raw = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(raw | {"eos_token_id": [1, 7]}))
    pg.load(tmp_path, device="cpu")
    (record,) = caplog.records
    message = "eos_token_id has 7, which does not end an answer here; only 1 does"
    assert record.getMessage() == f"{tmp_path / file}: {message}"


def test_the_tokenizer_of_an_adapter_is_used(tmp_path):
    base = text_model()
    pg.save(base._replace(tokenizer=None), tmp_path / "base")
    lora.save(tmp_path / "lora", lora.init(base.params, ["projector"], 1, 1.0), base.cfg, "base")
    pg.save(base, tmp_path / "with tokenizer")
    shutil.copy(tmp_path / "with tokenizer" / "tokenizer.json", tmp_path / "lora")
    loaded = pg.load(tmp_path / "base", device="cpu", adapter=tmp_path / "lora")
    assert pg.tokenizer.encode(loaded.tokenizer, "a") == pg.tokenizer.encode(base.tokenizer, "a")
