"""The README says what is so: its Python runs, its commands run, its links lead somewhere."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from prose import fences

import pgfunc as pg
from pgfunc import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


WRITTEN = {"tiny.npz", "tiny-int8", "boxes.png", "masks.png", "vectors.npy"}  # what the commands leave behind


def blocks(language: str) -> list[str]:
    return [fence.body for fence in fences(TEXT) if fence.language == language]


def commands() -> list[str]:
    """The `pgfunc` lines that need no checkpoint but the shipped one."""
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("pgfunc ") and "--model" not in line]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_first_example_prints_what_generate_gives(capsys):
    source = blocks("python")[0]
    assert len([line for line in source.splitlines() if line.strip() and not line.startswith("import")]) <= 12
    exec(compile(source, "README.md", "exec"), {})
    (expected,) = pg.generate(pg.load(), "examples/images/scene.png", "caption en", max_new_tokens=32)
    assert capsys.readouterr().out == expected.text + "\n"
    assert expected.finish == "eos"


@pytest.mark.parametrize("source", blocks("python")[1:])
def test_the_other_examples_run(source, capsys):
    exec(compile(source, "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", commands())
def test_commands_run(command, monkeypatch, tmp_path, capsys):
    words = shlex.split(command)
    pictures = sorted(str(path) for path in Path("examples/images").glob("*.png"))
    words = [w for word in words for w in (pictures if word == "examples/images/*.png" else [word])]
    words = [str(tmp_path / word) if word in WRITTEN else word for word in words]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out or list(tmp_path.iterdir())


def test_the_commands_are_those_that_exist():
    said = {line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("pgfunc ")}
    assert said <= {command.name for command in cli.app.registered_commands} | {
        command.callback.__name__ for command in cli.app.registered_commands if command.callback
    }


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
