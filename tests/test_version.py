"""The version is written once, in pgfunc/__init__.py: Python, the command line and the wheel read it there."""

import re
import tomllib
from pathlib import Path

from typer.testing import CliRunner

import pgfunc as pg
from pgfunc.cli import app

ROOT = Path(__file__).parent.parent


def test_the_command_prints_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"pgfunc {pg.__version__}\n")


def test_the_wheel_takes_its_version_from_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text()
    assert re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', source, re.MULTILINE) == [pg.__version__]


def test_the_public_names_exist():
    assert not [name for name in pg.__all__ if not hasattr(pg, name)]
