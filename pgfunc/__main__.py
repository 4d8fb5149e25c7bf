"""`python -m pgfunc` is `pgfunc`."""

from pgfunc.cli import main

main()
