"""Names that users type and files carry. This module imports no library, so `--help` lists them without PyTorch."""

import re

# command -> its prefix, as in the training of the mix checkpoints
TASKS = {"caption": "caption en", "ask": "answer en {}", "ocr": "ocr", "detect": "detect {}", "segment": "segment {}"}
GROUPS = {"int8": 0, "fp8": 0, "int4": 128, "int4-64": 64, "int4-32": 32}  # inputs that share a scale; 0: all of a row
STAGES = ("vision", "prefill", "decode", "generate")  # what `pgfunc bench` measures
MASKS = "masks.safetensors"  # the mask decoder in the folder of a model


def is_url(name: object) -> bool:
    """Whether a name is an http or https address."""
    return isinstance(name, str) and re.match("https?://", name, re.IGNORECASE) is not None
