"""Text is encoded to ids and decoded again; user text never becomes a control token."""

import copy
import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pgfunc import tokenizer
from pgfunc.errors import CheckpointError, PromptError
from pgfunc.tokenizer import Tokenizer

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]
WORDS = ["<loc0000>", "<loc0001>", "<loc1023>", "<seg000>", "<seg001>", "<seg127>"]
MERGES = [
    ("\n", "\n"),
    ("▁", "a"),
    ("l", "o"),
    ("lo", "c"),
    ("b", "o"),
    ("bo", "s"),
    ("e", "n"),
    ("▁", "en"),
    ("0", "0"),
]


def google(control_special: bool = True, words_special: bool = False) -> Backend:
    """A small tokenizer like PaliGemma's: spaces are ▁, unknown characters are byte tokens, and bos is added."""
    letters = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    texts = [*letters, *(left + right for left, right in MERGES)]
    pieces = CONTROL + [f"<0x{byte:02X}>" for byte in range(256)] + texts
    vocab = {piece: id for id, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for names, special in (
        (CONTROL, control_special),
        (WORDS, words_special),
        (["<mask>"], True),
        (["<image>"], control_special),
    ):
        backend.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    backend.enable_truncation(5)
    backend.enable_padding(length=9, pad_id=0, pad_token="<pad>")
    return backend


VARIANTS = {
    f"control {control}, words {words}": tokenizer.wrap(google(control, words), "a test's tokenizer")
    for control in (True, False)
    for words in (True, False)
}
PLAIN = VARIANTS["control True, words False"]
IDS = PLAIN.backend.get_vocab()
FORBIDDEN = {IDS[name] for name in [*CONTROL, "<image>"]}
tokenizers = st.sampled_from(sorted(VARIANTS)).map(VARIANTS.__getitem__)

names = st.sampled_from(
    [*CONTROL, "<image>", *WORDS, "<mask>", "<bos", "<<bos>>", "bos>", "\n", " ", "▁", "<0x41>", "a en", "00"]
)
texts = st.text() | st.lists(names | st.text(max_size=5)).map("".join)


# --- text to ids


@given(tokenizers, texts)
def test_text_never_becomes_a_control_token(tokens, text):
    assert not FORBIDDEN & set(tokenizer.encode(tokens, text))


@given(texts)
def test_the_ids_do_not_depend_on_which_tokens_are_marked_special(text):
    first, *others = (tokenizer.encode(tokens, text) for tokens in VARIANTS.values())
    assert all(other == first for other in others)


@given(tokenizers, texts, st.sampled_from(WORDS), texts)
def test_location_and_mask_tokens_are_one_id_in_every_position(tokens, left, word, right):
    expected = [*tokenizer.encode(tokens, left), IDS[word], *tokenizer.encode(tokens, right)]
    assert tokenizer.encode(tokens, left + word + right) == expected


@pytest.mark.parametrize(
    "text", ["<loc1>", "<loc00001>", "<LOC0001>", "<loc0001", "< loc0001>", "<seg0001>", "<loc1024>"]
)
def test_text_that_only_resembles_a_location_token_is_ordinary_text(text):
    assert len(tokenizer.encode(PLAIN, text)) > 1
    assert not {IDS[word] for word in WORDS} & set(tokenizer.encode(PLAIN, text))


def test_nothing_is_added_truncated_or_padded():
    assert tokenizer.encode(PLAIN, "") == []
    assert tokenizer.encode(PLAIN, "x") == [IDS["x"]]
    assert tokenizer.encode(PLAIN, "x" * 50) == [IDS["x"]] * 50
    assert tokenizer.encode(PLAIN, "a en en") == [IDS["a"], IDS["▁en"], IDS["▁en"]]


def test_a_newline_is_one_id_and_two_are_another():
    assert tokenizer.encode(PLAIN, "\n") == [PLAIN.newline] == [IDS["\n"]]
    assert tokenizer.encode(PLAIN, "\n\n") == [IDS["\n\n"]]


@given(st.text(), st.characters(categories=["Cs"]), st.text())
def test_a_lone_surrogate_is_refused(left, surrogate, right):
    with pytest.raises(PromptError) as error:
        tokenizer.encode(PLAIN, left + surrogate + right)
    assert str(error.value).isprintable()


# --- tokens that a tokenizer defines

DEFINED = ["<unused0>", "<task>", " x", "Word", "é n", "</s>"]
FLAGS = [
    AddedToken("<unused0>", special=True, lstrip=True, rstrip=True),
    AddedToken("<task>", normalized=True, lstrip=True),
    AddedToken(" x", normalized=True),
    AddedToken("Word", single_word=True),
    AddedToken("é n", normalized=False, rstrip=True),
]


def save_with_defined_tokens(folder: Path, way: str) -> None:
    """Save a tokenizer in transformers' layout with additional tokens, defined in one of the ways in `WAYS`."""
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    fast = PreTrainedTokenizerFast(tokenizer_object=google(), extra_special_tokens={"image_token": "<image>"}, **names)
    if way == "special":
        fast.add_special_tokens({"additional_special_tokens": DEFINED})
    elif way == "plain":
        fast.add_tokens(DEFINED)
    elif way == "flags":
        fast.add_tokens(FLAGS)
    elif way == "another end":
        fast.add_special_tokens({"eos_token": "</s>", "mask_token": "<task>"})
    fast.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if way == "extra in the config":
        settings["extra_special_tokens"] = ["<image>", *DEFINED]
    elif way == "additional in the config":
        settings = {"additional_special_tokens": ["<image>", *DEFINED]}
    elif way == "listed in the config":
        listed = json.loads(google().to_str())["added_tokens"]
        first = 1 + max(token["id"] for token in listed)
        settings["added_tokens_decoder"] = {str(token.pop("id")): token for token in listed} | {
            str(first + i): {"content": name, "special": i % 2 > 0, "normalized": i % 3 > 0, "lstrip": i % 2 > 0,
                             "rstrip": False, "single_word": False} for i, name in enumerate(DEFINED)}  # fmt: skip
    elif way == "old files":
        settings = {}
        mask = {"content": "<unused0>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<eos>", "mask_token": mask}))
        ids = {name: len(IDS) + i for i, name in enumerate(DEFINED)}
        (folder / "added_tokens.json").write_text(json.dumps(ids))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))


