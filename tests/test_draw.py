"""Drawing: objects are colored, labels stay inside the picture, and no other pixel changes."""

from time import process_time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageFont

from pgfunc.errors import SettingError
from pgfunc.image import open_image
from pgfunc.objects import draw, segment
from pgfunc.objects.detect import Box, Detection
from pgfunc.objects.fonts import FallbackFont
from pgfunc.objects.segment import Segment


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 90, 90))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@st.composite
def detections(draw, width: int, height: int) -> list[Detection]:
    """Boxes anywhere, some of them partly or completely outside the picture."""
    edge = st.floats(-0.5, 1.5)
    boxes = draw(st.lists(st.tuples(edge, edge, edge, edge), max_size=6))
    labels = st.text(max_size=40)
    return [
        Detection(draw(labels), Box(min(a, b) * height, min(c, d) * width, max(a, b) * height, max(c, d) * width), 0.5)
        for a, b, c, d in boxes
    ]


@given(st.data(), st.sampled_from([(1, 1), (3, 200), (64, 64), (200, 90), (640, 480)]))
def test_any_boxes_on_any_picture_can_be_drawn_and_labels_stay_inside(data, size):
    items = data.draw(detections(*size))
    picture = grey(*size)
    drawn = draw.objects(picture, items)
    assert (drawn.size, drawn.mode) == (size, "RGB")
    assert picture.tobytes() == grey(*size).tobytes(), "the input is not changed"
    labels = draw.place_labels(
        size, [item.box for item in items], [draw.caption(item) for item in items], FallbackFont(12), 1
    )
    assert len(labels) == len(items)
    for label in filter(None, labels):
        assert 0 <= label.left < label.right <= size[0]
        assert 0 <= label.top < label.bottom <= size[1]
    areas = [(label.right - label.left) * (label.bottom - label.top) for label in labels if label]
    assert sum(areas) <= size[0] * size[1] / 8, "labels hide little, however many there are"


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (3000, 2000)])
def test_an_outline_lies_on_the_edges_of_its_box_and_grows_with_the_picture(size):
    width, height = size
    box = Box(0.25 * height, 0.5 * width, 0.75 * height, 0.875 * width)
    drawn = pixels(draw.objects(grey(*size), [Detection("", box)]))
    touched = (drawn != 90).any(-1)
    rows, columns = touched.any(1).nonzero()[0], touched.any(0).nonzero()[0]
    # an empty label draws nothing
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (box.ymin, box.ymax, box.xmin, box.xmax)
    middle = touched[round(0.5 * height)]
    line = middle[: round(0.7 * width)].sum()
    assert line == max(1, round(min(size) / 140)) + (0 if size[0] == 64 else max(1, round(min(size) / 140) // 3))
    assert not touched[round(0.5 * height), round(0.6 * width) : round(0.8 * width)].any(), "only the edges are drawn"


def test_a_mask_is_translucent_inside_its_edge_and_colors_only_its_pixels():
    mask = torch.zeros(480, 640, dtype=torch.bool)
    mask[300:400, 200:260] = True
    item = segment.from_mask("", mask)._replace(box=Box(0, 0, 480, 640))
    drawn = pixels(draw.objects(grey(640, 480), [item]))
    color = np.array(draw.COLORS[0])
    assert (drawn[300:400, 200:203] == color).all(), "the edge is three pixels wide, as that of a box"
    assert (drawn[303:397, 203:204] == 0).all(), "one dark pixel inside the edge"
    expected = 90 * (1 - draw.OPACITY) + color * draw.OPACITY
    assert np.abs(drawn[304:396, 204:256] - expected).max() <= 1  # 8 bits
    around = drawn[200:470, 100:600].copy()
    around[100:200, 100:160] = 90
    assert (around == 90).all()


@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.integers(1, 3))
def test_the_edge_of_a_mask_is_its_pixels_near_the_outside(mask, width):
    edge = draw.edge(mask, width)
    for y, x in np.ndindex(mask.shape):
        near = mask[max(y - width, 0) : y + width + 1, max(x - width, 0) : x + width + 1]
        assert edge[y, x] == (mask[y, x] and not near.all())


def test_boxes_have_the_color_of_their_label():
    boxes = [Box(top, left, top + 60, left + 60) for top in (30, 150) for left in (30, 150)]
    items = [Detection(label, box) for label, box in zip(["cat", "dog", "cat", "bus"], boxes, strict=True)]
    drawn = pixels(draw.objects(grey(300, 300), items))
    colors = [tuple(drawn[int(box.ymax) - 1, int(box.xmin) + 30]) for box in boxes]
    assert colors == [draw.COLORS[i] for i in (0, 1, 0, 2)]
    assert len(set(draw.COLORS)) == len(draw.COLORS)


def test_masks_with_the_same_label_have_different_colors():
    masks = torch.zeros(12, 90, 120, dtype=torch.bool)
    for number, mask in enumerate(masks):
        mask[10 + 20 * (number // 4) : 26 + 20 * (number // 4), 10 + 25 * (number % 4) : 30 + 25 * (number % 4)] = True
    items = [segment.from_mask("", mask) for mask in masks]
    drawn = pixels(draw.objects(grey(120, 90), items))
    assert len({tuple(drawn[int(item.box.ymin), int(item.box.xmin) + 5]) for item in items}) == 12


@given(st.integers(0, 150))
def test_any_number_of_colors_are_distinct(count):
    colors = draw.palette(count)
    assert colors == draw.palette(200)[:count], "a new label does not change the colors of others"
    assert tuple(colors[:10]) == draw.COLORS[:count]
    assert len(set(colors)) == count
    assert all(max(color) > 128 for color in colors), "no dark color, because edges have a dark line"


def test_thirty_colors_are_as_far_apart_as_ten():
    def closest(count: int) -> float:
        colors = np.array(draw.palette(count))
        return (np.abs(colors[:, None] - colors).sum(-1) + 1000 * np.eye(count)).min()

    assert closest(30) >= closest(10) > 80  # of 765, in all channels together


@pytest.mark.parametrize("side", [32, 48, 64])
@pytest.mark.parametrize("masks", [False, True])
def test_labels_hide_little_of_a_small_picture(side, masks):
    """They hide at most an eighth of it, and no part of an object while they fit beside the objects."""
    boxes = [
        Box(side * 0.6, side * 0.5, side * 0.95, side * 0.9),
        Box(side * 0.25, side * 0.5, side * 0.55, side * 0.9),
    ]
    items: list = [Detection(name, box) for name, box in zip(("cat", "strawberry"), boxes, strict=True)]
    if masks:
        stacked = torch.zeros(2, side, side, dtype=torch.bool)
        for mask, box in zip(stacked, boxes, strict=True):
            mask[int(box.ymin) + 2 : int(box.ymax) - 2, int(box.xmin) + 2 : int(box.xmax) - 2] = True
        items = [Segment(item.label, item.box, mask) for item, mask in zip(items, stacked, strict=True)]
    with_labels = pixels(draw.objects(grey(side, side), items))
    bare = pixels(draw.objects(grey(side, side), [item._replace(label="") for item in items]))
    hidden = (with_labels != bare).any(-1)
    assert hidden.mean() <= 1 / 8
    for box in boxes:
        top, left, bottom, right = map(round, box)
        assert not hidden[top + 1 : bottom - 1, left + 1 : right - 1].any()


def test_many_labels_have_smaller_letters_and_those_that_do_not_fit_are_left_out():
    boxes = [Box(y, x, y + 9, x + 9) for y in range(0, 440, 15) for x in range(0, 600, 15)]
    items = [Detection(f"thing {i % 25}", box) for i, box in enumerate(boxes)]
    few, many = (draw.choose_font([item.label for item in some], None, (640, 480), 3) for some in (items[:3], items))
    assert sum(many.getmetrics()) < sum(few.getmetrics())
    labels = draw.place_labels((640, 480), boxes, [item.label for item in items], many, 3)
    areas = [(label.right - label.left) * (label.bottom - label.top) for label in labels if label]
    assert 0.12 < sum(areas) / (640 * 480) <= 1 / 8
    assert len(areas) < len(labels)


def seconds(side: int) -> float:
    """The CPU time for drawing a mask with its label on a square picture."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[side // 9 : -side // 9, side // 8 : -side // 5] = True
    item, picture, times = segment.from_mask("cat", mask), grey(side, side), []
    for _ in range(3):
        start = process_time()
        draw.objects(picture, [item])
        times.append(process_time() - start)
    return min(times)


def test_the_cost_of_drawing_grows_no_faster_than_the_pixels():
    assert seconds(2048) < 3 * 16 * seconds(512)  # 16 times the pixels, and lines four times as wide


def test_labels_avoid_each_other_while_the_picture_has_free_space():
    boxes = [Box(100, 100, 200, 200), Box(101, 101, 200, 200), Box(102, 99, 201, 200), Box(0, 0, 300, 300)]
    labels = draw.place_labels((300, 300), boxes, [f"object {i}" for i in range(4)], ImageFont.load_default(10), 2)
    assert None not in labels
    rectangles = draw.rectangles([label[1:] for label in labels if label])
    assert sum(draw.overlaps(rectangles, rectangles)) == (rectangles[:, 2:] - rectangles[:, :2]).prod(-1).sum()
    assert (labels[0].left, labels[0].bottom) == (100, 100), "above its box, if that is free"


def test_a_label_wider_than_the_picture_is_truncated():
    font = ImageFont.load_default(12)
    cut = draw.truncate("a very long label", font, 60)
    assert cut.endswith("…")
    assert "a very long label".startswith(cut[:-1])
    assert font.getlength(cut) <= 60 < font.getlength("a very long label"[: len(cut)] + "…")
    assert draw.truncate("cat", font, 60) == "cat"
    assert draw.truncate("cat", font, 0) == ""


def test_a_caption_has_the_confidence_if_asked_for_and_present():
    box = Box(0, 0, 1, 1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert draw.caption(Detection("cat", box, 0.874)) == "cat"
    assert draw.caption(Detection("cat", box), confidence=True) == "cat"
    assert draw.caption(Detection("cat", box, 0.874), confidence=True) == "cat 87%"
    assert draw.caption(Segment("", box, mask, 0.5), confidence=True) == "50%"
    assert draw.caption(Detection("big\n\0 cat\x1b", box)) == "big cat"
    confident = [Detection("cat", Box(20, 20, 80, 80), 0.3)]
    assert draw.objects(grey(300, 300), confident) == draw.objects(
        grey(300, 300), [confident[0]._replace(confidence=None)]
    )
    assert draw.objects(grey(300, 300), confident, confidence=True) != draw.objects(grey(300, 300), confident)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_a_picture_of_any_mode_is_drawn_on_as_rgb(mode):
    items = [Detection("cat", Box(20, 20, 80, 80))]
    picture = grey(100, 100).convert(mode)
    drawn = draw.objects(picture, items)
    assert (drawn.mode, picture.mode) == ("RGB", mode)
    assert drawn == draw.objects(open_image(picture), items)


def test_an_object_that_cannot_be_drawn_is_refused():
    for box in (Box(float("nan"), 0, 5, 5), Box(0, 0, float("inf"), 5)):
        with pytest.raises(SettingError, match=r"^Box\(.*\) is not a box; its edges are not finite$"):
            draw.objects(grey(30, 20), [Detection("cat", box)])
    small = Segment("cat", Box(0, 0, 5, 5), torch.ones(30, 20, dtype=torch.bool))
    with pytest.raises(SettingError, match=r"the mask of 'cat' is 30 x 20, the picture 20 x 30 pixels"):
        draw.objects(grey(30, 20), [small])
    with pytest.raises(SettingError, match=r"no\.ttf: cannot be read as a font"):
        draw.objects(grey(30, 20), [Detection("cat", Box(0, 0, 5, 5))], font="no.ttf")


def test_an_empty_mask_draws_nothing_and_a_full_one_has_no_edge():
    empty, full = torch.zeros(20, 30, dtype=torch.bool), torch.ones(20, 30, dtype=torch.bool)
    assert draw.objects(grey(30, 20), [Segment("", Box(3, 3, 3, 3), empty)]).getpixel((20, 10)) == (90, 90, 90)
    drawn = pixels(draw.objects(grey(30, 20), [Segment("", Box(0, 0, 20, 30), full)]))
    assert (drawn[1:-1, 1:-1] == drawn[5, 5]).all(), "a mask has no edge at the border of the picture"


def test_without_objects_the_picture_is_unchanged():
    assert draw.objects(grey(30, 20), []).tobytes() == grey(30, 20).tobytes()
