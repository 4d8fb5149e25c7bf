"""`preprocessor_config.json` of Hugging Face's folders: the resize filter of a configuration, read and written.

The rest of what it says (square pictures of the encoder's size, values in [-1, 1]) must be what `image.py` does.
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

# newer folders have the settings of the first in the second, which then counts
NAME, IN_PROCESSOR = "preprocessor_config.json", "processor_config.json"

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read(folder: Path, cfg: C) -> C:
    """The config with the resize filter that a folder asks for, if it asks for one."""
    for path in (folder / IN_PROCESSOR, folder / NAME):
        raw = read_json(path) if path.exists() else {}
        raw = raw.get("image_processor") if path.name == IN_PROCESSOR else raw
        if isinstance(raw, dict) and raw:
            return replace(cfg, resample=parse(raw, cfg.vision, path))
    return cfg


def parse(raw: Mapping[str, Any], vision: VisionConfig, path: Path) -> str:
    """The resize filter that an image processor's settings ask for."""
    for key, value in scaling(vision).items():
        absent = raw.get(key) is None and not (key in raw and key.startswith("do_"))  # null is false
        if not absent and raw[key] != value:
            raise CheckpointError(f"{path}: {key} is {raw[key]}, expected {value}")
    if raw.get("do_center_crop") and raw.get("crop_size") != scaling(vision)["size"]:
        raise CheckpointError(
            f"{path}: do_center_crop is True, to {raw.get('crop_size')}; expected no part of a picture"
        )
    resample = raw.get("resample", 3)
    if type(resample) is not int or resample not in RESAMPLE:
        raise CheckpointError(f"{path}: resample is {resample!r}, expected one of {RESAMPLE}")
    return RESAMPLE[resample]


def render(cfg: Config | SiglipConfig, **more: Any) -> dict[str, Any]:
    """The settings of transformers' image processor, and `more` beside them."""
    number = {name: number for number, name in RESAMPLE.items()}[cfg.resample]
    settings = {"image_processor_type": "SiglipImageProcessor", "do_convert_rgb": True, "resample": number}
    return settings | scaling(cfg.vision) | more


def scaling(vision: VisionConfig) -> dict[str, Any]:
    """What pixels are made by, whatever the filter."""
    return {
        "do_resize": True, "size": {"height": vision.image_size, "width": vision.image_size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
