"""Compile a pure function. A donated cache is appended to in place; the results are those of the pure function.

    step = pg.jit(pg.decode, donate="cache")
    logits, cache = step(params, token, cache, cfg)

    arguments.py    reads the arguments of a call, and describes what compiled code depends on
    reasons.py      why a function was compiled again
    cuda_graphs.py  captures compiled code and replays it
    donation.py     which cache may be written in place: handles, continuations, forks
    rows.py         rewind, reorder and insert: caches with other rows
    closures.py     the values that a function closes over
    overwriting.py  what a function does to a donated cache, according to its graph
    compilation.py  torch.compile, and the eager check that a function only appends
    code_folder.py  a folder for compiled code
    function.py     the compiled function, which uses all of these

This package knows nothing about models.
"""

from pgfunc.jit.code_folder import compiled_in as compiled_in
from pgfunc.jit.function import Jitted as Jitted
from pgfunc.jit.function import jit as jit
