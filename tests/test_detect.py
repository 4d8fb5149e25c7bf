"""Boxes as text: what is written is read back, and a malformed piece never affects the pieces beside it."""

import math
import re
from itertools import zip_longest

import pytest
from cases import text_model
from hypothesis import assume, given
from hypothesis import strategies as st

import pgfunc as pg
from pgfunc import tokenizer
from pgfunc.errors import PromptError, SettingError
from pgfunc.objects import detect, grammar
from pgfunc.objects.detect import Box, Detection

MODEL = text_model()
sides = st.integers(1, 5000)
fractions = st.floats(0, 1)
labels = st.text(max_size=12).map(str.strip).filter(lambda text: ";" not in text)


@st.composite
def detections(draw, width: int, height: int) -> Detection:
    (top, bottom), (left, right) = (sorted((draw(fractions), draw(fractions))) for _ in range(2))
    return Detection(draw(labels), Box(top * height, left * width, bottom * height, right * width))


def text(*locations: int, label: str = "", codes: int = 0) -> str:
    """The text of one object."""
    tokens = "".join(f"<loc{location:04d}>" for location in locations) + "<seg005>" * codes
    return tokens + (f" {label}" if label else "")


CAT, BUS = text(10, 20, 500, 600, label="cat"), text(0, 0, 1023, 1023, label="yellow bus")


def test_locations_are_ymin_xmin_ymax_xmax_in_steps_of_1_1023():
    parsed = detect.parse(f"{CAT} ; {BUS}", width=1023, height=2046)
    assert parsed == [Detection("cat", Box(20, 20, 1000, 600)), Detection("yellow bus", Box(0, 0, 2046, 1023))]
    assert detect.parse(text(0, 0, 341, 1023), 30, 9) == [Detection("", Box(0, 0, 3, 30))]
    assert detect.malformed(f"{CAT} ; {BUS}") == []


@given(st.data(), sides, sides)
def test_rendered_boxes_that_are_parsed_render_to_the_same_text(data, width, height):
    original = data.draw(st.lists(detections(width, height), max_size=4))
    rendered = detect.render(original, width, height)
    assert detect.malformed(rendered) == []
    parsed = detect.parse(rendered, width, height)
    without_repetitions = " ; ".join(dict.fromkeys(rendered.split(" ; ")))
    assert detect.render(parsed, width, height) == without_repetitions if original else not parsed


@given(sides, fractions, fractions)
def test_a_box_thinner_than_a_step_becomes_the_step_that_contains_its_middle(side, position, thickness):
    low = position * side
    high = min(low + thickness * side / 1023, side)
    top, left, bottom, right = detect.to_locations(Box(low, 0, high, side), side, side)
    assert (left, right) == (0, 1023)
    assert bottom == top + 1
    assert top - 1e-9 <= (low + high) / 2 / side * 1023 <= bottom + 1e-9


def test_edges_outside_the_picture_are_moved_to_its_border():
    assert detect.render([Detection("cat", Box(-5, -1, 99, 20))], 10, 50) == text(0, 0, 1023, 1023, label="cat")
    assert detect.render([Detection("cat", Box(70, 3, 80, 7))], 10, 50).startswith("<loc1022>")


def test_an_object_without_a_label_ends_with_its_last_token():
    assert detect.render([Detection("", Box(0, 0, 5, 5)), Detection("cat", Box(0, 0, 5, 5))], 5, 5) == (
        f"{text(0, 0, 1023, 1023)} ; {text(0, 0, 1023, 1023, label='cat')}"
    )


