"""`preprocessor_config.json` of Hugging Face folders: the resize filter is read from it and written to it.

Its other settings (square images of the encoder's size, values in [-1, 1]) must describe what `image.py` does.
Source: transformers `image_processing_siglip.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pgfunc.config import Config, SiglipConfig, VisionConfig
from pgfunc.errors import CheckpointError
from pgfunc.files.jsonfile import read_json

C = TypeVar("C", Config, SiglipConfig)

# newer folders keep the settings of the first file inside the second, which then takes precedence
PREPROCESSOR_CONFIG, PROCESSOR_CONFIG = "preprocessor_config.json", "processor_config.json"

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
BICUBIC = 3  # the default of transformers


def read(folder: Path, cfg: C) -> C:
    """The config with the resize filter of a folder's image processor, if the folder has settings of one."""
    for path in (folder / PROCESSOR_CONFIG, folder / PREPROCESSOR_CONFIG):
        raw = read_json(path) if path.exists() else {}
        raw = raw.get("image_processor") if path.name == PROCESSOR_CONFIG else raw
        if isinstance(raw, dict) and raw:
            return replace(cfg, resample=parse(raw, cfg.vision, path))
    return cfg


def parse(raw: Mapping[str, Any], vision: VisionConfig, path: Path) -> str:
    """The resize filter in an image processor's settings. Raises CheckpointError if the others are not ours."""
    for key, value in pixel_settings(vision).items():
        absent = raw.get(key) is None and not (key in raw and key.startswith("do_"))  # null means false for a do_ key
        if not absent and raw[key] != value:
            raise CheckpointError(f"{path}: {key} is {raw[key]}, expected {value}")
    if raw.get("do_center_crop") and raw.get("crop_size") != pixel_settings(vision)["size"]:
        raise CheckpointError(
            f"{path}: do_center_crop is True with crop_size {raw.get('crop_size')}; expected no cropping"
        )
    resample = raw.get("resample", BICUBIC)
    if type(resample) is not int or resample not in RESAMPLE:
        raise CheckpointError(f"{path}: resample is {resample!r}, expected one of {RESAMPLE}")
    return RESAMPLE[resample]


def render(cfg: Config | SiglipConfig, **extra: Any) -> dict[str, Any]:
    """The settings of transformers' image processor, with `extra` settings added."""
    number = {name: number for number, name in RESAMPLE.items()}[cfg.resample]
    settings = {"image_processor_type": "SiglipImageProcessor", "do_convert_rgb": True, "resample": number}
    return settings | pixel_settings(cfg.vision) | extra


def pixel_settings(vision: VisionConfig) -> dict[str, Any]:
    """The settings that turn an image into pixels, except for the filter."""
    return {
        "do_resize": True, "size": {"height": vision.image_size, "width": vision.image_size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
