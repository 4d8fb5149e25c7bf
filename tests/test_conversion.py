"""Saving and converting: all files of a checkpoint are converted, and a source is never overwritten.

Nan and infinity are refused, and no file of an older model stays behind.
"""

import json
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from cases import CONFIGS, bits, edit_arrays, prompt, text_model
from cases import params as parameters
from typer.testing import CliRunner

import pgfunc as pg
from pgfunc import cli, siglip_dual, tree
from pgfunc.checkpoint import bigvision, hf
from pgfunc.config import SiglipConfig, SiglipTextConfig
from pgfunc.errors import CheckpointError, NumericalError, PgfuncError, SettingError
from pgfunc.objects import vqvae
from pgfunc.train import lora

VQ = vqvae.init(1)


def siglip(vision, seed: int = 0) -> pg.SiglipModel:
    text = SiglipTextConfig(vocab=20, width=8, layers=1, heads=2, hidden=8, out=vision.width, positions=8)
    cfg = SiglipConfig(vision, text)
    return pg.SiglipModel(cfg, siglip_dual.init(cfg, seed), None)


@pytest.fixture
def original(tmp_path) -> Path:
    """A checkpoint with every file that may belong to one."""
    model = text_model()
    pg.save(model, tmp_path / "original")
    pg.segment.save(tmp_path / "original" / "masks.safetensors", VQ)
    pg.save_siglip(siglip(model.cfg.vision), tmp_path / "original" / "siglip", vision=False)
    (tmp_path / "original" / "generation_config.json").write_text("{}")
    return tmp_path / "original"


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and output of the command line, or the message of the error that it raised."""
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    return (
        (2, str(result.exception)) if isinstance(result.exception, PgfuncError) else (result.exit_code, result.output)
    )


# --- the files of a checkpoint


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_files_of_a_checkpoint_are_converted_with_it(original, tmp_path, dtype):
    converted = pg.convert(original, tmp_path / "out", dtype)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in original.iterdir()}
    assert converted == (tmp_path / "out", "Hugging Face layout", dtype or "float32",
                         tree.nbytes(text_model().params) // (2 if dtype else 1))  # fmt: skip
    assert bits(pg.segment.load(tmp_path / "out" / "masks.safetensors")) == bits(VQ)
    expected, actual = (pg.load_siglip(folder / "siglip", dtype, "cpu") for folder in (original, tmp_path / "out"))
    assert bits(actual.params) == bits(expected.params)
    assert actual.params.vision.patch.dtype == pg.load(tmp_path / "out", device="cpu").params.projector.dtype


def test_masks_are_copied_to_big_vision_and_back(original, tmp_path):
    pg.convert(original, tmp_path / "other" / "x.npz")
    pg.convert(tmp_path / "other" / "x.npz", tmp_path / "back", config=original, tokenizer=original / "tokenizer.json")
    assert bits(pg.segment.load(tmp_path / "back" / "masks.safetensors")) == bits(VQ)
    assert bits(pg.load(tmp_path / "back", device="cpu").params) == bits(text_model().params)
    pg.convert(original, tmp_path / "other" / "y.npz")  # equal masks may stay
    pg.segment.save(original / "masks.safetensors", vqvae.init(2))
    with pytest.raises(SettingError, match=r"masks\.safetensors: exists already"):
        pg.convert(original, tmp_path / "other" / "z.npz")
    pg.convert(original, tmp_path / "other" / "z.npz", force=True)
    assert bits(pg.segment.load(tmp_path / "other" / "masks.safetensors")) == bits(vqvae.init(2))


def test_merging_copies_the_masks(original, tmp_path):
    model = pg.load(original, device="cpu")
    lora.save(tmp_path / "lora", lora.init(model.params, ["projector"], 1, 1.0), model.cfg, str(original))
    status, output = run("merge", tmp_path / "lora", tmp_path / "merged", "--model", original)
    size = tree.nbytes(model.params)
    assert (status, output) == (0, f"{tmp_path / 'merged'}: Hugging Face layout, float32, {size:,} bytes\n")
    assert bits(pg.segment.load(tmp_path / "merged" / "masks.safetensors")) == bits(VQ)


def test_a_conversion_prints_format_dtype_and_size(original, tmp_path):
    assert run("convert", original, tmp_path / "x.npz", "--dtype", "bfloat16") == (
        0, f"{tmp_path / 'x.npz'}: big_vision's npz, bfloat16, {tree.nbytes(text_model().params) // 2:,} bytes\n"
    )  # fmt: skip


def test_new_files_have_the_mode_of_the_umask(original, tmp_path):
    (tmp_path / "plain").write_text("")
    expected = (tmp_path / "plain").stat().st_mode
    pg.convert(original, tmp_path / "out")
    pg.save(text_model(), tmp_path / "shards", shard_bytes=20_000)
    pg.convert(original, tmp_path / "npz" / "x.npz")
    lora.save(tmp_path / "lora", lora.init(text_model().params, ["projector"], 1, 1.0), text_model().cfg, "base")
    paths = [path for name in ("out", "shards", "npz", "lora") for path in (tmp_path / name).rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {stat.S_IMODE(expected)}


# --- targets that are refused


def snapshot(folder: Path) -> dict[str, bytes]:
    """Path -> content of every file below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["convert", "merge"])
