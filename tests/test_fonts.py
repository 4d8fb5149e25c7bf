"""Fonts: each character is drawn in a font that has a glyph for it, according to the font's own table."""

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
from pgfunc.objects.fonts import FallbackFont

DEJAVU = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
TABLE = TTFont(DEJAVU).getBestCmap()


@pytest.fixture
def no_system_fonts(monkeypatch):
    """The system has no fonts of its own."""
    monkeypatch.setattr(fonts, "installed", tuple)


@given(st.characters(exclude_categories=["C", "M", "Z"]) | st.sampled_from([chr(code) for code in TABLE]))
def test_a_font_has_the_glyphs_of_its_table(character):
    if fonts.needs_font(character):
        assert fonts.has_glyph(DEJAVU, character) == (ord(character) in TABLE)


def drawn(text: str, file: str | None) -> Image.Image:
    picture = Image.new("L", (400, 60))
    FallbackFont(24, file).write(ImageDraw.Draw(picture), 5, 5, text, "white")
    return picture


@pytest.mark.parametrize("word", ["кошка", "γάτα", "قطة", "mèo ế", "😀"])
def test_a_word_is_drawn_in_the_first_font_that_has_all_its_characters(word, no_system_fonts):
    assert fonts.runs(word, (fonts.PILLOW_FONT, DEJAVU)) == [(DEJAVU, word)]
    assert fonts.missing(word, DEJAVU) == ""
    assert drawn(word, DEJAVU).getbbox() is not None
    assert drawn(word, DEJAVU) != drawn(word, None)
    assert set(fonts.missing(word)) == {c for c in word if not (c.isspace() or c in "mo")}


def test_a_text_that_no_font_has_completely_is_drawn_in_several_fonts(no_system_fonts):
    own = fonts.PILLOW_FONT
    assert fonts.runs("猫 кошка 🐈 cat", (own, DEJAVU)) == [(own, "猫 "), (DEJAVU, "кошка "), (own, "🐈 cat")]
    assert fonts.missing("猫 кошка 猫", DEJAVU) == "猫"
    assert fonts.runs("", (own,)) == [(own, "")]


def test_marks_and_joiners_use_the_font_of_the_character_before_them(no_system_fonts):
    word = "к\u0301\u200d\u0301猫"
    assert unicodedata.category("\u200d") == "Cf"
    assert fonts.runs(word, (fonts.PILLOW_FONT, DEJAVU)) == [(DEJAVU, word[:-1]), (fonts.PILLOW_FONT, "猫")]


def test_the_font_of_the_user_is_tried_first():
    assert fonts.runs("cat", fonts.candidates(DEJAVU)) == [(DEJAVU, "cat")]
    assert fonts.runs("cat", fonts.candidates(None)) == [(fonts.PILLOW_FONT, "cat")]


def test_getlength_is_the_width_of_the_drawn_text(no_system_fonts):
    for word in ("cat", "кошка", "猫 кошка"):
        left, _, right, _ = drawn(word, DEJAVU).getbbox() or (0, 0, 0, 0)
        assert abs(right - left - FallbackFont(24, DEJAVU).getlength(word)) < 6  # pixels, the side bearings


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_installed_fonts_are_listed_with_regular_ones_first(system, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = {"linux": ".fonts", "darwin": "Library/Fonts", "win32": "AppData/Local/Microsoft/Windows/Fonts"}[system]
    (tmp_path / folder / "deep").mkdir(parents=True)
    for name in ("A-Bold.ttf", "LastResort.otf", "deep/B.ttc", "C-Regular.otf", "notes.txt"):
        (tmp_path / folder / name).touch()
    names = [Path(name).name for name in fonts.installed.__wrapped__() if name.startswith(str(tmp_path))]
    assert names == ["B.ttc", "C-Regular.otf", "A-Bold.ttf"]
    assert not fonts.has_glyph(str(tmp_path / folder / "A-Bold.ttf"), "c"), "an empty file has no glyphs"


@pytest.mark.parametrize("file", ["no.ttf", __file__, str(Path(__file__).parent)])
def test_a_file_that_is_not_a_font_is_refused(file):
    with pytest.raises(SettingError, match="cannot be read as a font"):
        FallbackFont(12, file)
