"""Every picture becomes the pixels that transformers' processor makes of it, or raises an ImageError."""

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
    assert text.isprintable(), "one line without control characters"
    return text


pictures = st.builds(noise, st.integers(1, 70), st.integers(1, 70), seeds)

# --- values and resizing


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
    picture = picture // 2 + 64  # away from black and white, so that no overshoot of bicubic is clipped
    expected = interpolate(
        torch.from_numpy(picture).permute(2, 0, 1)[None].double(), (SIDE, SIDE), mode=resample, antialias=True
    )
    pixels = image.pixels(picture, replace(CFG, resample=resample))
    # Pillow rounds to whole levels after each of its two passes; the cubic's weights amplify the first rounding by 1.3
    torch.testing.assert_close(pixels.double(), expected[0] / 127.5 - 1, atol=1.2 * LEVEL, rtol=0)


def test_black_is_minus_one_white_is_one_and_channels_are_red_green_blue():
    pixels = image.pixels(np.full((5, 3, 3), (0, 255, 51), np.uint8), CFG)
    expected = torch.tensor([-1.0, 1.0, -0.6]).expand(SIDE, SIDE, 3).permute(2, 0, 1)
    torch.testing.assert_close(pixels, expected, atol=1e-7, rtol=0)  # one rounding of float32


def test_the_filters_give_different_pixels():
    resized = [image.pixels(noise(60, 40), replace(CFG, resample=name)) for name in FILTERS]
    for i, one in enumerate(resized):
        assert all((one - other).abs().mean() > LEVEL for other in resized[:i])


# --- orientation

# EXIF 2.3, tag 274, stored pixels -> upright pixels; the comment says which sides of the scene row 0 and column 0 are
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
def test_a_picture_is_upright_for_every_exif_orientation(orientation, format):
    options = {"lossless": True} if format == "WEBP" else {}
    picture = Image.fromarray(noise(5, 8))
    stored = np.asarray(Image.open(io.BytesIO(encoded(picture, format, **options))))
    expected = UPRIGHT[orientation](stored)
    file = encoded(picture, format, exif=exif(orientation), **options)
    assert np.array_equal(rgb(file), expected)
    assert np.array_equal(rgb(Image.open(io.BytesIO(file))), expected)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_a_picture_is_upright_in_every_mode(orientation, mode):
    picture = Image.fromarray(noise(5, 8, channels=4)).convert(mode if mode != "I;16" else "I").convert(mode)
    file = encoded(picture, "PNG", exif=exif(orientation))
    assert np.array_equal(rgb(file), UPRIGHT[orientation](rgb(encoded(picture, "PNG"))))


byte_changes = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


def damaged(file: bytes, changes: list[tuple[int, int]]) -> bytes:
    """The file with some bytes replaced; a change is (offset, byte)."""
    content = bytearray(file)
    for offset, byte in changes:
        content[offset % len(content)] = byte
    return bytes(content)


@given(byte_changes, st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_damaged_metadata_leave_the_pixels(changes, format):
    """The picture may not be upright, but it is read. A warning would be an error here."""
    options = {"lossless": True} if format == "WEBP" else {}
    picture = Image.fromarray(noise(5, 8))
    pixels = rgb(encoded(picture, format, exif=damaged(exif(6).tobytes(), changes), **options))
    stored = rgb(encoded(picture, format, **options))
    assert any(np.array_equal(pixels, upright(stored)) for upright in UPRIGHT.values())


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(noise(5, 8, seed)) for seed in range(3)]
    for format, options in {"TIFF": {}, "PNG": {}, "WEBP": {"lossless": True}}.items():
        file = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(rgb(file), noise(5, 8, 0))


# --- modes

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = RAMP[:, :, None].repeat(3, axis=2)


def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[:, :, None] / 255
    return color * opacity + 255 * (1 - opacity)


def palette(transparency: int | bytes | None = None) -> tuple[Image.Image, np.ndarray]:
    """A palette picture with two pixels of each of 100 colors, and its RGB values on white."""
    colors = noise(100, 1)
    index = np.arange(200, dtype=np.uint8).reshape(10, 20) // 2
    picture = Image.frombytes("P", (20, 10), index.tobytes())
    picture.putpalette(colors.tobytes())
    alpha = np.full(100, 255)
    if isinstance(transparency, int):
        picture.info["transparency"] = transparency
        alpha[transparency] = 0
    if isinstance(transparency, bytes):
        picture.info["transparency"] = transparency
        alpha[: len(transparency)] = list(transparency)
    return picture, on_white(colors[index, 0], alpha[index])


