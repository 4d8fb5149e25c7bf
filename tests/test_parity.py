"""pgfunc computes what transformers computes, on random tiny checkpoints that transformers saved."""

from pathlib import Path

import pytest
import reference
import torch
from cases import prompt

import pgfunc as pg

ATOL = 1e-4  # float32, sums over at most 48 terms in another order; logits are of order 1


@pytest.fixture(scope="module", params=reference.VARIANTS)
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_random(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return pg.load(folder, device="cpu"), reference.load(folder)


CASES = {
    "one row": ([4], [3], 1, 0),
    "prefix only": ([6], [0], 1, 0),
    "suffix longer than the window": ([3], [12], 1, 0),
    "ragged, padded": ([2, 5, 3], [9, 1, 4], 1, 2),
    "two pictures": ([2, 4], [3, 3], 2, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(models, case):
    model, other = models
    prefix, suffix, images, padding = CASES[case]
    batch = prompt(model.cfg, prefix, suffix, images, padding=padding)
    ours, theirs = pg.forward(model.params, batch, model.cfg), reference.logits(other, batch, model.cfg)
    assert theirs.std() > 0.3, "the logits must depend on the network"
    torch.testing.assert_close(ours[batch.valid], theirs[batch.valid], atol=ATOL, rtol=0)


def test_greedy_tokens_equal_transformers_over_32_cached_steps(models):
    model, other = models
    for seed in range(4):
        batch = prompt(model.cfg, [5], [0], seed=seed)
        logits, cache = pg.prefill(model.params, batch, model.cfg, 32)
        tokens = [pg.sample.greedy(logits)]
        for _ in range(31):
            logits, cache = pg.decode(model.params, tokens[-1], cache, model.cfg)
            tokens.append(pg.sample.greedy(logits))
        assert torch.equal(torch.stack(tokens, 1), reference.greedy(other, batch, model.cfg, 32))


@pytest.mark.parametrize("layout", reference.LAYOUTS)
@pytest.mark.parametrize("variant", ["gemma-1kv", "gemma2"])
def test_every_key_layout_loads_the_same_weights(tmp_path, layout, variant):
    reference.save_random(tmp_path, variant)
    expected = pg.tree.flatten(pg.load(tmp_path, device="cpu").params)
    expected = {path: leaf.clone() for path, leaf in expected.items()}  # because the file is about to be rewritten
    reference.relayout(tmp_path, layout)
    actual = pg.tree.flatten(pg.load(tmp_path, device="cpu").params)
    assert all(torch.equal(actual[path], leaf) for path, leaf in expected.items())


def test_saved_checkpoints_load_in_transformers_with_the_same_logits(models, tmp_path):
    model, other = models
    pg.save(model, tmp_path, shard_bytes=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    batch = prompt(model.cfg, [2, 5], [3, 1])
    assert torch.equal(
        reference.logits(reference.load(tmp_path), batch, model.cfg), reference.logits(other, batch, model.cfg)
    )


def test_bfloat16_is_as_close_to_float32_as_transformers_is(folder, tmp_path):
    reference.load(folder).bfloat16().save_pretrained(tmp_path)
    model, wide, other = pg.load(tmp_path, device="cpu"), pg.load(tmp_path, "float32", "cpu"), reference.load(tmp_path)
    assert model.params.projector.dtype == torch.bfloat16
    ours, theirs = [], []
    for seed in range(8):
        batch = prompt(model.cfg, [4, 6], [5, 2], seed=seed)
        exact = pg.forward(wide.params, batch, model.cfg)[batch.valid]
        ours.append((pg.forward(model.params, batch, model.cfg)[batch.valid] - exact).square().mean())
        theirs.append((reference.logits(other, batch, model.cfg)[batch.valid] - exact).square().mean())
    # both round equally often, at different points: over eight prompts the two errors agree to a few per cent
    assert torch.stack(ours).mean().sqrt() < 1.2 * torch.stack(theirs).mean().sqrt()


def test_padding_rows_of_the_vocabulary_have_no_logits(models):
    model, _ = models
    assert model.params.language.embed.shape[0] == model.cfg.text.vocab + 32
    logits = pg.forward(model.params, prompt(model.cfg, [3], [2]), model.cfg)
    assert logits.shape[-1] == model.cfg.text.vocab == model.cfg.image
