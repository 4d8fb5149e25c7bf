"""PaliGemma and PaliGemma 2 as pure functions in PyTorch: what goes in is never changed."""

from pgfunc import errors as errors
from pgfunc import quant as quant
from pgfunc import sample as sample
from pgfunc import siglip_dual
from pgfunc import tokenizer as tokenizer
from pgfunc import tree as tree
from pgfunc.cache import Cache as Cache
from pgfunc.checkpoint import load as load
from pgfunc.checkpoint import save as save
from pgfunc.checkpoint.conversion import convert as convert
from pgfunc.checkpoint.siglip import load_siglip as load_siglip
from pgfunc.checkpoint.siglip import save_siglip as save_siglip
from pgfunc.config import PUBLISHED as PUBLISHED
from pgfunc.config import Config as Config
from pgfunc.generate import Completion as Completion
from pgfunc.generate import generate as generate
from pgfunc.generate import score as score
from pgfunc.generate import stream as stream
from pgfunc.jit import compiled_in as compiled_in
from pgfunc.jit import jit as jit
from pgfunc.jit.donation import reorder as reorder
from pgfunc.jit.donation import rewind as rewind
from pgfunc.kernels import rules as _rules  # noqa: F401  # fills the table of what compiled code computes instead
from pgfunc.objects import detect as detect
from pgfunc.objects import segment as segment
from pgfunc.paligemma import Params as Params
from pgfunc.paligemma import decode as decode
from pgfunc.paligemma import extend as extend
from pgfunc.paligemma import forward as forward
from pgfunc.paligemma import prefill as prefill
from pgfunc.prompt import Model as Model
from pgfunc.prompt import Prompt as Prompt
from pgfunc.prompt import prepare as prepare
from pgfunc.siglip_dual import prompt as dual_prompt  # noqa: F401
from pgfunc.siglip_dual.prompt import SiglipModel as SiglipModel

dual = siglip_dual


def __getattr__(name: str):
    """`pg.laws`, imported when it is first asked for: nothing else in Python needs Hypothesis."""
    if name == "laws":
        from importlib import import_module

        return import_module("pgfunc.laws")
    raise AttributeError(f"module 'pgfunc' has no attribute {name!r}")
