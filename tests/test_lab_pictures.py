"""Pictures show the numbers that they are given, at every size."""

import sys

import pytest
import torch

from pgfunc import lab
from pgfunc.errors import SettingError


@pytest.mark.parametrize("side", [224, 896])
def test_a_heat_map_shows_the_values_of_its_patches(side):
    values = torch.randn(16, generator=torch.Generator().manual_seed(0))
    drawing = lab.heat(torch.zeros(3, side, side), values, "title")
    assert drawing.data.tolist() == values.double().reshape(4, 4).tolist()
    _, right, _ = drawing.figure.axes
    (gray, colours) = right.get_images()
    assert gray.get_extent() == [-0.5, side - 0.5, side - 0.5, -0.5]
    assert colours.get_extent() == [0, side, side, 0]
    assert colours.norm.vmin == -colours.norm.vmax == -values.abs().max().item()
    assert drawing._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(SettingError, match="there are 15 values, which is not a square grid of patches"):
        lab.heat(torch.zeros(3, side, side), values[:15])


def test_values_of_one_sign_begin_at_white_and_a_limit_is_kept():
    (_, colours) = lab.heat(torch.zeros(3, 28, 28), torch.ones(4), limit=2.0).figure.axes[1].get_images()
    assert (colours.norm.vmin, colours.norm.vmax) == (0, 2)


def test_a_grid_has_its_first_row_at_the_bottom_and_labels():
    drawing = lab.grid(torch.tensor([[1.0, -2.0], [0.5, torch.nan]]), columns=["a", "\n"], title="t")
    axes = drawing.figure.axes[0]
    assert axes.get_ylim() == (-0.5, 1.5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "↵"]
    assert {text.get_text() for text in axes.texts} == {"1", "-2", "0.5", "nan"}
    assert axes.get_ylabel() == "layer"
    wide = lab.grid(torch.zeros(3, 1000)).figure.axes[0]
    assert len(wide.get_xticks()) <= 24
    assert not wide.texts
    with pytest.raises(SettingError, match="the table is 3 x 0, which leaves nothing to draw"):
        lab.grid(torch.zeros(3, 0))
    with pytest.raises(SettingError, match="there are 3 labels for 2 columns"):
        lab.grid(torch.zeros(1, 2), columns=["a", "b", "c"])


def test_a_strip_has_each_token_with_its_probability():
    words = [" a", "\n", " ", "\x1b[0m", *"0123456789"]
    drawing = lab.strip(words, torch.linspace(0, 1, 14))
    assert drawing.data.tolist() == torch.linspace(0, 1, 14).double().tolist()
    texts = [text.get_text() for text in drawing.figure.axes[0].texts]
    assert texts[::2] == [" a", "↵", "␣", "?[0m", *"0123456789"]
    assert texts[1::2] == [f"{x:.2f}" for x in torch.linspace(0, 1, 14)]
    with pytest.raises(SettingError, match=r"there are 2 tokens and probabilities of shape \(3,\)"):
        lab.strip(["a", "b"], torch.zeros(3))


def test_pictures_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingError, match=r'pictures need matplotlib, .* pip install "pgfunc\[plot\]"'):
        lab.grid(torch.zeros(1, 1))
