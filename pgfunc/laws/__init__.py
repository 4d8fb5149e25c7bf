"""What must hold of a PaliGemma, as named values, and the search for examples that break it.

    results = pg.laws.check(pg.laws.eager(model.params, model.cfg))

A `System` is an implementation as a record of functions; a `Law` says what it claims, of which functions, and how wrong
an example may be and why. Nothing here is imported by what it is about. `pgfunc laws` runs them from the command line.
"""

from pgfunc.laws.adapters import compiled as compiled
from pgfunc.laws.adapters import eager as eager
from pgfunc.laws.adapters import quantized as quantized
from pgfunc.laws.check import LAWS as LAWS
from pgfunc.laws.check import check as check
from pgfunc.laws.check import checks as checks
from pgfunc.laws.hf import transformers as transformers
from pgfunc.laws.law import Law as Law
from pgfunc.laws.law import Result as Result
from pgfunc.laws.losses import LOSSES as LOSSES
from pgfunc.laws.model import MODEL as MODEL
from pgfunc.laws.parts import PARTS as PARTS
from pgfunc.laws.pictures import PICTURES as PICTURES
from pgfunc.laws.sampling import SAMPLING as SAMPLING
from pgfunc.laws.stored import STORED as STORED
from pgfunc.laws.strategies import Picture as Picture
from pgfunc.laws.strategies import Rows as Rows
from pgfunc.laws.strategies import Split as Split
from pgfunc.laws.strategies import Strategies as Strategies
from pgfunc.laws.strategies import configs as configs
from pgfunc.laws.strategies import dtypes as dtypes
from pgfunc.laws.strategies import hostile as hostile
from pgfunc.laws.strategies import parameters as parameters
from pgfunc.laws.strategies import picture as picture
from pgfunc.laws.strategies import prompt as prompt
from pgfunc.laws.strategies import ragged as ragged
from pgfunc.laws.strategies import splits as splits
from pgfunc.laws.system import System as System
from pgfunc.laws.texts import TEXTS as TEXTS
from pgfunc.laws.transforms import TRANSFORMS as TRANSFORMS
