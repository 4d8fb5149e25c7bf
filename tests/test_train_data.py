"""JSON Lines: which files are read, in which order, and that every error names its file and line."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from cases import text_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import pgfunc as pg
from pgfunc import config
from pgfunc.errors import DataError
from pgfunc.train import data

GOOD = {"image": "a.png", "prefix": "caption en", "suffix": "a dog"}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def write(folder, *rows) -> str:
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return str(path)


def test_lines_are_examples_in_order(folder):
    path = write(folder, GOOD, GOOD | {"image": ["a.png", "b.png"], "suffix": ""}, b"", GOOD | {"id": 7, "image": []})
    first, second, third = data.read(path)
    assert first == data.Example(f"{path}:1", (folder / "a.png",), "caption en", "a dog")
    assert second.images == (folder / "a.png", folder / "b.png")
    assert (third.where, third.images) == (f"{path}:4", ())
    data.check(text_model(), [first, second, third])


def test_pictures_may_be_in_another_folder_or_have_absolute_paths(folder, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    path = write(away, GOOD, GOOD | {"image": str(folder / "b.png")})
    actual = data.read(path, folder)
    assert [row.images for row in actual] == [(folder / "a.png",), (folder / "b.png",)]
    data.check(text_model(), actual)


@pytest.mark.parametrize("text", [
    b'\xef\xbb\xbf{"image": "a.png", "prefix": "p", "suffix": "s"}\r\n',  # a byte order mark, and Windows line endings
    '{"image": "a.png", "prefix": "p", "suffix": "wei\u00df \\u00df\u2028"}'.encode(),
])  # fmt: skip
def test_files_of_other_systems_are_read(text, folder):
    (row,) = data.read(write(folder, text))
    assert row.suffix in ("s", "weiß ß\u2028")


@pytest.mark.parametrize(("row", "message"), [
    (b'{"image": "a.png", "prefix": ', "not a line of JSON in UTF-8"),
    (b"\xff\xfe", "not a line of JSON in UTF-8"),
    (json.dumps(GOOD).encode("utf-16-le"), "not a line of JSON in UTF-8"),
    (b"[" * 100_000, "not a line of JSON in UTF-8"),
    ([1], "expected an object with image, prefix and suffix, found [1]"),
    ({"image": "a.png", "prefix": "p"}, "suffix is missing; a line has image, prefix and suffix"),
    ({"image": "a.png", "suffix": "p"}, "prefix is missing"),
    ({"prefix": "p", "suffix": "p"}, "image is missing"),
    (GOOD | {"suffix": None}, "suffix is null, expected text"),
    (GOOD | {"prefix": ["p"]}, 'prefix is ["p"], expected text'),
    (GOOD | {"image": ["a.png", 3]}, "image is 3, expected text"),
], ids=str)  # fmt: skip
def test_an_invalid_line_is_named_with_its_number(row, message, folder):
    path = write(folder, GOOD, GOOD, row, GOOD)
    with pytest.raises(DataError) as error:
        data.read(path)
    assert str(error.value).startswith(f"{path}:3: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("row", "message"), [
    (GOOD | {"image": "c.png"}, "c.png: no such file"),
    (GOOD | {"image": ["a.png", "broken.png"]}, "broken.png: "),
    (GOOD | {"image": "notes.txt"}, "notes.txt: not a picture"),
    (GOOD | {"image": "."}, "cannot be read as a picture"),
    (GOOD | {"image": "a\0.png"}, "cannot be read as a picture"),
    (GOOD | {"suffix": "long " * 30}, "1 x 4 image tokens and 163 of text do not fit 120 positions"),
    (GOOD | {"image": ["a.png"] * 30}, "30 x 4 image tokens and 18 of text do not fit 120 positions"),
    (GOOD | {"suffix": "\ud800"}, "is not text that can be encoded"),
], ids=str)  # fmt: skip
def test_a_line_that_cannot_be_trained_on_is_named_with_its_number(row, message, folder):
    path = write(folder, GOOD, row)
    examples = data.read(path)
    with pytest.raises(DataError) as error:
        data.check(text_model(), examples)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


MISTAKES = [
    "<locNone>", "<locnan>", "<loc{:04d}>", "<loc>0001</loc>", "<segment001>", "[loc0001]",
    "<loc1024>", "<loc-001>", "<loc475>", "<loc00475>", "<LOC0001>", "<Loc0001>", "<loc 0001>", "< loc0001>",
    "<loc0001 >", "<loc_0001>", "<loc0475.5>", "<loc0001", "loc0001>", "</loc0001>", "<loc0001/>", "&lt;loc0001&gt;",
    "<loc0004>", "<seg128>", "<seg4>", "<seg0001>", "<SEG001>", "<seg-1>", "<seg001", "seg001>", "<loc\u0661\u0662>",
]  # fmt: skip


@pytest.mark.parametrize("key", ["prefix", "suffix"])
@pytest.mark.parametrize("piece", MISTAKES)
def test_a_misspelled_location_token_is_an_error(piece, key, folder):
    path = write(folder, GOOD, GOOD | {key: f"<loc0001><loc0002>{piece}<loc0003> cat ; <seg001>"})
    with pytest.raises(DataError) as error:
        data.check(text_model(), data.read(path))
    assert str(error.value).startswith(f"{path}:2: {key} has {piece!r}, which is not a token; locations are <loc0000>")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("text", [
    "<loc0001><loc0003><loc0002><loc0000><seg001> cat ; <loc0001>", "a < b > c", "<b>bold</b> <br/>", "x<loc && y>seg",
    "<location>", "<location 5>", "<locale=en>", "<segment 3>", "<segments>", "<loc>https://a.example/1</loc>", "<seg>",
    "<loc id=4>", "block0001>", "the loc 0001", "seg 12 > seg 3", "<email@example.com>", "a <3", "<loc: 40.7, -74.0>",
    "loc_0001", "a<eos>b", "the <bos> token", "what is <image>?", "<unk>", "",
])  # fmt: skip
def test_ordinary_text_is_accepted(text, folder):
    path = write(folder, GOOD | {"prefix": text}, GOOD | {"suffix": text})
    data.check(text_model(), data.read(path))


@given(st.lists(st.sampled_from([*"<> a1", "loc", "seg", "0001", "12"]), max_size=8).map("".join))
def test_a_bracketed_location_number_is_a_token_or_an_error(text):
    model = text_model()
    row = data.Example("data:1", (), "a", text)
    bracketed = re.findall(r"<(?:loc|seg)[0-9]+>", text)
    wrong = [piece for piece in bracketed if model.tokenizer.backend.token_to_id(piece) is None]
    if wrong:
        with pytest.raises(DataError, match="data:1: suffix has "):
            data.check_tokens(model, row)


def test_a_token_of_the_tokenizer_is_accepted_whatever_it_looks_like(folder):
    model = text_model()
    backend = copy.deepcopy(model.tokenizer.backend)
    backend.add_tokens(["<loc-1>"])
    more = config.with_vocabulary(
        replace(model.cfg, text=replace(model.cfg.text, padding=9)), range(backend.get_vocab_size())
    )
    model = model._replace(cfg=more, tokenizer=pg.tokenizer.wrap(backend, "with a token more"))
    data.check(model, data.read(write(folder, GOOD | {"suffix": "<loc-1>"})))


@pytest.mark.parametrize(("row", "message"), [
    ({"suffix": "a dog<eos>"}, "suffix begins or ends with <eos>; leave it out, training adds it"),
    ({"suffix": "a dog<eos><pad><pad>"}, "suffix begins or ends with <"),
    ({"suffix": "<bos>a dog"}, "suffix begins or ends with <bos>"),
    ({"prefix": "<bos>caption en\n"}, "prefix begins or ends with <bos>"),
    ({"prefix": "<image><image>caption en"}, "begins with 2 <image> for 1 picture; leave <image> out"),
    ({"image": [], "prefix": "<image>caption en"}, "begins with 1 <image> for 0 pictures"),
])  # fmt: skip
def test_control_tokens_around_a_text_are_an_error(row, message, folder):
    path = write(folder, GOOD, GOOD | row)
    with pytest.raises(DataError) as error:
        data.check(text_model(), data.read(path))
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_image_markers_in_a_prefix_change_nothing(folder):
    model = text_model()
    rows = data.read(write(folder, GOOD, GOOD | {"prefix": "<image>caption en"},
                           GOOD | {"prefix": "<image><bos>caption en"}))  # fmt: skip
    data.check(model, rows)
    (prompt,) = data.prompts(model, rows)
    assert (prompt.tokens == prompt.tokens[0]).all()


def test_the_longest_suffix_that_fits_is_accepted(folder):
    model = text_model()
    free = model.cfg.text.positions - model.cfg.vision.tokens - len("caption en") - 3  # bos, newline, eos
    data.check(model, data.read(write(folder, GOOD | {"suffix": "x" * free})))
    with pytest.raises(DataError, match=":1: "):
        data.check(model, data.read(write(folder, GOOD | {"suffix": "x" * (free + 1)})))


@pytest.mark.parametrize("rows", [(), (b"", b"  ")])
def test_an_empty_file_is_an_error(rows, folder):
    with pytest.raises(DataError, match=r"data\.jsonl: empty"):
        data.read(write(folder, *rows))


def test_a_missing_file_is_an_error(folder):
    for path in (folder / "none.jsonl", folder):
        with pytest.raises(DataError, match=f"{path}: cannot be read"):
            data.read(path)


@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 100), count=st.integers(1, 40), size=st.integers(1, 50))
def test_an_epoch_reads_every_example_once(seed, epoch, count, size):
    steps = data.steps_per_epoch(size, count)
    batches = [data.batch(seed, epoch * steps + step, size, count) for step in range(steps)]
    assert sorted(row for batch in batches for row in batch) == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= size


def test_each_epoch_and_each_seed_has_its_own_order():
    orders = [data.order(seed, epoch, 20) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == data.order(0, 0, 20)


@given(parts=st.integers(1, 9))
def test_prompts_contain_every_row_once_whatever_the_number_of_parts(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    images = [(folder / "a.png",) * count for count in (1, 0, 1, 2, 1, 0)]
    rows = [data.Example("", each, "p", "ab"[: i % 3]) for i, each in enumerate(images)]
    model = text_model()
    actual = list(data.prompts(model, rows, parts))
    assert sum(len(prompt.tokens) for prompt in actual) == len(rows)
    assert sum(prompt.pixels.shape[0] * prompt.pixels.shape[1] for prompt in actual) == sum(map(len, images))
    assert sum(int(prompt.causal.sum()) for prompt in actual) == sum(len(row.suffix) + 1 for row in rows)
    alone = [tuple(pg.prepare(model, [row.images], ["p"], [row.suffix]).tokens[0].tolist()) for row in rows]
    sequences = [tuple(t[v].tolist()) for prompt in actual for t, v in zip(prompt.tokens, prompt.valid, strict=True)]
    assert sorted(sequences) == sorted(alone)
    assert all(
        torch.equal(prompt.pixels, -torch.ones_like(prompt.pixels)) for prompt in actual
    )  # the pictures are black