@pytest.mark.parametrize("transparency", [None, 7, bytes(range(0, 200, 4))], ids=["none", "one color", "shades"])
def test_palette_pictures_have_the_colors_of_their_palette(transparency):
    picture, expected = palette(transparency)
    for source in (picture, encoded(picture, "PNG")):
        assert np.abs(rgb(source) - expected).max() <= 1  # blending rounds to whole levels


def test_transparent_pixels_appear_on_white():
    color, alpha = noise(9, 16), RAMP[:9]
    rgba = np.dstack([color, alpha])
    la = Image.merge("LA", [Image.fromarray(color[:, :, 0]), Image.fromarray(alpha)])
    indexed, looks = palette()
    indexed = indexed.crop((0, 0, 16, 9)).convert("PA")
    indexed.putalpha(Image.fromarray(alpha))
    cases = {
        "RGBA": (Image.fromarray(rgba), on_white(color, alpha)),
        "LA": (la, on_white(color[:, :, :1].repeat(3, 2), alpha)),
        "La": (la.convert("La"), on_white(color[:, :, :1].repeat(3, 2), alpha)),
        "PA": (indexed, on_white(looks[:9, :16], alpha)),
    }
    for mode, (picture, expected) in cases.items():
        assert picture.mode == mode
        assert np.abs(rgb(picture) - expected).max() <= 1  # blending rounds to whole levels
    assert np.array_equal(rgb(encoded(Image.fromarray(rgba), "PNG")), rgb(rgba))


def test_the_transparent_color_of_a_picture_without_alpha_is_white():
    grey, color = Image.fromarray(RAMP), Image.fromarray(GREY)
    for file in (encoded(grey, "PNG", transparency=9), encoded(color, "PNG", transparency=(9, 9, 9))):
        expected = GREY.copy()
        expected[0, 9] = 255
        assert np.array_equal(rgb(file), expected)


DEEP = (RAMP.astype(np.uint16) * 257).astype(np.uint16)  # the level n in 16 bits is 257 n
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
    "uint16 in color": DEEP[:, :, None].repeat(3, 2),
}


@pytest.mark.parametrize("name", RAMPS)
def test_a_grey_ramp_has_the_same_levels_in_every_bit_depth(name):
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
def test_levels_of_more_than_eight_bits_are_rounded_to_eight_unless_none_is_above_255(name, most, seed):
    levels = np.random.default_rng(seed).integers(0, most + 1, (5, 7))
    converted = rgb(DEPTHS[name](levels))[:, :, 0]
    if levels.max() <= 255:  # like Pillow's own `convert`
        assert np.array_equal(converted, levels)
    else:
        assert np.abs(converted - levels / 257).max() <= 0.5


@given(st.floats(0, 1))
def test_fractions_are_rounded_to_the_nearest_level(fraction):
    for source in (np.full((2, 2), fraction), Image.fromarray(np.full((2, 2), fraction, np.float32))):
        (level,) = {*rgb(source).flatten()}
        assert abs(level - fraction * 255) <= 0.5 + 1e-4  # float32


