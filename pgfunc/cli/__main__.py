"""`python -m pgfunc.cli` is `pgfunc`."""

from pgfunc.cli import main

main()
