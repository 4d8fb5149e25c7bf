"""Whatever lies in people's folders becomes the numbers that transformers' processor makes of it, or an ImageError."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CONFIGS, seeds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pgfunc import image
from pgfunc.errors import ImageError

CFG = CONFIGS["gemma"]
SIDE = CFG.vision.image_size
LEVEL = 2 / 255  # one grey level, where black is -1 and white is 1
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers, as in preprocessor_config.json


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return levels if channels > 1 else levels[:, :, 0]


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def rgb(source: image.Source) -> np.ndarray:
    """The upright 8-bit picture, before it is resized."""
    return np.asarray(image.open_image(source)).astype(int)


def message(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text.isprintable(), "one line, and nothing that a terminal obeys"
    return text


pictures = st.builds(noise, st.integers(1, 70), st.integers(1, 70), seeds)

# --- the numbers


@given(pictures, st.sampled_from(sorted(FILTERS)), st.sampled_from([28, 56]))
def test_pixels_equal_transformers_processor(picture, resample, side):
    cfg = replace(CFG, resample=resample, vision=replace(CFG.vision, image_size=side))
    processor = SiglipImageProcessorPil(
        resample=FILTERS[resample], size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    theirs = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    # the 8-bit levels are the same; float32 rounds x / 127.5 - 1 and (x / 255 - 0.5) / 0.5 differently
    torch.testing.assert_close(image.pixels(picture, cfg), theirs, atol=1e-6, rtol=0)


@given(pictures, st.sampled_from(["bilinear", "bicubic"]))
def test_resizing_is_antialiased_interpolation(picture, resample):
    picture = picture // 2 + 64  # so far from black and white that no overshoot of the cubic is clipped
    expected = interpolate(
        torch.from_numpy(picture).permute(2, 0, 1)[None].double(), (SIDE, SIDE), mode=resample, antialias=True
    )
    found = image.pixels(picture, replace(CFG, resample=resample))
    # Pillow rounds to whole levels after each of its two passes; the cubic's weights amplify the first rounding by 1.3
    torch.testing.assert_close(found.double(), expected[0] / 127.5 - 1, atol=1.2 * LEVEL, rtol=0)


def test_black_is_minus_one_white_is_one_and_channels_are_red_green_blue():
    pixels = image.pixels(np.full((5, 3, 3), (0, 255, 51), np.uint8), CFG)
    expected = torch.tensor([-1.0, 1.0, -0.6]).expand(SIDE, SIDE, 3).permute(2, 0, 1)
    torch.testing.assert_close(pixels, expected, atol=1e-7, rtol=0)  # one rounding of float32


def test_every_filter_is_another_one():
    found = [image.pixels(noise(60, 40), replace(CFG, resample=name)) for name in FILTERS]
    for i, one in enumerate(found):
        assert all((one - other).abs().mean() > LEVEL for other in found[:i])


# --- upright

# Exif 2.3, tag 274, from what is stored to what is seen: which sides of the scene row 0 and column 0 lie on
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,  # top, left
    2: lambda stored: stored[:, ::-1],  # top, right
    3: lambda stored: stored[::-1, ::-1],  # bottom, right
    4: lambda stored: stored[::-1],  # bottom, left
    5: lambda stored: stored.swapaxes(0, 1),  # left, top
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda stored: stored.swapaxes(0, 1)[::-1],  # left, bottom
}


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_upright_whatever_the_exif_says(orientation, format):
    options = {"lossless": True} if format == "WEBP" else {}
    picture = Image.fromarray(noise(5, 8))
    stored = np.asarray(Image.open(io.BytesIO(encoded(picture, format, **options))))
    expected = UPRIGHT[orientation](stored)
    file = encoded(picture, format, exif=exif(orientation), **options)
    assert np.array_equal(rgb(file), expected)
    assert np.array_equal(rgb(Image.open(io.BytesIO(file))), expected)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_upright_in_every_mode(orientation, mode):
    picture = Image.fromarray(noise(5, 8, channels=4)).convert(mode if mode != "I;16" else "I").convert(mode)
    file = encoded(picture, "PNG", exif=exif(orientation))
    assert np.array_equal(rgb(file), UPRIGHT[orientation](rgb(encoded(picture, "PNG"))))


flips = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


def flipped(file: bytes, places: list[tuple[int, int]]) -> bytes:
    damaged = bytearray(file)
    for place, byte in places:
        damaged[place % len(damaged)] = byte
    return bytes(damaged)


@given(flips, st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_damaged_metadata_leave_the_pixels(places, format):
    """The picture may stay on its side, but it is not lost; a warning would be an error here."""
    options = {"lossless": True} if format == "WEBP" else {}
    plain = Image.fromarray(noise(5, 8))
    found = rgb(encoded(plain, format, exif=flipped(exif(6).tobytes(), places), **options))
    stored = rgb(encoded(plain, format, **options))
    assert any(np.array_equal(found, upright(stored)) for upright in UPRIGHT.values())


def test_the_first_frame_counts():
    frames = [Image.fromarray(noise(5, 8, seed)) for seed in range(3)]
    for format, options in {"TIFF": {}, "PNG": {}, "WEBP": {"lossless": True}}.items():
        file = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(rgb(file), noise(5, 8, 0))


# --- modes

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = RAMP[:, :, None].repeat(3, axis=2)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[:, :, None] / 255
    return colour * share + 255 * (1 - share)


def palette(transparency: int | bytes | None = None) -> tuple[Image.Image, np.ndarray]:
    """Two pixels a colour, over 100 colours, and what they look like."""
    colours = noise(100, 1)
    index = np.arange(200, dtype=np.uint8).reshape(10, 20) // 2
    picture = Image.frombytes("P", (20, 10), index.tobytes())
    picture.putpalette(colours.tobytes())
    alpha = np.full(100, 255)
    if isinstance(transparency, int):
        picture.info["transparency"] = transparency
        alpha[transparency] = 0
    if isinstance(transparency, bytes):
        picture.info["transparency"] = transparency
        alpha[: len(transparency)] = list(transparency)
    return picture, on_white(colours[index, 0], alpha[index])


@pytest.mark.parametrize("transparency", [None, 7, bytes(range(0, 200, 4))], ids=["none", "one colour", "shades"])
def test_palettes_are_looked_up(transparency):
    picture, expected = palette(transparency)
    for source in (picture, encoded(picture, "PNG")):
        assert np.abs(rgb(source) - expected).max() <= 1  # blending rounds to whole levels


def test_transparent_pixels_appear_on_white():
    colour, alpha = noise(9, 16), RAMP[:9]
    rgba = np.dstack([colour, alpha])
    la = Image.merge("LA", [Image.fromarray(colour[:, :, 0]), Image.fromarray(alpha)])
    indexed, looks = palette()
    indexed = indexed.crop((0, 0, 16, 9)).convert("PA")
    indexed.putalpha(Image.fromarray(alpha))
    cases = {
        "RGBA": (Image.fromarray(rgba), on_white(colour, alpha)),
        "LA": (la, on_white(colour[:, :, :1].repeat(3, 2), alpha)),
        "La": (la.convert("La"), on_white(colour[:, :, :1].repeat(3, 2), alpha)),
        "PA": (indexed, on_white(looks[:9, :16], alpha)),
    }
    for mode, (picture, expected) in cases.items():
        assert picture.mode == mode
        assert np.abs(rgb(picture) - expected).max() <= 1  # blending rounds to whole levels
    assert np.array_equal(rgb(encoded(Image.fromarray(rgba), "PNG")), rgb(rgba))


def test_a_transparent_colour_of_a_picture_without_alpha_is_white():
    grey, colour = Image.fromarray(RAMP), Image.fromarray(GREY)
    for file in (encoded(grey, "PNG", transparency=9), encoded(colour, "PNG", transparency=(9, 9, 9))):
        expected = GREY.copy()
        expected[0, 9] = 255
        assert np.array_equal(rgb(file), expected)


DEEP = (RAMP.astype(np.uint16) * 257).astype(np.uint16)  # 257 x level is level, in 16 bits
RAMPS: dict[str, image.Source] = {
    "L": Image.fromarray(RAMP),
    "I;16": Image.fromarray(DEEP),
    "I;16B": Image.frombytes("I;16B", (16, 16), DEEP.astype(">u2").tobytes()),
    "I": Image.fromarray(DEEP.astype(np.int32)),
    "F": Image.fromarray(RAMP.astype(np.float32)),
    "PNG of 16 bits": encoded(Image.fromarray(DEEP), "PNG"),
    "TIFF of 16 bits": encoded(Image.fromarray(DEEP), "TIFF"),
    "PGM of 16 bits": b"P5 16 16 65535\n" + DEEP.astype(">u2").tobytes(),
    "uint16": DEEP,
    "big-endian uint16": DEEP.astype(">u2"),
    "uint16 in colour": DEEP[:, :, None].repeat(3, 2),
}


@pytest.mark.parametrize("name", RAMPS)
def test_a_grey_ramp_is_itself_in_every_depth(name):
    assert np.array_equal(rgb(RAMPS[name]), GREY)


DEPTHS: dict[str, Callable[[np.ndarray], image.Source]] = {
    "I": lambda levels: Image.fromarray(levels.astype(np.int32)),
    "I;16": lambda levels: Image.fromarray(levels.astype(np.uint16)),
    "I;16B": lambda levels: Image.frombytes("I;16B", levels.shape[::-1], levels.astype(">u2").tobytes()),
    "PNG of 16 bits": lambda levels: encoded(Image.fromarray(levels.astype(np.uint16)), "PNG"),
    "TIFF of 32 bits": lambda levels: encoded(Image.fromarray(levels.astype(np.int32)), "TIFF"),
    "uint16": lambda levels: levels.astype(np.uint16),
    "big-endian uint16": lambda levels: levels.astype(">u2"),
    "torch.uint16": lambda levels: torch.from_numpy(levels.astype(np.uint16)),
}


@given(st.sampled_from(sorted(DEPTHS)), st.integers(1, 65_535), seeds)
def test_levels_of_more_than_eight_bits_are_rounded_unless_all_are_levels_of_eight(name, most, seed):
    levels = np.random.default_rng(seed).integers(0, most + 1, (5, 7))
    found = rgb(DEPTHS[name](levels))[:, :, 0]
    if levels.max() <= 255:  # as Pillow's own `convert` has them
        assert np.array_equal(found, levels)
    else:
        assert np.abs(found - levels / 257).max() <= 0.5


@given(st.floats(0, 1))
def test_shares_are_rounded_to_the_nearest_level(share):
    for source in (np.full((2, 2), share), Image.fromarray(np.full((2, 2), share, np.float32))):
        (found,) = {*rgb(source).flatten()}
        assert abs(found - share * 255) <= 0.5 + 1e-4  # float32


@given(st.floats(1.001, 255), seeds)
def test_floats_above_one_are_the_levels_that_pillow_sees(most, seed):
    levels = np.random.default_rng(seed).uniform(0, most, (5, 7)).astype(np.float32)
    levels[0, 0] = most
    picture = Image.fromarray(levels)
    assert np.array_equal(rgb(encoded(picture, "TIFF")), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("levels", [[-1, 9], [0, 65_536], [0, 2**31 - 1]], ids=str)
def test_integers_outside_the_range_of_levels_are_refused(levels):
    with pytest.raises(ImageError, match=f"levels are {levels[0]} to {levels[1]}, expected 0 to 65,535") as error:
        rgb(Image.fromarray(np.array([levels], np.int32)))
    message(error)


@pytest.mark.parametrize("levels", [[-0.5, 0.5], [0, 255.5], [0, np.nan], [0, np.inf]], ids=str)
def test_floats_outside_the_range_of_levels_are_refused(levels):
    with pytest.raises(ImageError, match="expected 0 to 255; scale them first") as error:
        rgb(Image.fromarray(np.array([levels], np.float32)))
    message(error)


def test_a_transparent_level_of_sixteen_bits_is_white():
    expected = GREY.copy()
    expected[0, 9] = 255
    assert np.array_equal(rgb(encoded(Image.fromarray(DEEP), "PNG", transparency=9 * 257)), expected)


MODES = ["1", "L", "P", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "I", "F",
         "I;16", "I;16L", "I;16B", "I;16N"]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_which_pillow_keeps_levels_shows_what_pillow_shows(mode):
    picture = Image.fromarray(noise(9, 11)).convert("L").convert(mode)
    assert picture.mode == mode
    assert np.array_equal(
        rgb(picture), np.asarray(picture.convert("L").convert("RGB") if mode[0] in "IF" else picture.convert("RGB"))
    )


def test_a_large_picture_is_converted_in_parts_as_it_is_whole(monkeypatch):
    picture = Image.fromarray(noise(70, 30, channels=4))
    whole = [rgb(picture.convert(mode)) for mode in ("RGBA", "P", "CMYK")] + [rgb(DEEP)]
    monkeypatch.setattr(image, "BAND", 100)
    parts = [rgb(picture.convert(mode)) for mode in ("RGBA", "P", "CMYK")] + [rgb(DEEP)]
    assert all(np.array_equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_one_bit_is_black_and_white():
    bits = noise(9, 11, channels=1) > 127
    for source in (Image.fromarray(bits), encoded(Image.fromarray(bits), "PNG"), bits):
        assert np.array_equal(rgb(source), np.where(bits, 255, 0)[:, :, None].repeat(3, 2))


def test_inks_are_subtracted_from_white():
    inks = noise(9, 11, channels=4)
    light = 255 - inks.astype(float)
    expected = light[:, :, :3] * light[:, :, 3:] / 255
    picture = Image.frombytes("CMYK", (11, 9), inks.tobytes())
    assert np.abs(rgb(picture) - expected).max() <= 1  # rounded to whole levels
    flat = Image.new("CMYK", (16, 16), (10, 200, 90, 30))
    file = encoded(flat, "JPEG", quality=100)
    assert Image.open(io.BytesIO(file)).mode == "CMYK"
    assert np.abs(rgb(file) - rgb(flat)).max() <= 3  # the rounding of a JPEG of one colour


def test_luma_and_chroma_become_colours():
    picture = Image.fromarray(noise(9, 11)).convert("YCbCr")
    y, cb, cr = np.moveaxis(np.asarray(picture).astype(float), 2, 0)
    cb, cr = cb - 128, cr - 128
    expected = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=2)  # JFIF 1.02
    assert np.abs(rgb(picture) - expected.clip(0, 255)).max() <= 1  # rounded to whole levels


# --- sources


@given(pictures)
def test_all_sources_of_one_picture_agree(picture):
    expected = image.pixels(picture, CFG)
    tensor = torch.from_numpy(picture)
    share = picture / 255
    sources: dict[str, image.Source] = {
        "bytes": encoded(Image.fromarray(picture), "PNG"),
        "PIL": Image.fromarray(picture),
        "uint16": picture.astype(np.uint16) * 257,
        "float64": share,
        "float32": share.astype(np.float32),
        "float16": share.astype(np.float16),
        "opaque": np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)]),
        "strided": np.asfortranarray(picture),
        "reversed twice": np.ascontiguousarray(picture[::-1, ::-1])[::-1, ::-1],
        "tensor": tensor,
        "float tensor": tensor / 255,
        "tensor that requires a gradient": (tensor / 255).requires_grad_(),
        "permuted tensor": tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    for name, source in sources.items():
        assert torch.equal(image.pixels(source, CFG), expected), name


def test_bfloat16_keeps_a_picture_within_its_precision():
    tensor = torch.from_numpy(noise(30, 20))
    found = rgb((tensor / 255).bfloat16())
    assert np.abs(found - tensor.numpy()).max() <= 1  # 8 bits of mantissa: half a level, then rounding


@pytest.mark.parametrize("as_path", [str, Path])
def test_paths_agree_with_what_is_in_the_file(tmp_path, as_path):
    path = tmp_path / "a picture (é).png"
    path.write_bytes(encoded(Image.fromarray(noise(6, 9)), "PNG"))
    assert np.array_equal(rgb(as_path(path)), noise(6, 9))


@given(pictures)
def test_grey_arrays_are_grey_pictures(picture):
    grey = picture[:, :, 0]
    for source in (grey, grey[:, :, None], grey / 255, torch.from_numpy(grey)):
        assert np.array_equal(rgb(source), grey[:, :, None].repeat(3, 2))


def test_what_is_given_stays_as_it_was():
    array = noise(6, 9, channels=4)
    image.pixels(array, CFG)
    assert np.array_equal(array, noise(6, 9, channels=4))
    for mode in ("RGB", "RGBA", "P", "L", "I;16"):
        picture = Image.fromarray(noise(6, 9)).convert("I" if mode == "I;16" else mode).convert(mode)
        picture.info |= {"exif": exif(6).tobytes(), "comment": b"kept"}
        before, info, kept = picture.tobytes(), dict(picture.info), picture.copy()
        image.pixels(picture, CFG)
        assert (picture.tobytes(), picture.info, picture.mode, picture.size) == (before, info, kept.mode, kept.size)


# --- what is no picture

NOT_PICTURES = {
    "one axis": np.zeros(5),
    "four axes": np.zeros((1, 5, 5, 3)),
    "no axis": np.zeros(()),
    "no rows": np.zeros((0, 5, 3), np.uint8),
    "no columns": np.zeros((5, 0), np.uint8),
    "two channels": np.zeros((5, 5, 2), np.uint8),
    "channels first": torch.zeros(3, 5, 5),
    "grey with its channel first": torch.zeros(1, 5, 5),
    "batch": torch.zeros(1, 3, 5, 5),
    "above 1": np.full((5, 5), 1.001),
    "below 0": np.full((5, 5, 3), -0.001),
    "levels as floats": np.full((5, 5), 255.0),
    "nan": np.where(np.eye(5) > 0, np.nan, 0.5),
    "inf": np.full((5, 5), np.inf),
    "int64": np.zeros((5, 5), np.int64),
    "int8": np.zeros((5, 5), np.int8),
    "uint32": np.zeros((5, 5), np.uint32),
    "complex": np.zeros((5, 5), complex),
    "complex tensor": torch.zeros(5, 5, dtype=torch.complex64),
    "sparse": torch.zeros(5, 5).to_sparse(),
    "no values": torch.zeros(5, 5, device="meta"),
    "objects": np.full((5, 5), "a", object),
    "PIL without rows": Image.new("RGB", (5, 0)),
    "PIL without columns": Image.new("I;16", (0, 5)),
}


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_arrays_that_are_no_pictures_are_refused(name):
    with pytest.raises(ImageError) as error:
        image.pixels(NOT_PICTURES[name], CFG)
    message(error)


def test_files_that_are_no_pictures_are_refused_by_name(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture\n" * 9)
    (tmp_path / "zeros.png").write_bytes(bytes(1000))
    (tmp_path / "two\nlines.png").write_text("text")
    for name in ("missing.png", "folder.png", "empty.png", "text.png", "zeros.png", "two\nlines.png", "nul\0.png"):
        with pytest.raises(ImageError) as error:
            image.pixels(tmp_path / name, CFG)
        assert repr(name)[1:-1] in message(error)
        assert "0x" not in message(error), "no addresses in memory"
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        image.pixels(tmp_path / "missing.png", CFG)
    for source in (b"", b"GIF89a", b"not a picture"):
        with pytest.raises(ImageError, match="the given picture") as error:
            image.pixels(source, CFG)
        assert "0x" not in message(error)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "socket", "/dev/zero", "/dev/null", tmp_path):
            with pytest.raises(ImageError, match="a folder, a pipe or a device; expected a file") as error:
                image.pixels(path, CFG)
            assert message(error).startswith(f"{path}: ")
    with pytest.raises(ImageError, match="File name too long"):
        image.pixels("x" * 300 + ".png", CFG)


def segmented(segments: int) -> bytes:
    """A JPEG with so many segments of Exif data, which Pillow joins one by one."""
    file, data = encoded(Image.new("RGB", (8, 8)), "JPEG"), b"Exif\0\0abcd"
    return file[:2] + (b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data) * segments + file[2:]


def commented(comments: int) -> bytes:
    """A GIF with so many comments, likewise."""
    file = encoded(Image.new("L", (8, 8)), "GIF")
    start = file.index(b",")
    return file[:start] + b"!\xfe\x01a\0" * comments + file[start:]


def test_a_header_in_very_many_pieces_is_refused():
    for made in (segmented, commented):
        assert rgb(made(1000)).shape == (8, 8, 3)
        with pytest.raises(ImageError, match="header is in more than 20,000 pieces"):
            rgb(made(10**5))


@pytest.mark.parametrize("size", [(10**6, 1), (1, 10**6)], ids=str)
def test_a_picture_of_a_million_pixels_in_one_line_is_refused(size):
    with pytest.raises(ImageError, match="too many pixels"):
        image.pixels(encoded(Image.new("1", size), "PNG"), replace(CFG, vision=replace(CFG.vision, image_size=224)))


@pytest.mark.parametrize(("fault", "said"), [("one\ntwo", "(one)"), ("", "(OSError)")])
def test_an_error_of_a_decoder_is_one_line(monkeypatch, fault, said):
    def broken(file):
        raise OSError(fault)

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ImageError) as error:
        image.pixels(b"", CFG)
    assert said in message(error)


FORMATS: dict[str, dict] = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "GIF": {},
    "TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
    "PPM": {},
}
FILES = {format: encoded(Image.fromarray(noise(40, 31)), format, **FORMATS[format]) for format in FORMATS}
formats = st.sampled_from(sorted(FORMATS))


def attempt(file: bytes) -> np.ndarray | None:
    """The picture, or nothing after an ImageError of one line; any other error fails the test."""
    try:
        return rgb(file)
    except ImageError as error:
        if not str(error).isprintable():
            raise AssertionError("not one line") from error
        return None


@given(formats, st.floats(0, 1, exclude_max=True), st.booleans())
def test_a_truncated_picture_is_refused_unless_nothing_of_it_is_missing(format, share, end):
    whole = FILES[format]
    cut = len(whole) - 1 - int(share * 40) if end else int(share * len(whole))  # often among the last 40 bytes
    found = attempt(whole[:cut])
    assert found is None or np.array_equal(found, rgb(whole))


@given(formats, flips, st.booleans())
def test_damaged_bytes_give_a_picture_or_an_image_error(format, places, head):
    head = min(len(FILES[format]), 60 if head else 10**6)
    found = attempt(flipped(FILES[format][:head], places) + FILES[format][head:])
    assert found is None or (found.ndim == 3 and found.shape[2] == 3 and 0 not in found.shape)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a hundred bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


BOMBS = {
    "PNG": png(30_000, 30_000),
    "PNG of one row": png(2**31 - 1, 1),
    "PNG that Pillow only warns of": png(10_000, 10_000),
    "GIF": b"GIF89a"
    + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    + b"\x08",
    "BMP": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_refused_by_its_header(name, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("memory would be taken for the pixels"))
    with pytest.raises(ImageError, match="too many pixels") as error:
        image.pixels(BOMBS[name], CFG)
    message(error)
