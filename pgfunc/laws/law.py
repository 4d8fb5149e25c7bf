"""A law, and the search for an example that breaks it.

A law is a value: what it says, what it is about, how wrong an example is, and how wrong it may be and why. Hypothesis
draws the examples and makes the one that is shown as small as it can. Knows nothing about models.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy

from pgfunc.laws.strategies import Strategies
from pgfunc.laws.system import System

EXAMPLES = 50
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


def check(
    system: System | SearchStrategy[System],
    laws: Iterable[Law] | None = None,
    strategies: Strategies | None = None,
    examples: int = EXAMPLES,
    derandomize: bool = False,
) -> list[Result]:
    """Look for examples that break the laws, of one system, or of all that a strategy draws.

        broken = [result for result in pg.laws.check(system) if result.verdict == "broken"]

    A law that needs a function which the system does not have is `absent`. With `derandomize` the examples are the
    same at each call. An example that raises breaks its law.
    """
    return list(checks(system, laws, strategies, examples, derandomize))


def checks(
    system: System | SearchStrategy[System],
    laws: Iterable[Law] | None = None,
    strategies: Strategies | None = None,
    examples: int = EXAMPLES,
    derandomize: bool = False,
) -> Iterator[Result]:
    """`check`, a result at a time."""
    if laws is None:
        from pgfunc.laws import LAWS as laws  # they are made with what stands here
    systems = st.just(system) if isinstance(system, System) else system
    for each in laws:
        yield _search(each, systems, strategies or Strategies(), examples, derandomize)


class Broken(Exception):
    """An example breaks the law."""


def _search(
    law: Law, systems: SearchStrategy[System], strategies: Strategies, examples: int, derandomize: bool
) -> Result:
    found = Result(law, "absent")

    @settings(QUIET, max_examples=examples, derandomize=derandomize)
    @given(st.data())
    def search(data: DataObject) -> None:
        nonlocal found
        system = data.draw(systems)
        if missing := system.missing(law.needs):
            found = found._replace(why=", ".join(missing)) if found.verdict == "absent" else found
            return
        example, tolerance, why = data.draw(law.domain(system, strategies)), law.tolerance(system), ""
        try:
            error = float(law.error(system, example))
        except Exception as problem:
            error, why = (
                float("nan"),
                f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}",
            )
        broken = not error <= tolerance
        found = found._replace(
            verdict="broken" if broken or found.verdict == "broken" else "holds",
            examples=found.examples + 1,
            worst=error if broken else max(found.worst, error),
            tolerance=tolerance,
            counterexample=f"{system.name}: {example}" if broken else found.counterexample,
            why=why if broken else found.why if found.verdict == "broken" else "",
        )
        if broken:
            raise Broken

    with suppress(Broken):
        search()
    return found
