"""A mistake is one line that says what, where and what to do. The exact messages about settings, prompts, objects."""

from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from test_prompt import CFG, IDS, MODEL, RED

import pgfunc as pg
from pgfunc.errors import PgfuncError, PromptError, SettingError
from pgfunc.objects import detect, grammar, segment
from pgfunc.prompt import invalid_id_message
from pgfunc.sample import Settings, checked_float, checked_int

BOX = detect.Box(0, 0, 1, 1)
DONE = pg.Completion("", [], [], "eos")
HOLED = replace(CFG, image=40)  # `<image>` inside the vocabulary

MESSAGES = {
    "temperature is 'hot', expected a number": lambda: Settings("hot"),
    "temperature is True, expected a number": lambda: Settings(True),
    "temperature is -1.0, expected 0 (greedy) or more": lambda: Settings(-1),
    "temperature is inf, expected 0 (greedy) or more": lambda: Settings(float("inf")),
    "top-k is 'a', expected a whole number": lambda: Settings(top_k="a"),
    "top-k is 0, expected 1 or more": lambda: Settings(top_k=0),
    "top-p is 'a', expected a number": lambda: Settings(top_p="a"),
    "top-p is 0.0, expected more than 0 and at most 1": lambda: Settings(top_p=0),
    "min-p is 'a', expected a number": lambda: Settings(min_p="a"),
    "min-p is 2.0, expected 0 to 1": lambda: Settings(min_p=2),
    "n is 1.5, expected a whole number": lambda: checked_int("n", 1.5, 0),
    "n is True, expected a whole number": lambda: checked_int("n", True, 0),
    "n is 4, expected 1 to 3": lambda: checked_int("n", 4, 1, 3),
    "n is 0, expected 1 to 3": lambda: checked_int("n", 0, 1, 3),
    "x is beyond the range of a float": lambda: checked_float("x", 10**400),
    "the rows of one prompt have different numbers of pictures; prepare them separately":
        lambda: pg.prepare(MODEL, [[RED], []], "a"),
    "this model is on the meta device and has no weights; load it on another device":
        lambda: pg.prepare(MODEL._replace(params=pg.tree.map(lambda x: x.to("meta"), MODEL.params)), RED, "a"),
    "no rows: give at least one picture and one prefix": lambda: pg.prepare(MODEL, [], []),
    "'<image>a' begins with 1 <image> for 2 pictures; leave <image> out, it is added automatically":
        lambda: pg.prepare(MODEL, [[RED, RED]], ["<image>a"]),
    f"token id {len(IDS)} is outside 0..{CFG.text.vocab - 1}; is it a token id of another model?":
        lambda: pg.prepare(MODEL, RED, [[len(IDS)]]),
    "a label is 3, expected text": lambda: grammar.check_label(3),
    "boxes are read from text, such as the .text of a completion; found 3": lambda: grammar.read(3),
    "a confidence is read from a Completion and the model's tokenizer; found str and Completion":
        lambda: detect.location_logprobs("a", DONE),
    "a confidence is read from a Completion and the model's tokenizer; found Completion and str":
        lambda: detect.location_logprobs(DONE, "a"),
    "found 3, expected Detection(label, Box(ymin, xmin, ymax, xmax))": lambda: detect.check_objects(3),
    "found Detection(label=3, box=Box(ymin=0, xmin=0, ymax=1, xmax=1), confidence=None), expected Detection(label, "
    "Box(ymin, xmin, ymax, xmax))": lambda: detect.check_objects([detect.Detection(3, BOX)]),
    "(1, 2) is not a box; expected Box(ymin, xmin, ymax, xmax)": lambda: detect.edges((1, 2)),
    "a picture of inf x 10 pixels; expected a positive width and height":
        lambda: detect.to_locations(BOX, float("inf"), 10),
    "the mask decoder is a int, expected the parameters from `segment.load`": lambda: segment.check_vqvae(3),
    "a mask is a list, expected a tensor; torch.as_tensor makes one": lambda: segment.check_mask([[True]]),
    "a mask is float32[2, 3], expected bool[height, width]": lambda: segment.check_mask(torch.zeros(2, 3)),
    "a mask is bool[3], expected bool[height, width]": lambda: segment.check_mask(torch.ones(3, dtype=torch.bool)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _unchecked():
    """Users have no type checker at run time, which would raise an error before the package does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_mistake_is_one_exact_line(message):
    with pytest.raises(PgfuncError) as error:
        MESSAGES[message]()
    assert str(error.value) == message
    assert isinstance(error.value, (SettingError, PromptError))


@pytest.mark.parametrize(("cfg", "id", "tokenized", "message"), [
    (HOLED, 40, False, "token id 40 is no token; it is <image>: leave it out, image tokens are added automatically"),
    (CFG, CFG.image, True, f"token id {CFG.image} is outside 0..{CFG.text.vocab - 1}; it is <image>: leave it out, "
     "image tokens are added automatically"),
    (CFG, 999, True, f"token id 999 is outside 0..{CFG.text.vocab - 1}; the tokenizer has tokens that the embedding "
     "has no rows for; is it the tokenizer of another model?"),
    (CFG, -1, False, f"token id -1 is outside 0..{CFG.text.vocab - 1}; is it a token id of another model?"),
    (CFG, 0, False, "token id 0 is no token; is it a token id of another model?"),
])  # fmt: skip
def test_an_invalid_id_says_whether_it_is_outside_the_vocabulary_and_whose_it_is(cfg, id, tokenized, message):
    assert invalid_id_message(cfg, id, tokenized) == message


def test_settings_keep_numbers_of_numpy_as_numbers_of_python():
    settings = Settings(np.float32(0.5), np.int64(3), np.float64(0.25), np.float32(0.125))
    assert settings == Settings(0.5, 3, 0.25, 0.125)
    values = settings.temperature, settings.top_k, settings.top_p, settings.min_p
    assert [type(value) for value in values] == [float, int, float, float]
    assert checked_int("n", 3, 1, 3) == 3
