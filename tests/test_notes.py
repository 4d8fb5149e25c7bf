"""The notes are true: their Python runs, block after block, and prints the text that stands below it."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from prose import INDEX, NOTES, ROOT, Fence, fences

LOGS = {"measured.md", "performance.md", "mutation.md"}  # records; they have no Python
LESSONS = [path for path in NOTES if path.name not in LOGS]
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]\d+)?")


def languages(note: Path) -> list[str]:
    return [fence.language for fence in fences(note.read_text()) if fence.language]


def examples(note: Path) -> list[tuple[Fence, str]]:
    """Each Python block of a note and the text block after it, which shows its output; "" if there is none."""
    tagged = [fence for fence in fences(note.read_text()) if fence.language]
    pairs = pairwise([*tagged, Fence("", "", 0)])
    return [(one, other.body if other.language == "text" else "") for one, other in pairs if one.language == "python"]


def test_fences_have_their_language_and_line():
    text = "one\n\n```python\nprint(1)\n```\n\n```\ndrawing\n```\n"
    assert fences(text) == [Fence("python", "print(1)\n", 3), Fence("", "drawing\n", 7)]


@pytest.mark.parametrize("note", LESSONS, ids=lambda note: note.stem)
def test_snippets_run_and_print_what_the_note_shows(note, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = {}
    for source, expected in examples(note):
        # empty lines stand for the lines above, so that a traceback names the right line of the note
        exec(compile("\n" * source.line + source.body, str(note), "exec"), names)
        printed = capsys.readouterr().out
        assert NUMBER.sub("0", printed) == NUMBER.sub("0", expected), f"{note.name}, line {source.line}"
        numbers, shown = ([float(word) for word in NUMBER.findall(text)] for text in (printed, expected))
        assert numbers == pytest.approx(shown, rel=0.02, abs=1e-9)  # float32 on other processors; last digits shown


@pytest.mark.parametrize("note", LESSONS, ids=lambda note: note.stem)
def test_every_output_stands_below_a_snippet(note):
    assert set(languages(note)) <= {"python", "text", "sh"}
    for before, after in pairwise(["", *languages(note)]):
        assert after != "text" or before == "python"


@pytest.mark.parametrize("name", sorted(LOGS))
def test_records_have_no_python(name):
    assert "python" not in languages(INDEX.parent / name)


def test_the_index_names_every_note():
    assert sorted(re.findall(r"\]\(([\w-]+\.md)\)", INDEX.read_text())) == [note.name for note in NOTES]
