"""The README and the notes are true: the README's Python runs, all commands run, all links lead to files."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from prose import PAGES, README, ROOT, blocks, commands, links

import pgfunc as pg
from pgfunc import cli

# files that the commands write
OUTPUTS = {
    "tiny.npz", "tiny-int8", "boxes.png", "masks.png", "vectors.npy", "worst.html", "captions.jsonl", "captions.csv",
    "found.json", "drawn",
}  # fmt: skip
# a command with --model is not run: it names files that a reader has, or weights that need an account; nor is one with
# --ray, which needs the extra and a cluster
SELF_CONTAINED = [
    command for page in PAGES for command in commands(page) if not {"--model", "--ray"} & {*shlex.split(command)}
]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_loop_has_at_most_12_lines_and_prints_the_same_text_as_generate():
    (source,) = blocks(README, "python")
    assert len([line for line in source.splitlines() if line.strip() and not line.startswith("import")]) <= 12
    # in a process of its own: code with the hook that checks shapes cannot be compiled
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (expected,) = pg.generate(pg.load(), "examples/images/scene.png", "caption en", max_new_tokens=32)
    assert done.stdout == expected.text + "\n"
    assert expected.finish == "eos"


@pytest.mark.parametrize("command", SELF_CONTAINED)
def test_commands_run(command, monkeypatch, tmp_path, capsys):
    words = shlex.split(command)
    pictures = sorted(str(path) for path in Path("examples/images").glob("*.png"))
    words = [w for word in words for w in (pictures if word == "examples/images/*.png" else [word])]
    words = [str(tmp_path / word) if word in OUTPUTS else word for word in words]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code
    assert capsys.readouterr().out or list(tmp_path.iterdir())


def test_all_commands_exist():
    names = {command.split()[1] for page in PAGES for command in commands(page)}
    registered = cli.app.registered_commands
    assert names <= {each.name or each.callback.__name__ for each in registered if each.callback}
    assert len(SELF_CONTAINED) >= 14, "the commands of the notes are found"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem if page.parent != ROOT else "the README")
def test_links_lead_to_files(page):
    assert links(page)
    assert all((page.parent / link).exists() for link in links(page))


def test_the_tree_of_files_names_all_of_the_package_and_nothing_else():
    (tree,) = [block for block in blocks(README, "") if block.startswith("pgfunc/\n")]
    package = tree.partition("\nweights/")[0].removeprefix("pgfunc/\n")
    named = {name for line in package.splitlines() for name in re.findall(r"\w+(?:\.py|/)", line[:36])}
    hidden = {"__init__.py", "__pycache__/"}
    present = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "pgfunc").iterdir()} - hidden
    assert named == {name for name in present if name.endswith((".py", "/"))}
    for folder in re.findall(r"^(\w+/\w*)", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir()
