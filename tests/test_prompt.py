"""Every row of pictures and text becomes `[image tokens] <bos> prefix \\n | suffix <eos>`."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import GEMMA, VISION, params
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from test_tokenizer import IDS, PLAIN, texts

import pgfunc as pg
from pgfunc import image, tokenizer
from pgfunc.config import Config
from pgfunc.errors import ImageError, PromptError

VOCAB = len(IDS) - 1  # `<image>` is the last id of the tokenizer and not in the model's vocabulary
CFG = Config(VISION, replace(GEMMA, vocab=VOCAB, positions=90), image=IDS["<image>"])
MODEL = pg.Model(CFG, params(CFG), PLAIN)
MUTE = MODEL._replace(tokenizer=None)
PAD, EOS, BOS, NEWLINE = 0, 1, 2, IDS["\n"]
RED, GREEN, BLUE = (np.full((3, 5, 3), np.eye(3)[i] * 255, np.uint8) for i in range(3))

# short enough for 90 positions, and without `<image>` markers, which other tests cover
short = texts.filter(lambda text: len(text.encode()) < 30 and not text.lstrip().startswith("<image>"))
batches = st.lists(st.tuples(short, st.none() | short), min_size=1, max_size=4)


def encode(text: str) -> list[int]:
    return tokenizer.encode(PLAIN, text)


def prepare(rows: list[tuple[str, str | None]], images=()) -> pg.Prompt:
    return pg.prepare(MODEL, [list(images)] * len(rows), [prefix for prefix, _ in rows], [suffix for _, suffix in rows])


def equal(one: pg.Prompt, other: pg.Prompt) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def error_message(*arguments, model: pg.Model = MODEL) -> str:
    """The message of the PromptError that `prepare` raises. It must be one line."""
    with pytest.raises(PromptError) as error:
        pg.prepare(model, *arguments)
    assert str(error.value).isprintable(), "one line"
    return str(error.value)


# --- the layout


def test_a_prompt_is_laid_out_as_drawn():
    """Two rows; x is padding:

    <bos> a \\n | c d <eos>        <bos> e f b \\n x
    """
    prompt = prepare([("a", "cd"), ("efb", None)], [RED])
    a, b, c, d, e, f = (IDS[letter] for letter in "abcdef")
    assert prompt.tokens.tolist() == [[BOS, a, NEWLINE, c, d, EOS], [BOS, e, f, b, NEWLINE, PAD]]
    assert prompt.valid.int().tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert prompt.causal.int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    assert prompt.pixels.shape == (2, 1, 3, 28, 28)
    assert [leaf.dtype for leaf in prompt] == [torch.float32, torch.int64, torch.bool, torch.bool]


@given(batches)
def test_every_row_is_bos_prefix_newline_suffix_eos_then_padding(rows):
    prompt = prepare(rows)
    lengths = []
    for (prefix, suffix), tokens, valid, causal in zip(rows, *(leaf.tolist() for leaf in prompt[1:]), strict=True):
        left = [BOS, *encode(prefix), NEWLINE]
        right = [] if suffix is None else [*encode(suffix), EOS]
        padding = len(tokens) - len(left) - len(right)
        assert tokens == left + right + [PAD] * padding
        assert valid == [True] * (len(left) + len(right)) + [False] * padding
        assert causal == [False] * len(left) + [True] * len(right) + [False] * padding
        lengths.append(len(left) + len(right))
    assert prompt.tokens.shape == (len(rows), max(lengths))


@given(batches, st.integers(0, 2))
def test_a_row_depends_on_the_other_rows_only_in_its_padding(rows, pictures):
    images = [RED, BLUE][:pictures]
    prompt = prepare(rows, images)
    for i, row in enumerate(rows):
        alone = prepare([row], images)
        width = alone.tokens.shape[1]
        assert equal(alone, pg.Prompt(prompt.pixels[i : i + 1], *(leaf[i : i + 1, :width] for leaf in prompt[1:])))
        assert not prompt.valid[i, width:].any()


@pytest.mark.parametrize("prefix", ["", "a", "a\n", "a\n\n", "\n", "a\n<loc0001>\n"])
def test_the_newline_is_a_separate_token_after_every_prefix(prefix):
    (tokens,) = pg.prepare(MODEL, RED, prefix).tokens.tolist()
    assert tokens == [BOS, *encode(prefix), NEWLINE]


def test_a_prefix_that_ends_in_a_newline_keeps_both():
    assert encode("\n\n") == [IDS["\n\n"]], "in one string, two newlines are one token; otherwise this tests nothing"
    assert pg.prepare(MODEL, RED, "a\n").tokens.tolist() == [[BOS, IDS["a"], NEWLINE, NEWLINE]]


def test_user_text_contains_no_control_token():
    prompt = pg.prepare(MODEL, RED, "<bos><image><pad>\n<eos>", "<eos> <bos>")
    (tokens,) = prompt.tokens.tolist()
    assert (tokens.count(BOS), tokens.count(EOS), tokens.count(PAD), tokens.count(CFG.image)) == (1, 1, 0, 0)
    assert tokens[-1] == EOS


def test_location_and_mask_tokens_are_encoded_in_prefix_and_suffix():
    prompt = pg.prepare(MODEL, RED, "a<loc0001>", "<loc1023><seg001>")
    first, *rest = [IDS[token] for token in ("<loc0001>", "<loc1023>", "<seg001>")]
    assert prompt.tokens.tolist() == [[BOS, IDS["a"], first, NEWLINE, *rest, EOS]]


# --- prefixes that begin with `<image>`, as for transformers' processor


@given(st.integers(1, 2), st.sampled_from(["", " ", "\n"]), st.sampled_from(["", " "]), short)
def test_one_marker_per_picture_changes_nothing(pictures, before, between, prefix):
    assume(not prefix.startswith("<bos>"))
    images = [[RED, BLUE][:pictures]]
    marked = before + between.join(["<image>"] * pictures) + prefix
    assert equal(pg.prepare(MODEL, images, marked, "b"), pg.prepare(MODEL, images, prefix, "b"))


def test_a_bos_after_the_markers_changes_nothing():
    expected = pg.prepare(MODEL, RED, "a")
    assert equal(pg.prepare(MODEL, RED, "<image><bos>a"), expected)
    assert equal(pg.prepare(MODEL, RED, ["<image>a"]), expected)
    assert not equal(pg.prepare(MODEL, RED, "<bos>a"), expected), "without a marker, <bos> is text"


@pytest.mark.parametrize(("images", "prefix", "count"), [
    (RED, "<image><image>a", "2 <image> for 1 picture;"),
    ([[RED, BLUE]], "<image> a", "1 <image> for 2 pictures;"),
    ([[]], "<image>a", "1 <image> for 0 pictures;"),
])  # fmt: skip
def test_a_wrong_number_of_markers_is_refused(images, prefix, count):
    assert count in error_message(images, prefix)
    assert "leave <image> out" in error_message(images, prefix)


@pytest.mark.parametrize("prefix", ["what is <image>?", "<image>a<image>", "a <image>", "<IMAGE>a", "<imag e>"])
def test_image_in_another_position_is_text(prefix):
    tokens = pg.prepare(MODEL, RED, prefix).tokens.tolist()
    assert tokens == [[BOS, *encode(prefix.removeprefix("<image>")), NEWLINE]]
    assert CFG.image not in tokens[0]


def test_image_in_a_suffix_is_text():
    tokens = pg.prepare(MODEL, RED, "a", "<image>b").tokens.tolist()
    assert tokens == [[BOS, IDS["a"], NEWLINE, *encode("<image>b"), EOS]]


def test_markers_change_nothing_in_generate_stream_and_score():
    plain, marked = "caption en", "<image>caption en"
    (expected,), (completion,) = (pg.generate(MODEL, RED, prefix, max_new_tokens=5) for prefix in (plain, marked))
    assert completion == expected
    assert "".join(pg.stream(MODEL, RED, marked, max_new_tokens=5)) == expected.text
    assert torch.equal(pg.score(MODEL, RED, marked, ["a"]), pg.score(MODEL, RED, plain, ["a"]))
    rows = pg.generate(MODEL, [RED, [RED, BLUE]], [marked, "<image>" + marked], max_new_tokens=5)
    assert rows == pg.generate(MODEL, [RED, [RED, BLUE]], plain, max_new_tokens=5)


# --- pictures


@pytest.mark.parametrize("count", [0, 1, 2])
def test_pictures_keep_their_row_and_their_order(count):
    rows = [[RED, GREEN][:count], [BLUE, RED][:count], [GREEN, GREEN][:count]]
    prompt = pg.prepare(MODEL, rows, ["a", "b", "c"])
    assert prompt.pixels.shape == (3, count, 3, 28, 28)
    for pictures, row in zip(rows, prompt.pixels, strict=True):
        for picture, pixels in zip(pictures, row, strict=True):
            assert torch.equal(pixels, image.pixels(picture, CFG))


def test_a_picture_may_be_a_path_bytes_an_image_or_a_tensor(tmp_path):
    Image.fromarray(RED).save(tmp_path / "red.png")
    path = tmp_path / "red.png"
    for source in (path, str(path), path.read_bytes(), Image.fromarray(RED), torch.from_numpy(RED)):
        for images in (source, [source], [[source]], (source,), deque([source])):
            assert equal(pg.prepare(MODEL, images, "a"), pg.prepare(MODEL, RED, "a"))
    with pytest.raises(ImageError, match=r"blue\.png: no such file"):
        pg.prepare(MODEL, [path, tmp_path / "blue.png"], "a")


def test_pictures_take_positions():
    prefix = "x" * (90 - 2 * 4 - 2)  # 4 image tokens per picture, bos, newline
    assert pg.prepare(MODEL, [[RED, BLUE]], prefix).tokens.shape == (1, 82)
    pg.prepare(MODEL, RED, prefix + "xxxx")
    pg.prepare(MODEL, [[]], prefix + "x" * 8)
    for images, rest in (([[RED, BLUE]], "x"), (RED, "x" * 5), ([[]], "x" * 9)):
        assert "90 positions" in error_message(images, prefix + rest)


def test_the_longest_row_and_its_suffix_must_fit():
    text = "x" * 43
    pg.prepare(MODEL, [RED, BLUE], ["a", text[:-4]], ["b", text])  # 4 + bos + 39 + newline + 43 + eos is 89
    assert "90 positions" in error_message([RED, BLUE], ["a", text], ["b", text])


# --- one value for all rows


def test_a_single_value_is_used_for_every_row():
    rows = pg.prepare(MODEL, [RED, RED], ["a", "a"], ["b", "b"])
    for images in (RED, [RED, RED], (RED, RED), [[RED], [RED]], [(RED,), RED]):
        for prefixes in ("a", ["a", "a"], ("a", "a")):
            for suffixes in ("b", ["b", "b"], ("b", "b")):
                if any(isinstance(argument, (list, tuple)) for argument in (images, prefixes, suffixes)):
                    assert equal(pg.prepare(MODEL, images, prefixes, suffixes), rows)
    assert equal(pg.prepare(MODEL, RED, "a", "b"), pg.prepare(MODEL, [RED], ["a"], ["b"]))


def test_empty_texts_are_texts():
    assert pg.prepare(MODEL, RED, "").tokens.tolist() == [[BOS, NEWLINE]]
    assert pg.prepare(MODEL, [RED, BLUE], "", "").tokens.tolist() == [[BOS, NEWLINE, EOS]] * 2
    assert pg.prepare(MODEL, [RED, BLUE], ["", "a"], ["", None]).tokens.tolist() == [
        [BOS, NEWLINE, EOS],
        [BOS, IDS["a"], NEWLINE],
    ]


@given(short, short)
def test_ids_instead_of_text_are_used_unchanged(prefix, suffix):
    left, right = [BOS, *encode(prefix), NEWLINE], encode(suffix)
    expected = pg.prepare(MODEL, [RED, BLUE], prefix)
    for model in (MODEL, MUTE):
        assert equal(pg.prepare(model, [RED, BLUE], left), expected)
        assert equal(pg.prepare(model, [RED, BLUE], [left, tuple(left)]), expected)
        if right:
            assert equal(pg.prepare(model, RED, left, right), pg.prepare(MODEL, RED, prefix, suffix))
    assert equal(pg.prepare(MODEL, RED, [left, prefix]), pg.prepare(MODEL, RED, [prefix, prefix]))


def test_the_arguments_are_not_changed():
    images, prefixes, suffixes, red = [[RED, BLUE], [BLUE, RED]], ["a", [2, 5]], ["b", None], RED.copy()
    pg.prepare(MODEL, images, prefixes, suffixes)
    assert ([len(row) for row in images], prefixes, suffixes) == ([2, 2], ["a", [2, 5]], ["b", None])
    assert np.array_equal(RED, red)


# --- invalid prompts

LENGTHS = {
    "pictures and prefixes": (([RED, BLUE], ["a", "b", "c"]), "2 pictures, 3 prefixes"),
    "pictures and suffixes": (([RED, BLUE], "a", ["b"]), "2 pictures, 1 suffixes"),
    "prefixes and suffixes": ((RED, ["a", "b"], ["c", "d", "e"]), "2 prefixes, 3 suffixes"),
    "no pictures for a prefix": (([], ["a"]), "0 pictures, 1 prefixes"),
    "no prefixes for a picture": (([RED], []), "1 pictures, 0 prefixes"),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_lists_of_different_lengths_are_refused(case):
    arguments, counts = LENGTHS[case]
    assert counts in error_message(*arguments)


@pytest.mark.parametrize("arguments", [([], []), ([], "a"), (RED, []), ((), ())])
def test_no_rows_are_refused(arguments):
    assert "no rows" in error_message(*arguments)


@pytest.mark.parametrize("images", [[RED, [RED, BLUE]], [[], RED], [[RED], []]])
def test_rows_with_different_numbers_of_pictures_are_refused(images):
    assert "different numbers of pictures" in error_message(images, "a")


@pytest.mark.parametrize("wrong", [VOCAB, VOCAB + 1, -1, 2**40])
def test_ids_outside_the_vocabulary_are_refused(wrong):
    for arguments in ((RED, [BOS, wrong]), (RED, [[BOS], [wrong]]), (RED, "a", [wrong]), (RED, "a", [[5, wrong]])):
        assert f"token id {wrong} is outside 0..{VOCAB - 1}" in error_message(*arguments)
    assert pg.prepare(MODEL, RED, [0, VOCAB - 1]).tokens.tolist() == [[0, VOCAB - 1]]


@pytest.mark.parametrize("arguments", [(RED, [[]]), (RED, [[BOS], []]), (RED, "a", [[]])])
def test_a_row_of_no_ids_is_refused(arguments):
    assert "found []" in error_message(*arguments)


@pytest.mark.parametrize("arguments", [(RED, "a"), (RED, ["a", [2]]), (RED, [BOS, 5], "a")])
def test_text_without_a_tokenizer_is_refused(arguments):
    assert "without a tokenizer" in error_message(*arguments, model=MUTE)


@pytest.mark.parametrize("wrong", [None, 5, 2.0, b"abc", np.array([2, 5]), torch.tensor([2, 5]), iter("ab")], ids=type)
def test_values_that_are_neither_text_nor_ids_are_refused(wrong):
    for arguments in ((RED, wrong), (RED, ["a", wrong])):
        assert "prefixes are text or lists of token ids" in error_message(*arguments)
    for arguments in ((RED, "a", wrong), (RED, "a", ["b", wrong])) if wrong is not None else ():  # None means no suffix
        assert "suffixes are text or lists of token ids" in error_message(*arguments)


def test_a_model_without_weights_is_refused():
    on_meta = MODEL._replace(params=pg.tree.map(lambda leaf: leaf.to("meta"), MODEL.params))
    assert "is on the meta device" in error_message(RED, "a", model=on_meta)


def test_the_tokenizer_of_another_model_is_refused():
    (id,) = encode("<loc0001>")
    small = MODEL._replace(cfg=replace(CFG, text=replace(CFG.text, vocab=id)))
    pg.prepare(small, RED, "a")
    with pytest.raises(PromptError, match=f"token id {id} is outside"):
        pg.prepare(small, RED, "<loc0001>")


def test_a_picture_in_several_rows_is_decoded_once(monkeypatch):
    decoded = []
    original = image.pixels
    monkeypatch.setattr(image, "pixels", lambda source, cfg: decoded.append(source) or original(source, cfg))
    pixels = pg.prepare(MODEL, [RED, BLUE, RED], ["a", "b", "c"]).pixels
    assert len(decoded) == 2
    assert torch.equal(pixels[0], pixels[2])
    assert not torch.equal(pixels[0], pixels[1])


@pytest.mark.parametrize("row", [RED, [RED, BLUE]])
def test_pictures_that_all_rows_share_are_stored_once(row):
    pixels = pg.prepare(MODEL, [row, row], ["a", "b"]).pixels
    assert pixels.stride(0) == 0
    assert torch.equal(pixels, torch.cat([pg.prepare(MODEL, [row], ["a"]).pixels] * 2))


def test_text_with_a_lone_surrogate_is_refused():
    assert "encoded" in error_message(RED, "a\ud800")
    assert "encoded" in error_message(RED, "a", ["\udfff\n"])


def test_a_prompt_is_on_the_device_of_its_model_whatever_the_defaults_are():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            prompts = [pg.prepare(MODEL, RED, "a", "b"), pg.prepare(MODEL, [[]], ["a"])]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {part.device.type for prompt in prompts for part in prompt} == {"cpu"}
    assert {prompt.pixels.dtype for prompt in prompts} == {torch.float32}
