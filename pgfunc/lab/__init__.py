"""The lab: every activation is an output, and every edit of one is an input.

    logits, seen = capture(pg.forward, "language.*.resid_post")(params, prompt, cfg)
    logits = edit(pg.forward, {"language.3.z": put(0.0, heads(0, n=4))})(params, prompt, cfg)

`capture` and `edit` take a function that has an argument `tap`, and return a function with the same arguments. So they
can be nested, compiled by `pg.jit`, and transformed by `torch.func`. `capture(edit(f))` captures edited values;
`edit(capture(f))` captures the values before the edit. The names of activations are those of `gemma.TAPS` and
`siglip.TAPS`, after the part and the layer: `language.3.z`. `names` lists those of a call.

    naming.py     the names of activations, their axes, and patterns of names
    functions.py  capture, edit, names
    edits.py      put, add, block, and selections: tokens, heads, patches
    readings.py   resume, logit lens, direct logit attribution, attribution patching, gradients
    collecting.py collect: activations of a data set on disk
    probes.py     probe, ridge: linear maps of activations
    sae.py        sparse autoencoders
    pictures.py   heat, grid, strip
"""

from pgfunc.lab import sae as sae
from pgfunc.lab.collecting import Collection as Collection
from pgfunc.lab.collecting import collect as collect
from pgfunc.lab.collecting import collection as collection
from pgfunc.lab.edits import Add as Add
from pgfunc.lab.edits import Block as Block
from pgfunc.lab.edits import Put as Put
from pgfunc.lab.edits import add as add
from pgfunc.lab.edits import block as block
from pgfunc.lab.edits import heads as heads
from pgfunc.lab.edits import patches as patches
from pgfunc.lab.edits import put as put
from pgfunc.lab.edits import tokens as tokens
from pgfunc.lab.functions import Edits as Edits
from pgfunc.lab.functions import capture as capture
from pgfunc.lab.functions import edit as edit
from pgfunc.lab.functions import edits as edits
from pgfunc.lab.functions import names as names
from pgfunc.lab.naming import Shape as Shape
from pgfunc.lab.naming import table as table
from pgfunc.lab.pictures import Drawing as Drawing
from pgfunc.lab.pictures import grid as grid
from pgfunc.lab.pictures import heat as heat
from pgfunc.lab.pictures import strip as strip
from pgfunc.lab.probes import Probe as Probe
from pgfunc.lab.probes import probe as probe
from pgfunc.lab.probes import ridge as ridge
from pgfunc.lab.readings import PARTS as PARTS
from pgfunc.lab.readings import Attribution as Attribution
from pgfunc.lab.readings import attribution as attribution
from pgfunc.lab.readings import attribution_patching as attribution_patching
from pgfunc.lab.readings import integrated as integrated
from pgfunc.lab.readings import jacobian as jacobian
from pgfunc.lab.readings import lens as lens
from pgfunc.lab.readings import per_example as per_example
from pgfunc.lab.readings import resume as resume