WAYS = ["special", "plain", "flags", "another end", "extra in the config", "additional in the config",
        "listed in the config", "old files"]  # fmt: skip


@pytest.fixture(scope="module", params=WAYS)
def both(request, tmp_path_factory) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """The tokenizer in a folder, loaded by pgfunc and by transformers."""
    folder = tmp_path_factory.mktemp("defined")
    save_with_defined_tokens(folder, request.param)
    return tokenizer.load(folder / "tokenizer.json"), AutoTokenizer.from_pretrained(folder)


words = st.sampled_from([*DEFINED, *WORDS, "<mask>", "<TASK>", "Words", " ", "  ", "\n", "a", "en", "é", "<unused1>"])


@given(st.lists(words | st.text(max_size=3)).map("".join))
def test_defined_tokens_are_encoded_as_in_transformers(both, text):
    ours, theirs = both
    expected = theirs(text, add_special_tokens=False).input_ids
    assume(ours.control.isdisjoint(expected))
    assert tokenizer.encode(ours, text) == expected


def test_each_defined_token_is_one_id_next_to_a_control_token_that_is_text(both):
    ours, theirs = both
    for name in set(DEFINED) & theirs.get_vocab().keys():
        (id,) = tokenizer.encode(ours, name)
        assert id == theirs.convert_tokens_to_ids(name)
        ids = tokenizer.encode(ours, f"<eos>{name}<image>{name}")
        assert ids.count(id) == 2
        assert ours.control.isdisjoint(ids)


def test_defined_tokens_are_decoded_whether_special_or_not(both):
    ours, theirs = both
    for name in set(DEFINED) & theirs.get_vocab().keys():
        ids = [IDS["a"], theirs.convert_tokens_to_ids(name), IDS["b"]]
        assert tokenizer.decode(ours, ids) == f"a{name}b"
        assert list(tokenizer.pieces(ours, ids)) == ["a", name, "b"]


def test_an_id_can_be_made_a_control_token_whatever_its_name(tmp_path):
    save_with_defined_tokens(tmp_path, "another end")
    ours = tokenizer.load(tmp_path / "tokenizer.json", control=[len(IDS)])
    assert ours.backend.id_to_token(len(IDS)) == "</s>"
    assert len(IDS) not in tokenizer.encode(ours, "a</s>")
    assert tokenizer.decode(ours, [IDS["a"], len(IDS)]) == "a"


