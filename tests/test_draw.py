"""Drawing: colours where the objects are, labels inside the picture, and nothing else is touched."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageFont

from pgfunc import draw, segment
from pgfunc.detect import Box, Detection
from pgfunc.segment import Segment


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 90, 90))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@st.composite
def found(draw, width: int, height: int) -> list[Detection]:
    """Boxes anywhere, some of them partly or wholly outside."""
    edge = st.floats(-0.5, 1.5)
    boxes = draw(st.lists(st.tuples(edge, edge, edge, edge), max_size=6))
    labels = st.text(max_size=40)
    return [
        Detection(draw(labels), Box(min(a, b) * height, min(c, d) * width, max(a, b) * height, max(c, d) * width), 0.5)
        for a, b, c, d in boxes
    ]


@given(st.data(), st.sampled_from([(1, 1), (3, 200), (64, 64), (200, 90), (640, 480)]))
def test_any_boxes_on_any_picture_can_be_drawn_and_labels_stay_inside(data, size):
    items = data.draw(found(*size))
    picture = grey(*size)
    drawn = draw.objects(picture, items)
    assert (drawn.size, drawn.mode) == (size, "RGB")
    assert picture.tobytes() == grey(*size).tobytes(), "the given picture is not changed"
    for plate in draw.plates(size, items, ImageFont.load_default(12), 1):
        assert 0 <= plate.left < plate.right <= size[0] or size[0] < 3
        assert 0 <= plate.top < plate.bottom <= size[1]


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (3000, 2000)])
def test_an_outline_lies_on_the_edges_of_its_box_and_grows_with_the_picture(size):
    width, height = size
    box = Box(0.25 * height, 0.5 * width, 0.75 * height, 0.875 * width)
    drawn = pixels(draw.objects(grey(*size), [Detection("", box)]))
    touched = (drawn != 90).any(-1)
    rows, columns = touched.any(1).nonzero()[0], touched.any(0).nonzero()[0]
    # an empty label leaves no trace
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (box.ymin, box.ymax, box.xmin, box.xmax)
    middle = touched[round(0.5 * height)]
    line = middle[: round(0.7 * width)].sum()
    assert line == max(1, round(min(size) / 140)) + (0 if size[0] == 64 else max(1, round(min(size) / 140) // 3))
    assert not touched[round(0.5 * height), round(0.6 * width) : round(0.8 * width)].any(), "only the edges"


def test_a_mask_is_translucent_inside_an_edge_and_covers_its_pixels_alone():
    mask = torch.zeros(480, 640, dtype=torch.bool)
    mask[300:400, 200:260] = True
    item = segment.from_mask("", mask)._replace(box=Box(0, 0, 480, 640))
    drawn = pixels(draw.objects(grey(640, 480), [item]))
    colour = np.array(draw.COLOURS[0])
    assert (drawn[300:400, 200:203] == colour).all(), "three pixels of edge, as a box has"
    assert (drawn[303:397, 203:204] == 0).all(), "one dark pixel inside it"
    expected = 90 * (1 - draw.OPACITY) + colour * draw.OPACITY
    assert np.abs(drawn[304:396, 204:256] - expected).max() <= 1  # 8 bits
    around = drawn[200:470, 100:600].copy()
    around[100:200, 100:160] = 90
    assert (around == 90).all()


@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.integers(1, 3))
def test_an_edge_is_what_lies_near_the_outside(mask, width):
    found = draw.edge(torch.from_numpy(mask), width).numpy()
    for y, x in np.ndindex(mask.shape):
        near = mask[max(y - width, 0) : y + width + 1, max(x - width, 0) : x + width + 1]
        assert found[y, x] == (mask[y, x] and not near.all())


def test_a_label_has_one_colour_and_labels_differ():
    boxes = [Box(top, left, top + 60, left + 60) for top in (30, 150) for left in (30, 150)]
    items = [Detection(label, box) for label, box in zip(["cat", "dog", "cat", "bus"], boxes, strict=True)]
    drawn = pixels(draw.objects(grey(300, 300), items))
    colours = [tuple(drawn[int(box.ymax) - 1, int(box.xmin) + 30]) for box in boxes]
    assert colours == [draw.COLOURS[i] for i in (0, 1, 0, 2)]
    assert len(set(draw.COLOURS)) == len(draw.COLOURS)


def test_labels_avoid_each_other_while_there_is_room():
    boxes = [Box(100, 100, 200, 200), Box(101, 101, 200, 200), Box(102, 99, 201, 200), Box(0, 0, 300, 300)]
    items = [Detection(f"object {i}", box, 0.5) for i, box in enumerate(boxes)]
    placed = draw.plates((300, 300), items, ImageFont.load_default(10), 2)
    assert sum(draw.overlap(a, b) for a in placed for b in placed if a is not b) == 0
    assert (placed[0].left, placed[0].bottom) == (100, 100), "on top of its box, if it can"


def test_a_label_wider_than_the_picture_is_cut_short():
    font = ImageFont.load_default(12)
    cut = draw.shortened("a very long label", font, 60)
    assert cut.endswith("…")
    assert "a very long label".startswith(cut[:-1])
    assert font.getlength(cut) <= 60 < font.getlength("a very long label"[: len(cut)] + "…")
    assert draw.shortened("cat", font, 60) == "cat"
    assert draw.shortened("cat", font, 0) == ""


def test_captions_have_the_confidence_if_there_is_one():
    box = Box(0, 0, 1, 1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert draw.caption(Detection("cat", box)) == "cat"
    assert draw.caption(Detection("cat", box, 0.874)) == "cat 87%"
    assert draw.caption(Segment("", box, mask, 0.5)) == "50%"
    assert draw.caption(Detection("big\n cat", box)) == "big cat"


def test_nothing_found_is_the_same_picture():
    assert draw.objects(grey(30, 20), []).tobytes() == grey(30, 20).tobytes()
