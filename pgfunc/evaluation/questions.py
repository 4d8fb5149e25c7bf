"""Answers to questions against reference answers: exact match, VQA accuracy and ANLS.

VQA accuracy (Antol et al. 2015): an answer is as right as min(n / 3, 1), where n people gave the same answer; the mean
is taken over the sets that leave out one person. If the people's answers differ, all answers are normalized first, as
the official evaluation does (GT-Vision-Lab/VQA, vqaEval.py). A question with fewer than four answers has no VQA
accuracy, because no answer could be fully right.

ANLS (Biten et al. 2019): 1 - edits / length of the longer text, or 0 if that is below 0.5; without regard to case and
the width of spaces, and with the best reference. The paper gives 0 also for exactly 0.5; the scripts of its benchmarks
do not, and neither does this one.
"""

import re
from collections.abc import Sequence

from pgfunc.evaluation.captions import is_exact
from pgfunc.evaluation.metrics import Measured, fractions, mean, share

FEWEST = 4  # answers per question, for VQA accuracy
THRESHOLD = 0.5  # of ANLS
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER, PERIOD = re.compile(r"\d,\d"), re.compile(r"\.(?!\d)")

# contractions that people write without an apostrophe: ending -> beginnings
ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
}
OWSAT = "'ow's'at"
DOUBLE = {
    "'d've": "he it she somebody someone something there they we who y'all you",
    "n't've": "could had might should would",
}


def measure(answers: Sequence[str | None], references: Sequence[Sequence[str]]) -> Measured:
    """The metrics of answers; the score of an answer is its VQA accuracy, or exact match if some question has none."""
    pairs = list(zip(answers, references, strict=True))
    exact = [is_exact(*pair) for pair in pairs]
    metrics = {"exact": share(exact), "anls": mean([anls(*pair) for pair in pairs])}
    if any(len(group) < FEWEST for group in references):
        return fractions(metrics, [float(hit) for hit in exact], "exact match")
    accuracies = [vqa_accuracy(*pair) for pair in pairs]
    return fractions({"vqa_accuracy": mean(accuracies)} | metrics, accuracies, "VQA accuracy")


def vqa_accuracy(answer: str | None, people: Sequence[str]) -> float:
    """The VQA accuracy of one answer, from 0 to 1, given the answers of four or more people."""
    if answer is None:
        return 0.0
    answer, *people = [" ".join(re.split(r"[\n\t]", text)).strip() for text in (answer, *people)]
    if len(set(people)) > 1:
        answer, *people = map(normalize, (answer, *people))
    same = [one == answer for one in people]
    return sum(min((sum(same) - own) / 3, 1) for own in same) / len(same)


def normalize(answer: str) -> str:
    """An answer in lower case, without punctuation and articles; digits for numbers, apostrophes in contractions."""
    text = answer
    for mark in PUNCTUATION:
        removed = f"{mark} " in answer or f" {mark}" in answer or COMMA_IN_NUMBER.search(answer)
        text = text.replace(mark, "" if removed else " ")
    words = [DIGITS.get(word, word) for word in PERIOD.sub("", text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def contractions() -> dict[str, str]:
    """Contraction with an apostrophe missing -> with all. The official list has no `ill`, `shed`, `wed` and `id`."""
    table = {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all", "yall'd've": "y'all'd've"}
    table |= dict.fromkeys(["yall'll", "y'allll"], "y'all'll") | dict.fromkeys(["ow's'at", "'ows'at", "'ow'sat"], OWSAT)
    table |= {"somebody'd": "somebodyd"}  # as in the official list
    for ending, words in ENDINGS.items():
        table |= {word + ending.replace("'", ""): word + ending for word in words.split()}
    for ending, words in DOUBLE.items():
        first = ending.removesuffix("'ve")
        bare = first.replace("'", "")
        for word in words.split():
            table[f"{word}{bare}'ve"] = table[f"{word}{first}ve"] = word + ending
    return table


CONTRACTIONS = contractions()


def anls(answer: str | None, references: Sequence[str]) -> float:
    """The normalized Levenshtein similarity of one answer with the best reference, cut at the threshold."""
    from rapidfuzz.distance import Levenshtein

    if answer is None:
        return 0.0
    text, *others = (" ".join(one.lower().split()) for one in (answer, *references))
    best = max(Levenshtein.normalized_similarity(text, other) for other in others)
    return best if best >= THRESHOLD else 0.0
