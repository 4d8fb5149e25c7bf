"""Letters: each is drawn in a font that has it, as the font's own table says."""

import sys
import unicodedata
from pathlib import Path

import matplotlib
import pytest
from fontTools.ttLib import TTFont
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from pgfunc.errors import SettingError
from pgfunc.objects import fonts
from pgfunc.objects.fonts import Letters

DEJAVU = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
TABLE = TTFont(DEJAVU).getBestCmap()


@pytest.fixture
def bare(monkeypatch):
    """A system without fonts."""
    monkeypatch.setattr(fonts, "installed", tuple)


@given(st.characters(exclude_categories=["C", "M", "Z"]) | st.sampled_from([chr(code) for code in TABLE]))
def test_a_font_has_the_letters_of_its_table(letter):
    if fonts.needs_font(letter):
        assert fonts.has(DEJAVU, letter) == (ord(letter) in TABLE)


def drawn(text: str, file: str | None) -> Image.Image:
    picture = Image.new("L", (400, 60))
    Letters(24, file).write(ImageDraw.Draw(picture), 5, 5, text, "white")
    return picture


@pytest.mark.parametrize("word", ["кошка", "γάτα", "قطة", "mèo ế", "😀"])
def test_a_word_is_drawn_whole_in_the_first_font_that_has_its_letters(word, bare):
    assert fonts.runs(word, (fonts.OWN, DEJAVU)) == [(DEJAVU, word)]
    assert fonts.missing(word, DEJAVU) == ""
    assert drawn(word, DEJAVU).getbbox() is not None
    assert drawn(word, DEJAVU) != drawn(word, None)
    assert set(fonts.missing(word)) == {c for c in word if not (c.isspace() or c in "mo")}


def test_a_word_that_no_font_has_whole_is_drawn_in_parts(bare):
    own = fonts.OWN
    assert fonts.runs("猫 кошка 🐈 cat", (own, DEJAVU)) == [(own, "猫 "), (DEJAVU, "кошка "), (own, "🐈 cat")]
    assert fonts.missing("猫 кошка 猫", DEJAVU) == "猫"
    assert fonts.runs("", (own,)) == [(own, "")]


def test_marks_and_joiners_stay_with_their_letter(bare):
    word = "к\u0301\u200d\u0301猫"
    assert unicodedata.category("\u200d") == "Cf"
    assert fonts.runs(word, (fonts.OWN, DEJAVU)) == [(DEJAVU, word[:-1]), (fonts.OWN, "猫")]


def test_a_given_font_comes_first():
    assert fonts.runs("cat", fonts.candidates(DEJAVU)) == [(DEJAVU, "cat")]
    assert fonts.runs("cat", fonts.candidates(None)) == [(fonts.OWN, "cat")]


def test_lengths_are_those_of_what_is_drawn(bare):
    for word in ("cat", "кошка", "猫 кошка"):
        left, _, right, _ = drawn(word, DEJAVU).getbbox() or (0, 0, 0, 0)
        assert abs(right - left - Letters(24, DEJAVU).getlength(word)) < 6  # pixels, beside the outermost letters


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_the_fonts_of_the_system_are_found_regular_ones_first(system, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = {"linux": ".fonts", "darwin": "Library/Fonts", "win32": "AppData/Local/Microsoft/Windows/Fonts"}[system]
    (tmp_path / folder / "deep").mkdir(parents=True)
    for name in ("A-Bold.ttf", "LastResort.otf", "deep/B.ttc", "C-Regular.otf", "notes.txt"):
        (tmp_path / folder / name).touch()
    found = [Path(name).name for name in fonts.installed.__wrapped__() if name.startswith(str(tmp_path))]
    assert found == ["B.ttc", "C-Regular.otf", "A-Bold.ttf"]
    assert not fonts.has(str(tmp_path / folder / "A-Bold.ttf"), "c"), "an empty file has no letters"


@pytest.mark.parametrize("file", ["no.ttf", __file__, str(Path(__file__).parent)])
def test_a_file_that_is_no_font_is_one_line(file):
    with pytest.raises(SettingError, match="cannot be read as a font"):
        Letters(12, file)
