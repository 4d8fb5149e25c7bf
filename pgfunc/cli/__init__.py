"""The command line: `pgfunc caption photo.jpg`. It parses options, chooses defaults, calls the package and prints.

A user's mistake is one line on standard error and exit status 2. With `--json`, the commands on pictures print one line
of JSON per picture on standard output; progress bars and notes go to standard error. Each module of commands adds
them to `app`.
"""

import io
import logging
import os
import sys
import warnings
from contextlib import suppress
from typing import Annotated

import typer

import pgfunc as pg

# --help lists the commands in the order of these imports
from pgfunc.cli import text as text  # isort: skip
from pgfunc.cli import locate as locate  # isort: skip
from pgfunc.cli import contrast as contrast  # isort: skip
from pgfunc.cli import demo as demo  # isort: skip
from pgfunc.cli import train as train  # isort: skip
from pgfunc.cli import evaluate as evaluate  # isort: skip
from pgfunc.cli import checkpoints as checkpoints  # isort: skip
from pgfunc.cli import compile as compile  # isort: skip
from pgfunc.cli import bench as bench  # isort: skip
from pgfunc.cli import laws as laws  # isort: skip
from pgfunc.cli.options import app
from pgfunc.errors import PgfuncError, with_options


def print_version(wanted: bool) -> bool:
    """Print the version and end the program, if `--version` is given. Returns the option's value."""
    if wanted:
        print(f"pgfunc {pg.__version__}")
        raise typer.Exit
    return wanted


Version = Annotated[
    bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
]


@app.callback()
def before_each_command(version: Version = False) -> None:
    """Take the options that stand before the name of a command."""


def main() -> None:
    """Run the command line. A PgfuncError, or an OSError that names a file, becomes one line and exit status 2."""
    set_up_process()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except PgfuncError as error:
        fail(with_options(str(error)))
    except BrokenPipeError:  # the reader of the pipe has stopped, as `head` does
        silence()
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:
            fail(str(PgfuncError(f"{error.filename}: {error.strerror}")))
        if type(error) is not OSError:  # for example a ConnectionError
            raise
        silence()
        fail(f"standard output: cannot be written ({error.strerror})")


def set_up_process() -> None:
    """Change settings of the whole process, which a command may do but a library may not."""
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # None if the shell closed them
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding lacks
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about damaged metadata, while the pixels can be decoded
    logging.basicConfig(format="%(name)s: %(message)s")


def fail(message: str) -> None:
    """Print one line on standard error, and exit with status 2."""
    with suppress(OSError):
        print(f"pgfunc: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def silence() -> None:
    """Discard further output, including what Python still holds in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
