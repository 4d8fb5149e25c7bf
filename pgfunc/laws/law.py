"""A law, and the search for an example that breaks it.

A law is a value: what it says, what it is about, how wrong an example is, and how wrong it may be and why. Hypothesis
draws the examples and makes the one that is shown as small as it can. Knows nothing about models.
"""

from collections.abc import Callable
from contextlib import suppress
from math import nan
from typing import Any, Literal, NamedTuple

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, Unsatisfiable
from hypothesis.strategies import DataObject, SearchStrategy
from torch import OutOfMemoryError

from pgfunc.laws.strategies import Strategies
from pgfunc.laws.system import System

SMALLER = 200  # examples that are tried to find a smaller one than the first that breaks a law
QUIET = settings(
    database=None, deadline=None, verbosity=Verbosity.quiet, print_blob=False, report_multiple_bugs=False,
    suppress_health_check=list[Any](HealthCheck), phases=[Phase.explicit, Phase.generate, Phase.shrink],
)  # fmt: skip


class Law(NamedTuple):
    """What must hold of any implementation that has the functions in `needs`.

    An example is plain data, which prints as what it is. It breaks the law where its error is not at most `within`,
    plus `roundings` times the rounding of the system.
    """

    name: str
    statement: str
    needs: tuple[str, ...]
    domain: Callable[[System, Strategies], SearchStrategy[Any]]
    error: Callable[[System, Any], float]
    within: float
    roundings: float
    reason: str  # for the tolerance

    def tolerance(self, system: System) -> float:
        return self.within + self.roundings * system.rounding


class Result(NamedTuple):
    """What a search found: of the examples tried the largest error; the smallest example that breaks the law."""

    law: Law
    verdict: Literal["holds", "broken", "absent"]
    examples: int = 0
    worst: float = 0.0
    tolerance: float = 0.0
    counterexample: str = ""
    why: str = ""  # the functions that are missing, or what an example raised


def law(
    statement: str,
    needs: str,
    domain: Callable[[System, Strategies], SearchStrategy[Any]],
    within: float = 0.0,
    roundings: float = 0.0,
    reason: str = "exact",
) -> Callable[[Callable[[Any, Any], float]], Law]:
    """Make a law of the function that says how wrong an example is; the law has its name."""

    def named(error: Callable[[Any, Any], float]) -> Law:
        name = error.__name__.replace("_", "-")
        return Law(name, statement, tuple(needs.split()), domain, error, within, roundings, reason)

    return named


class Broken(Exception):
    """An example breaks the law."""


class Enough(KeyboardInterrupt):
    """The search for a smaller example has taken long enough: Hypothesis lets this one pass, as that of a keyboard."""


def search(
    law: Law, systems: SearchStrategy[System], strategies: Strategies, examples: int, derandomize: bool
) -> Result:
    """What examples of a law give; with `derandomize` they are the same at each call.

    One that raises breaks it, but where a device has not enough memory: this goes on to the caller.
    """
    found, after = Result(law, "absent"), 0

    @settings(QUIET, max_examples=examples, derandomize=derandomize)
    @given(st.data())
    def example(data: DataObject) -> None:
        nonlocal found, after
        if found.verdict == "broken":
            after += 1
            if after > SMALLER:
                raise Enough
        system = data.draw(systems)
        if missing := system.missing(law.needs):
            found = found._replace(why=", ".join(missing)) if found.verdict == "absent" else found
            return
        drawn, tolerance, why = data.draw(law.domain(system, strategies)), law.tolerance(system), ""
        try:
            error = float(law.error(system, drawn))
        except OutOfMemoryError:
            raise
        except Exception as problem:
            error, why = nan, ": ".join([type(problem).__name__, *str(problem).splitlines()[:1]])
        broken = not error <= tolerance
        found = found._replace(
            verdict="broken" if broken or found.verdict == "broken" else "holds",
            examples=found.examples + 1,
            worst=error if broken else max(found.worst, error),
            tolerance=tolerance,
            counterexample=f"{system.name}: {drawn}" if broken else found.counterexample,
            why=why if broken else found.why if found.verdict == "broken" else "",
        )
        if broken:
            raise Broken

    try:
        with suppress(Broken, Flaky, Enough):  # an example may break a law at one time, and not at another
            example()
    except Unsatisfiable:
        return found._replace(why="such examples")
    return found
