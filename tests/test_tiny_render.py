"""Painting the scenes of the tiny checkpoint: pixels, visible masks and boxes, against plain numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny import render, scenes, shapes, world
from examples.tiny.scenes import Background, Scene, Sign, Thing

WORLD = world.small()
CAT, BANK = WORLD.catalog, WORLD.bank("cpu")
FLAT = Background(np.full((3, 16, 16), 100, np.uint8), -1, np.eye(2, 3, dtype=np.float32), 0.0)
FIRST_SHAPE = len(CAT.extent) - len(shapes.OUTLINES)
SQUARE = FIRST_SHAPE + list(shapes.OUTLINES).index("square")
SIDE = 224


def placed(
    texture: int, centre=(0.5, 0.5), axes=(0.5, 0.5), turn: float = 0.0, tint=(1.0, 1.0, 1.0), off=(0.0, 0.0)
) -> Thing:
    """A handmade thing: `theta` inverts the scaling, turning and moving of a texture; `off` offsets its reading."""
    cos, sin = np.cos(turn), np.sin(turn)
    ahead = np.array([[cos, -sin], [sin, cos]]) * axes
    back = np.linalg.inv(ahead)
    theta = np.concatenate([back, -back @ (2 * np.asarray(centre) - 1)[:, None]], 1).astype(np.float32)
    reach = np.abs(ahead) @ CAT.extent[texture] / 2
    warp = np.broadcast_to(np.array(off, np.float32)[:, None, None], (2, scenes.KNOTS, scenes.KNOTS))
    return Thing("", "", texture, tuple(centre), tuple(reach), theta, warp, np.diag(tint).astype(np.float32))


def painted(*things: Thing, sign: Sign | None = None, ground: Background = FLAT, side: int = SIDE) -> render.Rendered:
    return render.render(BANK, render.layout([Scene(things, sign, ground)]), side, seed=0)


def drawn(split: str, count: int, **changes) -> list[Scene]:
    made = [scenes.draw(CAT, split, index) for index in range(count)]
    return [scene._replace(background=scene.background._replace(**changes)) for scene in made]


def box_of(mask: np.ndarray) -> tuple[float, ...]:
    ys, xs = np.nonzero(mask)
    if not len(ys):
        return (0.0,) * 4
    return tuple(edge / len(mask) for edge in (ys.min(), xs.min(), ys.max() + 1, xs.max() + 1))


# --- one thing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texture", [0, 7, SQUARE, FIRST_SHAPE + 6])
def test_the_identity_map_leaves_a_texture_unchanged(texture):
    found = render.things(BANK, render.layout([Scene((placed(texture, axes=(1, 1)),), None, FLAT)]), 128)[0, 0]
    torch.testing.assert_close(found, WORLD.textures[texture] / 255, atol=1e-5, rtol=0)  # bilinear weights, float32


@given(st.floats(-0.2, 0.2), st.floats(-0.2, 0.2), st.floats(-1, 1), st.sampled_from([2, 5, SQUARE]))
def test_a_constant_warp_moves_the_thing(x, y, turn, texture):
    warped = placed(texture, axes=(0.5, 0.3), turn=turn, off=(x, y))
    moved = placed(texture, axes=(0.5, 0.3), turn=turn)
    moved.theta[:, 2] += (x, y)
    one, other = (render.things(BANK, render.layout([Scene((each,), None, FLAT)]), SIDE) for each in (warped, moved))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)  # float32 places in a texture of 128 texels, steep edges


@given(st.integers(-40, 40), st.integers(-40, 40), st.floats(-1, 1), st.sampled_from([2, 5, SQUARE]))
def test_moving_a_thing_by_whole_pixels_moves_its_mask_and_box(x, y, turn, texture):
    here = placed(texture, (0.5, 0.5), (0.4, 0.3), turn)
    there = placed(texture, (0.5 + x / SIDE, 0.5 + y / SIDE), (0.4, 0.3), turn)
    one, other = painted(here), painted(there)
    # a pixel whose alpha is one half may tip over: float32 places
    assert (one.masks[0, 0].roll((y, x), (0, 1)) != other.masks[0, 0]).sum() <= 2
    shift = torch.tensor([y, x, y, x]) / SIDE
    torch.testing.assert_close(one.boxes[0, 0] + shift, other.boxes[0, 0], atol=1.01 / SIDE, rtol=0)


@given(st.floats(0.25, 0.75), st.floats(0.25, 0.75), st.floats(0.2, 0.4), st.floats(0.2, 0.4), st.floats(-0.5, 0.5))
def test_the_box_of_a_turned_square_agrees_with_its_reach(x, y, wide, tall, turn):
    thing = placed(SQUARE, (x, y), (wide, tall), turn)
    claimed = y - thing.reach[1], x - thing.reach[0], y + thing.reach[1], x + thing.reach[0]
    found = painted(thing).boxes[0, 0].tolist()
    np.testing.assert_allclose(found, claimed, atol=2 / SIDE)  # a corner's last pixel is less than half covered


@pytest.mark.parametrize("split", ["train", "S2", "S3"])
def test_things_appear_only_at_their_positions(split):
    found = drawn(split, 40)
    boxes = render.render(BANK, render.layout(found), SIDE, 0).boxes
    for i, scene in enumerate(found):
        for j, thing in enumerate(scene.things):
            (x, y), (wide, tall) = thing.centre, thing.reach
            ymin, xmin, ymax, xmax = boxes[i, j].tolist()
            # a pixel counts where its centre is covered; between its knots a cubic goes a little beyond them
            warped = np.abs(np.linalg.inv(thing.theta[:, :2])) @ np.abs(thing.warp).max((1, 2)) / 2
            across, down = 1.01 / SIDE + 1.3 * warped
            assert y - tall - down <= ymin < ymax <= y + tall + down
            assert x - wide - across <= xmin < xmax <= x + wide + across
        assert not boxes[i, len(scene.things) :].any()


@pytest.mark.parametrize("split", ["train", "S3"])
def test_alpha_is_never_above_one_and_colour_never_above_alpha(split):
    found = render.things(BANK, render.layout(drawn(split, 30)), SIDE)
    colour, alpha = found[:, :, :3], found[:, :, 3:]
    assert colour.min() >= 0
    assert alpha.max() <= 1
    assert (colour <= alpha).all()


def test_a_tint_mixes_the_channels_of_the_texture():
    swap = placed(0, axes=(1, 1))._replace(tint=np.array([[0, 0, 0.5], [0, 1, 0], [1, 0, 0]], np.float32))
    found = render.things(BANK, render.layout([Scene((swap,), None, FLAT)]), 128)[0, 0]
    red, green, blue, alpha = WORLD.textures[0] / 255
    expected = torch.stack([0.5 * blue, green, red, alpha])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# --- things upon things -----------------------------------------------------------------------------------------------


def test_a_later_thing_hides_an_earlier_one_and_keeps_its_own_mask():
    behind, front = placed(SQUARE, (0.4, 0.4), tint=(1, 0, 0)), placed(SQUARE, (0.6, 0.6), tint=(0, 1, 0))
    both, alone = painted(behind, front), [painted(behind).masks[0, 0], painted(front).masks[0, 0]]
    assert torch.equal(both.masks[0, 1], alone[1])
    assert torch.equal(both.masks[0, 0], alone[0] & ~alone[1])
    assert (alone[0] & alone[1]).sum() > 2000
    middle, corner = both.pixels[0, :, 112, 112], both.pixels[0, :, 60, 60]
    assert middle.tolist() == [0, 255, 0]
    assert corner.tolist() == [255, 0, 0]


def test_the_visible_masks_of_a_scene_never_overlap():
    masks = render.render(BANK, render.layout(drawn("train", 60)), SIDE, 0).masks
    assert masks.sum(1).max() <= 1


@given(st.lists(st.lists(st.booleans(), min_size=36, max_size=36), min_size=1, max_size=3))
def test_boxes_are_those_of_the_masks(values):
    masks = torch.tensor(values).reshape(-1, 1, 6, 6)
    found = render.boxes(masks)
    for box, mask in zip(found[:, 0].tolist(), masks[:, 0].numpy(), strict=True):
        assert box == pytest.approx(box_of(mask))


def test_rendered_boxes_are_those_of_the_rendered_masks():
    found = render.render(BANK, render.layout(drawn("train", 40)), SIDE, 0)
    for boxes, masks in zip(found.boxes.tolist(), found.masks.numpy(), strict=True):
        assert boxes == [pytest.approx(box_of(mask)) for mask in masks]


def test_a_picture_is_painted_from_back_to_front():
    found = drawn("train", 30, grain=0.0)
    where = render.layout(found)
    ours = render.render(BANK, where, SIDE, 0)
    pictures, layers = render.backgrounds(BANK, where, SIDE).numpy(), render.things(BANK, where, SIDE).numpy()
    for i, scene in enumerate(found):
        picture, alphas = pictures[i], []
        for layer in layers[i]:
            picture = layer[:3] + picture * (1 - layer[3])
            alphas = [alpha * (1 - layer[3]) for alpha in alphas] + [layer[3]]
        if scene.sign:
            (top, left), (height, width) = scene.sign.corner, scene.sign.pixels.shape[:2]
            where_it_is = slice(top, top + height), slice(left, left + width)
            pixels = np.moveaxis(scene.sign.pixels, -1, 0) / 255
            picture[(slice(None), *where_it_is)] *= 1 - pixels[3]
            picture[(slice(None), *where_it_is)] += pixels[:3]
            for alpha in alphas:
                alpha[where_it_is] *= 1 - pixels[3]
        levels = np.clip(255 * picture, 0, 255)
        assert np.abs(ours.pixels[i].numpy() - levels).max() < 0.51  # rounded
        assert ((np.stack(alphas) > 0.5) == ours.masks[i].numpy()).all()


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_painted_like_its_scenes_one_by_one():
    found = drawn("train", 25, grain=0.0)
    together = render.render(BANK, render.layout(found), SIDE, 0)
    for i, scene in enumerate(found):
        alone = render.render(BANK, render.layout([scene]), SIDE, 1)
        assert (alone.pixels[0].int() - together.pixels[i].int()).abs().max() <= 1  # rounding
        assert torch.equal(alone.masks[0], together.masks[i])
        assert torch.equal(alone.boxes[0], together.boxes[i])


def test_a_batch_without_things_signs_or_photographs_is_painted_too():
    where = render.layout([Scene((), None, FLAT)] * 2)
    assert where.crop.shape == (0, 2, 3)
    assert where.corner.shape == (0, 2)
    found = render.render(BANK, where, SIDE, 0)
    assert (found.pixels == 100).all()
    assert not found.masks.any()
    assert not found.boxes.any()


# --- signs, backgrounds, grain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("corner", [(0, 0), (SIDE - 20, SIDE - 30), (17, 101)])
def test_a_sign_starts_at_its_corner_and_hides_what_is_behind_it(corner):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4)).astype(np.uint8)
    pixels[..., 3] = 255
    found = painted(placed(SQUARE, axes=(1.02, 1.02)), sign=Sign("", pixels, corner))
    (top, left) = corner
    here = (slice(top, top + 20), slice(left, left + 30))
    assert (found.pixels[0][(slice(None), *here)].permute(1, 2, 0).numpy() == pixels[..., :3]).all()
    hidden = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    hidden[here] = True
    alone = painted(placed(SQUARE, axes=(1.02, 1.02)))
    assert torch.equal(found.masks[0, 0], alone.masks[0, 0] & ~hidden)
    assert torch.equal(found.pixels[0][:, ~hidden], alone.pixels[0][:, ~hidden])


def test_a_crop_is_the_right_part_of_a_photograph():
    photo, size = WORLD.photos[0], world.PHOTO
    ground = FLAT._replace(photo=0)
    whole = painted(ground=ground, side=size).pixels[0]
    assert torch.equal(whole, photo)
    crop = np.array([[-0.5, 0, 0.5], [0, 0.5, -0.25]], np.float32)  # half its side, mirrored, moved right and up
    part = painted(ground=ground._replace(crop=crop), side=size // 2).pixels[0]
    quarter, eighth = size // 4, size // 8
    expected = photo[:, quarter - eighth : 3 * quarter - eighth, 2 * quarter :].flip(-1)
    assert torch.equal(part, expected)


def test_crops_stay_inside_the_photograph():
    for index in range(300):
        crop = scenes.draw(CAT, "S3", index).background.crop
        assert (np.abs(crop).sum(1) <= 1 + 1e-6).all()


def test_grain_has_the_stated_deviation_and_follows_the_seed():
    where = render.layout([Scene((), None, FLAT._replace(grain=9.0)), Scene((), None, FLAT)])
    noisy = render.render(BANK, where, SIDE, seed=3)
    assert (noisy.pixels[0].float() - 100).std() == pytest.approx(9, rel=0.02)  # 150,000 numbers, and rounding
    assert (noisy.pixels[1] == 100).all()
    assert torch.equal(noisy.pixels, render.render(BANK, where, SIDE, seed=3).pixels)
    assert not torch.equal(noisy.pixels, render.render(BANK, where, SIDE, seed=4).pixels)


# --- the world --------------------------------------------------------------------------------------------------------


def test_the_extent_of_a_texture_contains_its_opaque_part_around_the_centre():
    alpha = np.zeros((3, 8, 8), np.uint8)
    alpha[0, 3:5, 2:6] = 255  # centred
    alpha[1, 1:3, 5:8] = 255  # off the centre: as far as it reaches, on both sides
    alpha[2, 3:5, [0, 7]] = 255  # in two parts
    np.testing.assert_allclose(world.extent(alpha), [[0.5, 0.25], [1, 0.75], [1, 0.25]])


def test_the_small_world_has_every_split_and_premultiplied_textures():
    assert all(set(CAT.sprites[split]) == set(CAT.names) for split in scenes.SPRITES.values())
    assert (WORLD.textures[:, :3] <= WORLD.textures[:, 3:]).all()
    assert (BANK.soft[:, :3] <= BANK.soft[:, 3:]).all()
    assert CAT.pairs.any(), "S1 needs a pair"
