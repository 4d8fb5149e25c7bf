"""Damaged files, files of other models and missing sources are refused in one line that names the problem."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CONFIGS, edit_arrays, params

import pgfunc as pg
from pgfunc.checkpoint import bigvision, hf
from pgfunc.errors import CheckpointError, DeviceError, SettingError


def model() -> pg.Model:
    return pg.Model(CONFIGS["gemma"], params(CONFIGS["gemma"]), None)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_text(folder: Path, **changes) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text | changes)


def index(folder: Path, value) -> None:
    """Turn the folder's only weight file into a shard, with this index."""
    (folder / hf.SINGLE).rename(folder / "shard")
    (folder / hf.INDEX).write_text(json.dumps(value))


NORM = "language_model.model.norm.weight"
DAMAGE = {
    "missing key": (
        lambda d: edit_arrays(d / hf.SINGLE, lambda a: a.pop(NORM)),
        rf"{NORM} is missing, expected shape \(16,\)",
    ),
    "unknown key": (
        lambda d: edit_arrays(d / hf.SINGLE, lambda a: a.update(extra=torch.zeros(2, 3))),
        r"extra with shape \(2, 3\) is not part of the model that config\.json describes",
    ),
    "wrong shape": (
        lambda d: edit_arrays(d / hf.SINGLE, lambda a: a.update({NORM: torch.zeros(7)})),
        rf"{NORM}: expected \(16,\), found \(7,\)",
    ),
    "wrong dtype": (
        lambda d: edit_arrays(d / hf.SINGLE, lambda a: a.update({NORM: torch.zeros(16, dtype=torch.int64)})),
        rf"{NORM}: dtype I64 is not one of",
    ),
    "untied head": (
        lambda d: edit_arrays(d / hf.SINGLE, lambda a: a.update({"lm_head.weight": torch.zeros(67, 16)})),
        "lm_head.weight differs from embed_tokens.weight",
    ),
    "truncated": (
        lambda d: (d / hf.SINGLE).write_bytes((d / hf.SINGLE).read_bytes()[:-10]),
        r"model\.safetensors: not a complete safetensors file",
    ),
    "no weights": (lambda d: (d / hf.SINGLE).unlink(), r"holds neither model\.safetensors nor"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json: missing"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json: not readable as JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), r"config\.json: expected a JSON object"),
    "another model": (lambda d: edit_json(d / "config.json", model_type="llama"), "model_type is 'llama'"),
    "no text_config": (lambda d: edit_json(d / "config.json", text_config=None), r"config\.json: "),
    "wrong processor size": (
        lambda d: edit_json(d / "preprocessor_config.json", size={"height": 5, "width": 5}),
        r"preprocessor_config\.json: size is .* expected",
    ),
    "index outside the folder": (
        lambda d: index(d, {"weight_map": {NORM: "../x.safetensors"}}),
        r"\.\./x\.safetensors lies outside the folder",
    ),
    "missing shard": (
        lambda d: index(d, {"weight_map": {NORM: "x.safetensors"}}),
        r"x\.safetensors: missing, though",
    ),
    "key not in its shard": (
        lambda d: index(d, {"weight_map": {"nothing": "shard"}}),
        r"shard: nothing is missing, though",
    ),
    "index without a map": (lambda d: index(d, {}), "weight_map does not map keys"),
    "two dtypes": (
        lambda d: edit_arrays(d / hf.SINGLE, lambda a: a.update({NORM: a[NORM].bfloat16()})),
        r"is torch\.bfloat16.* choose one with dtype=",
    ),
    "untied embeddings": (
        lambda d: edit_json(d / "config.json", tie_word_embeddings=False),
        "tie_word_embeddings is False",
    ),
    "scaled rope": (lambda d: edit_text(d, rope_scaling={"type": "linear", "factor": 4}), "rope_scaling is"),
    "another rope": (lambda d: edit_text(d, rope_parameters={"rope_type": "yarn"}), "rope_type is yarn"),
    "another activation": (lambda d: edit_text(d, hidden_act="relu"), "hidden_act is 'relu'"),
    "biases": (lambda d: edit_text(d, attention_bias=True), "attention_bias is True"),
    "no image token": (lambda d: edit_json(d / "config.json", image_token_index=None), "image_token_index is None"),
    "no resizing": (lambda d: edit_json(d / "preprocessor_config.json", do_resize=False), "do_resize is False"),
    "unknown filter": (lambda d: edit_json(d / "preprocessor_config.json", resample=[]), r"resample is \[\], expected"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, damage):
    pg.save(model(), tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message) as raised:
        pg.load(tmp_path, device="cpu")
    assert "\n" not in str(raised.value)


def test_a_damaged_npz_is_refused(tmp_path):
    path, cfg = tmp_path / "x.npz", CONFIGS["gemma"]
    pg.save(model(), tmp_path / "hf")
    bigvision.save(path, cfg, params(cfg))
    complete = path.read_bytes()
    config = tmp_path / "hf" / "config.json"
    with pytest.raises(CheckpointError, match="needs config="):
        pg.load(path)
    wider = json.loads(config.read_text())
    edit_json(config, text_config=wider["text_config"] | {"hidden_size": 32}, projection_dim=32)
    with pytest.raises(CheckpointError, match=r"img/head/kernel: expected \(24, 32\), found \(24, 16\)"):
        pg.load(path, config=config)
    pg.save(model(), tmp_path / "hf")
    path.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(CheckpointError, match="not a complete npz file"):
        pg.load(path, config=config)
    np.savez(path, **{"params/img/head/bias": np.zeros(3, ">i4")})
    with pytest.raises(CheckpointError, match="dtype >i4"):
        pg.load(path, config=config)
    np.savez(path, **{"params/img/head/bias": np.array([{}], dtype=object)})
    with pytest.raises(CheckpointError, match=r"dtype \|O"):
        pg.load(path, config=config)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", hf.SINGLE, "tokenizer.json", "x.npz"])
def test_a_fifo_in_place_of_a_file_is_refused_without_waiting(tmp_path, name):
    pg.save(model(), tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a "):
        pg.load(tmp_path / name if name == "x.npz" else tmp_path, config=tmp_path if name == "x.npz" else None)


def test_a_missing_source_device_or_dtype_is_refused(tmp_path):
    for source in ("no/such/folder", tmp_path / "nothing.npz"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            pg.load(source)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="neither a folder in Hugging Face layout nor"):
        pg.load(tmp_path / "x.bin")
    for device in ("nowhere", "hpu"):
        with pytest.raises(DeviceError, match=f"device {device} is not available"):
            pg.load(device=device)
    with pytest.raises(SettingError, match="dtype is int8"):
        pg.load(dtype="int8")
    pg.save(model(), tmp_path / "folder")
    with pytest.raises(SettingError, match=r"config x is for a \.npz"):
        pg.load(tmp_path / "folder", config="x")
    for name in ("~nobody-of-this-name/x", "x" * 5000):
        with pytest.raises(CheckpointError, match="not the name of a file or folder"):
            pg.load(name)


def test_the_first_of_several_eos_ids_ends_an_answer(tmp_path):
    pg.save(model(), tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=None)
    edit_text(tmp_path, eos_token_id=[1, 107])
    assert pg.load(tmp_path, device="meta").cfg.eos == 1
