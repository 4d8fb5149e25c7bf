"""All laws, and checking a system against them."""

from collections.abc import Iterable, Iterator

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pgfunc.laws.lab import LAB
from pgfunc.laws.law import Law, Result, search
from pgfunc.laws.losses import LOSSES
from pgfunc.laws.model import MODEL
from pgfunc.laws.parts import PARTS
from pgfunc.laws.pictures import PICTURES
from pgfunc.laws.sampling import SAMPLING
from pgfunc.laws.stored import STORED
from pgfunc.laws.strategies import Strategies
from pgfunc.laws.system import System
from pgfunc.laws.texts import TEXTS
from pgfunc.laws.transforms import TRANSFORMS

LAWS: tuple[Law, ...] = (*MODEL, *TRANSFORMS, *LAB, *PARTS, *SAMPLING, *STORED, *TEXTS, *PICTURES, *LOSSES)
EXAMPLES = 20


def check(
    system: System | SearchStrategy[System],
    laws: Iterable[Law] = LAWS,
    strategies: Strategies | None = None,
    examples: int = EXAMPLES,
    derandomize: bool = False,
) -> list[Result]:
    """Look for examples that break the laws, in one system or in those that a strategy draws; one result for each law.

        broken = [result for result in pg.laws.check(system) if result.verdict == "broken"]

    The verdict is "absent" if the system lacks a function that the law needs, or if the strategies draw no example for
    it. With `derandomize`, every call tries the same examples. An example that raises an exception breaks its law.
    """
    return list(checks(system, laws, strategies, examples, derandomize))


def checks(
    system: System | SearchStrategy[System],
    laws: Iterable[Law] = LAWS,
    strategies: Strategies | None = None,
    examples: int = EXAMPLES,
    derandomize: bool = False,
) -> Iterator[Result]:
    """Like `check`, but yields each result as soon as it is known."""
    systems = st.just(system) if isinstance(system, System) else system
    for law in laws:
        yield search(law, systems, strategies or Strategies(), examples, derandomize)
