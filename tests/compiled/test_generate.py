"""What is said is the same compiled: by `generate`, by `stream`, and by the command line with code made ahead."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import text_model

import pgfunc as pg

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 5}])
def test_generate_and_stream_say_the_same_compiled(sampling):
    model = text_model()
    picture = torch.randint(0, 255, (40, 30, 3), dtype=torch.uint8).numpy()
    asked = {"images": [picture, [picture, picture]], "prefixes": ["a", "b?"], "max_new_tokens": 12}
    pure, fast = (pg.generate(model, **asked, **sampling, compile=compile) for compile in (False, True))
    assert [done.tokens for done in fast] == [done.tokens for done in pure]
    for one, other in zip(fast, pure, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    alone = {"images": picture, "prefix": "a", "max_new_tokens": 12}
    assert list(pg.stream(model, **alone, **sampling, compile=True)) == list(pg.stream(model, **alone, **sampling))


def test_code_that_was_compiled_ahead_serves_wherever_its_folder_is(tmp_path):
    pg.save(text_model(), tmp_path / "model")

    def run(*arguments: str) -> str:
        here = "--model", str(tmp_path / "model"), "--device", "cpu"
        command = [sys.executable, "-m", "pgfunc.cli", *arguments, *here]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout

    def files(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".so", ".cpp", ".py")}

    made, moved = tmp_path / "made", tmp_path / "moved"
    said = run("compile", str(made), "--max-new-tokens", "12")
    assert said.startswith(f"{made} has the code after ")
    made.rename(moved)
    before = files(moved)
    caption = "caption", str(ROOT / "examples/images/scene.png"), "--max-new-tokens", "12"
    assert run(*caption, "--compiled", str(moved)) == run(*caption) != ""
    assert files(moved) == before, "nothing was compiled"
    assert not made.exists()