@pytest.mark.parametrize("content", [
    "{", "[]", '{"added_tokens_decoder": []}', '{"added_tokens_decoder": {"x": {"content": "a"}}}',
    '{"added_tokens_decoder": {"1": {"content": 7}}}', '{"bos_token": {"content": ["a"]}}',
    '{"extra_special_tokens": 7}', '{"added_tokens_decoder": {"1": "a\\ud800"}}',
])  # fmt: skip
def test_a_broken_file_next_to_a_tokenizer_is_named(tmp_path, content):
    path = saved(tmp_path, COMPLETE)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json") as error:
        tokenizer.load(path)
    assert str(error.value).isprintable()


# --- copies

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda tokens: pickle.loads(pickle.dumps(tokens)),
    "an old protocol": lambda tokens: pickle.loads(pickle.dumps(tokens, protocol=2)),
    "replaced": lambda tokens: replace(tokens, newline=tokens.newline),
    "another backend": lambda tokens: replace(tokens, backend=copy.deepcopy(tokens.backend)),
    "twice": lambda tokens: copy.deepcopy(pickle.loads(pickle.dumps(tokens))),
}


@given(tokenizers, st.sampled_from(sorted(COPIES)), st.booleans(), texts)
def test_a_copy_encodes_and_decodes_like_the_original(tokens, way, used, text):
    """Whether or not the original has encoded a control token before."""
    expected = tokenizer.encode(tokens, text)
    if used:
        tokenizer.encode(tokens, "<eos>")
    copied = COPIES[way](tokens)
    assert (copied.newline, copied.control) == (tokens.newline, tokens.control)
    assert tokenizer.encode(copied, text) == expected
    assert tokenizer.decode(copied, expected) == tokenizer.decode(tokens, expected)


def test_a_backend_is_copied_and_not_shared():
    """transformers sets padding, truncation and `encode_special_tokens` again at each call."""
    backend = google()
    tokens = tokenizer.wrap(backend, "a test's tokenizer")
    assert backend.truncation, "the argument is not changed"
    backend.enable_padding(length=50, pad_id=0, pad_token="<pad>")
    backend.add_tokens(["abc"])
    backend.encode_special_tokens = False
    assert tokenizer.encode(tokens, "abc<eos>") == tokenizer.encode(PLAIN, "abc<eos>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens.backend, pad_token="<pad>")
    fast(["abc", "<eos>"], padding="max_length", max_length=20, truncation=True)
    assert tokenizer.encode(tokens, "abc<eos>") == tokenizer.encode(PLAIN, "abc<eos>")


def test_merges_are_never_skipped_at_random():
    backend = google()
    backend.model.dropout = 0.9
    tokens = tokenizer.wrap(backend, "a test's tokenizer")
    for _ in range(20):
        assert tokenizer.encode(tokens, "a en\n\n<eos>00") == tokenizer.encode(PLAIN, "a en\n\n<eos>00")


def test_a_tokenizer_with_another_file_name_ignores_the_other_files_in_its_folder(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(COMPLETE)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert tokenizer.load(path).backend.get_vocab() == IDS


def test_threads_encode_the_same_ids():
    tokens = tokenizer.wrap(google(), "a test's tokenizer")
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda text: tokenizer.encode(tokens, text), ["a<eos>b<loc0001>", "a en"] * 100))
    assert ids == [tokenizer.encode(PLAIN, "a<eos>b<loc0001>"), tokenizer.encode(PLAIN, "a en")] * 100


def test_the_repr_of_a_tokenizer_is_its_size():
    assert repr(tokenizer.wrap(google(), "a test's tokenizer")) == f"Tokenizer({len(IDS):,} tokens)"


# --- ids to text


@given(tokenizers, texts)
def test_decoding_undoes_encoding(tokens, text):
    """Except for ▁, with which Google's tokenizers represent a space."""
    assert tokenizer.decode(tokens, tokenizer.encode(tokens, text)) == text.replace("▁", " ")


added = st.sampled_from([IDS[name] for name in [*CONTROL, "<image>", "<mask>", *WORDS]])
ids = st.lists(st.integers(0, len(IDS) - 1) | st.integers(4, 259) | added)  # 4 to 259 are the bytes


@given(tokenizers, ids)
def test_ids_are_decoded_to_the_bytes_of_their_tokens(tokens, ids):
    token_bytes = {id: name.replace("▁", " ").encode() for name, id in IDS.items()}
    token_bytes |= {4 + byte: bytes([byte]) for byte in range(256)} | dict.fromkeys(FORBIDDEN, b"")
    assert tokenizer.decode(tokens, ids) == b"".join(token_bytes[id] for id in ids).decode("utf-8", "replace")