@pytest.mark.parametrize(("target", "message"), [
    ("original", "would replace"), ("link", "would replace"), ("", "the current one"), (".", "the current one"),
    ("taken", "exists already; give another name, or replace it with force="), ("file", "is a file"),
    ("a" * 300, "File name too long"), ("file/x", "Not a directory"), ("around", "is the folder of"),
])  # fmt: skip
def test_a_target_that_is_a_source_or_exists_is_refused_before_loading(
    command, target, message, original, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    lora.save("around/lora", lora.init(text_model().params, ["projector"], 1, 1.0), text_model().cfg, "base")
    pg.save(text_model(), "around/original")
    Path("link").symlink_to("original")
    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("user's")
    Path("file").write_text("user's")
    before = snapshot(tmp_path)
    monkeypatch.setattr(pg, "load", lambda *arguments: pytest.fail("loaded"))
    monkeypatch.setattr("pgfunc.checkpoint.conversion.load", lambda *arguments: pytest.fail("loaded"))
    source = "around/original" if target == "around" else "original"
    arguments = [source, target] if command == "convert" else ["around/lora", target, "--model", source]
    status, output = run(command, *arguments, *([] if target == "taken" else ["--force"]))
    assert status == 2
    assert message in output
    assert snapshot(tmp_path) == before


def test_force_replaces_an_existing_model(original, tmp_path):
    pg.save(text_model(seed=5), tmp_path / "out", shard_bytes=20_000)
    assert run("convert", original, tmp_path / "out", "--force")[0] == 0
    assert bits(pg.load(tmp_path / "out", device="cpu").params) == bits(text_model().params)
    assert not list((tmp_path / "out").glob("model-*"))


def test_an_empty_folder_is_a_valid_target(original, tmp_path):
    (tmp_path / "out").mkdir()
    assert run("convert", original, tmp_path / "out")[0] == 0


# --- saves, by us, by transformers and by several threads


@pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
def test_transformers_loads_our_files_and_we_load_what_it_saves_over_them(tmp_path, shard_bytes):
    reference.save_random(tmp_path / "theirs", "gemma-1kv")
    reference.save_random(tmp_path / "next", "gemma-1kv", seed=1)
    model = pg.load(tmp_path / "theirs", device="cpu")
    pg.save(model, tmp_path / "ours", shard_bytes)
    batch = prompt(model.cfg, [4], [3])
    other = reference.load(tmp_path / "ours")
    torch.testing.assert_close(
        reference.logits(other, batch, model.cfg), pg.forward(model.params, batch, model.cfg), atol=1e-4, rtol=0
    )
    other.load_state_dict(reference.load(tmp_path / "next").state_dict())
    (tmp_path / "ours" / hf.SINGLE).unlink(missing_ok=True)
    other.save_pretrained(tmp_path / "ours")  # its config.json keeps fields that transformers does not know
    assert bits(pg.load(tmp_path / "ours", device="cpu").params) == bits(
        pg.load(tmp_path / "next", device="cpu").params
    )


@pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
def test_weights_beside_another_saves_configuration_are_refused(tmp_path, shard_bytes):
    cfg = CONFIGS["gemma"]
    for name, text in {"a": cfg.text, "b": replace(cfg.text, theta=5_000.0)}.items():
        model = pg.Model(replace(cfg, text=text), parameters(cfg), None)
        pg.save(model, tmp_path / name, shard_bytes)
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"an incomplete save or copy: .* was not saved with this config\.json"):
        pg.load(tmp_path / "b")


def test_saving_a_model_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        pg.save(text_model(), tmp_path / name, shard_bytes=20_000)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]
    index = json.loads((tmp_path / "a" / hf.INDEX).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "a").glob("model-*")}


def test_concurrent_saves_leave_one_model_and_readers_see_one(tmp_path):
    """Every rank of a distributed script may save into the same folder."""
    models = [text_model(seed) for seed in (1, 2)]
    pg.save(models[0], tmp_path)
    expected = [bits(model.params) for model in models]
    with ThreadPoolExecutor(4) as pool:
        saves = [pool.submit(pg.save, models[i % 2], tmp_path, (10**9, 20_000)[i % 3 == 0]) for i in range(30)]
        loaded = [bits(pg.load(tmp_path, device="cpu").params) for _ in range(15)]
        for save in saves:
            save.result()
    assert all(params in expected for params in [*loaded, bits(pg.load(tmp_path, device="cpu").params)])
    assert not list(tmp_path.glob(".*"))


