"""The benchmark of many pictures captions the same files by both libraries, and compares their captions."""

import json

import pytest
from cases import CONFIGS, params

import pgfunc as pg
from examples.benchmarks import many

FEW = ("--pictures", "5", "--batch", "4", "--peer-batches", "2", "--repeat", "1", "--device", "cpu", "--workers", "0")


def test_both_libraries_write_captions_of_the_drawn_lengths(tmp_path, monkeypatch, capsys):
    pg.save(pg.Model(CONFIGS["gemma"], params(CONFIGS["gemma"]), None), tmp_path)
    monkeypatch.setattr(many, "SHORTEST", 2)
    monkeypatch.setattr(many, "LONGEST", 4)
    assert many.main(["--model", str(tmp_path), "--json", *FEW]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 2 <= report["tokens"] <= 4
    assert report["bound_pictures_per_s"] == pytest.approx(5 / sum(report["bound_s"].values()))
    assert [row["who"] for row in report["rows"]] == [
        "pgfunc", "transformers, batch 2", "transformers, batch 2, static cache",
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["equal"] == 1.0, "float32"
        assert 0 < row["pictures_per_s"]["least"] <= row["pictures_per_s"]["median"]
