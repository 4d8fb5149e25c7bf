"""The scenes of the tiny checkpoint: the contents of each split, and the positions of things."""

import hashlib
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny import plates, scenes, shapes, world
from examples.tiny.scenes import Catalog, Scene, Thing

ROOT = Path(__file__).parent.parent
SPLITS = list(scenes.SPLITS)
WORDS = plates.split(plates.frequencies())
places = st.integers(0, 2**40)  # training numbers its scenes so


def crowd(count: int = 40) -> Catalog:
    """A catalog of many classes, each with three textures in each split, of random extent, without pixels."""
    names = [f"class{i:02d}" for i in range(count)]
    numbers = iter(range(3 * count * 4))
    sprites = {
        split: {name: [next(numbers) for _ in range(3)] for name in names}
        for split in ("train", "unseen", "photo", "style")
    }
    extent = np.random.default_rng(0).uniform(0.3, 0.97, (3 * count * 4 + len(shapes.OUTLINES), 2))
    return scenes.catalog(names, sprites, extent, {"train": [0, 1, 2], "test": [3, 4]}, (), WORDS)


CAT = crowd()
CATALOGS = {"many": CAT, "small": world.small().catalog}


def names(scene: Scene) -> list[str]:
    return [thing.name for thing in scene.things]


def held_out(cat: Catalog, present: list[str]) -> bool:
    """Whether the names contain a held-out combination, looked up one by one."""
    numbers = [cat.names.index(name) for name in present if name in cat.names]
    coloured = [tuple(name.split(" ")) for name in present if name not in cat.names]
    return any(cat.pairs[pair] for pair in combinations(numbers, 2)) or any(each in cat.coloured for each in coloured)


def corners(centre, reach) -> tuple[float, ...]:
    return centre[0] - reach[0], centre[1] - reach[1], centre[0] + reach[0], centre[1] + reach[1]


def fingerprint() -> str:
    """A hash of some scenes of every split."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in (0, 1, 2**33):
            scene = scenes.draw(CAT, split, index)
            numbers = [array for thing in scene.things for array in (thing.theta, thing.warp, thing.tint)]
            for array in (*numbers, *scene.background[:3], *(scene.sign[1:] if scene.sign else ())):
                digest.update(np.ascontiguousarray(array).tobytes())
            digest.update(repr((names(scene), scene.sign and scene.sign.text)).encode())
    return digest.hexdigest()


# --- a function of split and number -----------------------------------------------------------------------------------


def test_a_scene_is_the_same_in_every_process_whatever_was_drawn_before():
    np.random.seed(1)  # a global state, which must not matter
    scenes.draw(CAT, "train", 5)
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, "-c", "import test_tiny_scenes; print(test_tiny_scenes.fingerprint())"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == fingerprint()


def test_scenes_of_different_numbers_and_splits_differ():
    drawn = [scenes.draw(CAT, split, index).background.crop.tobytes() for split in SPLITS for index in range(50)]
    assert len(set(drawn)) == len(drawn)


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cat", CATALOGS.values(), ids=CATALOGS)
@pytest.mark.parametrize("split", [split for split in SPLITS if split != "S1"])
def test_only_scenes_of_s1_have_a_held_out_combination(cat, split):
    assert not any(held_out(cat, names(scenes.draw(cat, split, index))) for index in range(400))


@pytest.mark.parametrize("cat", CATALOGS.values(), ids=CATALOGS)
def test_every_scene_of_s1_has_a_held_out_combination(cat):
    assert all(held_out(cat, names(scenes.draw(cat, "S1", index))) for index in range(1000))


def test_an_eighth_of_the_pairs_and_of_the_coloured_shapes_is_held_out():
    assert (CAT.pairs == CAT.pairs.T).all()
    assert not CAT.pairs.diagonal().any(), "two of a kind are never held out"
    assert CAT.pairs[np.triu_indices(40, 1)].mean() == pytest.approx(scenes.HELD_OUT, abs=0.035)  # 780 draws, 3 sigma
    assert len(CAT.coloured) == pytest.approx(scenes.HELD_OUT * 96, abs=1)
    # no colour and no shape is missing from training
    for i, kinds in enumerate((shapes.COLOURS, shapes.OUTLINES)):
        assert all(sum(pair[i] == kind for pair in CAT.coloured) < 4 for kind in kinds)


def test_only_the_intended_splits_share_sprites():
    seen = {split: set() for split in SPLITS}
    first_shape = len(CAT.extent) - len(shapes.OUTLINES)
    for split in SPLITS:
        for index in range(800 if split == "train" else 400):
            for thing in scenes.draw(CAT, split, index).things:
                of_shape = thing.texture >= first_shape
                assert of_shape == bool(thing.colour)
                if not of_shape:
                    assert thing.texture in CAT.sprites[scenes.SPRITES[split]][thing.name]
                    seen[split].add(thing.texture)
    assert all(not seen[a] & seen[b] for a, b in combinations(["train", "S2", "S3", "style"], 2))
    assert seen["S0"] <= seen["train"], "800 training scenes have all 120 sprites"
    assert len(seen["train"]) == 120


def test_s3_has_background_photographs_of_its_own():
    for split in SPLITS:
        behind = {scenes.draw(CAT, split, index).background.photo for index in range(100)}
        assert behind == ({3, 4} if split == "S3" else {-1, 0, 1, 2})


def test_plain_shapes_occur_only_in_splits_with_training_sprites():
    for split in SPLITS:
        plain = [bool(t.colour) for index in range(200) for t in scenes.draw(CAT, split, index).things]
        assert any(plain) == (split in ("train", "S0", "S1"))


# --- placement --------------------------------------------------------------------------------------------------------


@given(places, st.sampled_from(SPLITS), st.sampled_from(sorted(CATALOGS)))
def test_things_and_signs_lie_inside_the_picture(index, split, which):
    scene = scenes.draw(CATALOGS[which], split, index)
    for thing in scene.things:
        assert min(corners(thing.centre, thing.reach)) >= -1e-9
        assert max(corners(thing.centre, thing.reach)) <= 1 + 1e-9
    if scene.sign:
        top, left = scene.sign.corner
        height, width = scene.sign.pixels.shape[:2]
        assert 0 <= top <= 224 - height
        assert 0 <= left <= 224 - width


@given(places, st.sampled_from(SPLITS), st.sampled_from(sorted(CATALOGS)))
def test_no_two_things_share_more_than_the_allowed_part_of_the_smaller(index, split, which):
    scene = scenes.draw(CATALOGS[which], split, index)
    boxes = [corners(thing.centre, thing.reach) for thing in scene.things]
    if scene.sign:
        (top, left), (height, width) = scene.sign.corner, scene.sign.pixels.shape[:2]
        boxes.append(tuple(edge / 224 for edge in (left, top, left + width, top + height)))
    for a, b in combinations(boxes, 2):
        wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        assert max(wide, 0) * max(tall, 0) <= (scenes.OVERLAP + 1e-9) * min(areas)


def forward(thing: Thing) -> np.ndarray:
    """The vectors from the texture's centre to its right and lower edge, as fractions of the picture, in columns."""
    return np.linalg.inv(thing.theta[:, :2].astype(np.float64)) / 2