@given(tokenizers, texts, st.lists(st.tuples(st.integers(0, 100), st.sampled_from(sorted(FORBIDDEN)))))
def test_control_tokens_are_left_out_of_the_text(tokens, text, inserted):
    ids = tokenizer.encode(tokens, text)
    expected = tokenizer.decode(tokens, ids)
    for index, id in inserted:
        ids.insert(index, id)
    assert tokenizer.decode(tokens, ids) == expected


def test_location_and_mask_tokens_are_decoded_to_their_names():
    for tokens in VARIANTS.values():
        assert tokenizer.decode(tokens, [2, IDS["<loc0001>"], IDS["<seg127>"], IDS["▁en"], 1]) == "<loc0001><seg127> en"


@given(texts)
def test_pieces_come_as_soon_as_their_characters_are_complete(text):
    ids, taken = tokenizer.encode(PLAIN, text), 0

    def one_by_one() -> Iterator[int]:
        nonlocal taken
        for id in ids:
            taken += 1
            yield id

    decoded = ""
    for piece in tokenizer.pieces(PLAIN, one_by_one()):
        decoded += piece
        assert piece
        assert tokenizer.decode(PLAIN, ids[:taken]) == decoded
    assert decoded == text.replace("▁", " ")


# --- files


def saved(folder: Path, content: str | bytes) -> Path:
    path = folder / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("words", [True, False])
def test_a_loaded_file_encodes_like_the_saved_tokenizer(tmp_path, control, words):
    loaded = tokenizer.load(saved(tmp_path, google(control, words).to_str()))
    assert (loaded.newline, loaded.control) == (PLAIN.newline, PLAIN.control)
    text = "<bos>a en\n<loc0001> é<eos>"
    assert tokenizer.encode(loaded, text) == tokenizer.encode(PLAIN, text)


COMPLETE = google().to_str()
BROKEN: dict[str, str | bytes] = {
    "empty": "",
    "text": "not\nJSON\n",
    "no model": "{}",
    "a list": "[]",
    "quoted in the error": json.dumps(json.loads(COMPLETE) | {"version": "1\n0"}),
    "no token for unknown text": Backend(models.BPE({"a": 0}, [], unk_token="<unk>")).to_str(),
    "no token for a newline": Backend(models.BPE({"a": 0}, [])).to_str(),
    "not UTF-8": b"\xff\xfe\n",
    "truncated": COMPLETE[: len(COMPLETE) // 2],
    "a merge of unknown pieces": json.dumps(
        json.loads(COMPLETE) | {"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_and_named(tmp_path, name):
    path = saved(tmp_path, BROKEN[name])
    refused(path)


def test_a_missing_file_and_a_folder_are_refused_and_named(tmp_path):
    refused(tmp_path / "missing.json")
    refused(tmp_path)


def refused(path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        tokenizer.load(path)
    text = str(error.value)
    assert text.isprintable(), "one line"
    assert str(path) in text


def test_a_tokenizer_without_a_newline_token_is_refused(tmp_path):
    backend = google()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    refused(saved(tmp_path, backend.to_str()))


def test_a_file_may_lack_control_tokens():
    vocab = {"a": 0, "\n": 1, "<eos>": 2}
    loaded: Tokenizer = tokenizer.wrap(Backend(models.BPE(vocab, [])), "three tokens")
    assert (loaded.newline, loaded.control) == (1, {2})


def test_a_pattern_that_takes_exponential_time_is_an_error(tmp_path):
    """The Rust code of the package panics, which is not an Exception in Python."""
    slow, text = Regex("(a+)+$"), "a" * 40 + "b"
    backend = google()
    backend.normalizer = normalizers.Replace(slow, " ")
    with pytest.raises(PromptError, match=r"not text that can be encoded .*retry-limit"):
        tokenizer.encode(tokenizer.wrap(backend, "a test's tokenizer"), text)
    raw = json.loads(backend.to_str())
    token = raw["added_tokens"][0] | {"id": backend.get_vocab_size(), "content": text, "normalized": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"added_tokens": [*raw["added_tokens"], token]}))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer .*retry-limit"):
        tokenizer.load(tmp_path / "tokenizer.json")
    backend = google()
    backend.add_tokens([text])
    backend.decoder = decoders.Replace(slow, " ")
    tokens = tokenizer.wrap(backend, "a test's tokenizer")
    with pytest.raises(CheckpointError, match=r"cannot write token [0-9]+ .*retry-limit"):
        tokenizer.decode(tokens, tokenizer.encode(tokens, text))
