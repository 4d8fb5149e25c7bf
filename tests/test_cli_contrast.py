"""`pgfunc embed` and `pgfunc classify` print what the dual encoder computes, and one line for a user's mistake."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_siglip import CFG, model

import pgfunc as pg
from pgfunc import cli, siglip_dual
from pgfunc.siglip_dual import prompt as dual_prompt

MODEL = model()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder with a random checkpoint and two pictures."""
    folder = tmp_path_factory.mktemp("cli")
    pg.save_siglip(MODEL, folder / "model")
    (folder / "folder.npy").mkdir()
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (9, 6), colour).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def run(workdir, monkeypatch, capsys):
    """Run the command in that folder; returns exit status, standard output and standard error."""

    def call(*arguments: str, chosen: tuple[str, ...] = ("--model", "model")) -> tuple[int, str, str]:
        monkeypatch.chdir(workdir)
        monkeypatch.setattr(sys, "argv", ["pgfunc", *arguments, *chosen, "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code, out.out, out.err

    return call


def vectors(workdir, images: list[str], texts: list[str]) -> np.ndarray:
    pixels = dual_prompt.pixels(MODEL, [workdir / name for name in images])
    actual = [siglip_dual.embed_images(MODEL.params, pixels, CFG)]
    actual += [siglip_dual.embed_texts(MODEL.params, dual_prompt.text_ids(MODEL, texts), CFG)] if texts else []
    return torch.cat(actual).numpy()


def test_embed_prints_one_vector_per_line_pictures_first(run, workdir):
    status, out, _ = run("embed", "red.png", "blue.png", "--text", "a star", "--text", "it", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [line.get("image") or line["text"] for line in lines] == ["red.png", "blue.png", "a star", "it"]
    expected = vectors(workdir, ["red.png", "blue.png"], ["a star", "it"])
    np.testing.assert_allclose([line["vector"] for line in lines], expected, atol=1e-6)  # the batch sizes differ
    plain = run("embed", "red.png")[1]
    assert plain.startswith("red.png: ")
    np.testing.assert_allclose([float(x) for x in plain.split(": ")[1].split()], expected[0], atol=1e-4)


def test_embed_accepts_texts_without_pictures(run, workdir):
    (line,) = run("embed", "--text", "a star", "--json")[1].splitlines()
    np.testing.assert_allclose(json.loads(line)["vector"], vectors(workdir, [], ["a star"])[0], atol=1e-6)


def test_embed_writes_an_array(run, workdir):
    assert run("embed", "red.png", "--text", "a star", "--out", "two.npy") == (0, "", "")
    actual = np.load(workdir / "two.npy", allow_pickle=False)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, vectors(workdir, ["red.png"], ["a star"]), atol=1e-6)


def test_classify_ranks_labels_by_their_own_probability(run, workdir):
    labels, template = ["star", "it", "red"], "a {}!"
    options = [part for label in labels for part in ("--label", label)]
    status, out, _ = run("classify", "blue.png", *options, "--template", template, "--json")
    actual = json.loads(out)
    image, *texts = torch.from_numpy(vectors(workdir, ["blue.png"], [template.format(label) for label in labels]))
    expected = siglip_dual.logits(MODEL.params, image[None], torch.stack(texts))[0].sigmoid().tolist()
    assert status == 0
    assert actual["image"] == "blue.png"
    assert actual["template"] == template
    assert actual["probabilities"] == pytest.approx(dict(zip(labels, expected, strict=True)), abs=1e-6)
    assert list(actual["probabilities"].values()) == sorted(actual["probabilities"].values(), reverse=True)
    plain = run("classify", "blue.png", *options, "--template", template)[1].splitlines()
    assert [line.split("\t")[0] for line in plain] == [f"blue.png: {label}" for label in actual["probabilities"]]


def test_the_default_template_of_classify_depends_on_the_model(run, workdir, monkeypatch):
    monkeypatch.setattr(pg.checkpoint.siglip, "shipped", lambda: workdir)
    (workdir / "siglip").symlink_to(workdir / "model")
    assert json.loads(run("classify", "red.png", "--label", "it", "--json", chosen=())[1])["template"] == "{}"
    template = json.loads(run("classify", "red.png", "--label", "it", "--json")[1])["template"]
    assert template == "this is a photo of {}"


MISTAKES = {
    ("embed",): "embed needs a picture or a text",
    ("embed", "absent.png"): "absent.png: no such file",
    ("embed", "red.png", "--out", "two.txt"): "--out two.txt: expected a name that ends in .npy",
    ("embed", "red.png", "--out", "no/two.npy"): "no/two.npy: there is no folder no",
    ("embed", "red.png", "--out", "folder.npy"): "folder.npy: is a folder",
    ("embed", "--text", "a a a a a a a a a"): "is 9 tokens, this model reads up to 7",
    ("classify", "red.png", "--label", "it", "--template", "photo"): "--template 'photo': expected a {}",
    ("classify", "red.png", "--label", "it", "--label", " "): "--label is empty",
    ("classify", "red.png", "--label", "it", "--label", "it"): "--label 'it' is repeated; name it once",
    ("classify", "absent.png", "--label", "it"): "absent.png: no such file",
}


@pytest.mark.parametrize("command", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_and_status_2(run, command):
    status, out, err = run(*command)
    assert (status, out) == (2, "")
    assert err.startswith("pgfunc: ")
    assert MISTAKES[command] in err
    assert err.count("\n") == 1


def test_a_missing_model_is_one_line_and_status_2(run):
    status, _, err = run("embed", "red.png", chosen=("--model", "absent"))
    assert status == 2
    assert "absent: no such file or folder" in err


@pytest.fixture
def bad(workdir):
    """A text file with the name of a picture."""
    (workdir / "bad.png").write_text("no picture")


@pytest.mark.usefixtures("bad")
def test_an_unreadable_picture_is_skipped_and_the_others_are_computed(run, workdir):
    status, out, err = run("embed", "red.png", "bad.png", "blue.png", "--text", "it", "--json", "--out", "some.npy")
    assert status == 1
    assert [json.loads(line).get("image") for line in out.splitlines()] == ["red.png", "blue.png", None]
    np.testing.assert_allclose(
        np.load(workdir / "some.npy"), vectors(workdir, ["red.png", "blue.png"], ["it"]), atol=1e-6
    )
    assert err.startswith("pgfunc: bad.png: ")
    assert err.count("\n") == 1
    status, out, err = run("classify", "bad.png", "red.png", "--label", "it", "--json")
    assert (status, json.loads(out)["image"], err.count("\n")) == (1, "red.png", 1)
    assert run("embed", "bad.png", "bad.png", "--out", "none.npy")[:2] == (1, "")
    assert not (workdir / "none.npy").exists()


@pytest.mark.parametrize("command", [
    ("embed", "red.png"), ("embed", "--text", "it", "--json"), ("embed", "red.png", "--out", "nan.npy"),
    ("classify", "red.png", "--label", "it"), ("classify", "red.png", "--label", "it", "--json"),
], ids=" ".join)  # fmt: skip
def test_nan_is_neither_printed_nor_written(run, workdir, monkeypatch, command):
    broken = MODEL._replace(params=pg.tree.map(lambda leaf: torch.full_like(leaf, float("nan")), MODEL.params))
    monkeypatch.setattr(pg, "load_siglip", lambda *args: broken)
    status, out, err = run(*command)
    assert (status, out) == (2, "")
    assert "is nan or infinite: the weights are, or --dtype is too small for them" in err
    assert not (workdir / "nan.npy").exists()


def test_vectors_do_not_overwrite_an_input(run, workdir):
    (workdir / "x.npy").symlink_to("red.png")
    before = (workdir / "red.png").read_bytes()
    status, _, err = run("embed", "red.png", "--out", "x.npy")
    assert (status, (workdir / "red.png").read_bytes()) == (2, before)
    assert "--out x.npy: would replace red.png, which is read" in err
