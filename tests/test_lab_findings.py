"""The findings run, on few scenes, and find what is clear in each; the scenes are what they say they are."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pgfunc as pg
from examples.lab import common, scenes
from examples.lab.selections import highest, outliers, random_of, widened

ROOT = Path(__file__).parent.parent
PAPERS = sorted(path.stem for path in (ROOT / "examples" / "lab" / "papers").glob("*.py"))


# --- scenes -----------------------------------------------------------------------------------------------------------


def arrays(painted):
    return np.stack([np.asarray(picture) for picture in painted.pictures])


def test_scenes_have_shapes_of_different_colours_and_outlines_and_depend_on_the_seed_and_the_number_only():
    drawn = scenes.draw(6, things=3, seed=1)
    for scene in drawn:
        colours, outlines = zip(*(thing.name.split(" ") for thing in scene.things), strict=True)
        assert len({*colours}) == len({*outlines}) == 3
        assert colours == tuple(thing.colour for thing in scene.things)
    assert [s.things[0].centre for s in scenes.draw(3, 3, 1)] == [s.things[0].centre for s in drawn[:3]]
    assert drawn[0].things[0].centre != scenes.draw(1, 3, 2)[0].things[0].centre
    assert (arrays(scenes.paint(drawn[:2])) == arrays(scenes.paint(drawn))[:2]).all()


def test_a_changed_scene_differs_in_the_changed_thing_only():
    drawn = scenes.draw(8)
    other = [scenes.recoloured(s, 0, "blue" if s.things[0].colour != "blue" else "red") for s in drawn]
    one, two = scenes.paint(drawn), scenes.paint(other)
    gone = scenes.paint([scenes.without(scene, 0) for scene in drawn])
    for i in range(8):
        near = torch.nn.functional.max_pool2d(one.masks[i, 0].float()[None], 9, 1, 4)[0] > 0  # with its soft edge
        inside = (one.masks[i, 0] & ~one.masks[i, 1]).numpy()
        for changed in (two, gone):
            differs = (arrays(one)[i] != arrays(changed)[i]).any(-1)
            assert not differs[~near.numpy()].any()
        assert (arrays(one)[i] != arrays(two)[i]).any(-1)[inside].mean() > 0.95
        assert (gone.masks[i, 0] | ~one.masks[i, 1]).all()  # the other thing, which is no longer hidden
    assert [s.things[0].name.split(" ")[1] for s in other] == [scenes.outline(s, 0) for s in drawn]


def test_the_shipped_checkpoint_knows_these_scenes():
    drawn = scenes.draw(12)
    questions = [f"answer en what color is the {scenes.outline(scene, 0)}?" for scene in drawn]
    found = pg.generate(common.load(), scenes.paint(drawn).pictures, questions)
    assert [each.text for each in found] == [scene.things[0].colour for scene in drawn]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_an_estimate_is_the_mean_with_an_interval_that_contains_it_in_about_95_of_100_cases():
    assert common.estimate(torch.ones(5)) == (1.0, 1.0, 1.0)
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        mean, low, high = common.estimate(torch.rand(80, generator=generator) < 0.3)
        assert low <= mean <= high
        inside += low <= 0.3 <= high
    assert 0.9 <= inside / 200 <= 0.98
    assert [each.mean for each in common.estimates(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))] == [2, 3]


def test_selections_are_what_they_say():
    own = torch.zeros(2, 256, dtype=torch.bool)
    own[0, [0, 17]], own[1, 100] = True, True
    grid = widened(own)[0].view(16, 16)
    assert grid[:3, :3].all()
    assert grid.sum() == 9
    assert widened(own)[1].view(16, 16)[5:8, 3:6].all()
    random = random_of(~own, own.sum(1), seed=0)
    assert not (random & own).any()
    assert random.sum(1).tolist() == [2, 1]
    assert not torch.equal(random, random_of(~own, own.sum(1), seed=1))
    scores = torch.arange(512.0).view(2, 256)
    assert highest(scores, torch.tensor([1, 3])).nonzero()[:, 1].tolist() == [255, 253, 254, 255]
    x = torch.ones(1, 256, 4)
    x[0, 7] = 100
    assert outliers(x, 3).nonzero().tolist() == [[0, 7]]


def test_answers_from_image_tokens_are_those_of_the_pictures():
    model, drawn = common.load(), scenes.draw(3)
    prompt = pg.prepare(model, scenes.paint(drawn).pictures, ["caption en", "ocr", "answer en is there a red star?"])
    last = common.last_token(prompt, model.cfg.vision.tokens)
    with torch.no_grad():
        expected, _ = pg.prefill(model.params, prompt, model.cfg, 0)
    found = common.answers(model, common.encode(model, prompt)["projector"], prompt, last)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# --- findings ---------------------------------------------------------------------------------------------------------


def run(name, tmp_path, count=3):
    finding = importlib.import_module(f"examples.lab.{name}")
    return finding.main(["--scenes", str(count), "--out", str(tmp_path)])


def check_ablation(result):
    assert all(each.mean >= 0.6 for each in result.right.values())
    assert result.wrong["existence"]["object"].mean > result.wrong["existence"]["random"].mean


def check_heads(result):
    ratio = result.ratios["colour"][:, 0].mean(0)  # of the last token: named and other thing, layers, heads
    assert ratio[0, 3].min() > 3 > ratio[1, 3].max()


def check_knockout(result):
    assert result["colour"]["text"][0, 6].drop.mean > 0.5 > result["colour"]["random"][3, 4].drop.mean


def check_vision(result):
    late = {group: sites["vision.7.resid_post"].recovered.mean for group, sites in result.by_site.items()}
    assert abs(result.by_site["object"]["vision.embed"].recovered.mean - 1) < 0.05
    assert late["object"] > late["random"] + 0.1
    assert late["corners"] > late["random"] + 0.1


def check_pointing(result):
    assert result.scores["attention, layer 3"].hit.mean == 1


def check_logit_lens(result):
    last = result.text["colour, last token"]["right answer"].top
    assert last[-1].mean == 1 > last[0].mean


def check_steering(result):
    assert result.sweep["patched"][:4].min() == 1


def check_probing(result):
    assert result.read["object", "colour"][0].mean > result.control["object", "colour"][0].mean


def check_dictionary(result):
    assert result.quality.explained > 0.5
    assert result.changed["none"].mean == 0 < result.kept["none"].mean


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}
SMALLER = {"pointing": {"NODES": 2}, "dictionary": {"STEPS": 150}}


def test_every_finding_is_checked():
    files = {path.stem for path in (ROOT / "examples" / "lab").glob("*.py")}
    assert files - {"asking", "common", "figures", "scenes", "selections"} == CHECKS.keys()
    assert {path.stem for path in (ROOT / "examples" / "images" / "lab").glob("*.png")} - {"patching"} == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_a_finding_runs_and_draws_its_picture(name, tmp_path, monkeypatch):
    for constant, value in SMALLER.get(name, {}).items():
        monkeypatch.setattr(importlib.import_module(f"examples.lab.{name}"), constant, value)
    CHECKS[name](run(name, tmp_path))
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(10**6) or ()) > 50


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_is_reproduced_in_at_most_60_lines_that_name_it(name, tmp_path):
    text = (ROOT / "examples" / "lab" / "papers" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    assert name.removeprefix("p").replace("_", ".") in " ".join(text.split())
    numbers = run(f"papers.{name}", tmp_path, 2)
    estimates = [each for value in numbers.values() for each in (value if isinstance(value, list) else [value])]
    assert all(isinstance(each, common.Estimate) and each.low <= each.mean <= each.high for each in estimates)
    assert len({each.mean for each in estimates}) > 2
