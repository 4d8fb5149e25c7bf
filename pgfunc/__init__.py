"""PaliGemma and PaliGemma 2 as pure functions in PyTorch: what goes in is never changed."""

from pgfunc import errors as errors
from pgfunc import sample as sample
from pgfunc import tokenizer as tokenizer
from pgfunc import tree as tree
from pgfunc.cache import Cache as Cache
from pgfunc.checkpoint import convert as convert
from pgfunc.checkpoint import load as load
from pgfunc.checkpoint import save as save
from pgfunc.config import PUBLISHED as PUBLISHED
from pgfunc.config import Config as Config
from pgfunc.generate import Completion as Completion
from pgfunc.generate import generate as generate
from pgfunc.generate import score as score
from pgfunc.generate import stream as stream
from pgfunc.paligemma import Params as Params
from pgfunc.paligemma import decode as decode
from pgfunc.paligemma import extend as extend
from pgfunc.paligemma import forward as forward
from pgfunc.paligemma import prefill as prefill
from pgfunc.prompt import Model as Model
from pgfunc.prompt import Prompt as Prompt
from pgfunc.prompt import prepare as prepare
