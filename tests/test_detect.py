"""Boxes in text: what is written is read back, and one malformed piece never spoils another."""

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
from pgfunc.objects import detect
from pgfunc.objects.detect import Box, Detection

MODEL = text_model()
sides = st.integers(1, 5000)
fractions = st.floats(0, 1)
labels = st.text(max_size=12).map(str.strip).filter(lambda text: ";" not in text)


@st.composite
def detections(draw, width: int, height: int) -> Detection:
    (top, bottom), (left, right) = (sorted((draw(fractions), draw(fractions))) for _ in range(2))
    return Detection(draw(labels), Box(top * height, left * width, bottom * height, right * width))


def text(*places: int, label: str = "", codes: int = 0) -> str:
    return "".join(f"<loc{place:04d}>" for place in places) + "<seg005>" * codes + (f" {label}" if label else "")


CAT, BUS = text(10, 20, 500, 600, label="cat"), text(0, 0, 1023, 1023, label="yellow bus")


def test_places_are_ymin_xmin_ymax_xmax_in_steps_of_one_1023th():
    found = detect.parse(f"{CAT} ; {BUS}", width=1023, height=2046)
    assert found == [Detection("cat", Box(20, 20, 1000, 600)), Detection("yellow bus", Box(0, 0, 2046, 1023))]
    assert detect.parse(text(0, 0, 341, 1023), 30, 9) == [Detection("", Box(0, 0, 3, 30))]
    assert detect.malformed(f"{CAT} ; {BUS}") == []


@given(st.data(), sides, sides)
def test_text_of_boxes_is_read_back_as_it_was(data, width, height):
    found = data.draw(st.lists(detections(width, height), max_size=4))
    written = detect.render(found, width, height)
    assert detect.malformed(written) == []
    again = detect.parse(written, width, height)
    assert (
        detect.render(again, width, height) == " ; ".join(dict.fromkeys(written.split(" ; "))) if found else not again
    )


@given(sides, fractions, fractions)
def test_a_box_thinner_than_a_step_is_the_step_that_its_middle_lies_in(side, place, thickness):
    low = place * side
    high = min(low + thickness * side / 1023, side)
    top, left, bottom, right = detect.to_places(Box(low, 0, high, side), side, side)
    assert (left, right) == (0, 1023)
    assert bottom == top + 1
    assert top - 1e-9 <= (low + high) / 2 / side * 1023 <= bottom + 1e-9


def test_edges_outside_the_picture_are_moved_onto_its_border():
    assert detect.render([Detection("cat", Box(-5, -1, 99, 20))], 10, 50) == text(0, 0, 1023, 1023, label="cat")
    assert detect.render([Detection("cat", Box(70, 3, 80, 7))], 10, 50).startswith("<loc1022>")


def test_an_object_without_a_label_ends_at_its_places():
    assert detect.render([Detection("", Box(0, 0, 5, 5)), Detection("cat", Box(0, 0, 5, 5))], 5, 5) == (
        f"{text(0, 0, 1023, 1023)} ; {text(0, 0, 1023, 1023, label='cat')}"
    )


