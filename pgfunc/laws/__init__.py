"""The laws that every PaliGemma must keep, as named values, and the search for examples that break them.

    results = pg.laws.check(pg.laws.eager(model.params, model.cfg))

A `System` is an implementation, as a record of functions. A `Law` states what it claims, which functions it needs, and
how large the error of an example may be and why. The model does not import this package. `pgfunc laws` checks the laws
from the command line. Importing this package raises SettingError if Hypothesis is not installed.
"""

from pgfunc.errors import SettingError

try:
    import hypothesis  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    raise SettingError('the laws need Hypothesis, which is not installed: pip install "pgfunc[laws]"') from None

from pgfunc.laws.adapters import compiled, eager, quantized
from pgfunc.laws.check import LAWS, check, checks
from pgfunc.laws.hf import transformers
from pgfunc.laws.lab import LAB
from pgfunc.laws.law import Law, Result
from pgfunc.laws.losses import LOSSES
from pgfunc.laws.model import MODEL
from pgfunc.laws.parts import PARTS
from pgfunc.laws.pictures import PICTURES
from pgfunc.laws.sampling import SAMPLING
from pgfunc.laws.stored import STORED
from pgfunc.laws.strategies import (
    Picture,
    Rows,
    Split,
    Strategies,
    configs,
    dtypes,
    hostile,
    parameters,
    picture,
    prompt,
    ragged,
    splits,
)
from pgfunc.laws.system import System
from pgfunc.laws.texts import TEXTS
from pgfunc.laws.transforms import TRANSFORMS

__all__ = [
    "LAB", "LAWS", "LOSSES", "MODEL", "PARTS", "PICTURES", "SAMPLING", "STORED", "TEXTS", "TRANSFORMS",
    "Law", "Picture", "Result", "Rows", "Split", "Strategies", "System",
    "check", "checks", "compiled", "configs", "dtypes", "eager", "hostile", "parameters", "picture", "prompt",
    "quantized", "ragged", "splits", "transformers",
]  # fmt: skip