@given(places)
def test_theta_maps_the_centre_of_a_thing_to_the_centre_of_its_texture(index):
    for thing in scenes.draw(CAT, "train", index).things:
        place = 2 * np.asarray(thing.centre) - 1
        np.testing.assert_allclose(thing.theta @ [*place, 1], 0, atol=1e-5)  # float32, values up to 10
        # a turned rectangle reaches as far as its half diagonals do
        reach = np.abs(forward(thing)) @ CAT.extent[thing.texture]
        np.testing.assert_allclose(reach, thing.reach, rtol=1e-5)


@given(places, st.sampled_from(["train", "S0"]))
def test_shapes_tilt_within_their_limits_and_only_training_sprites_lean_or_warp(index, split):
    for thing in scenes.draw(CAT, split, index).things:
        right, down = forward(thing).T
        mirrored = np.cross([*right, 0], [*down, 0])[2] < 0
        assert not (mirrored and thing.colour)
        right = -right if mirrored else right
        turn = np.degrees(np.arctan2(right[1], right[0]))
        lean = abs(right @ down) / np.linalg.norm(right) / np.linalg.norm(down)
        varied = split == "train" and not thing.colour
        limit = shapes.TILT[thing.name.split(" ")[1]] if thing.colour else 25 if varied else 20
        assert abs(turn) <= limit + 1e-3
        assert lean < (0.6 if varied else 1e-6)  # 5 sigma
        assert thing.warp.any() == varied


def test_training_sprites_lean():
    leans = [right @ down for index in range(100) for thing in scenes.draw(CAT, "train", index).things
             if not thing.colour for right, down in [forward(thing).T]]  # fmt: skip
    assert np.mean(np.abs(leans) > 1e-4) > 0.8


def test_training_sprites_are_warped_by_a_few_hundredths_of_their_size():
    things = [thing for index in range(100) for thing in scenes.draw(CAT, "train", index).things if not thing.colour]
    assert np.std([thing.warp for thing in things]) == pytest.approx(scenes.WARP, rel=0.05)


