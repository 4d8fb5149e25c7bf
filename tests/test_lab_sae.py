"""Sparse autoencoders find the directions that data are made of, and can be put into the model."""

import json
from functools import partial

import pytest
import torch
from cases import CONFIGS, params, prompt
from safetensors.torch import save_file

import pgfunc as pg
from pgfunc import lab
from pgfunc.errors import SettingError
from pgfunc.lab import sae

CFG = sae.Config(latents=24, k=3, dead_after=20, revived=8)
GENERATOR = torch.Generator().manual_seed(0)
DIRECTIONS = torch.nn.functional.normalize(torch.randn(16, 12, generator=GENERATOR), dim=-1)
SHIFT = torch.linspace(-3, 3, 12)


def sparse(count, generator=GENERATOR):
    """Sums of three of 16 directions, with coefficients of 10 to 20, and a mean that is not 0."""
    chosen = torch.rand(count, 16, generator=generator).argsort(-1) < 3
    return (chosen * (10 + 10 * torch.rand(count, 16, generator=generator))) @ DIRECTIONS + SHIFT


def batches(epoch, size=64):
    yield from sparse(1024, torch.Generator().manual_seed(epoch)).split(size)


@pytest.fixture(scope="module")
def trained():
    return sae.train(batches, CFG, steps=1500, rate=3e-3)


def test_training_finds_the_directions_that_the_data_are_sums_of(trained):
    quality = sae.quality(trained, sparse(500), CFG)
    assert quality.explained > 0.95
    assert quality.active <= 3
    best = (DIRECTIONS @ trained.decoder.T).max(-1).values
    assert (best > 0.95).float().mean() > 0.8
    torch.testing.assert_close(trained.decoder.norm(dim=-1), torch.ones(24))
    with torch.no_grad():
        untrained = sae.train(batches, CFG, steps=1)
    assert sae.quality(untrained, sparse(500), CFG).explained < 0.7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_activations_of_any_dtype_with_a_graph_and_in_inference_mode_are_learned_from(dtype):
    with torch.inference_mode():
        inside = sae.train(lambda epoch: (x.to(dtype) for x in batches(epoch)), CFG, steps=3)
    outside = sae.train(lambda epoch: (x.to(dtype).requires_grad_() * 1 for x in batches(epoch)), CFG, steps=3)
    assert {x.dtype for x in inside[:4]} == {torch.float32}
    for one, other in zip(inside[:4], outside[:4], strict=True):
        torch.testing.assert_close(one, other)


def test_the_size_of_the_activations_changes_nothing_but_their_reconstruction(trained):
    small = sae.train(lambda epoch: (x / 64 for x in batches(epoch)), CFG, steps=1500, rate=3e-3)
    x = sparse(100)
    torch.testing.assert_close(sae.decode(small, sae.encode(small, x / 64, CFG)) * 64,
                               sae.decode(trained, sae.encode(trained, x, CFG)), rtol=1e-3, atol=1e-2)  # fmt: skip


def test_only_latents_that_are_active_or_dead_learn():
    p, x = sae.init(sparse(64), sae.Config(latents=64, k=2), seed=0), sparse(64)
    cfg = sae.Config(latents=64, k=2, revived=16)
    silent = ~(sae.encode(p, x, cfg) > 0).any(0)
    positive = (sae.hidden(p, x, cfg) > 0).any(0)
    assert (silent & positive).sum() > 4
    for dead in (torch.zeros_like(silent), silent):
        gradient, _ = torch.func.grad(sae.loss, has_aux=True)(p, x, cfg, dead)
        learns = gradient.decoder.abs().sum(-1) > 0
        assert (learns & silent).any() == dead.any()
        assert not (learns & silent & ~positive).any()


def test_the_loss_is_the_unexplained_share_and_its_gradient_leaves_the_length_of_directions(trained):
    x = sparse(64)
    error, active = sae.loss(trained, x, CFG, torch.zeros(24, dtype=torch.bool))
    latents = sae.encode(trained, x, CFG)
    expected = (x - sae.decode(trained, latents)).square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(error, expected)
    assert active.tolist() == (latents > 0).any(0).tolist()
    gradient = torch.randn(24, 12)
    rest = gradient - sae.along(gradient, trained.decoder)
    assert (rest * trained.decoder).sum(-1).abs().max() < 1e-5


