"""The laws are an extra: only `pgfunc laws` and `pg.laws` need Hypothesis, and without it they say what to install."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MESSAGE = 'the laws need Hypothesis, which is not installed: pip install "pgfunc[laws]"'
CAPTION = ["caption", str(ROOT / "examples/images/scene.png"), "--device", "cpu"]
BLOCKED = "import sys; sys.modules['hypothesis'] = None\n"  # an import of it raises, as if it were not installed


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the code in a new process that imports the same pgfunc as this one."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `pgfunc` without Hypothesis."""
    return run(BLOCKED + "from pgfunc.cli import main; main()", *arguments)


def test_import_and_caption_do_not_import_hypothesis():
    check = "\nassert 'hypothesis' not in sys.modules, 'imported'\n"
    code = f"import sys, pgfunc{check}from pgfunc.cli import app\napp(standalone_mode=False){check}"
    done = run(code, *CAPTION)
    assert (done.returncode, done.stderr) == (0, "")


def test_captions_are_written_without_hypothesis():
    done = command(*CAPTION)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.parametrize(("arguments", "text"), [(["--help"], "laws"), (["laws", "--help"], "--system")])
def test_help_is_shown_without_hypothesis(arguments, text):
    done = command(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert text in done.stdout


def test_the_command_says_what_to_install():
    done = command("laws", "--law", "forward-is-pure")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pgfunc: {MESSAGE}\n"


IMPORTS = """
import pgfunc
from pgfunc.errors import SettingError

for statement in ("pgfunc.laws", "from pgfunc import laws", "import pgfunc.laws"):
    try:
        exec(statement)
    except SettingError as error:
        print(error)
"""


def test_python_says_what_to_install():
    done = run(BLOCKED + IMPORTS)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{MESSAGE}\n" * 3, "")
