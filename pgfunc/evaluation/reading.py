"""Text read from pictures, against what is written there: character error rate and exact match.

The character error rate is the number of edits (insertions, deletions, replacements) that turn the answers into the
references, over the number of characters of the references. All texts count together, so it may exceed 1.
"""

from collections.abc import Sequence

from pgfunc.evaluation.captions import is_exact
from pgfunc.evaluation.metrics import Measured, fractions, ratio, share


def measure(answers: Sequence[str | None], references: Sequence[Sequence[str]]) -> Measured:
    """The metrics of texts. With several references, the one with the smallest error rate counts.

    The score of an answer is 1 - edits / characters.
    """
    pairs = list(zip(answers, references, strict=True))
    edits = [fewest_edits(answer or "", group) for answer, group in pairs]
    metrics = {
        "cer": ratio([wrong for wrong, _ in edits], [length for _, length in edits], "characters"),
        "exact": share([is_exact(*pair) for pair in pairs]),
    }
    return fractions(metrics, [1 - wrong / max(length, 1) for wrong, length in edits], "1 - error rate")


def fewest_edits(text: str, references: Sequence[str]) -> tuple[int, int]:
    """The edits to the nearest reference, and its length in characters."""
    from rapidfuzz.distance import Levenshtein

    counts = [(Levenshtein.distance(text, one), len(one)) for one in references]
    return min(counts, key=lambda count: count[0] / max(count[1], 1))
