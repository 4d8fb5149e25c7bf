"""The tokenizer: a byte-fallback BPE, learned from scene texts and plain English, with ids in the order of Google's.

    0..3 pad, eos, bos, unk | 4..259 the bytes | text | 1,024 <loc> | 128 <seg> | <image>

Owns the vocabulary. Decoding undoes encoding for any text, except that a ▁ becomes a space, as in Google's.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from examples.tiny import plates, shapes
from examples.tiny.texts import COLUMNS, ROWS, article, plural

TEXT = 2048  # ids below the first <loc>
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MARK = "▁"


def corpus(names: Sequence[str]) -> list[str]:
    """Scene texts, repeated so often that each of their words becomes one token, and English words by frequency."""
    things = [*names, *(f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.OUTLINES)]
    captions = [f" {article(name)} and two {plural(name)}, {name} left of above" for name in things]
    questions = [f"answer en is there {article(name)}? how many {plural(name)} are there?" for name in things]
    fixed = ["caption en", "ocr", "detect", "segment", "answer en where is the", "answer en what color is the",
             "answer en how many objects are there?", "answer en what does the sign say?", "yes", "no", "two", "three",
             "four", "center", *ROWS, *COLUMNS, *(f" {column}" for column in COLUMNS), *shapes.COLOURS]  # fmt: skip
    return [
        *(fixed + captions + questions) * 300,
        *(" ".join([""] + [word] * n) for word, n in plates.frequencies().items()),
    ]


def _pieces() -> pre_tokenizers.PreTokenizer:
    """Limit the merges: newlines, digits and punctuation stand alone; a space begins the word after it."""
    alone = pre_tokenizers.Split(Regex(r"\n|\d|[^\w\s▁]"), "isolated")
    return pre_tokenizers.Sequence([alone, pre_tokenizers.Split(MARK, "merged_with_next")])  # type: ignore[list-item]


def _merges(texts: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The text tokens in the order in which they were learned, and the merges that make them."""
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizers.Replace(" ", MARK), _pieces()
    alphabet = [chr(code) for code in range(32, 127) if chr(code) != " "] + [MARK, "\n"]
    size = TEXT - len(SPECIAL) - len(BYTES)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    ids = learner.get_vocab()
    return sorted(ids, key=ids.__getitem__), [(left, right) for left, right in merges]


def build(names: Sequence[str]) -> Tokenizer:
    """Learn the merges and lay out the ids."""
    pieces, merges = _merges(corpus(names))
    vocab = {piece: i for i, piece in enumerate(SPECIAL + BYTES + pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", MARK)
    tokenizer.pre_tokenizer = _pieces()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    codes = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in codes])
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


def of_run(run: Path, names: Sequence[str]) -> Tokenizer:
    """The tokenizer of a training run, learned once, because other versions of the package may learn other merges."""
    path = run / "tokenizer.json"
    if not path.exists():
        build(names).save(str(path))
    return Tokenizer.from_file(str(path))