MALFORMED = {
    "three locations": (text(1, 2, 3, label="dog"), "3 location tokens, expected 4"),
    "five locations": (text(1, 2, 3, 4, 5, label="dog"), "5 location tokens, expected 4"),
    "cut off": ("<loc0001><loc00", "1 location tokens, expected 4"),
    "text": ("a dog in the grass", "0 location tokens, expected 4"),
    "codes alone": ("<seg001><seg002> dog", "0 location tokens, expected 4"),
    "above 1023": (text(1, 2, 1024, 4, label="dog"), "location 1024 is above 1023"),
    "upside down": (text(3, 2, 1, 4, label="dog"), "corners (3, 2) and (1, 4) are not top left and bottom right"),
    "mirrored": (text(1, 4, 3, 2, label="dog"), "corners (1, 4) and (3, 2) are not top left and bottom right"),
    "no height": (text(1, 2, 1, 4, label="dog"), "corners (1, 2) and (1, 4) are not top left and bottom right"),
    "no width": (text(1, 2, 3, 2, label="dog"), "corners (1, 2) and (3, 2) are not top left and bottom right"),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("separator", [" ; ", ";", "; "])
def test_a_malformed_piece_is_reported_and_affects_no_other(case, separator):
    piece, reason = MALFORMED[case]
    for pieces in ([piece, CAT, BUS], [CAT, piece, BUS], [CAT, BUS, piece]):
        joined = separator.join(pieces)
        assert detect.parse(joined, 40, 30) == detect.parse(f"{CAT} ; {BUS}", 40, 30)
        assert detect.malformed(joined) == [(piece, reason)]


SEPARATORS = [" ; ", ";", "; ", " ;", ";\n", " ", "", "\n", ", ", ",", ",\n", " , ", "\n\n", "\t"]
plain = st.text("aé☃< >loc1", max_size=8).map(str.strip)
corners = st.lists(st.integers(0, 1023), min_size=2, max_size=2, unique=True).map(sorted)


@st.composite
def objects(draw) -> str:
    (top, bottom), (left, right) = draw(corners), draw(corners)
    return text(top, left, bottom, right, label=draw(plain), codes=draw(st.sampled_from([0, 0, 3, 16])))


@given(st.lists(objects(), max_size=4), st.data())
def test_objects_are_read_in_the_same_way_with_any_separator(pieces, data):
    separators = [data.draw(st.sampled_from(SEPARATORS)) for _ in pieces[1:]]
    joined = "".join(word for pair in zip_longest(pieces, separators, fillvalue="") for word in pair)
    alone = [item._replace(starts=()) for piece in pieces for item in detect.well_formed(piece)]
    assert [item._replace(starts=()) for item in detect.well_formed(joined)] == alone
    assert detect.malformed(joined) == []


@given(st.lists(st.tuples(corners, corners, plain.filter(bool)), min_size=1, max_size=4), st.data())
def test_all_labels_may_stand_before_their_tokens(examples, data):
    pieces = [label + data.draw(st.sampled_from(["", " "])) + text(y[0], x[0], y[1], x[1]) for y, x, label in examples]
    joined = data.draw(st.sampled_from(SEPARATORS)).join(pieces)
    items = detect.well_formed(joined)
    assert [item.label for item in items] == [label for _, _, label in examples]
    assert [item.locations for item in items] == [(y[0], x[0], y[1], x[1]) for y, x, _ in examples]
    assert detect.malformed(joined) == []


@pytest.mark.parametrize("case", [case for case in MALFORMED if case not in ("text", "cut off")])
@pytest.mark.parametrize("separator", [separator for separator in SEPARATORS if ";" not in separator])
def test_a_malformed_piece_is_reported_without_semicolons_too(case, separator):
    piece, reason = MALFORMED[case]
    for pieces in ([piece, CAT, BUS], [CAT, piece, BUS], [CAT, BUS, piece]):
        joined = separator.join(pieces)
        assert detect.parse(joined, 40, 30) == detect.parse(f"{CAT} ; {BUS}", 40, 30)
        assert detect.malformed(joined) == [(piece, reason)]


TOO_FEW, TOO_MANY, BOX = text(1, 2, 3), text(1, 2, 3, 4, 5), text(10, 20, 500, 600)
PARTLY_MALFORMED = {  # text, labels that are read, pieces that are malformed
    "text before the object": (f"I see {CAT} here", ["cat here"], ["I see"]),
    "codes after the label": (f"{BOX} cat <seg001>", ["cat"], ["<seg001>"]),
    "codes before the object": (f"<seg001>{CAT}", ["cat"], ["<seg001>"]),
    "locations after the label": (f"{CAT} {TOO_FEW}", ["cat"], [TOO_FEW]),
    "boxes without labels, and one that is cut off": (f"{BOX}{text(0, 0, 1, 1)}{TOO_FEW}", ["", ""], [TOO_FEW]),
    "too few, then a line with a box": (f"{TOO_FEW}\n{BOX}", [""], [TOO_FEW]),
    "too many, then a line with a box": (f"{TOO_MANY} dog\n{CAT}", ["cat"], [f"{TOO_MANY} dog"]),
    "a comma that belongs to the label": (f"{BOX} cat,", ["cat,"], []),
    "commas after every object": (f"{BOX} cat, {BOX} dog,", ["cat", "dog"], []),
    "only commas": (", ,", [], [", ,"]),
}


@pytest.mark.parametrize("case", PARTLY_MALFORMED)
def test_complete_objects_are_kept_and_the_rest_is_reported(case):
    mixed, labels, left_out = PARTLY_MALFORMED[case]
    assert [item.label for item in detect.parse(mixed, 40, 30)] == labels
    assert [item.piece for item in detect.malformed(mixed)] == left_out


words = [CAT, BUS, BOX, "<loc0001>", "<seg001>", ";", " ", ", ", "cat", "<loc", "0001>", "\n", "é"]


@given(st.lists(st.sampled_from(words), max_size=12))
def test_every_word_of_any_text_is_in_an_object_or_a_malformed_piece(chosen):
    joined = rest = "".join(chosen)
    for item in detect.read(joined):
        skipped, piece, rest = rest.partition(item.piece)
        assert piece
        assert not skipped.strip(" ,;\n"), "every word is in a piece, in order"
    assert not rest.strip(" ,;\n")
    for item in detect.well_formed(joined):
        tokens = [joined[start : start + 9] for start in item.starts]
        assert tokens == [f"<loc{location:04d}>" for location in item.locations]
    box = re.compile("(?<!>)<loc0010><loc0020><loc0500><loc0600>(?!<)")
    boxes = [item for item in detect.well_formed(joined) if item.locations == (10, 20, 500, 600)]
    assert len(boxes) >= len(box.findall(joined)), "a box that touches no other word is kept"


def test_the_drawing_in_the_docstring_of_the_grammar_is_read_as_two_objects():
    drawing = next(line for line in grammar.__doc__.splitlines() if "..." in line and "cat" in line)
    cat, bus = detect.read(drawing.replace("...", "<seg000>" * 14))
    assert cat[1:3] == ("cat", (102, 204, 511, 767))
    assert cat.codes == (11, *[0] * 14, 97)
    assert bus[1:4] == ("bus", (0, 512, 1023, 1023), ())


def test_unusual_labels_spaces_and_codes_do_not_change_the_box():
    box = detect.parse(CAT, 40, 30)[0].box
    for label in ("cat", "", "cat < dog", "<b>"):
        assert detect.parse(text(10, 20, 500, 600, label=label), 40, 30) == [Detection(label, box)]
    for codes in (1, 15, 16, 17):
        assert detect.parse(text(10, 20, 500, 600, label="cat", codes=codes), 40, 30) == [Detection("cat", box)]
    spaced = " <loc0010> <loc0020>\n<loc0500><loc0600>\tcat "
    assert detect.parse(spaced, 40, 30) == [Detection("cat", box)]
    for empty in ("", " ", ";", " ; ; "):
        assert (detect.parse(empty, 40, 30), detect.malformed(empty)) == ([], [])


def test_a_repeated_object_is_read_once():
    other = CAT.replace("cat", "dog")
    moved = CAT.replace("0600", "0601")
    parsed = detect.parse(" ; ".join([CAT, other, CAT, moved, CAT, other]), 40, 30)
    assert parsed == [item for piece in (CAT, other, moved) for item in detect.parse(piece, 40, 30)]


@pytest.mark.parametrize("label", ["cat;dog", "cat <loc0001>", "<seg001>", " cat", "cat\n"])
def test_a_label_that_could_not_be_read_back_is_refused(label):
    with pytest.raises(PromptError, match=re.escape(repr(label))):
        detect.render([Detection(label, Box(0, 0, 1, 1))], 1, 1)


@pytest.mark.parametrize("box", [Box(math.nan, 0, 1, 1), Box(0, 0, 1, math.inf), Box(0, -math.inf, 1, 1)])
def test_a_box_that_is_not_finite_is_refused(box):
    with pytest.raises(SettingError, match="its edges are not finite"):
        detect.render([Detection("cat", box)], 4, 4)


@pytest.mark.parametrize("box", [Box(1, 0, 0, 1), Box(0, 1, 1, 0)])
def test_a_box_with_swapped_edges_is_refused(box):
    with pytest.raises(PromptError, match="expected ymin <= ymax and xmin <= xmax"):
        detect.render([Detection("cat", box)], 4, 4)


@pytest.mark.parametrize("size", [(0, 5), (5, -1)])
def test_a_picture_without_pixels_is_refused(size):
    message = f"a picture of {size[0]} x {size[1]} pixels"
    with pytest.raises(SettingError, match=message):
        detect.parse(CAT, *size)
    with pytest.raises(SettingError, match=message):
        detect.render([Detection("cat", Box(0, 0, 1, 1))], *size)


def test_prompts_have_the_documented_form():
    assert detect.prefix(["cat", "yellow bus"]) == "detect cat ; yellow bus"
    assert detect.region(Box(1, 2, 3, 4), 8, 4) == f"{text(256, 256, 767, 512)} caption en"
    assert (
        detect.region(Box(1, 2, 3, 4), 8, 4, "describe en; short ") == f"{text(256, 256, 767, 512)} describe en; short "
    )


@pytest.mark.parametrize("labels", [[], [""], ["cat", ""], "cat"])
def test_a_prompt_that_asks_for_nothing_is_refused(labels):
    with pytest.raises(PromptError, match="expected a list of what to look for"):
        detect.prefix(labels)


def completion(answer: str, logprob: float = -1.0) -> pg.Completion:
    """An answer whose k-th token has k times this log-probability."""
    ids = tokenizer.encode(MODEL.tokenizer, answer)
    return pg.Completion(answer, ids, [logprob * (i + 1) for i in range(len(ids))], "eos")


@given(st.text(alphabet="aé☃🐈 ", max_size=5).map(str.strip), st.text(alphabet="aé☃🐈", max_size=5))
def test_confidence_is_the_geometric_mean_of_the_four_location_probabilities(first, second):
    boxes = "<loc0000><loc0001><loc0002><loc0003>", "<loc0001><loc0000><loc0003><loc0002>"
    assume(first or second)
    done = completion(f"{boxes[0]} {first};{second} ;{boxes[1]}{second}", -0.1)
    detections = detect.with_confidence(done, MODEL.tokenizer, 40, 30)
    assert [item._replace(confidence=None) for item in detections] == detect.parse(done.text, 40, 30)
    assert detections[0].confidence == pytest.approx(math.exp(-0.1 * (1 + 2 + 3 + 4) / 4))
    start = len(done.tokens) - len(second.encode()) - 4  # one token a byte
    assert detections[1].confidence == pytest.approx(math.exp(-0.1 * (start + 2.5)))


@pytest.mark.parametrize("separator", [" ; ", " ", "", "\n", ", "])
def test_each_box_has_its_own_confidence_with_any_separator(separator):
    """Locations 0 to 3 are tokens here, and so is each other character; the k-th token has log-probability -k."""
    boxes = "<loc0000><loc0001><loc0002><loc0003>", "<loc0001><loc0000><loc0003><loc0002>", "<loc0000>"
    done = completion(separator.join((boxes[0] + "cat", boxes[1] + "é", boxes[2])))
    first, second = detect.with_confidence(done, MODEL.tokenizer, 40, 30)
    assert (first.label, second.label) == ("cat", "é")
    start = 4 + len("cat") + len(separator)
    assert first.confidence == pytest.approx(math.exp(-(1 + 2 + 3 + 4) / 4))
    assert second.confidence == pytest.approx(math.exp(-(start + 2.5)))


def test_invalid_utf8_does_not_shift_the_confidence():
    broken = tokenizer.encode(MODEL.tokenizer, "é☃")[:-1]
    ids = [*broken, *tokenizer.encode(MODEL.tokenizer, f" ; {text(0, 1, 2, 3)} a"), broken[0]]
    done = pg.Completion(tokenizer.decode(MODEL.tokenizer, ids), ids, [-0.5 * i for i in range(len(ids))], "length")
    (detection,) = detect.with_confidence(done, MODEL.tokenizer, 40, 30)
    first = len(broken) + 3
    assert detection.confidence == pytest.approx(math.exp(-0.5 * (first + 1.5)))


def test_locations_spelled_in_several_tokens_have_no_confidence():
    spelled = completion(CAT)  # the tokenizer of the tests has tokens only for locations 0 to 3
    assert len(spelled.tokens) == len(CAT)
    assert detect.with_confidence(spelled, MODEL.tokenizer, 40, 30) == detect.parse(CAT, 40, 30)
    half = completion("<loc0000><loc0001><loc0002><loc0900> cat")
    assert detect.with_confidence(half, MODEL.tokenizer, 40, 30)[0].confidence is None


def test_former_names_still_work():
    assert detect.written(CAT) == detect.well_formed(CAT)
    assert detect.written(CAT)[0].places == (10, 20, 500, 600)
    assert detect.words((10, 20, 500, 600)) + " cat" == CAT
    assert detect.to_places(Box(0, 0, 1, 1), 1, 1) == (0, 0, 1023, 1023)
    assert detect.wanted(["cat", "bus"]) == "cat ; bus"


@pytest.mark.parametrize(("written", "expected"), [
    (f"{text(1, 2, 3, 4, label='X')}, {text(5, 6, 7, 8, label='XX')}", [("X", 1), ("XX", 5)]),
    ("cat " + text(1, 2, 3, 4) + text(5, 6, 7, 8), [("cat", 1), ("", 5)]),
    ("cat " + text(1, 2, 3, 4) + text(5, 6, 7, 8) + text(3, 6, 7, 8), [("cat", 1), ("", 5), ("", 3)]),
    (text(1, 2, 3, 4) + text(5, 6, 7, 8, label="cat"), [("", 1), ("cat", 5)]),
    (text(1, 2, 3, 4, codes=16) + text(5, 6, 7, 8, codes=16, label="cat"), [("", 1), ("cat", 5)]),
])  # fmt: skip
def test_objects_without_a_separator_are_read_one_by_one(written, expected):
    assert [(piece.label, piece.locations[0]) for piece in grammar.read(written)] == expected


def test_a_box_may_be_thin():
    ymin, xmin, ymax, xmax = detect.to_locations(Box(0, 5, 1, 5), 10, 10)
    assert ymin < ymax
    assert xmin < xmax
