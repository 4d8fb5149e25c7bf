"""A law, and the search for an example that breaks it.

A law is a value: its statement, the functions that it needs, the error of an example, and the allowed error with its
reason. Hypothesis draws the examples and shrinks the counterexample that is shown. Knows nothing about models.
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

MOST_SHRINKS = 200  # examples that are tried, after the first counterexample, to find a smaller one
QUIET = settings(
    database=None, deadline=None, verbosity=Verbosity.quiet, print_blob=False, report_multiple_bugs=False,
    suppress_health_check=list[Any](HealthCheck), phases=[Phase.explicit, Phase.generate, Phase.shrink],
)  # fmt: skip


class Law(NamedTuple):
    """A statement that every implementation with the functions in `needs` must satisfy.

    An example is plain data that prints legibly. It breaks the law if its error exceeds `within` plus `roundings` times
    the rounding of the system, or is nan.
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
        """The largest allowed error for this system."""
        return self.within + self.roundings * system.rounding


class Result(NamedTuple):
    """The result of a search: how many examples were tried, the largest error, and the smallest counterexample."""

    law: Law
    verdict: Literal["holds", "broken", "absent"]
    examples: int = 0
    worst: float = 0.0  # if the law is broken, the error of the counterexample
    tolerance: float = 0.0
    counterexample: str = ""
    why: str = ""  # what is absent (functions, or "such examples"), or the exception that an example raised


def law(
    statement: str,
    needs: str,
    domain: Callable[[System, Strategies], SearchStrategy[Any]],
    within: float = 0.0,
    roundings: float = 0.0,
    reason: str = "exact",
) -> Callable[[Callable[[Any, Any], float]], Law]:
    """A decorator that turns the function for the error of an example into a law, which takes its name."""

    def named(error: Callable[[Any, Any], float]) -> Law:
        name = error.__name__.replace("_", "-")
        return Law(name, statement, tuple(needs.split()), domain, error, within, roundings, reason)

    return named


class Broken(Exception):
    """An example breaks the law."""


class Enough(KeyboardInterrupt):
    """Ends the search for a smaller example. Hypothesis lets it pass, because it is a KeyboardInterrupt."""


def search(
    law: Law, systems: SearchStrategy[System], strategies: Strategies, examples: int, derandomize: bool
) -> Result:
    """Try examples of a law; with `derandomize`, every call tries the same ones.

    An example that raises an exception breaks the law, except OutOfMemoryError, which is raised to the caller.
    """
    result, shrinks = Result(law, "absent"), 0

    @settings(QUIET, max_examples=examples, derandomize=derandomize)
    @given(st.data())
    def example(data: DataObject) -> None:
        nonlocal result, shrinks
        if result.verdict == "broken":
            shrinks += 1
            if shrinks > MOST_SHRINKS:
                raise Enough
        system = data.draw(systems)
        if missing := system.missing(law.needs):
            result = result._replace(why=", ".join(missing)) if result.verdict == "absent" else result
            return
        drawn, tolerance, why = data.draw(law.domain(system, strategies)), law.tolerance(system), ""
        try:
            error = float(law.error(system, drawn))
        except OutOfMemoryError:
            raise
        except Exception as problem:
            error, why = nan, ": ".join([type(problem).__name__, *str(problem).splitlines()[:1]])
        broken = not error <= tolerance
        result = result._replace(
            verdict="broken" if broken or result.verdict == "broken" else "holds",
            examples=result.examples + 1,
            worst=error if broken else max(result.worst, error),
            tolerance=tolerance,
            counterexample=f"{system.name}: {drawn}" if broken else result.counterexample,
            why=why if broken else result.why if result.verdict == "broken" else "",
        )
        if broken:
            raise Broken

    try:
        with suppress(Broken, Flaky, Enough):  # Flaky: an example breaks a law in one run and not in another
            example()
    except Unsatisfiable:
        return result._replace(why="such examples")
    return result