@given(st.floats(1.001, 255), seeds)
def test_floats_above_one_are_converted_as_by_pillow(most, seed):
    levels = np.random.default_rng(seed).uniform(0, most, (5, 7)).astype(np.float32)
    levels[0, 0] = most
    picture = Image.fromarray(levels)
    assert np.array_equal(rgb(encoded(picture, "TIFF")), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("levels", [[-1, 9], [0, 65_536], [0, 2**31 - 1]], ids=str)
def test_integers_outside_16_bits_are_refused(levels):
    with pytest.raises(ImageError, match=f"levels are {levels[0]} to {levels[1]}, expected 0 to 65,535") as error:
        rgb(Image.fromarray(np.array([levels], np.int32)))
    message(error)


@pytest.mark.parametrize("levels", [[-0.5, 0.5], [0, 255.5], [0, np.nan], [0, np.inf]], ids=str)
def test_floats_outside_0_to_255_are_refused(levels):
    with pytest.raises(ImageError, match="expected 0 to 255; scale them first") as error:
        rgb(Image.fromarray(np.array([levels], np.float32)))
    message(error)


def test_the_transparent_level_of_a_16_bit_picture_is_white():
    expected = GREY.copy()
    expected[0, 9] = 255
    assert np.array_equal(rgb(encoded(Image.fromarray(DEEP), "PNG", transparency=9 * 257)), expected)


MODES = ["1", "L", "P", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "I", "F",
         "I;16", "I;16L", "I;16B", "I;16N"]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_has_the_colors_that_pillow_converts_it_to(mode):
    picture = Image.fromarray(noise(9, 11)).convert("L").convert(mode)
    assert picture.mode == mode
    assert np.array_equal(
        rgb(picture), np.asarray(picture.convert("L").convert("RGB") if mode[0] in "IF" else picture.convert("RGB"))
    )


def test_converting_a_picture_in_bands_gives_the_same_levels(monkeypatch):
    picture = Image.fromarray(noise(70, 30, channels=4))
    at_once = [rgb(picture.convert(mode)) for mode in ("RGBA", "P", "CMYK")] + [rgb(DEEP)]
    monkeypatch.setattr(image, "BAND", 100)
    in_bands = [rgb(picture.convert(mode)) for mode in ("RGBA", "P", "CMYK")] + [rgb(DEEP)]
    assert all(np.array_equal(one, other) for one, other in zip(at_once, in_bands, strict=True))


def test_one_bit_is_black_and_white():
    bits = noise(9, 11, channels=1) > 127
    for source in (Image.fromarray(bits), encoded(Image.fromarray(bits), "PNG"), bits):
        assert np.array_equal(rgb(source), np.where(bits, 255, 0)[:, :, None].repeat(3, 2))


def test_cmyk_becomes_rgb_by_subtracting_the_inks_from_white():
    inks = noise(9, 11, channels=4)
    light = 255 - inks.astype(float)
    expected = light[:, :, :3] * light[:, :, 3:] / 255
    picture = Image.frombytes("CMYK", (11, 9), inks.tobytes())
    assert np.abs(rgb(picture) - expected).max() <= 1  # rounded to whole levels
    flat = Image.new("CMYK", (16, 16), (10, 200, 90, 30))
    file = encoded(flat, "JPEG", quality=100)
    assert Image.open(io.BytesIO(file)).mode == "CMYK"
    assert np.abs(rgb(file) - rgb(flat)).max() <= 3  # rounding in a JPEG of one color


def test_ycbcr_becomes_rgb_as_in_jfif():
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
    fractions = picture / 255
    sources: dict[str, image.Source] = {
        "bytes": encoded(Image.fromarray(picture), "PNG"),
        "PIL": Image.fromarray(picture),
        "uint16": picture.astype(np.uint16) * 257,
        "float64": fractions,
        "float32": fractions.astype(np.float32),
        "float16": fractions.astype(np.float16),
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
    levels = rgb((tensor / 255).bfloat16())
    assert np.abs(levels - tensor.numpy()).max() <= 1  # 8 bits of mantissa: half a level, then rounding


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_path_gives_the_picture_in_the_file(tmp_path, as_path):
    path = tmp_path / "a picture (é).png"
    path.write_bytes(encoded(Image.fromarray(noise(6, 9)), "PNG"))
    assert np.array_equal(rgb(as_path(path)), noise(6, 9))


@given(pictures)
def test_grey_arrays_are_grey_pictures(picture):
    grey = picture[:, :, 0]
    for source in (grey, grey[:, :, None], grey / 255, torch.from_numpy(grey)):
        assert np.array_equal(rgb(source), grey[:, :, None].repeat(3, 2))


def test_the_arguments_are_not_changed():
    array = noise(6, 9, channels=4)
    image.pixels(array, CFG)
    assert np.array_equal(array, noise(6, 9, channels=4))
    for mode in ("RGB", "RGBA", "P", "L", "I;16"):
        picture = Image.fromarray(noise(6, 9)).convert("I" if mode == "I;16" else mode).convert(mode)
        picture.info |= {"exif": exif(6).tobytes(), "comment": b"kept"}
        levels, info, copy = picture.tobytes(), dict(picture.info), picture.copy()
        image.pixels(picture, CFG)
        assert (picture.tobytes(), picture.info, picture.mode, picture.size) == (levels, info, copy.mode, copy.size)


# --- invalid pictures

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
def test_arrays_that_are_not_pictures_are_refused(name):
    with pytest.raises(ImageError) as error:
        image.pixels(NOT_PICTURES[name], CFG)
    message(error)


def test_files_that_are_not_pictures_are_refused_and_named(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture\n" * 9)
    (tmp_path / "zeros.png").write_bytes(bytes(1000))
    (tmp_path / "two\nlines.png").write_text("text")
    for name in ("missing.png", "folder.png", "empty.png", "text.png", "zeros.png", "two\nlines.png", "nul\0.png"):
        with pytest.raises(ImageError) as error:
            image.pixels(tmp_path / name, CFG)
        assert repr(name)[1:-1] in message(error)
        assert "0x" not in message(error), "no memory address"
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        image.pixels(tmp_path / "missing.png", CFG)
    for source in (b"", b"GIF89a", b"not a picture"):
        with pytest.raises(ImageError, match="the given picture") as error:
            image.pixels(source, CFG)
        assert "0x" not in message(error)


def test_pipes_sockets_devices_and_folders_are_refused_without_waiting(tmp_path):
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
    """A JPEG with this many segments of EXIF data, which Pillow joins one by one."""
    file, data = encoded(Image.new("RGB", (8, 8)), "JPEG"), b"Exif\0\0abcd"
    return file[:2] + (b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data) * segments + file[2:]


def commented(comments: int) -> bytes:
    """A GIF with this many comments, which Pillow joins one by one."""
    file = encoded(Image.new("L", (8, 8)), "GIF")
    start = file.index(b",")
    return file[:start] + b"!\xfe\x01a\0" * comments + file[start:]


def test_a_header_in_very_many_pieces_is_refused():
    for make in (segmented, commented):
        assert rgb(make(1000)).shape == (8, 8, 3)
        with pytest.raises(ImageError, match="header is in more than 20,000 pieces"):
            rgb(make(10**5))


@pytest.mark.parametrize("size", [(10**6, 1), (1, 10**6)], ids=str)
def test_a_picture_of_a_million_pixels_in_one_line_is_refused(size):
    with pytest.raises(ImageError, match="too long and narrow"):
        image.pixels(encoded(Image.new("1", size), "PNG"), replace(CFG, vision=replace(CFG.vision, image_size=224)))


@pytest.mark.parametrize(("fault", "reason"), [("one\ntwo", "(one)"), ("", "(OSError)")])
def test_the_error_of_a_decoder_becomes_one_line(monkeypatch, fault, reason):
    def broken(file):
        raise OSError(fault)

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ImageError) as error:
        image.pixels(b"", CFG)
    assert reason in message(error)


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
    """The picture, or None if reading it raises an ImageError of one line. Any other error fails the test."""
    try:
        return rgb(file)
    except ImageError as error:
        if not str(error).isprintable():
            raise AssertionError("not one line") from error
        return None


@given(formats, st.floats(0, 1, exclude_max=True), st.booleans())
def test_a_truncated_picture_is_refused_unless_all_pixels_are_there(format, fraction, near_end):
    file = FILES[format]
    cut = len(file) - 1 - int(fraction * 40) if near_end else int(fraction * len(file))
    picture = attempt(file[:cut])
    assert picture is None or np.array_equal(picture, rgb(file))


@given(formats, byte_changes, st.booleans())
def test_damaged_bytes_give_a_picture_or_an_image_error(format, changes, in_header):
    end = min(len(FILES[format]), 60 if in_header else 10**6)
    picture = attempt(damaged(FILES[format][:end], changes) + FILES[format][end:])
    assert picture is None or (picture.ndim == 3 and picture.shape[2] == 3 and 0 not in picture.shape)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A PNG that declares this size and has a hundred bytes of pixel data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


BOMBS = {
    "PNG": png(30_000, 30_000),
    "PNG of one row": png(2**31 - 1, 1),
    "PNG that only makes Pillow warn": png(10_000, 10_000),
    "GIF": b"GIF89a"
    + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    + b"\x08",
    "BMP": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_refused_by_its_header(name, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("this would allocate memory for the pixels"))
    with pytest.raises(ImageError, match="too many pixels") as error:
        image.pixels(BOMBS[name], CFG)
    message(error)


def test_a_picture_of_the_caller_is_never_the_one_that_is_returned():
    mine = Image.new("RGB", (3, 2))
    image.open_image(mine).putpixel((0, 0), (255, 0, 0))
    assert mine.getpixel((0, 0)) == (0, 0, 0)
