"""The notes say what is so: their Python runs, block after block, and prints what stands below it."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from prose import Fence, fences

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "notes"
NOTES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
LOGS = {"performance.md", "mutation.md"}  # which have nothing to run
ESSAYS = [path for path in NOTES if path.name not in LOGS]
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]\d+)?")


def examples(note: Path) -> list[tuple[Fence, str]]:
    """Each Python block of a note, and the text block that follows it, which is what it prints; "" is nothing."""
    told = [fence for fence in fences(note.read_text()) if fence.language]
    pairs = pairwise([*told, Fence("", "", 0)])
    return [(one, other.body if other.language == "text" else "") for one, other in pairs if one.language == "python"]


def test_fences_know_their_language_and_place():
    text = "one\n\n```python\nprint(1)\n```\n\n```\ndrawing\n```\n"
    assert fences(text) == [Fence("python", "print(1)\n", 3), Fence("", "drawing\n", 7)]


@pytest.mark.parametrize("note", ESSAYS, ids=lambda note: note.stem)
def test_snippets_run_and_print_what_the_note_shows(note, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = {}
    for source, expected in examples(note):
        # the lines above are kept, empty, so that a traceback points into the note
        exec(compile("\n" * source.line + source.body, str(note), "exec"), names)
        found = capsys.readouterr().out
        assert NUMBER.sub("0", found) == NUMBER.sub("0", expected), f"{note.name}, line {source.line}"
        numbers, shown = ([float(word) for word in NUMBER.findall(text)] for text in (found, expected))
        assert numbers == pytest.approx(shown, rel=0.02, abs=1e-9)  # float32 on other processors; last digits shown


@pytest.mark.parametrize("note", ESSAYS, ids=lambda note: note.stem)
def test_every_output_stands_below_a_snippet(note):
    languages = [fence.language for fence in fences(note.read_text()) if fence.language]
    assert set(languages) == {"python", "text"}
    for before, after in zip(["", *languages], languages, strict=False):
        assert after == "python" or before == "python"


@pytest.mark.parametrize("page", [*NOTES, FOLDER / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert links
    assert all((FOLDER / link).exists() for link in links)


def test_the_index_names_every_note():
    assert sorted(re.findall(r"\]\(([\w-]+\.md)\)", (FOLDER / "README.md").read_text())) == [n.name for n in NOTES]
