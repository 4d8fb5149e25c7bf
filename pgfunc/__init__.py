"""PaliGemma and PaliGemma 2 as pure functions in PyTorch: no function changes its arguments.

    import pgfunc as pg

    model = pg.load()
    (answer,) = pg.generate(model, "photo.jpg", "caption en")

Some public names are modules: `pgfunc.errors`, `pgfunc.lab`, `pgfunc.laws`, `pgfunc.quant`, `pgfunc.sample`,
`pgfunc.tokenizer`, `pgfunc.tree`. Some have shorter names: `pg.detect` is `pgfunc.objects.detect`, `pg.segment` is
`pgfunc.objects.segment`, `pg.dual` is `pgfunc.siglip_dual`, and `pg.dual_prompt` is `pgfunc.siglip_dual.prompt`.

Each name, and each module of the package, is imported when it is first used: `import pgfunc` does not import PyTorch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# `laws` is public too, but is left out here, because `import *` would import it, and only the laws need Hypothesis
__all__ = [
    "PUBLISHED", "Cache", "Completion", "Config", "Model", "Params", "Prompt", "Result", "SiglipModel",
    "compiled_in", "convert", "decode", "detect", "dual", "dual_prompt", "errors", "extend", "forward", "generate",
    "generate_many", "insert", "jit", "lab", "load", "load_siglip", "prefill", "prepare", "quant", "reorder", "rewind",
    "sample", "save", "save_siglip", "score", "segment", "stream", "tokenizer", "tree",
]  # fmt: skip

if TYPE_CHECKING:  # the public names for type checkers and editors; what follows gives the same at run time
    from pgfunc import errors, lab, quant, sample, tokenizer, tree
    from pgfunc import laws as laws
    from pgfunc import siglip_dual as dual
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

_HOMES = {  # module -> the public names in it
    "cache": ("Cache",),
    "checkpoint": ("load", "save"),
    "checkpoint.conversion": ("convert",),
    "checkpoint.siglip": ("load_siglip", "save_siglip"),
    "config": ("PUBLISHED", "Config"),
    "generate": ("Completion", "generate", "score", "stream"),
    "jit": ("compiled_in", "jit"),
    "jit.rows": ("insert", "reorder", "rewind"),
    "many": ("Result", "generate_many"),
    "paligemma": ("Params", "decode", "extend", "forward", "prefill"),
    "prompt": ("Model", "Prompt", "prepare"),
    "siglip_dual.prompt": ("SiglipModel",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SHORTER = {  # public name -> module
    "detect": "objects.detect", "segment": "objects.segment", "dual": "siglip_dual", "dual_prompt": "siglip_dual.prompt"
}  # fmt: skip


class _Package(ModuleType):
    """This package. Python names a module in its package; `pg.generate` and `pg.jit` stay the functions."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = isinstance(value, ModuleType) and value.__name__ == f"pgfunc.{name}"
        super().__setattr__(name, getattr(value, name) if is_module and name in _HOME_OF else value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # for a type checker, these would make every name public

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module of the package, when it is first used.

        Raises SettingError for `laws` if Hypothesis is not installed.
        """
        if name in _HOME_OF:
            value = getattr(import_module(f"pgfunc.{_HOME_OF[name]}"), name)
        else:
            path = f"pgfunc.{_SHORTER.get(name, name)}"
            if name.startswith("_") or find_spec(path) is None:
                raise AttributeError(f"module 'pgfunc' has no attribute {name!r}")
            value = import_module(path)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, "laws"})
