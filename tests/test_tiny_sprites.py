"""The curated table, and the way from a picture to a sprite."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from examples.tiny import sprites

ROWS = sprites.read_table()
TRAINED = [row for row in ROWS if row.split in ("train", "unseen")]
PERMISSIVE = {"MIT", "Apache-2.0", "OFL-1.1", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "public domain"}


def test_the_drawings_of_training_and_of_held_out_scenes_are_permissively_licensed():
    assert {row.licence for row in TRAINED} <= PERMISSIVE
    assert all(row.author for row in TRAINED), "CC-BY asks for the author"


def test_no_picture_occurs_twice_in_the_table():
    pictures = [(row.source, row.file) for row in ROWS]
    assert len(set(pictures)) == len(pictures)


def test_every_source_of_sprites_can_be_drawn():
    assert {row.source for row in ROWS if row.split in sprites.SPLITS} == set(sprites.DRAW)


@pytest.mark.parametrize("size", [(300, 40), (40, 300), (10, 10)])
def test_a_sprite_fills_its_square_to_two_pixels_and_is_premultiplied(size):
    picture = Image.new("RGBA", (400, 400))
    ImageDraw.Draw(picture).rectangle((50, 50, 49 + size[0], 49 + size[1]), (200, 100, 50, 128))
    rgba = sprites.fit(picture)
    ys, xs = np.nonzero(rgba[..., 3])
    assert max(np.ptp(ys), np.ptp(xs)) + 1 == sprites.LONGEST
    assert (rgba[..., :3] <= rgba[..., 3:]).all()
