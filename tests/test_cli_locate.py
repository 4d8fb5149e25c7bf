"""`detect` and `segment` print, draw and write the objects in the model's text; `caption --box` is about a region."""

import json
import os
import shutil
import sys
import weakref
from pathlib import Path

import matplotlib
import numpy as np
import one_by_one
import pytest
from cases import text_model
from PIL import Image

import pgfunc as pg
from pgfunc import cli, tokenizer
from pgfunc.objects import coco, detect, draw, fonts, segment, vqvae

MODEL, VQ = text_model(), vqvae.init(5)
CODES = "".join(f"<seg{code:03d}>" for code in range(16))
# the tests' tokenizer has tokens only for locations 0 to 3, so only the first object has a confidence
SURE, UNSURE = "<loc0000><loc0001><loc0002><loc0003>", "<loc0100><loc0200><loc0511><loc0767>"
TEXT = f"{SURE}{CODES} cat ; {UNSURE}{CODES} yellow bus ; nonsense"
IDS = tokenizer.encode(MODEL.tokenizer, TEXT)
DONE = pg.Completion(TEXT, IDS, [-0.25] * len(IDS), "length")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder with a random checkpoint, its mask decoder, and two pictures."""
    folder = tmp_path_factory.mktemp("locate")
    pg.save(MODEL, folder / "model")
    pg.save(MODEL, folder / "bare")
    segment.save(folder / "model" / "masks.safetensors", VQ)
    segment.save(folder / "other.safetensors", vqvae.init(6))
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (200, 150), colour).save(folder / f"{name}.png")
    (folder / "sub").mkdir()
    Image.new("RGB", (20, 10)).save(folder / "sub" / "red.png")
    return folder


@pytest.fixture
def prefixes(monkeypatch) -> list[str]:
    """Replace the model by one that always answers TEXT; the list collects its prefixes."""
    prompts: list[str] = []

    def generate(model: pg.Model, image: Image.Image, prefix: str, max_new_tokens: int, **sampling) -> list:
        assert max_new_tokens == 512
        prompts.append(prefix)
        return [DONE]

    monkeypatch.setattr(pg, "generate", generate)
    return prompts


@pytest.fixture
def run(workdir, monkeypatch, capsys):
    """Run the command in that folder; returns exit status, standard output and standard error."""
    monkeypatch.setattr(pg, "generate_many", one_by_one.generate_many)

    def call(*arguments: str, model: str = "model") -> tuple[int, str, str]:
        monkeypatch.chdir(workdir)
        monkeypatch.setattr(sys, "argv", ["pgfunc", *arguments, "--model", model, "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code, out.out, out.err

    return call


def test_detect_prints_one_object_per_line_and_notes_what_it_left_out(run, prefixes):
    status, out, err = run("detect", "red.png", "cat ; yellow bus")
    assert status == 0
    assert prefixes == ["detect cat ; yellow bus"]
    sure, unsure = out.splitlines()
    assert sure == "red.png: cat\tx 0.2..0.6, y 0.0..0.3\tconfidence 0.78"
    assert unsure == "red.png: yellow bus\tx 39.1..150.0, y 14.7..74.9"
    assert err.splitlines() == [
        "pgfunc: red.png: left out 'nonsense': 0 location tokens, expected 4",
        "pgfunc: red.png: stopped at 512 tokens, perhaps too early; --max-new-tokens allows more",
    ]


@pytest.mark.parametrize("command", ["detect", "segment"])
def test_sampling_options_reach_the_sampler(run, monkeypatch, command):
    sampled: dict = {}
    monkeypatch.setattr(pg, "generate", lambda model, image, prefix, **sampling: sampled.update(sampling) or [DONE])
    options = ["--temperature", "1.2", "--top-k", "30", "--top-p", "0.9", "--min-p", "0.01", "--seed", "5"]
    assert run(command, "red.png", "cat", "--max-new-tokens", "6", *options)[0] == 0
    expected = {"max_new_tokens": 6, "temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 5}
    assert sampled == expected


def test_detect_json_has_boxes_in_pixels(run, prefixes):
    status, out, err = run("detect", "red.png", "sub/red.png", "--prompt", "cat", "--json")
    assert (status, err, prefixes) == (0, "", ["detect cat"] * 2)
    first, second = map(json.loads, out.splitlines())
    assert [first[key] for key in ("image", "prompt", "text", "width", "height")] == [
        "red.png",
        prefixes[0],
        TEXT,
        200,
        150,
    ]
    assert (second["width"], second["height"]) == (20, 10)
    assert first["malformed"] == [{"piece": "nonsense", "reason": "0 location tokens, expected 4"}]
    sure, unsure = first["objects"]
    assert sure["confidence"] == pytest.approx(np.exp(-0.25))
    assert (unsure["label"], unsure["confidence"]) == ("yellow bus", None)
    assert unsure["box"] == detect.parse(TEXT, 200, 150)[1].box._asdict()
    assert unsure["box"]["xmin"] == pytest.approx(200 * 200 / 1023)


@pytest.mark.parametrize("command", ["detect", "segment"])
def test_what_to_look_for_is_one_argument_or_several_labels(run, prefixes, command):
    assert run(command, "red.png", "blue.png", "--label", "cat", "--label", "yellow bus")[0] == 0
    assert run(command, "--label", "cat", "red.png")[0] == 0
    assert run(command, "red.png", "cat ; yellow bus")[0] == 0
    assert prefixes == [f"{command} cat ; yellow bus"] * 2 + [f"{command} cat", f"{command} cat ; yellow bus"]


def test_an_answer_that_ended_with_eos_gets_no_note(run, monkeypatch):
    complete = pg.Completion(f"{UNSURE} cat", [], [], "eos")
    monkeypatch.setattr(pg, "generate", lambda *args, **sampling: [complete])
    assert run("detect", "red.png", "cat")[2] == ""


def test_segment_json_has_the_masks(run, prefixes):
    status, out, _ = run("segment", "red.png", "cat", "--json")
    assert (status, prefixes) == (0, ["segment cat"])
    expected = segment.parse(TEXT, 200, 150, VQ)
    objects = json.loads(out)["objects"]
    assert [item["mask"] for item in objects] == [coco.rle(item.mask) for item in expected]
    assert [item["label"] for item in objects] == ["cat", "yellow bus"]
    assert f"\t{expected[1].mask.sum()} pixels" in run("segment", "red.png", "cat")[1].splitlines()[1]


def test_masks_chooses_the_mask_decoder(run, prefixes):
    out = run("segment", "red.png", "cat", "--json", "--masks", "other.safetensors", model="bare")[1]
    expected = segment.parse(TEXT, 200, 150, vqvae.init(6))[1].mask
    assert (
        json.loads(out)["objects"][1]["mask"]
        == coco.rle(expected)
        != coco.rle(segment.parse(TEXT, 200, 150, VQ)[1].mask)
    )


@pytest.mark.parametrize("command", ["detect", "segment"])
def test_out_writes_the_drawing(run, prefixes, workdir, tmp_path, command):
    before = (workdir / "red.png").read_bytes()
    assert run(command, "red.png", "cat", "--out", str(tmp_path / "out.png"))[0] == 0
    objects = (
        segment.with_confidence(DONE, MODEL.tokenizer, 200, 150, VQ)
        if command == "segment"
        else detect.with_confidence(DONE, MODEL.tokenizer, 200, 150)
    )
    expected = draw.objects(Image.open(workdir / "red.png"), objects)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(expected))
    assert (workdir / "red.png").read_bytes() == before


def test_out_is_a_folder_for_several_pictures(run, prefixes, tmp_path):
    assert run("detect", "red.png", "blue.png", "cat", "--out", str(tmp_path / "drawn"))[0] == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["blue.png", "red.png"]
    assert run("detect", "sub/red.png", "cat", "--out", str(tmp_path))[0] == 0
    assert pg.image.open_image(tmp_path / "red.png").size == (20, 10), "one picture too, if the folder exists"


KINDS = {"a.jpg": "JPEG", "b.JPEG": "JPEG", "c.png": "PNG", "d.webp": "WEBP", "e.tif": "TIFF", "f.bmp": "BMP"}


def test_a_drawing_keeps_the_format_of_its_picture_or_is_a_png(run, prefixes, workdir, tmp_path):
    """A drawing of a JPEG is not a PNG of five times the size; formats with a palette have too few colours."""
    names = KINDS | {"g.gif": "GIF", "h.ico": "ICO", "j": "JPEG", "k.ppm": "PPM"}
    for name, kind in names.items():
        Image.open(workdir / "red.png").save(tmp_path / name, kind)
    out = tmp_path / "drawn"
    assert run("detect", *(str(tmp_path / name) for name in names), "cat", "--out", str(out))[0] == 0
    formats = {}
    for path in out.iterdir():
        with Image.open(path) as image:
            formats[path.name] = image.format
    assert formats == KINDS | {"g.png": "PNG", "h.png": "PNG", "j.png": "PNG", "k.png": "PNG"}


def test_a_drawing_shows_the_confidence_with_the_option(run, prefixes, workdir, tmp_path):
    objects, picture = detect.with_confidence(DONE, MODEL.tokenizer, 200, 150), Image.open(workdir / "red.png")
    for options, confidence in (([], False), (["--confidence"], True)):
        assert run("detect", "red.png", "cat", "--out", str(tmp_path / "x.png"), *options)[0] == 0
        assert Image.open(tmp_path / "x.png").convert("RGB") == draw.objects(picture, objects, confidence=confidence)


def test_letters_missing_in_all_fonts_are_named_once_and_font_provides_them(run, monkeypatch, tmp_path):
    monkeypatch.setattr(fonts, "installed", tuple)  # a system without fonts
    text = f"{UNSURE} кот ; {SURE} котик"
    monkeypatch.setattr(pg, "generate", lambda *args, **sampling: [pg.Completion(text, [], [], "eos")])
    call = ["detect", "red.png", "blue.png", "cat", "--out", str(tmp_path / "drawn")]
    status, _, err = run(*call)
    assert (status, err.count("\n")) == (0, 1)
    assert "letters коти, which are drawn as boxes; --font FILE names one that has" in err
    dejavu = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    assert run(*call, "--font", dejavu)[2] == ""
    drawn = Image.open(tmp_path / "drawn" / "red.png").convert("RGB")
    objects = detect.parse(text, 200, 150)
    assert drawn == draw.objects(Image.new("RGB", (200, 150), (200, 0, 0)), objects, dejavu)


@pytest.mark.parametrize("coco_file", [False, True])
def test_masks_of_earlier_pictures_are_freed(run, prefixes, monkeypatch, tmp_path, coco_file):
    masks, most = [], []

    def with_confidence(*args) -> list:
        objects = original(*args)
        masks.extend(weakref.ref(item.mask) for item in objects)
        most.append(sum(mask() is not None for mask in masks))
        return objects

    original = segment.with_confidence
    monkeypatch.setattr(segment, "with_confidence", with_confidence)
    options = ["--out", str(tmp_path / "drawn"), *(["--coco", str(tmp_path / "x.json")] if coco_file else [])]
    for number in range(6):
        Image.new("RGB", (20, 10)).save(tmp_path / f"{number}.png")
    assert run("segment", *(str(tmp_path / f"{number}.png") for number in range(6)), "cat", *options)[0] == 0
    assert (len(masks), max(most)) == (12, 4), "the masks of one picture, and of the one before it"


def test_a_truncated_picture_is_missing_in_the_coco_file_and_the_others_are_in_it(run, prefixes, workdir, tmp_path):
    (workdir / "cut.png").write_bytes((workdir / "red.png").read_bytes()[:60])
    call = ["detect", "red.png", "cut.png", "sub/red.png", "cat", "--coco", str(tmp_path / "x.json"), "--json"]
    status, out, err = run(*call)
    assert status == 1
    assert [json.loads(line)["image"] for line in out.splitlines()] == ["red.png", "sub/red.png"]
    assert err.startswith("pgfunc: cut.png: cannot be read as a picture")
    assert err.count("\n") == 1
    assert run("detect", "cut.png", "cat")[0] == 2
    dataset = json.loads((tmp_path / "x.json").read_text())
    assert [image["file_name"] for image in dataset["images"]] == ["red.png", "sub/red.png"]


def test_the_coco_file_has_all_pictures(run, prefixes, tmp_path):
    assert run("segment", "red.png", "sub/red.png", "cat", "--coco", str(tmp_path / "all.json"))[0] == 0
    names = [("red.png", 200, 150), ("sub/red.png", 20, 10)]
    pictures = [
        coco.Picture(name, width, height, segment.with_confidence(DONE, MODEL.tokenizer, width, height, VQ))
        for name, width, height in names
    ]
    assert json.loads((tmp_path / "all.json").read_text()) == coco.dataset(pictures)


def test_odd_file_names_and_labels_are_printed_and_written(run, workdir, monkeypatch, tmp_path):
    """A file name that is not valid Unicode, and a label of two lines: output is one line, and files can be read."""
    name, text = os.fsdecode(b"\xff.png"), f"{UNSURE} big\ncat ☃"
    shutil.copy(workdir / "red.png", workdir / name)
    monkeypatch.setattr(pg, "generate", lambda *args, **sampling: [pg.Completion(text, [], [], "eos")])
    status, out, _ = run("detect", name, "cat", "--coco", str(tmp_path / "x.json"), "--out", str(tmp_path / "x.png"))
    assert status == 0
    assert out.splitlines() == ["\\udcff.png: big cat ☃\tx 39.1..150.0, y 14.7..74.9"]
    dataset = json.loads((tmp_path / "x.json").read_text())
    assert (dataset["images"][0]["file_name"], dataset["categories"][0]["name"]) == (name, "big\ncat ☃")
    assert json.loads(run("detect", name, "cat", "--json")[1])["finish"] == "eos"


def test_an_answer_without_objects_prints_nothing_found(run, prefixes, monkeypatch):
    nothing = pg.Completion("", [], [], "eos")
    monkeypatch.setattr(pg, "generate", lambda *args, **sampling: [nothing])
    assert run("detect", "red.png", "cat")[:2] == (0, "red.png: nothing found\n")
    assert json.loads(run("segment", "red.png", "cat", "--json")[1])["objects"] == []


def test_detect_and_segment_run_with_a_real_model(run):
    status, out, _ = run("detect", "red.png", "cat", "--max-new-tokens", "4")
    expected = pg.generate(MODEL, Image.new("RGB", (200, 150), (200, 0, 0)), "detect cat", max_new_tokens=4)
    assert (status, out) == (0, "red.png: nothing found\n")
    value = json.loads(run("segment", "red.png", "cat", "--max-new-tokens", "4", "--json")[1])
    assert value["malformed"] == [item._asdict() for item in segment.malformed(value["text"])]
    assert json.loads(run("detect", "red.png", "cat", "--max-new-tokens", "4", "--json")[1])["text"] == expected[0].text


def test_caption_accepts_a_box(run):
    status, out, _ = run("caption", "red.png", "--box", "50,30,100,120", "--json", "--max-new-tokens", "3")
    assert status == 0
    assert json.loads(out)["prompt"] == "<loc0205><loc0256><loc0818><loc0512> caption en"
    prompt = json.loads(run("caption", "red.png", "--box", "0,0,200,150", "--prompt", "cap en", "--json")[1])["prompt"]
    assert prompt == "<loc0000><loc0000><loc1023><loc1023> cap en"


@pytest.mark.parametrize("command", ["detect", "segment"])
def test_an_unreadable_picture_is_skipped_and_the_others_are_drawn(run, prefixes, tmp_path, command):
    (tmp_path / "bad.png").write_text("no picture")
    out, dataset = tmp_path / "drawn", tmp_path / "all.json"
    pictures = [str(tmp_path / "bad.png"), "red.png", "blue.png"]
    status, printed, err = run(command, *pictures, "cat", "--coco", str(dataset), "--out", str(out), "--json")
    assert status == 1
    assert [json.loads(line)["image"] for line in printed.splitlines()] == pictures[1:]
    assert [entry["file_name"] for entry in json.loads(dataset.read_text())["images"]] == pictures[1:]
    assert sorted(path.name for path in out.iterdir()) == ["blue.png", "red.png"]
    assert err.startswith(f"pgfunc: {pictures[0]}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--coco", "--json"])
def test_nan_in_a_result_is_an_error_with_json(run, monkeypatch, tmp_path, option):
    broken = DONE._replace(logprobs=[float("nan")] * len(IDS))
    monkeypatch.setattr(pg, "generate", lambda *args, **sampling: [broken])
    options = ["--coco", str(tmp_path / "x.json")] if option == "--coco" else ["--json"]
    status, _, err = run("detect", "red.png", "cat", *options)
    assert status == 2
    assert "nan or infinite, which JSON cannot hold" in err
    assert not list(tmp_path.iterdir())


MISTAKES = {
    "nothing to look for": (["detect", "red.png"], "detect needs to know what to look for"),
    "pictures alone": (["detect", "red.png", "blue.png"], "detect needs to know what to look for"),
    "empty": (["segment", "red.png", ""], "segment needs to know what to look for"),
    "blank": (["detect", "red.png", " "], "detect needs to know what to look for"),
    "both": (["detect", "red.png", "cat", "--prompt", "dog"], "cat: no such file; --prompt already says what"),
    "missing picture": (["detect", "no.png", "cat"], "no.png: no such file"),
    "missing among others": (["detect", "red.png", "no.png", "blue.png", "cat"], "no.png: no such file"),
    "several words": (
        ["detect", "red.png", "apple", "red berry", "plum"],
        "apple: no such file; to look for several things: --label apple --label 'red berry' --label plum",
    ),
    "label and prompt": (["detect", "red.png", "--label", "cat", "--prompt", "cat"], "give one of them"),
    "label and last": (["segment", "red.png", "cat", "--label", "dog"], "cat: no such file; --label already says"),
    "empty label": (["detect", "red.png", "--label", ""], "labels are [''], expected a list of what to look for"),
    "label of two": (["detect", "red.png", "--label", "a ; b"], "label 'a ; b' cannot be written"),
    "folder without pictures": (["detect", "model", "cat"], "model: has no pictures"),
    "pattern": (["detect", "*.gif", "cat"], "*.gif: no file matches"),
    "least confidence": (
        ["detect", "red.png", "cat", "--min-confidence", "2"],
        "min-confidence is 2.0, expected 0 to 1",
    ),
    "temperature": (["detect", "red.png", "cat", "--temperature", "-1"], "temperature is -1.0, expected"),
    "font missing": (["detect", "red.png", "cat", "--font", "no.ttf"], "no.ttf: cannot be read as a font"),
    "kind of out": (["detect", "red.png", "cat", "--out", "x.txt"], "--out x.txt: not a kind of picture"),
    "folder of out": (["detect", "red.png", "cat", "--out", "no/x.png"], "no/x.png: there is no folder no"),
    "folder of coco": (["detect", "red.png", "cat", "--coco", "no/x.json"], "no/x.json: there is no folder no"),
    "out is the picture": (["detect", "red.png", "cat", "--out", "red.png"], "would replace red.png, which is read"),
    "out is its folder": (["detect", "red.png", "blue.png", "cat", "--out", "."], "red.png: would replace red.png"),
    "coco is the picture": (["detect", "red.png", "cat", "--coco", "red.png"], "--coco red.png: would replace red.png"),
    "coco is the model's": (
        ["detect", "red.png", "cat", "--coco", "model/config.json"],
        "--coco model/config.json: is a file of model, which is read",
    ),
    "coco is the drawing": (["detect", "red.png", "cat", "--coco", "x.png", "--out", "sub/../x.png"], "--out writes"),
    "long names": (["detect", "red.png", "cat", "--coco", "x" * 300], "cannot be written (File name too long)"),
    "one name": (["detect", "red.png", "sub/red.png", "cat", "--out", "o"], "another picture would both be o/red.png"),
    "out is a file": (["detect", "red.png", "blue.png", "cat", "--out", "other.safetensors"], "is a file; several"),
    "kind that is read alone": (["detect", "red.png", "cat", "--out", "x.psd"], "--out x.psd: not a kind of picture"),
    "coco is a folder": (["detect", "red.png", "cat", "--coco", "sub"], "sub: is a folder"),
    "masks missing": (["segment", "red.png", "cat", "--masks", "x.npz"], "x.npz: no such file"),
    "masks of another kind": (
        ["segment", "red.png", "cat", "--masks", "model/model.safetensors"],
        "model/model.safetensors: _vq_vae._embedding is missing; expected a mask VQ-VAE",
    ),
    "no edge": (["caption", "red.png", "--box", ""], "--box : expected four numbers XMIN,YMIN,XMAX,YMAX"),
    "three edges": (["caption", "red.png", "--box", "1,2,3"], "--box 1,2,3: expected four numbers XMIN,YMIN,XMAX,YMAX"),
    "outside": (["caption", "red.png", "--box", "1,2,201,4"], "inside red.png, of 200 x 150 pixels"),
    "mirrored": (["caption", "red.png", "--box", "5,2,3,4"], "is not XMIN,YMIN,XMAX,YMAX inside red.png"),
    "nan": (["caption", "red.png", "--box", "1,2,nan,4"], "is not XMIN,YMIN,XMAX,YMAX inside red.png"),
}


ARGUMENTS = [name for name in MISTAKES if not name.startswith("masks")]


@pytest.mark.parametrize("mistake", ARGUMENTS)
def test_arguments_are_checked_before_anything_is_loaded(run, monkeypatch, mistake):
    monkeypatch.setattr(pg, "load", lambda *args, **more: pytest.fail("loaded"))
    assert run(*MISTAKES[mistake][0])[0] == 2


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2_before_the_model_is_asked(run, prefixes, mistake):
    arguments, message = MISTAKES[mistake]
    status, out, err = run(*arguments)
    assert (status, out, prefixes) == (2, "", [])
    assert err.startswith("pgfunc: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("option", "owner"), [("--box", "caption"), ("--masks", "segment")])
def test_an_option_exists_only_where_it_applies(run, option, owner):
    for command in ("caption", "ask", "ocr", "generate", "detect", "segment"):
        status, _, err = run(command, "red.png", option, "x", "cat")
        assert status == 2
        assert ("No such option" in err) == (command != owner)


def test_a_missing_mask_decoder_is_an_error_that_names_the_option(run, prefixes):
    status, out, err = run("segment", "red.png", "cat", model="bare")
    assert (status, out, prefixes) == (2, "", [])
    assert (
        err
        == "pgfunc: bare/masks.safetensors: missing; give a mask decoder with --masks, such as Google's vae-oid.npz\n"
    )


def test_what_to_look_for_may_be_longer_than_a_file_name(run, prefixes):
    names = " ; ".join(f"object {i}" for i in range(400))
    assert run("detect", "red.png", names)[0] == 0
    assert prefixes == [f"detect {names}"]
