"""Collected activations are those of a captured run of each row, whatever the batches and shards."""

import json

import pytest
import torch
from cases import VISION, text_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import pgfunc as pg
from pgfunc import lab
from pgfunc.errors import SettingError

MODEL = text_model()
PICTURES = [Image.new("RGB", (28, 28), color) for color in ("red", "blue", "green")]
ROWS = [(PICTURES[0], "ab"), (PICTURES[1], "a"), (PICTURES[2], "ba ab"), (PICTURES[0], "b")]
NAMES = ["vision.1.z", "projector", "language.0.gate", "language.1.resid_pre"]


def expected(name, row, tokens):
    """The activations of one row that are stored, and their positions."""
    prompt = pg.prepare(MODEL, *([each] for each in row))
    _, seen = lab.capture(pg.forward, name)(MODEL.params, prompt, MODEL.cfg)
    x, image = seen[name][0], VISION.tokens
    positions = torch.arange(len(x)) + (image if name in ("logits", "language.out") else 0)
    kept = {"all": positions >= 0, "image": positions < image, "text": positions >= image}
    mask = kept[tokens] if tokens != "last" else positions == positions[-1]
    return x[mask], positions[mask]


@settings(max_examples=15)
@given(st.integers(1, 5), st.sampled_from([1, 4000, 2**20]), st.sampled_from(["all", "image", "text", "last"]))
def test_stored_activations_are_those_of_each_row_in_order(tmp_path_factory, batch, shard_bytes, tokens):
    names = NAMES if tokens in ("all", "image") else [*NAMES[2:], "language.out", "logits"]
    folder = tmp_path_factory.mktemp("collected") / "new"
    found = lab.collect(MODEL, iter(ROWS), names, folder, tokens, batch, shard_bytes)
    assert found.rows == len(ROWS)
    assert (list(found.kinds), found.rows) == (names, len(ROWS))
    least = -(-len(ROWS) // batch)
    assert len(found.shards) == least if shard_bytes == 1 else 1 <= len(found.shards) <= least
    for name in names:
        each = [expected(name, row, tokens) for row in ROWS]
        torch.testing.assert_close(found.load(name), torch.cat([x for x, _ in each]), rtol=1e-4, atol=1e-5)
        row, position = found.origins(name)
        assert position.tolist() == torch.cat([where for _, where in each]).tolist()
        assert row.tolist() == [i for i, (x, _) in enumerate(each) for _ in range(len(x))]


def test_pictures_of_a_row_follow_one_another_and_suffixes_are_text(tmp_path):
    rows = [(PICTURES[:2], "ab", "ba"), (PICTURES[1:], "a", "b")]
    found = lab.collect(MODEL, rows, ["projector", "language.0.mlp_out"], tmp_path / "new")
    x, (row, position) = found.load("projector"), found.origins("projector")
    assert position.tolist() == [*range(2 * VISION.tokens)] * 2
    assert row.tolist() == [0] * 2 * VISION.tokens + [1] * 2 * VISION.tokens
    own = x.view(2, 2, VISION.tokens, -1)
    torch.testing.assert_close(own[0, 1], own[1, 0])  # the same picture
    lengths = [2 * VISION.tokens + int(pg.prepare(MODEL, [r[0]], [r[1]], [r[2]]).valid.sum()) for r in rows]
    assert found.origins("language.0.mlp_out").row.tolist() == [0] * lengths[0] + [1] * lengths[1]


def test_rows_are_read_as_they_are_needed_and_memory_holds_one_shard(tmp_path):
    taken = 0

    def rows():
        nonlocal taken
        for i in range(60):
            taken += 1
            if i:
                stored = len([*tmp_path.glob("new/*.safetensors")])
                assert stored >= i - 2  # one batch of one row is written before the next but one is read
            yield ROWS[i % 4]

    found = lab.collect(MODEL, rows(), ["language.0.mlp_out"], tmp_path / "new", batch=1, shard_bytes=1)
    assert (taken, len(found.shards), found.rows) == (60, 60, 60)


def test_nothing_behind_the_last_name_is_computed(tmp_path, monkeypatch):
    from pgfunc import gemma

    layers = []
    monkeypatch.setattr(gemma, "mlp", lambda *args: layers.append(1) or 1 / 0)
    found = lab.collect(MODEL, ROWS, ["language.0.attn_out", "vision.0.z"], tmp_path / "first")
    assert (found.rows, layers) == (4, [])
    monkeypatch.setattr(gemma, "run", lambda *args: 1 / 0)
    assert lab.collect(MODEL, ROWS, ["projector"], tmp_path / "second").rows == 4


@pytest.mark.parametrize("size", [1, 7, 20])
def test_batches_have_each_activation_once_in_an_order_of_the_seed(tmp_path, size):
    found = lab.collect(MODEL, ROWS, ["language.0.mlp_out"], tmp_path / "new", batch=1, shard_bytes=1)
    x = found.load("language.0.mlp_out")
    one, again, other = (torch.cat([*found.batches("language.0.mlp_out", size, seed)]) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(one) == len(x) // size * size
    order = [(x == each).all(1).nonzero()[0].item() for each in one]
    assert len({*order}) == len(order)


def test_mistakes_are_one_line(tmp_path):
    for names, tokens, message in [
        (["language.9.z"], "all", r"^'language.9.z' matches no activation of this call; similar: language.\d.z"),
        (["language.*.pattern"], "all", r"^language.0.pattern has no axis of tokens to store it by; use lab.capture$"),
        (["vision.1.z"], "last", r"^vision.1.z has image tokens only, not 'last'$"),
        (["logits"], "image", r"^logits has text tokens only, not 'image'$"),
    ]:
        with pytest.raises(SettingError, match=message):
            lab.collect(MODEL, ROWS, names, tmp_path / "new", tokens)
    assert not (tmp_path / "new").exists()
    with pytest.raises(SettingError, match=r"^row 0 has no picture, so it has no projector$"):
        lab.collect(MODEL, [([], "ab")], ["projector"], tmp_path / "new")
    with pytest.raises(SettingError, match=r"index.json: cannot be read, lab.collect did not finish"):
        lab.collection(tmp_path / "new")
    for rows, options, message in [
        ([], {}, r"^there are no rows$"),
        (ROWS, {"batch": 0}, r"^batch is 0, expected 1 or more rows$"),
        (ROWS, {"patterns": []}, r"^patterns \[\], tokens 'all': expected names, and all, image, text or last$"),
        ([(PICTURES[0], "a"), (PICTURES[0], "a", "b")], {}, r"^rows 0 to 1: some have a suffix, others have none$"),
    ]:
        with pytest.raises(SettingError, match=message):
            lab.collect(MODEL, rows, **{"patterns": ["projector"], "folder": tmp_path / "new"} | options)
    with pytest.raises(FileNotFoundError, match="missing"):  # of the caller's rows
        lab.collect(MODEL, (Image.open("missing") for _ in range(2)), ["projector"], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    found = lab.collect(MODEL, ROWS, ["projector"], tmp_path / "other")
    with pytest.raises(SettingError, match=r"^size is 0, expected 1 or more$"):
        next(found.batches("projector", 0, 0))
    with pytest.raises(SettingError, match=r"other: is not empty; give another folder$"):
        lab.collect(MODEL, ROWS, ["projector"], tmp_path / "other")
    with pytest.raises(SettingError, match=r"other: has no 'logits', only projector$"):
        found.load("logits")
    assert json.loads((tmp_path / "other" / "index.json").read_text())["rows"] == 4
