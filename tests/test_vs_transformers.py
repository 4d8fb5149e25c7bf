"""The comparison with transformers uses the same tensors and compares tokens; a competitor that fails is a line."""

import json

import pytest
import torch
from cases import CONFIGS, params, text_model

import pgfunc as pg
from examples.benchmarks import vs_transformers
from pgfunc import bench

FEW = ("--tokens", "6", "--repeat", "2", "--batch", "2", "--no-compile", "--device", "cpu")
PGFUNC, DYNAMIC, STATIC = "pgfunc", "transformers, dynamic cache", "transformers, static cache, eager"
MODELS = {"gemma": pg.Model(CONFIGS["gemma"], params(CONFIGS["gemma"]), None), "gemma2": text_model()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, path in paths.items():
        pg.save(MODELS[name], path)
    return paths


@pytest.mark.parametrize("name", MODELS)
def test_all_competitors_generate_the_same_tokens_in_float32(name, folders, capsys):
    status = vs_transformers.main(["--model", str(folders[name]), "--json", *FEW])
    report = json.loads(capsys.readouterr().out)
    assert status == 0
    assert (report["dtype"], report["layers"], report["tokens"]) == ("float32", [2, 3], 6)
    rows = {(row["batch"], row["who"]): row for row in report["rows"]}
    assert list(rows) == [(batch, who) for batch in (1, 2) for who in (DYNAMIC, PGFUNC, STATIC)]
    for (_, who), row in rows.items():
        if who == STATIC and name == "gemma2" and "raises" in row:
            assert row["raises"].startswith("AttributeError"), "as transformers 5.17 to 5.24 do"
            continue
        assert (row["agree"], row["differs_at"], row["margin"]) == (1.0, None, None)
        for key in ("first", "token", "whole"):
            times = row[f"{key}_ms"]
            assert times["least"] <= times["median"] <= times["most"]
            assert row[f"{key}_ratio"] == 1 or who != PGFUNC
        assert row["first_ms"]["median"] > 0


def test_both_compute_on_the_same_memory():
    model = vs_transformers.bare(MODELS["gemma2"])
    mine = {leaf.data_ptr() for leaf in pg.tree.flatten(model.params).values()}
    theirs = dict(vs_transformers.peer(model).named_parameters())
    assert {weight.data_ptr() for weight in theirs.values()} == mine
    assert mine <= {leaf.data_ptr() for leaf in pg.tree.flatten(MODELS["gemma2"].params).values()}


def test_layers_are_those_of_the_small_machine(monkeypatch, capsys):
    monkeypatch.setitem(pg.PUBLISHED, "paligemma-3b-224", CONFIGS["gemma"])
    assert vs_transformers.main(["--layers", "1", "--dtype", "float32", *FEW]) == 0
    assert capsys.readouterr().out.startswith("paligemma-3b-224, 1 + 1 layers, float32, 6 tokens, 2 turns\n")


def test_a_different_token_in_float32_is_exit_status_1(folders, monkeypatch, capsys):
    writers = vs_transformers.writers

    def liar(*args):
        honest = writers(*args)
        return honest | {DYNAMIC: lambda tokens: honest[PGFUNC](tokens) + (torch.arange(tokens) == 4)}

    monkeypatch.setattr(vs_transformers, "writers", liar)
    assert vs_transformers.main(["--model", str(folders["gemma"]), *FEW]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert ["0.833, not token 4: margin " in line for line in lines if DYNAMIC in line] == [True, True]


def test_the_margin_is_of_the_logits_where_a_row_first_differs():
    model = MODELS["gemma"]
    prompt = bench.random_prompt(model.cfg, 2, 3, torch.device("cpu"))
    expected = torch.tensor([[5, 6, 7], [8, 9, 1]])
    agreement = vs_transformers.agreement(torch.tensor([[5, 6, 7], [8, 2, 3]]), expected, model, prompt)
    assert (agreement["agree"], agreement["differs_at"]) == (pytest.approx(4 / 6), 1)
    _, cache = pg.prefill(model.params, prompt, model.cfg, 1)
    logits = pg.decode(model.params, expected[:, 0], cache, model.cfg)[0][1]
    assert agreement["margin"] == pytest.approx(float((logits[2] - logits[9]).abs() / logits.std()), rel=1e-3)


def test_an_error_of_transformers_is_a_line_and_ends_its_turns():
    turns = []

    def broken(tokens):
        turns.append(tokens)
        raise AttributeError("no ndim\nand more")

    competitors = {"pgfunc": lambda tokens: torch.zeros(1, tokens), "transformers": broken}
    results = vs_transformers.contest(competitors, torch.device("cpu"), 4, 3)
    _, other = vs_transformers.rows(results, 1, lambda tokens, expected: {})
    assert turns == [4]
    assert vs_transformers.line(other) == "    1  transformers                        raises AttributeError: no ndim"
    with pytest.raises(AttributeError):
        vs_transformers.contest({"pgfunc": broken}, torch.device("cpu"), 4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        ("--batch", "0"): "batch is 0, expected 1 or more",
        ("--layers", "0"): "layers is 0, expected 1 or more",
        ("--model", "nowhere", "--layers", "2"): "--layers is for random weights; a checkpoint keeps all of its layers",
    }.items(),
    ids=str,
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert vs_transformers.main(list(arguments)) == 2
    assert capsys.readouterr().err == f"vs_transformers.py: {message}\n"
