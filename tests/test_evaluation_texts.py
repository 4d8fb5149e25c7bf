"""Metrics of texts equal those of the fields' own programs: recorded values stand beside what made them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny import evaluate
from pgfunc.evaluation import captions, metrics, questions, reading

CAPTIONS = ["A man riding a wave, on a surfboard!", "a cat cat cat on a mat", "two dogs", None]
REFERENCES = [
    ["a man rides a big wave on a surfboard", "a surfer riding a wave"],
    ["a cat on a mat"],
    ["two dogs", "two brown dogs play in the snow", "dogs"],
    ["A red bus."],
]


def test_cider_and_bleu_equal_those_of_coco():
    """`CiderScorer` and `BleuScorer(4)` of pycocoevalcap 1.2, with option "closest", on the same tokens."""
    measured = captions.measure(CAPTIONS, REFERENCES)
    assert measured.scores == pytest.approx([3.40369529, 4.78082331, 2.56256094, 0])
    assert measured.metrics["cider"].value == pytest.approx(2.6867698849788377)
    assert measured.metrics["bleu4"].value == pytest.approx(0.4573245119940097)


def test_a_caption_that_is_its_only_reference_has_the_best_cider():
    texts = ["a cat on a mat", "two brown dogs play", "the red bus stops"]
    measured = captions.measure(texts, [[text] for text in texts])
    assert measured.scores == pytest.approx([10] * 3)
    assert [metric.value for metric in measured.metrics.values()] == pytest.approx([10, 1, 1])


def test_a_single_picture_has_no_cider_but_a_score():
    measured = captions.measure(["a cat"], [["a dog", "a cat"]])
    assert measured.metrics["cider"].value is None
    assert (measured.scores, measured.scored) == ([1.0], "exact match")


def test_tokens_are_lowercase_words():
    assert captions.tokens("A cat's T-shirt, 2 dogs — «Straße» no_one.") == [
        "a", "cat's", "t-shirt", "2", "dogs", "straße", "no", "one",
    ]  # fmt: skip


# vqaEval.py of github.com/GT-Vision-Lab/VQA at a013f00, translated to Python 3
@pytest.mark.parametrize(("answer", "people", "accuracy"), [
    ("yes", {"yes": 10}, 1.0), ("Yes", {"yes": 10}, 0.0), ("Yes", {"yes": 9, "no": 1}, 1.0),
    ("two", {"2": 3, "3": 7}, 0.9), ("2", {"two": 2, "3": 8}, 0.6), ("the red car.", {"red car": 4, "car": 6}, 1.0),
    ("dont know", {"don't know": 5, "no": 5}, 1.0), ("1,000", {"1000": 4, "1": 6}, 1.0),
    ("t-shirt", {"t shirt": 4, "shirt": 6}, 1.0), ("t-shirt", {"tshirt": 4, "t - shirt": 6}, 1.0),
    ("2.5", {"2.5": 3, "25": 7}, 0.9), ("u.s.", {"us": 4, "usa": 6}, 1.0), ("none", {"0": 1, "1": 9}, 0.3),
    ("blue\tsky ", {"blue sky": 6, "sky": 4}, 1.0), ("somebody'd", {"somebodyd": 4, "x": 6}, 1.0),
    ("y'all'dve", {"yall'd've": 4, "x": 6}, 1.0), ("", {"x": 10}, 0.0), (None, {"x": 10}, 0.0),
])  # fmt: skip
def test_vqa_accuracy_equals_the_official_one(answer, people, accuracy):
    answers = [text for text, count in people.items() for _ in range(count)]
    assert questions.vqa_accuracy(answer, answers) == pytest.approx(accuracy)


# anls_star 1.0.1, `anls_score(tuple(references), answer)`
@pytest.mark.parametrize(("answer", "references", "expected"), [
    ("The Coca-Cola Company", ["coca cola company", "The Coca Cola Company"], 0.9523809523809523),
    ("1,250", ["$1,250", "1250"], 0.8333333333333334), ("july 4", ["July 14, 1999"], 0), ("abcd", ["abxy"], 0.5),
    ("Yes", ["yes"], 1), ("", ["x"], 0), ("santa  Rosa ", ["Santa Rosa"], 1), (None, [""], 0),
])  # fmt: skip
def test_anls_equals_that_of_its_package(answer, references, expected):
    assert questions.anls(answer, references) == pytest.approx(expected)


def test_questions_have_vqa_accuracy_if_each_has_four_answers():
    few = questions.measure(["yes", "no"], [["yes"] * 4, ["no"] * 3])
    assert few.metrics.keys() == {"exact", "anls"}
    many = questions.measure(["yes", "2"], [["yes"] * 4, ["two"] * 3 + ["3"]])
    assert many.metrics["vqa_accuracy"].value == pytest.approx((1 + (3 * 2 / 3 + 1) / 4) / 2)
    assert many.metrics["exact"].value == 0.5
    assert many.scored == "VQA accuracy"


def test_the_character_error_rate_equals_that_of_jiwer():
    """jiwer 4.0.0, `cer(references, answers)`."""
    references = [["STOP"], ["fizzling 6 accident"], ["51"], ["bough lawyers"]]
    measured = reading.measure(["STOP", "fizling 6 accidents", None, "bough  lawyer"], references)
    assert measured.metrics["cer"].value == pytest.approx(0.15789473684210525)
    assert measured.metrics["exact"].value == 0.25
    assert measured.scores == pytest.approx([1, 1 - 2 / 19, 0, 1 - 2 / 13])


@given(st.text("ab ", max_size=6), st.lists(st.text("abc", max_size=6), min_size=1, max_size=3))
def test_edits_are_those_to_the_nearest_reference(text, references):
    rates = [evaluate.distance(text, one) / max(len(one), 1) for one in references]
    edits, length = reading.fewest_edits(text, references)
    assert edits / max(length, 1) == min(rates)


@given(st.integers(0, 30), st.integers(1, 30))
def test_wilsons_interval_has_the_shares_within_z_of_the_observed_one(hits, misses):
    n = hits + misses
    metric = metrics.share([True] * hits + [False] * misses)
    for end in (metric.low, metric.high):
        assert end is not None
        assert abs(hits / n - end) == pytest.approx(metrics.Z * (end * (1 - end) / n) ** 0.5, abs=1e-9)


def test_the_bootstrap_interval_of_many_answers_is_the_normal_one():
    values = [float(i % 5) for i in range(500)]
    metric = metrics.mean(values)
    half = metrics.Z * (2 / 500) ** 0.5  # the variance of 0..4 is 2
    tolerance = 0.15 * half  # three standard errors of a quantile of 1,000 resamples
    assert (metric.low, metric.high) == pytest.approx((2 - half, 2 + half), abs=tolerance)
    assert metric == metrics.mean(values), "the resamples are the same each time"


def test_a_ratio_is_over_all_answers_and_its_interval_over_answers_that_have_parts():
    metric = metrics.ratio([1, 0, 3], [2, 0, 4], "objects")
    assert (metric.value, metric.counted) == (4 / 6, 6)
    assert metrics.ratio([0.0], [0], "objects").value is None
    assert metrics.share([]).value is None
