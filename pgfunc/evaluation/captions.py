"""Captions against reference captions: CIDEr-D, BLEU-4 and exact match.

CIDEr-D (Vedantam, Zitnick & Parikh 2015, sections 3 and 5): the captions of a picture are vectors of n-grams, n = 1 to
4, weighted by how rare each n-gram is among the references of all pictures. The score is the mean cosine with the
references, times 10. A repeated n-gram counts at most as often as in the reference, and a caption of another length is
scaled down by a Gaussian of sigma 6. It depends on all references, so figures of different data sets do not compare.

Both metrics see the same tokens: words in lower case, without punctuation, as in COCO's evaluation. That one tokenizes
by a Java program, which also splits `cat's` and `don't` in two, so figures may differ in the third digit.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from math import exp, log, sqrt
from typing import Any

from pgfunc.evaluation.metrics import Measured, Metric, mean, share, single

LONGEST, SIGMA = 4, 6.0
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")

Grams = Counter[tuple[str, ...]]


def measure(answers: Sequence[str | None], references: Sequence[Sequence[str]]) -> Measured:
    """The metrics of captions; the score of a caption is its CIDEr-D.

    For a single picture CIDEr-D does not exist, because no n-gram is rarer than another: the value is None, and the
    score is exact match. A caption of one word has at most a CIDEr-D of 2.5, because it has no longer n-grams.
    """
    texts = [answer or "" for answer in answers]
    exact = [is_exact(*pair) for pair in zip(answers, references, strict=True)]
    scores = cider([tokens(text) for text in texts], [[tokens(one) for one in group] for group in references])
    metrics = {"cider": mean(scores), "bleu4": bleu(texts, references), "exact": share(exact)}
    if len(answers) == 1:
        return Measured(metrics | {"cider": single(None, 1, "answers")}, [float(exact[0])], "exact match", exact)
    return Measured(metrics, scores, "CIDEr-D", exact)


def is_exact(answer: str | None, references: Sequence[str]) -> bool:
    """Whether an answer is one of the references, character by character, except for spaces at the ends."""
    return answer is not None and answer.strip() in [reference.strip() for reference in references]


def tokens(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; `t-shirt` and `cat's` are one word each."""
    return WORD.findall(text.lower())


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """BLEU-4 of all captions together, from 0 to 1, by sacrebleu: on the tokens above, with exponential smoothing."""
    from sacrebleu.metrics.bleu import BLEU

    def joined(text: str) -> str:
        return " ".join(tokens(text))

    width = max(map(len, references))
    columns: Any = [[joined(group[i]) if i < len(group) else None for group in references] for i in range(width)]
    score = BLEU(tokenize="none").corpus_score([joined(text) for text in texts], columns)
    return single(score.score / 100, len(texts), "answers")


def cider(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """The CIDEr-D of each caption, from 0 to 10. All texts are tokens."""
    counted = [[grams(one) for one in group] for group in references]
    present = Counter[tuple[str, ...]](chain.from_iterable(set().union(*group) for group in counted))
    rarity = {gram: log(len(references)) - log(count) for gram, count in present.items()}
    unseen = log(len(references)) if references else 0.0

    def weighted(counts: Grams) -> dict[tuple[str, ...], float]:
        return {gram: count * rarity.get(gram, unseen) for gram, count in counts.items()}

    scores = []
    for caption, group, counts in zip(captions, references, counted, strict=True):
        vector = weighted(grams(caption))
        similar = [
            exp(-((len(caption) - len(one)) ** 2) / (2 * SIGMA**2)) * cosines(vector, weighted(other))
            for one, other in zip(group, counts, strict=True)
        ]
        scores.append(10 * sum(similar) / len(similar))
    return scores


def grams(words: Sequence[str]) -> Grams:
    """How often each n-gram stands in a text, for n from 1 to 4."""
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def cosines(caption: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """The mean over n of the cosine between n-grams, where the caption's weights are cut to the reference's."""
    total = 0.0
    for n in range(1, LONGEST + 1):
        both = [min(caption[gram], reference[gram]) * reference[gram] for gram in common(caption, reference, n)]
        norms = [norm(weight for gram, weight in vector.items() if len(gram) == n) for vector in (caption, reference)]
        total += sum(both) / (norms[0] * norms[1]) if all(norms) else 0.0
    return total / LONGEST


def common(one: Iterable[tuple[str, ...]], other: Iterable[tuple[str, ...]], n: int) -> list[tuple[str, ...]]:
    """The n-grams in both, in the order of the first."""
    members = set(other)
    return [gram for gram in one if len(gram) == n and gram in members]


def norm(weights: Iterable[float]) -> float:
    """The length of a vector."""
    return sqrt(sum(weight**2 for weight in weights))
