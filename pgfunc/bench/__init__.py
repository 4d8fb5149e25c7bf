"""How long the stages of a model take on this machine, beside their floors there.

    roofline.py   what a stage must read and compute, and the least time that takes: its floor
    measuring.py  times a call; measures the machine's bandwidth and matrix product
    inputs.py     random parameters and prompts
    pipeline.py   the stages: load, vision, prefill, decode and generate

This package knows nothing about the command line.
"""

from pgfunc.bench.inputs import random_params as random_params
from pgfunc.bench.inputs import random_prompt as random_prompt
from pgfunc.bench.measuring import cold as cold
from pgfunc.bench.measuring import hardware as hardware
from pgfunc.bench.measuring import measure as measure
from pgfunc.bench.measuring import timed as timed
from pgfunc.bench.measuring import times as times
from pgfunc.bench.pipeline import GREEDY as GREEDY
from pgfunc.bench.pipeline import Case as Case
from pgfunc.bench.pipeline import Stage as Stage
from pgfunc.bench.pipeline import compiled_prefill_stage as compiled_prefill_stage
from pgfunc.bench.pipeline import load_stage as load_stage
from pgfunc.bench.pipeline import stages as stages
from pgfunc.names import STAGES as STAGES
