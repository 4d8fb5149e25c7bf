"""The command line: `pgfunc caption photo.jpg`. It parses, calls the package and prints; it decides nothing else.

A mistake of the user's is one line on standard error and exit status 2. With `--json` each picture gives one line of
JSON on standard output; progress goes to standard error. Each file of commands adds its own to `app`.
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

# in this order the commands stand in --help
from pgfunc.cli import text as text  # isort: skip
from pgfunc.cli import locate as locate  # isort: skip
from pgfunc.cli import contrast as contrast  # isort: skip
from pgfunc.cli import train as train  # isort: skip
from pgfunc.cli import checkpoints as checkpoints  # isort: skip
from pgfunc.cli import compile as compile  # isort: skip
from pgfunc.cli import bench as bench  # isort: skip
from pgfunc.cli import laws as laws  # isort: skip
from pgfunc.cli.options import app
from pgfunc.errors import PgfuncError, with_options


def print_version(wanted: bool) -> bool:
    """Print the version and end the program, if `--version` is given. What is returned is the option's value."""
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
    """Run the command line; a PgfuncError is its message, which names options, and exit status 2.

    So is a file that cannot be used.
    """
    own_process()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except PgfuncError as error:
        fail(with_options(str(error)))
    except BrokenPipeError:  # who reads has enough, as `head`
        silence()
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:
            fail(str(PgfuncError(f"{error.filename}: {error.strerror}")))
        if type(error) is not OSError:  # such as of a connection
            raise
        silence()
        fail(f"standard output: cannot be written ({error.strerror})")


def own_process() -> None:
    """Set up what belongs to the whole process, as a command may: a library may not."""
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # where the shell closed them
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal of another encoding cannot show
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata: what counts is that the pixels decode
    logging.basicConfig(format="%(name)s: %(message)s")


def fail(message: str) -> None:
    """One line on standard error, and status 2."""
    with suppress(OSError):
        print(f"pgfunc: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def silence() -> None:
    """Nothing is written to standard output any more, not even what Python holds back until it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
