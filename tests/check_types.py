"""The types that a user's editor shows. pyright is in [dev], so this file is named: pytest tests/check_types.py."""

import json
import subprocess
import sys

# a line of a user's script, and the type that pyright must reveal for it
TYPES = {
    "pg.__version__": "str",
    "pg.load()": "Model",
    "prompt": "Prompt",
    "pg.forward(params, prompt, cfg)": "Tensor",
    "pg.prefill(params, prompt, cfg, size=8)": "tuple[Tensor, Cache]",
    "pg.sample.greedy(logits)": "Tensor",
    "pg.decode(params, token, cache, cfg)": "tuple[Tensor, Cache]",
    "step(params, token, cache, cfg)": "tuple[Tensor, Cache]",
    "pg.generate(model, 'a.png', 'caption en')": "list[Completion]",
    "pg.score(model, 'a.png', 'caption en', ['a cat'])": "Tensor",
    "next(pg.stream(model, 'a.png', 'caption en'))": "str",
    "pg.detect.parse('<loc0000>', 640, 480)": "list[Detection]",
    "laws.check(laws.eager(params, cfg))": "list[Result]",
}
SCRIPT = """
import pgfunc as pg
from pgfunc import laws

model = pg.load()
params, cfg = model.params, model.cfg
prompt = pg.prepare(model, "a.png", "caption en")
logits, cache = pg.prefill(params, prompt, cfg, 8)
token = pg.sample.greedy(logits)
step = pg.jit(pg.decode, donate="cache")
"""


def pyright(script, folder):
    """The severity and message of each report, for a script outside the checkout that imports this Python's pgfunc."""
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return [(report["severity"], report["message"]) for report in json.loads(done.stdout)["generalDiagnostics"]]


def test_a_users_script_has_the_types_of_its_values(tmp_path):
    script = SCRIPT + "".join(f"reveal_type({expression})\n" for expression in TYPES)
    expected = [("information", f'Type of "{expression}" is "{name}"') for expression, name in TYPES.items()]
    assert pyright(script, tmp_path) == expected


def test_a_compiled_function_keeps_its_signature(tmp_path):
    script = SCRIPT + "step(params, token, cache)\nstep(params, token, cache, cfg, size=1)\n"
    assert pyright(script, tmp_path) == [
        ("error", 'Argument missing for parameter "cfg"'),
        ("error", 'No parameter named "size"'),
    ]


def test_what_is_not_a_picture_is_refused(tmp_path):
    calls = "prepare(model, 3, 'a')", "generate(model, [None], 'a')", "score(model, {}, 'a', ['b'])"
    reports = pyright(SCRIPT + "".join(f"pg.{call}\n" for call in calls), tmp_path)
    assert [severity for severity, _ in reports] == ["error"] * len(calls)
    rows = "[]", "[[]]", "[['a.png', b''], ('b.png',)]", "['a.png', model.params.projector]"
    assert pyright(SCRIPT + "".join(f"pg.prepare(model, {row}, 'a')\n" for row in rows), tmp_path) == []