MALFORMED = {
    "three places": (text(1, 2, 3, label="dog"), "3 places, expected 4"),
    "five places": (text(1, 2, 3, 4, 5, label="dog"), "5 places, expected 4"),
    "cut off": ("<loc0001><loc00", "1 places, expected 4"),
    "text": ("a dog in the grass", "0 places, expected 4"),
    "codes alone": ("<seg001><seg002> dog", "0 places, expected 4"),
    "above 1023": (text(1, 2, 1024, 4, label="dog"), "place 1024 is above 1023"),
    "upside down": (text(3, 2, 1, 4, label="dog"), "corners (3, 2) and (1, 4) are not top left and bottom right"),
    "mirrored": (text(1, 4, 3, 2, label="dog"), "corners (1, 4) and (3, 2) are not top left and bottom right"),
    "no height": (text(1, 2, 1, 4, label="dog"), "corners (1, 2) and (1, 4) are not top left and bottom right"),
    "no width": (text(1, 2, 3, 2, label="dog"), "corners (1, 2) and (3, 2) are not top left and bottom right"),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("between", [" ; ", ";", "; "])
def test_a_malformed_piece_is_named_and_spoils_nothing(case, between):
    piece, reason = MALFORMED[case]
    for pieces in ([piece, CAT, BUS], [CAT, piece, BUS], [CAT, BUS, piece]):
        written = between.join(pieces)
        assert detect.parse(written, 40, 30) == detect.parse(f"{CAT} ; {BUS}", 40, 30)
        assert detect.malformed(written) == [(piece, reason)]


SEPARATORS = [" ; ", ";", "; ", " ;", ";\n", " ", "", "\n", ", ", ",", ",\n", " , ", "\n\n", "\t"]
plain = st.text("aé☃< >loc1", max_size=8).map(str.strip)
corners = st.lists(st.integers(0, 1023), min_size=2, max_size=2, unique=True).map(sorted)


@st.composite
def objects(draw) -> str:
    (top, bottom), (left, right) = draw(corners), draw(corners)
    return text(top, left, bottom, right, label=draw(plain), codes=draw(st.sampled_from([0, 0, 3, 16])))


@given(st.lists(objects(), max_size=4), st.data())
def test_whatever_stands_between_objects_each_is_read_as_if_it_stood_alone(pieces, data):
    between = [data.draw(st.sampled_from(SEPARATORS)) for _ in pieces[1:]]
    written = "".join(word for pair in zip_longest(pieces, between, fillvalue="") for word in pair)
    alone = [item for piece in pieces for item in detect.written(piece)]
    assert [item._replace(starts=()) for item in detect.written(written)] == [
        item._replace(starts=()) for item in alone
    ]
    assert detect.malformed(written) == []


@given(st.lists(st.tuples(corners, corners, plain.filter(bool)), min_size=1, max_size=4), st.data())
def test_labels_may_all_stand_in_front_of_their_places(given, data):
    pieces = [label + data.draw(st.sampled_from(["", " "])) + text(y[0], x[0], y[1], x[1]) for y, x, label in given]
    written = data.draw(st.sampled_from(SEPARATORS)).join(pieces)
    assert [item.label for item in detect.written(written)] == [label for _, _, label in given]
    assert [item.places for item in detect.written(written)] == [(y[0], x[0], y[1], x[1]) for y, x, _ in given]
    assert detect.malformed(written) == []


@pytest.mark.parametrize("case", [case for case in MALFORMED if case not in ("text", "cut off")])
@pytest.mark.parametrize("between", [between for between in SEPARATORS if ";" not in between])
def test_a_malformed_piece_without_semicolons_spoils_nothing_either(case, between):
    piece, reason = MALFORMED[case]
    for pieces in ([piece, CAT, BUS], [CAT, piece, BUS], [CAT, BUS, piece]):
        written = between.join(pieces)
        assert detect.parse(written, 40, 30) == detect.parse(f"{CAT} ; {BUS}", 40, 30)
        assert detect.malformed(written) == [(piece, reason)]


TOO_FEW, TOO_MANY, BOX = text(1, 2, 3), text(1, 2, 3, 4, 5), text(10, 20, 500, 600)
HALVES = {
    "text in front": (f"I see {CAT} here", ["cat here"], ["I see"]),
    "codes behind the label": (f"{BOX} cat <seg001>", ["cat"], ["<seg001>"]),
    "codes in front": (f"<seg001>{CAT}", ["cat"], ["<seg001>"]),
    "places behind the label": (f"{CAT} {TOO_FEW}", ["cat"], [TOO_FEW]),
    "boxes without labels, and one that was cut off": (f"{BOX}{text(0, 0, 1, 1)}{TOO_FEW}", ["", ""], [TOO_FEW]),
    "too few, then a line with a box": (f"{TOO_FEW}\n{BOX}", [""], [TOO_FEW]),
    "too many, then a line with a box": (f"{TOO_MANY} dog\n{CAT}", ["cat"], [f"{TOO_MANY} dog"]),
    "a comma that is text": (f"{BOX} cat,", ["cat,"], []),
    "commas all along": (f"{BOX} cat, {BOX} dog,", ["cat", "dog"], []),
    "commas alone": (", ,", [], [", ,"]),
}


@pytest.mark.parametrize("case", HALVES)
def test_what_is_whole_is_kept_and_the_rest_is_named(case):
    written, labels, left_out = HALVES[case]
    assert [item.label for item in detect.parse(written, 40, 30)] == labels
    assert [item.piece for item in detect.malformed(written)] == left_out


words = [CAT, BUS, BOX, "<loc0001>", "<seg001>", ";", " ", ", ", "cat", "<loc", "0001>", "\n", "é"]


@given(st.lists(st.sampled_from(words), max_size=12))
def test_any_text_is_read_as_objects_and_malformed_pieces(given):
    written = "".join(given)
    left = written
    for item in detect.read(written):
        skipped, found, left = left.partition(item.piece)
        assert found
        assert not skipped.strip(" ,;\n"), "every word is in a piece, in order"
    assert not left.strip(" ,;\n")
    for item in detect.written(written):
        assert [written[start : start + 9] for start in item.starts] == [f"<loc{place:04d}>" for place in item.places]
    box = re.compile("(?<!>)<loc0010><loc0020><loc0500><loc0600>(?!<)")
    found = [item for item in detect.written(written) if item.places == (10, 20, 500, 600)]
    assert len(found) >= len(box.findall(written)), "a box that touches no other word is kept"


def test_what_is_not_quite_an_object_and_still_a_box():
    box = detect.parse(CAT, 40, 30)[0].box
    for labelled in ("cat", "", "cat < dog", "<b>"):
        assert detect.parse(text(10, 20, 500, 600, label=labelled), 40, 30) == [Detection(labelled, box)]
    for codes in (1, 15, 16, 17):
        assert detect.parse(text(10, 20, 500, 600, label="cat", codes=codes), 40, 30) == [Detection("cat", box)]
    spaced = " <loc0010> <loc0020>\n<loc0500><loc0600>\tcat "
    assert detect.parse(spaced, 40, 30) == [Detection("cat", box)]
    for empty in ("", " ", ";", " ; ; "):
        assert (detect.parse(empty, 40, 30), detect.malformed(empty)) == ([], [])


def test_repetitions_are_one_object():
    other = CAT.replace("cat", "dog")
    moved = CAT.replace("0600", "0601")
    found = detect.parse(" ; ".join([CAT, other, CAT, moved, CAT, other]), 40, 30)
    assert found == [item for piece in (CAT, other, moved) for item in detect.parse(piece, 40, 30)]


@pytest.mark.parametrize("label", ["cat;dog", "cat <loc0001>", "<seg001>", " cat", "cat\n"])
def test_a_label_that_could_not_be_read_back_is_refused(label):
    with pytest.raises(PromptError, match=re.escape(repr(label))):
        detect.render([Detection(label, Box(0, 0, 1, 1))], 1, 1)


@pytest.mark.parametrize("box", [Box(math.nan, 0, 1, 1), Box(0, 0, 1, math.inf), Box(0, -math.inf, 1, 1)])
def test_a_box_that_is_none_is_not_written(box):
    with pytest.raises(SettingError, match="its edges are not finite"):
        detect.render([Detection("cat", box)], 4, 4)


@pytest.mark.parametrize("box", [Box(1, 0, 0, 1), Box(0, 1, 1, 0)])
def test_a_box_whose_edges_are_swapped_is_not_written(box):
    with pytest.raises(PromptError, match="expected ymin <= ymax and xmin <= xmax"):
        detect.render([Detection("cat", box)], 4, 4)


@pytest.mark.parametrize("size", [(0, 5), (5, -1)])
def test_a_picture_without_pixels_has_no_boxes(size):
    for call in (detect.parse, detect.render):
        given = (CAT,) if call is detect.parse else ([Detection("cat", Box(0, 0, 1, 1))],)
        with pytest.raises(SettingError, match=f"a picture of {size[0]} x {size[1]} pixels"):
            call(*given, *size)


def test_prompts():
    assert detect.prefix(["cat", "yellow bus"]) == "detect cat ; yellow bus"
    assert detect.region(Box(1, 2, 3, 4), 8, 4) == f"{text(256, 256, 767, 512)} caption en"
    assert (
        detect.region(Box(1, 2, 3, 4), 8, 4, "describe en; short ") == f"{text(256, 256, 767, 512)} describe en; short "
    )


@pytest.mark.parametrize("labels", [[], [""], ["cat", ""], "cat"])
def test_a_prompt_that_asks_for_nothing_is_refused(labels):
    with pytest.raises(PromptError, match="expected a list of what to look for"):
        detect.prefix(labels)


def completion(written: str, logprob: float = -1.0) -> pg.Completion:
    ids = tokenizer.encode(MODEL.tokenizer, written)
    return pg.Completion(written, ids, [logprob * (i + 1) for i in range(len(ids))], "eos")


@given(st.text(alphabet="aé☃🐈 ", max_size=5).map(str.strip), st.text(alphabet="aé☃🐈", max_size=5))
def test_confidence_is_the_geometric_mean_of_the_four_places(first, second):
    boxes = "<loc0000><loc0001><loc0002><loc0003>", "<loc0001><loc0000><loc0003><loc0002>"
    assume(first or second)
    done = completion(f"{boxes[0]} {first};{second} ;{boxes[1]}{second}", -0.1)
    found = detect.with_confidence(done, MODEL.tokenizer, 40, 30)
    assert [item._replace(confidence=None) for item in found] == detect.parse(done.text, 40, 30)
    assert found[0].confidence == pytest.approx(math.exp(-0.1 * (1 + 2 + 3 + 4) / 4))
    start = len(done.tokens) - len(second.encode()) - 4  # one token a byte
    assert found[1].confidence == pytest.approx(math.exp(-0.1 * (start + 2.5)))


@pytest.mark.parametrize("between", [" ; ", " ", "", "\n", ", "])
def test_confidence_goes_with_its_box_whatever_stands_between(between):
    """Places 0 to 3 are tokens here, and each other character is one: the k-th token has log-probability -k."""
    boxes = "<loc0000><loc0001><loc0002><loc0003>", "<loc0001><loc0000><loc0003><loc0002>", "<loc0000>"
    done = completion(between.join((boxes[0] + "cat", boxes[1] + "é", boxes[2])))
    first, second = detect.with_confidence(done, MODEL.tokenizer, 40, 30)
    assert (first.label, second.label) == ("cat", "é")
    start = 4 + len("cat") + len(between)
    assert first.confidence == pytest.approx(math.exp(-(1 + 2 + 3 + 4) / 4))
    assert second.confidence == pytest.approx(math.exp(-(start + 2.5)))


def test_bytes_that_are_not_text_do_not_shift_the_confidence():
    broken = tokenizer.encode(MODEL.tokenizer, "é☃")[:-1]
    ids = [*broken, *tokenizer.encode(MODEL.tokenizer, f" ; {text(0, 1, 2, 3)} a"), broken[0]]
    done = pg.Completion(tokenizer.decode(MODEL.tokenizer, ids), ids, [-0.5 * i for i in range(len(ids))], "length")
    (found,) = detect.with_confidence(done, MODEL.tokenizer, 40, 30)
    first = len(broken) + 3
    assert found.confidence == pytest.approx(math.exp(-0.5 * (first + 1.5)))


def test_places_spelled_in_other_tokens_have_no_confidence():
    spelled = completion(CAT)  # the tests' tokenizer has tokens for places 0 to 3 alone
    assert len(spelled.tokens) == len(CAT)
    assert detect.with_confidence(spelled, MODEL.tokenizer, 40, 30) == detect.parse(CAT, 40, 30)
    half = completion("<loc0000><loc0001><loc0002><loc0900> cat")
    assert detect.with_confidence(half, MODEL.tokenizer, 40, 30)[0].confidence is None
