"""`--help` has examples that the program understands; completion, `python -m pgfunc` and variables work."""

import os
import shlex
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import pgfunc as pg
from pgfunc.cli.examples import EXAMPLES
from pgfunc.cli.options import app

COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


def shown(*arguments: str, **variables: str) -> str:
    done = CliRunner().invoke(app, arguments, prog_name="pgfunc", env={"COLUMNS": "80", **variables})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_each_command_are_shown_and_understood(name):
    lines = [line.strip() for line in shown(name, "--help").splitlines()]
    assert 2 <= len(EXAMPLES[name]) <= 3
    for example in EXAMPLES[name]:
        assert example in lines, "in one line of 80 characters, so that it can be copied"
        program, command, *arguments = shlex.split(example)
        assert (program, command) == ("pgfunc", name)
        COMMANDS[name].make_context(name, arguments)  # raises an error of usage


def test_every_example_belongs_to_a_command():
    assert EXAMPLES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", [(), ("caption",)], ids=str)
def test_h_is_help(command):
    assert shown(*command, "-h") == shown(*command, "--help")


def program(*arguments: str, **variables: str) -> str:
    """What `python -m pgfunc` prints in a new process."""
    command = [sys.executable, "-m", "pgfunc", *arguments]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True).stdout


def test_python_m_pgfunc_is_the_program():
    assert program("--version") == f"pgfunc {pg.__version__}\n"


def test_the_shell_completes_commands_and_options():
    assert "complete_bash" in program("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")

    def completed(words: str) -> list[str]:
        variables = {"_PGFUNC_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return CliRunner().invoke(app, prog_name="pgfunc", env=variables).stdout.split()

    assert completed("pgfunc cap") == ["caption"]
    assert completed("pgfunc caption --te") == ["--temperature"]


@pytest.mark.parametrize("name", [name for name in COMMANDS if "--device" in shown(name, "--help")])
def test_an_environment_variable_can_choose_the_device_except_of_what_is_measured(name, monkeypatch):
    monkeypatch.setenv("PGFUNC_DEVICE", "cuda:1")
    _, _, *arguments = shlex.split(EXAMPLES[name][0])

    def device(*more: str) -> str | None:
        return COMMANDS[name].make_context(name, [*arguments, *more]).params["device"]

    measured = name in ("bench", "laws")
    assert (device(), device("--device", "cpu")) == (None if measured else "cuda:1", "cpu")
    assert ("PGFUNC_DEVICE" in shown(name, "--help")) != measured
