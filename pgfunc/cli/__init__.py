"""The command line: `pgfunc caption photo.jpg`. It parses, calls the package and prints; it decides nothing else.

A mistake of the user's is one line on standard error and exit status 2. With `--json` each picture gives one line of
JSON on standard output; progress goes to standard error. Each file of commands adds its own to `app`.
"""

import io
import logging
import sys

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


def main() -> None:
    """Run the command line; a PgfuncError is its message, which names options, and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        app()
    except PgfuncError as error:
        print(f"pgfunc: {with_options(str(error))}", file=sys.stderr)
        sys.exit(2)