# --- numbers that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_not_saved(tmp_path, value, dtype):
    model = text_model()
    broken = tree.map(lambda leaf: leaf.to(dtype), model.params)
    broken.language.layers[1].q[2, 3] = value
    encoder, pairs = siglip(model.cfg.vision), lora.init(model.params, ["projector"], 1, 1.0)
    encoder.params.text.embed[0, 0], pairs.pairs["projector"].b[0, 0] = value, value
    codebook = VQ._replace(codebook=VQ.codebook.clone().fill_(value))
    saves = {
        "language.layers.1.q": lambda: pg.save(model._replace(params=broken), tmp_path / "a"),
        r"language\.layers\.1\.q": lambda: bigvision.save(tmp_path / "a.npz", model.cfg, broken),
        "text.embed": lambda: pg.save_siglip(encoder, tmp_path / "b"),
        "projector.b": lambda: lora.save(tmp_path / "c", pairs, model.cfg, "base"),
        "codebook": lambda: pg.segment.save(tmp_path / "d.safetensors", codebook),
    }
    for path, save in saves.items():
        with pytest.raises(NumericalError, match=f"{path} holds nan or infinity, and is not saved"):
            save()
    assert not list(tmp_path.iterdir())


def test_finite_numbers_with_an_infinite_sum_are_finite(tmp_path):
    full = torch.full((4, 4), 6e4, dtype=torch.float16)
    tree.check_finite({"a": full, "b": torch.full((3,), 3e38), "c": torch.zeros(0), "d": torch.arange(3)}, "x")
    with pytest.raises(NumericalError, match=r"x: e\.1 holds nan or infinity"):
        tree.check_finite({"a": full, "e": [full, torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)]}, "x")


# --- files of an older model in the folder


def test_a_save_removes_the_settings_and_tokens_of_an_older_model(tmp_path):
    model = text_model()
    pg.save(model, tmp_path)
    older = {"image_processor": {"resample": 0, "size": {"height": 7, "width": 7}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(older))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<stale>": model.cfg.image + 1}))
    (tmp_path / "special_tokens_map.json").write_text("{}")
    pg.save(model, tmp_path)
    again = pg.load(tmp_path, device="cpu")
    assert again.cfg == model.cfg
    assert pg.tokenizer.encode(again.tokenizer, "<stale>") == pg.tokenizer.encode(model.tokenizer, "<stale>")


def test_a_conversion_over_a_model_removes_its_files(original, tmp_path):
    bare = text_model(seed=3)._replace(tokenizer=None)
    pg.save(bare, tmp_path / "bare")
    (original / "notes.txt").write_text("user's")
    pg.convert(tmp_path / "bare", original, force=True)
    assert sorted(path.name for path in original.rglob("*") if path.is_file()) == [
        "config.json", "model.safetensors", "notes.txt", "preprocessor_config.json",
    ]  # fmt: skip
    assert pg.load(original, device="cpu").tokenizer is None


def test_a_conversion_reports_the_quantization_of_the_weights(original, tmp_path):
    assert pg.convert(original, tmp_path / "small", quantize="int8").dtype == "int8"
    assert pg.convert(tmp_path / "small", tmp_path / "again").dtype == "int8"


def test_a_linked_subfolder_of_a_target_is_refused_without_loss(original, tmp_path):
    shutil.move(original / "siglip", tmp_path / "elsewhere")
    (original / "siglip").symlink_to(tmp_path / "elsewhere")
    pg.save(text_model(seed=3), tmp_path / "other")
    pg.save_siglip(siglip(text_model().cfg.vision), tmp_path / "other" / "siglip", vision=False)
    before = bits(pg.load(original, device="cpu").params)
    with pytest.raises(CheckpointError, match="siglip is a link to another folder"):
        pg.convert(tmp_path / "other", original, force=True)
    assert bits(pg.load(original, device="cpu", mmap=False).params) == before


def test_a_dual_encoder_ignores_a_pooling_head_beside_its_paligemma(original):
    expected = pg.load_siglip(original / "siglip", device="cpu").params.pool.probe.clone()
    head = {"vision_tower.vision_model.head.probe": torch.zeros(1, 1, text_model().cfg.vision.width)}
    edit_arrays(original / hf.SINGLE, lambda arrays: arrays.update(head))
    assert torch.equal(pg.load_siglip(original / "siglip", device="cpu").params.pool.probe, expected)
