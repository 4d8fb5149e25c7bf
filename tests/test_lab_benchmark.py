"""Activations, patterns and patches equal those of forward hooks on transformers, as the lab's benchmark checks."""

from pathlib import Path

import pytest
import torch
from cases import CONFIGS, params, text_model

import pgfunc as pg
from pgfunc import bench

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
MODELS = {"gemma": pg.Model(CONFIGS["gemma"], params(CONFIGS["gemma"]), None), "gemma2": text_model()}


@pytest.mark.parametrize("name", MODELS)
def test_activations_and_patches_equal_those_of_hooks_on_transformers(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # it is a script, which imports the one beside it
    import lab
    import vs_transformers

    model = vs_transformers.bare(MODELS[name])
    device = model.params.projector.device
    prompts = [bench.random_prompt(model.cfg, 1, vs_transformers.TEXT_TOKENS, device, seed) for seed in (0, 1)]
    ours, theirs = lab.Ours(model, *prompts), lab.Theirs(model, vs_transformers.peer(model), *prompts)
    with torch.no_grad():
        assert len(ours.residuals()) == model.cfg.text.layers
        lab.check(ours, theirs)
        monkeypatch.setattr(ours, "patterns", lambda: [1.1 * x for x in lab.Ours.patterns(ours)])
        with pytest.raises(AssertionError, match="patterns"):
            lab.check(ours, theirs)