def test_the_numbers_of_things_have_the_stated_shares_and_no_scene_is_empty():
    drawn = [scenes.draw(CAT, "train", index) for index in range(2000)]
    shares = np.bincount([len(scene.things) for scene in drawn], minlength=5) / len(drawn)
    np.testing.assert_allclose(shares, scenes.CROWDS, atol=0.04)  # 3 sigma, and some find no room
    assert all(scene.things or scene.sign for scene in drawn)


@pytest.mark.parametrize(("split", "least", "most"), [("train", 0.44, 1.45), ("S0", 0.79, 1.11)])
def test_a_shape_keeps_its_colour_and_a_sprite_never_turns_dark(split, least, most):
    for index in range(200):
        for thing in scenes.draw(CAT, split, index).things:
            shown = thing.tint @ np.ones(3)
            if thing.colour:
                distances = {name: np.abs(255 * shown - tone).max() for name, tone in shapes.COLOURS.items()}
                assert distances[thing.colour] < 55  # 5 sigma of 10 levels
                assert thing.name.startswith(thing.colour + " ")
            else:
                assert shown.min() > least
                assert shown.max() < most


@given(st.floats(-4, 4))
def test_a_hue_rotation_keeps_grey_and_lengths_and_a_third_of_a_turn_swaps_the_channels(angle):
    turn = scenes._hue(angle)
    np.testing.assert_allclose(turn @ np.ones(3), 1, atol=1e-9)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(scenes._hue(2 * np.pi / 3) @ [1, 0, 0], [0, 1, 0], atol=1e-9)


# --- signs ------------------------------------------------------------------------------------------------------------


def test_a_sixth_of_the_words_is_held_out():
    train, test = (set(words) for words in plates.split(plates.frequencies()))
    assert not train & test
    assert len(test) / len(train | test) == pytest.approx(1 / 6, abs=0.02)


def test_every_split_but_training_has_signs_with_held_out_words():
    for split in SPLITS:
        drawn = [scenes.draw(CAT, split, index).sign for index in range(300)]
        said = {word.lower() for sign in drawn if sign for word in sign.text.split(" ")}
        long = {word for word in said if word.isalpha() and len(word) > 6}  # no letters at random
        assert long
        assert long <= set(CAT.words.seen if split == "train" else CAT.words.unseen)


@given(st.integers(0, 2**32), st.booleans())
def test_a_phrase_is_one_to_three_items_of_one_case(seed, unseen):
    said = plates.phrase(np.random.default_rng(seed), CAT.words.unseen if unseen else CAT.words.seen)
    assert 1 <= len(said.split(" ")) <= 3
    assert said in (said.lower(), said.upper(), said.title())
    assert all(item.isdigit() or item.isalpha() for item in said.split(" "))


@given(st.integers(0, 2**32), st.sampled_from(["i", "WWWWWWWW MMMMMMMM WWWWWWWW", "gjpqy", "12345", "Tax Fly Quay"]))
def test_a_sign_shows_its_complete_text_and_is_premultiplied(seed, text):
    pixels = plates.sign(text, np.random.default_rng(seed), ()).astype(int)
    height, width = pixels.shape[:2]
    assert height <= plates.HEIGHT
    assert width <= plates.WIDTH
    assert (pixels[..., :3] <= pixels[..., 3:]).all()
    paper = pixels[height // 2, 1, :3]
    edge = np.concatenate([pixels[:2].reshape(-1, 4), pixels[-2:].reshape(-1, 4), pixels[:, :2].reshape(-1, 4),
                           pixels[:, -2:].reshape(-1, 4)])  # fmt: skip
    assert (edge[edge[:, 3] > 0, :3] == paper).all(), "ink at the edge: the text was cut off"
    assert np.abs(pixels[3:-3, 3:-3, :3] - paper).max() > 60, "there is ink, and it can be read"


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shapes.OUTLINES)
def test_a_shape_fills_its_square_as_a_sprite_does(name):
    ys, xs = np.nonzero(shapes.mask(name, 128) > 127)
    assert max(np.ptp(ys), np.ptp(xs)) + 1 == pytest.approx(124, abs=1)
    for low, high in ((ys.min(), ys.max() + 1), (xs.min(), xs.max() + 1)):
        assert (low + high) / 2 == pytest.approx(64, abs=1)


def test_a_ring_has_a_hole_and_no_seam():
    ring = shapes.mask("ring", 128)
    assert ring[64, 64] == 0
    assert (ring[62:66, 102:122] == 255).all()


@pytest.mark.parametrize(
    ("name", "share"),
    [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.866 / 2), ("cross", 5 / 9), ("ring", np.pi / 4 * 0.6975)],
)  # fmt: skip
def test_a_shape_covers_the_geometric_share_of_its_square(name, share):
    assert shapes.mask(name, 128).mean() / 255 * (128 / 124) ** 2 == pytest.approx(share, abs=0.015)
