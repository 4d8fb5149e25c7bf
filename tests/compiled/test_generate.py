"""Compiled generation gives the same text: by `generate`, `stream`, and the command line with code compiled ahead.

Also tests settings of wrong types, which `conftest.py`'s type-checking hook would reject first: they raise one-line
errors, and numpy's numbers are accepted.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import text_model

import pgfunc as pg
from pgfunc.errors import SettingError

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 5}])
def test_generate_and_stream_give_the_same_compiled(sampling):
    model = text_model()
    picture = torch.randint(0, 255, (40, 30, 3), dtype=torch.uint8).numpy()
    arguments = {"images": [picture, [picture, picture]], "prefixes": ["a", "b?"], "max_new_tokens": 12}
    eager, compiled = (pg.generate(model, **arguments, **sampling, compile=compile) for compile in (False, True))
    assert [row.tokens for row in compiled] == [row.tokens for row in eager]
    for one, other in zip(compiled, eager, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    row = {"images": picture, "prefix": "a", "max_new_tokens": 12}
    assert list(pg.stream(model, **row, **sampling, compile=True)) == list(pg.stream(model, **row, **sampling))


def test_code_that_was_compiled_ahead_is_used_after_its_folder_was_moved(tmp_path):
    pg.save(text_model(), tmp_path / "model")

    def run(*arguments: str) -> str:
        options = "--model", str(tmp_path / "model"), "--device", "cpu"
        command = [sys.executable, "-m", "pgfunc.cli", *arguments, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def files(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".so", ".cpp", ".py")}

    original, moved = tmp_path / "original", tmp_path / "moved"
    output = run("compile", str(original), "--max-new-tokens", "12")
    assert output.startswith(f"{original} has the code after ")
    original.rename(moved)
    before = files(moved)
    caption = "caption", str(ROOT / "examples/images/scene.png"), "--max-new-tokens", "12", "--json"
    compiled, eager = (json.loads(run(*caption, *more)) for more in (("--compiled", str(moved)), ()))
    assert compiled["tokens"] == eager["tokens"] != []
    assert files(moved) == before, "nothing was compiled"
    assert not original.exists()


WRONG = [
    {"top_k": 2.5}, {"top_k": True}, {"top_k": "3"}, {"top_k": np.float64(3)}, {"top_k": 0}, {"top_p": "0.9"},
    {"top_p": float("nan")}, {"min_p": [0.1]}, {"temperature": "hot"}, {"temperature": None}, {"temperature": 1j},
    {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": 10**400}, {"temperature": True},
    {"max_new_tokens": 2.5}, {"max_new_tokens": True}, {"max_new_tokens": "9"}, {"max_new_tokens": None},
    {"max_new_tokens": 0}, {"seed": -1}, {"seed": 2**32}, {"seed": 2**64}, {"seed": 1.5}, {"seed": "one"},
    {"seed": None},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_setting_of_a_wrong_type_or_size_raises_an_error_of_one_line(wrong):
    for run in (pg.generate, pg.stream):
        with pytest.raises(SettingError) as error:
            run(text_model(), np.zeros((9, 9, 3), np.uint8), "a", **wrong)
        (name,) = wrong
        assert str(error.value).startswith(f"{name.replace('_', '-')} is ")
        assert str(error.value).isprintable()


def test_numpy_numbers_are_accepted_as_settings():
    python = {"max_new_tokens": 5, "temperature": 0.75, "top_k": 20, "top_p": 0.875, "min_p": 0.0, "seed": 7}
    types = [np.int64, np.float32, np.uint8, np.float64, np.float16, np.int32]
    numpy = {name: type_(value) for (name, value), type_ in zip(python.items(), types, strict=True)}
    picture = np.zeros((9, 9, 3), np.uint8)
    assert pg.generate(text_model(), picture, "a", **numpy) == pg.generate(text_model(), picture, "a", **python)