def test_a_saved_sae_is_read_back_and_so_are_those_of_other_kinds(trained, tmp_path):
    sae.save(trained, CFG, tmp_path / "topk")
    found, cfg = sae.load(tmp_path / "topk")
    assert (cfg.k, cfg.latents) == (3, 24)
    assert all(torch.equal(a, b) for a, b in zip(found[:4], trained[:4], strict=True))
    settings = json.loads((tmp_path / "topk" / "cfg.json").read_text())
    assert (settings["architecture"], settings["d_in"], settings["d_sae"], settings["k"]) == ("topk", 12, 24, 3)
    arrays = {"W_enc": trained.encoder, "b_enc": trained.encoder_bias, "W_dec": trained.decoder, "b_dec": trained.bias}
    x = sparse(20)
    for kind, threshold in (("standard", 0.0), ("jumprelu", 4.0)):
        folder = tmp_path / kind
        folder.mkdir()
        more = {"threshold": torch.full((24,), threshold)} if kind == "jumprelu" else {}
        save_file({k: v.contiguous() for k, v in (arrays | more).items()}, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps({"architecture": kind, "apply_b_dec_to_input": False}))
        p, cfg = sae.load(folder)
        before = x @ trained.encoder + trained.encoder_bias
        torch.testing.assert_close(sae.encode(p, x, cfg), torch.where(before > threshold, before, 0.0).relu())


def test_files_that_are_no_sae_are_one_line(tmp_path):
    with pytest.raises(SettingError, match=r"cfg.json or sae_weights.safetensors cannot be read"):
        sae.load(tmp_path)
    save_file({"W_enc": torch.ones(1, 1)}, tmp_path / "sae_weights.safetensors")
    for settings, message in [
        ({"architecture": "topk"}, r"has no b_enc, which an SAE of kind topk has$"),
        ({"architecture": "jumprelu"}, r"has no b_enc, which an SAE of kind jumprelu has$"),
        ({"architecture": "standard", "activation_fn_str": "topk"}, r"activation_fn_str is topk, which is not supp"),
        ({"architecture": "gated"}, r"cfg.json: architecture is gated, expected topk, standard or jumprelu$"),
        (
            {"architecture": "topk", "k": 1, "normalize_activations": "layer_norm"},
            r"normalize_activations is layer_nor",
        ),
    ]:
        (tmp_path / "cfg.json").write_text(json.dumps(settings))
        with pytest.raises(SettingError, match=message):
            sae.load(tmp_path)
    with pytest.raises(SettingError, match=r"^k is 9, expected 1 to 8 latents$"):
        sae.train(batches, sae.Config(latents=8, k=9), steps=1)
    with pytest.raises(SettingError, match=r"^the first batch of activations is all zeros$"):
        sae.train(lambda epoch: [torch.zeros(4, 3)], CFG, steps=1)
    with pytest.raises(SettingError, match=r"^there are no batches to train on"):
        sae.train(lambda epoch: [], CFG, steps=1)


def test_an_sae_is_an_edit_that_keeps_what_it_does_not_describe():
    cfg = CONFIGS["gemma"]
    tree, rows, name = params(cfg), prompt(cfg, [3, 1], [2, 4]), "language.1.resid_post"
    logits, seen = lab.capture(pg.forward, name)(tree, rows, cfg)
    x = seen[name].flatten(0, 1)
    settings = sae.Config(latents=32, k=8)
    p = sae.train(lambda epoch: x.split(len(x)), settings, steps=50)
    own = sae.encode(p, seen[name], settings)
    kept = lab.edit(pg.forward, {name: sae.SetLatent(p, settings, 3, own[..., 3, None])})(tree, rows, cfg)
    torch.testing.assert_close(kept, logits)
    _, edited = lab.capture(lab.edit(pg.forward, {name: sae.SetLatent(p, settings, 3, 50.0)}), name)(tree, rows, cfg)
    torch.testing.assert_close(edited[name] - seen[name], (50 - own[..., 3, None]) * p.decoder[3], rtol=1e-3, atol=1e-3)
    _, spliced = lab.capture(lab.edit(pg.forward, {name: sae.Reconstruct(p, settings)}), name)(tree, rows, cfg)
    torch.testing.assert_close(spliced[name], sae.decode(p, own))


def test_the_batches_of_a_collection_can_be_trained_on(tmp_path):
    from cases import text_model
    from PIL import Image

    model = text_model()
    rows = [(Image.new("RGB", (28, 28), color), "ab") for color in ("red", "blue", "green")]
    found = lab.collect(model, rows, ["language.0.mlp_out"], tmp_path / "x", batch=1, shard_bytes=1)
    x, cfg = found.load("language.0.mlp_out"), sae.Config(latents=64, k=4)
    p = sae.train(partial(found.batches, "language.0.mlp_out", 8), cfg, steps=100)
    assert sae.quality(p, x, cfg).explained > 0.5
