"""PaliGemma and PaliGemma 2 as pure functions in PyTorch: no function changes its arguments.

    import pgfunc as pg

    model = pg.load()
    (answer,) = pg.generate(model, "photo.jpg", "caption en")

Some public names are modules: `pgfunc.errors`, `pgfunc.lab`, `pgfunc.quant`, `pgfunc.sample`, `pgfunc.tokenizer`,
`pgfunc.tree`. Some have shorter names: `pg.detect` is `pgfunc.objects.detect`, `pg.segment` is
`pgfunc.objects.segment`, `pg.dual` is `pgfunc.siglip_dual`, and `pg.dual_prompt` is `pgfunc.siglip_dual.prompt`.
`pg.laws` is `pgfunc.laws`, which is imported when first used.
"""

from types import ModuleType

import pgfunc.kernels.rules  # noqa: F401  # fills the table of `lowering`
from pgfunc import errors, lab, quant, sample, siglip_dual, tokenizer, tree
from pgfunc.cache import Cache
from pgfunc.checkpoint import load, save
from pgfunc.checkpoint.conversion import convert
from pgfunc.checkpoint.siglip import load_siglip, save_siglip
from pgfunc.config import PUBLISHED, Config
from pgfunc.generate import Completion, generate, score, stream
from pgfunc.jit import compiled_in, jit
from pgfunc.jit.rows import insert, reorder, rewind
from pgfunc.many import Result, generate_many
from pgfunc.objects import detect, segment
from pgfunc.paligemma import Params, decode, extend, forward, prefill
from pgfunc.prompt import Model, Prompt, prepare
from pgfunc.siglip_dual import prompt as dual_prompt
from pgfunc.siglip_dual.prompt import SiglipModel

__version__ = "0.1.0"
dual = siglip_dual

# `laws` is public too, but is left out here, because `import *` would import it
__all__ = [
    "PUBLISHED", "Cache", "Completion", "Config", "Model", "Params", "Prompt", "Result", "SiglipModel",
    "compiled_in", "convert", "decode", "detect", "dual", "dual_prompt", "errors", "extend", "forward", "generate",
    "generate_many", "insert", "jit", "lab", "load", "load_siglip", "prefill", "prepare", "quant", "reorder", "rewind",
    "sample", "save", "save_siglip", "score", "segment", "stream", "tokenizer", "tree",
]  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    """Import `pg.laws` when it is first used, because only the laws need Hypothesis.

    Raises SettingError if Hypothesis is not installed.
    """
    if name == "laws":
        from importlib import import_module

        return import_module("pgfunc.laws")
    raise AttributeError(f"module 'pgfunc' has no attribute {name!r}")
