"""`import pgfunc` and `pgfunc --help` do not import PyTorch; each public name is imported when it is first used."""

import ast
import json
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pgfunc as pg

HEAVY = {"torch", "numpy", "PIL", "tokenizers", "safetensors", "huggingface_hub", "hypothesis"}


def fresh(code: str) -> Any:
    """What a new interpreter prints for the value of `result` after this code."""
    code = f"import sys, json\n{code}\nprint(json.dumps(result))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def declared() -> dict[str, tuple[str, str]]:
    """Public name -> the module and the name that type checkers read."""
    tree = ast.parse(Path(pg.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    found = [
        (node.module or "", alias) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    return {alias.asname or alias.name: (module, alias.name) for module, alias in found}


def test_type_checkers_and_python_see_the_same_names():
    assert declared().keys() == {*pg.__all__, "laws"}
    for name, (module, original) in declared().items():
        if module == "pgfunc":
            assert getattr(pg, name) is import_module(f"pgfunc.{original}"), name
        else:
            import_module(module)
            value = getattr(sys.modules[module], original, None) or import_module(f"{module}.{original}")
            assert getattr(pg, name) is value, name


COMMANDS = """
from typer.testing import CliRunner
import pgfunc.cli
from pgfunc.cli.options import app
names = [None, *(info.name for info in app.registered_commands)]
for name in names:
    done = CliRunner().invoke(app, [*([name] if name else []), "--help"])
    assert done.exit_code == 0 and "--help" in done.output, name
for mistake in ("captoin x", "caption --nonsense", "caption no.jpg", "detect no.jpg cat", "score no.jpg"):
    assert CliRunner().invoke(app, mistake.split()).exit_code != 0, mistake
result = [len(names), sorted(sys.modules)]
"""


def test_help_and_mistakes_do_not_import_pytorch():
    commands, modules = fresh(COMMANDS)
    assert commands > 10
    assert not HEAVY & set(modules)


USED = """
import pgfunc as pg
import pgfunc.jit, pgfunc.generate
functions = pg.jit.__name__, pg.generate.__name__, pg.gemma.__name__
listed = dir(pg)
exec("from pgfunc import *")
result = [functions, dir(), listed]
"""


def test_names_are_functions_and_not_the_modules_of_that_name_and_a_star_imports_all():
    functions, starred, listed = fresh(USED)
    assert functions == ["jit", "generate", "pgfunc.gemma"]
    assert {*pg.__all__} <= {*starred}
    assert "laws" not in starred
    assert {*pg.__all__, "laws", "__version__"} <= {*listed}


def test_an_unknown_name_is_an_attribute_error():
    for name in ("nothing", "__main__", "_private"):
        assert not hasattr(pg, name)


def test_functions_can_be_pickled():
    assert pickle.loads(pickle.dumps((pg.decode, pg.Config, pg.generate))) == (pg.decode, pg.Config, pg.generate)
