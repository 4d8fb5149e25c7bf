"""The training of the tiny checkpoint on a CPU: from the first stage to a model that writes what it was taught."""

import itertools
import shutil
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pgfunc as pg
from examples.tiny import batches, export, fit, masks, recipe, render, scenes, texts, tokenizer, train, world
from examples.tiny.recipe import Plan
from pgfunc import paligemma, siglip_dual, tree
from pgfunc.checkpoint.siglip import load_siglip
from pgfunc.config import SiglipTextConfig, TextConfig, VisionConfig
from pgfunc.errors import NumericalError
from pgfunc.objects import detect, segment, vqvae
from pgfunc.siglip_dual import prompt as dual_prompt
from pgfunc.train import finetune

SMALL = recipe.small()


def command(module, folder: Path, *words: str) -> None:
    """Run a module's `main` as the shell does, at toy sizes."""
    before, sys.argv = sys.argv, [module.__name__, *words, "--small", "--run", str(folder)]
    try:
        module.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """All stages at toy sizes, by the command of the recipe."""
    folder = tmp_path_factory.mktemp("run")
    command(train, folder, *recipe.STAGES)
    return folder


@pytest.fixture(scope="module")
def exported(trained) -> Path:
    command(export, trained, "--out", str(trained / "weights"))
    return trained / "weights"


def job(folder: Path, until: float = float("inf"), seed: int = 0) -> train.Job:
    return train.job(
        Namespace(small=True, position="learned", run=folder, workers=0, seed=seed, seconds=0)
    )._replace(until=until)  # fmt: skip


# --- all stages, at toy sizes -----------------------------------------------------------------------------------------


def test_every_stage_leaves_its_parameters_and_a_log(trained):
    left = {path.name for path in trained.iterdir()}
    assert {f"{stage}.safetensors" for stage in recipe.STAGES} | {"log.jsonl"} <= left
    assert not [name for name in left if "going" in name or "part" in name]
    assert [line.count('"step": 4') for line in (trained / "log.jsonl").read_text().splitlines()] == [1] * 4


def test_what_is_exported_loads_and_runs(exported):
    model, siglip = pg.load(exported, dtype="float32"), load_siglip(exported / "siglip", dtype="float32")
    coder = segment.load(exported / "masks.safetensors")
    picture = Image.new("RGB", (224, 224), "navy")
    (done,) = pg.generate(model, picture, "caption en", max_new_tokens=3)
    assert done.finish in ("eos", "length")
    assert segment.parse(detect.token_text((0, 0, 500, 500), range(16)), 224, 224, coder)[0].mask.shape == (224, 224)
    images = siglip_dual.embed_images(siglip.params, dual_prompt.pixels(siglip, [picture]), siglip.cfg)
    said = siglip_dual.embed_texts(siglip.params, dual_prompt.text_ids(siglip, ["a cup"]), siglip.cfg)
    assert torch.isfinite(siglip_dual.logits(siglip.params, images, said)).all()


def test_what_is_exported_is_what_was_trained(trained, exported):
    spoken = load_file(trained / "speak.safetensors")
    loaded = tree.flatten(pg.load(exported, dtype="bfloat16").params)
    assert set(loaded) == set(spoken)
    assert all(torch.equal(loaded[name], leaf.bfloat16()) for name, leaf in spoken.items())
    siglip = load_siglip(exported / "siglip", dtype="bfloat16").params
    align = load_file(trained / "align.safetensors")
    half = tree.flatten(siglip._replace(vision=()))
    assert all(torch.equal(half[name], leaf.bfloat16()) for name, leaf in align.items())
    assert all(torch.equal(leaf, loaded[f"vision.{name}"]) for name, leaf in tree.flatten(siglip.vision).items())


def test_speak_starts_from_the_vision_encoder_of_contrast_and_align_leaves_it_alone(trained):
    contrast, align = (load_file(trained / f"{stage}.safetensors") for stage in ("contrast", "align"))
    spoken = load_file(trained / "speak.safetensors")
    name = "vision.patch"
    before = siglip_dual.init(SMALL.siglip).vision.patch
    assert 0 < (spoken[name] - contrast[name]).abs().mean() < 0.1 * contrast[name].abs().mean()
    assert not torch.equal(contrast[name], before)
    assert not [key for key in align if key.startswith("vision.")]


def test_a_finished_stage_is_not_trained_again(trained, capsys):
    before = {path: path.read_bytes() for path in trained.glob("*.safetensors")}
    command(train, trained, *recipe.STAGES)
    assert {path: path.read_bytes() for path in trained.glob("*.safetensors")} == before
    assert not capsys.readouterr().out


def test_patch_positions_start_alike_for_neighbours(tmp_path):
    vision = VisionConfig(width=32, layers=1, heads=2, hidden=8, image_size=224, patch=28)
    cfg = recipe.recipe(vision, SMALL.model.text, SMALL.siglip.text, {})
    place = train.start_contrast(job(tmp_path)._replace(recipe=cfg)).vision.position.reshape(8, 8, 32)
    near, far = (place[0, 0] - place[0, 1]).norm(), (place[0, 0] - place[0, 7]).norm()
    assert near < far
    torch.testing.assert_close(place[3, 2, :16], place[3, 7, :16])  # the first half knows the row
    torch.testing.assert_close(place[3, 2, 16:], place[6, 2, 16:])  # the second the column


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["contrast", "speak", "align"])
def test_a_stage_interrupted_after_each_step_ends_with_the_same_bits(trained, tmp_path, stage):
    for needed in ("masks", "contrast", "speak"):
        if needed != stage:
            shutil.copy(trained / f"{needed}.safetensors", tmp_path)
    at = job(tmp_path, until=0)
    calls = [train.TRAIN[stage](at) for _ in range(SMALL.plans[stage].steps)]
    assert calls == [False] * (len(calls) - 1) + [True]
    assert (tmp_path / f"{stage}.safetensors").read_bytes() == (trained / f"{stage}.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.going*"))


def test_another_seed_gives_other_scenes(tmp_path):
    at = job(tmp_path)
    first, second = (next(iter(train.painted(at._replace(seed=seed), "contrast", "", 0)))[0] for seed in (0, 1))
    assert not torch.equal(first.masks, second.masks)


def test_a_loss_that_is_no_number_stops_the_stage(tmp_path):
    plan = Plan(steps=3, scenes=1, peak=1.0, warmup=0)
    with pytest.raises(NumericalError, match="masks: the loss is nan at step 3"):
        fit.fit("masks", {"x": torch.ones(1)}, lambda p, _: (p["x"].sum() * float("nan"), {}),
                lambda n: range(n, 3), plan, tmp_path, float("inf"))  # fmt: skip


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_learn_what_one_would(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    (alone := tmp_path / "alone").mkdir()
    both = torch.cat([SHARES, SHARES.flip(1)], 1)
    fit.fit("toy", {"x": torch.ones(3)}, toy, lambda n: iter(both[n:]), TOY, alone, float("inf"))
    together = load_file(tmp_path / "toy.safetensors")["x"]
    torch.testing.assert_close(together, load_file(alone / "toy.safetensors")["x"])
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1  # one of them writes
    assert not (together == 1).any()


SHARES = torch.arange(60.0).reshape(5, 4, 3).sin()  # five batches of four rows
TOY = Plan(steps=5, scenes=8, peak=0.1, warmup=1)


def toy(params, rows):
    return (rows * params["x"] - 1).square().mean(), {}


def one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = SHARES if rank == 0 else SHARES.flip(1)
    ends = []
    for until in (0, 0, float("inf")):  # stopped twice, when the time of one of them is up; gone on with
        late = until if rank else float("inf")
        ends.append(fit.fit("toy", {"x": torch.ones(3)}, toy, lambda n: iter(rows[n:]), TOY, Path(folder), late))
        torch.distributed.barrier()
    assert ends == [False, False, True]
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("stage", "written"), [("contrast", "description"), ("speak", "prompts")])
def test_processes_share_out_the_scenes_of_one(tmp_path, stage, written):
    def batch(process: int, processes: int) -> batches.Batch:
        at = job(tmp_path)._replace(process=process, processes=processes)
        return train.stream(at, stage, written)[1]

    whole, parts = batch(0, 1), [batch(rank, 2) for rank in (0, 1)]
    assert torch.equal(whole.layout.tones, torch.cat([each.layout.tones for each in parts]))
    assert torch.equal(whole.texts.tokens, torch.cat([each.texts.tokens for each in parts]))


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_speak_is_the_fine_tuning_loss_of_every_prompt_with_its_own_picture(trained):
    at = job(trained)
    params = tree.map(lambda leaf: leaf.bfloat16(), paligemma.init(SMALL.model, 1))
    batch = next(iter(train.prompts(at, 0)))
    pixels, tokens, valid, causal, _ = batch
    ours, _ = train.speak(SMALL.model, SMALL.prompts, params, batch)
    each = train.scaled(pixels).repeat_interleave(SMALL.prompts, 0)
    theirs = finetune.loss(params, pg.Prompt(each, tokens, valid, causal), SMALL.model)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-3)  # bf16: the same sums in another order


# --- overfitting ------------------------------------------------------------------------------------------------------

LARGER = recipe.recipe(
    VisionConfig(width=64, layers=2, heads=2, hidden=128, image_size=224, patch=28),
    TextConfig(vocab=3200, padding=64, width=64, layers=2, heads=2, kv_heads=1, head_dim=32, hidden=128,
               query_scale=32**-0.5),
    SiglipTextConfig(vocab=2048, width=64, layers=1, heads=2, hidden=64, out=64),
    {"speak": Plan(steps=90, scenes=4, peak=5e-3, warmup=10)},
)  # fmt: skip


def lesson(vocab: batches.Vocabulary, at: world.World, coder: vqvae.Params):
    """Four scenes with a sign, a batch of what is asked of them, and the answers as text."""
    drawn = [scenes.draw(at.catalog, "train", index) for index in range(60)]
    drawn = [scene for scene in drawn if scene.sign and 1 <= len(scene.things) <= 2][:4]
    painted = render.render(at.bank("cpu"), render.layout(drawn), 224, seed=0)
    crops = masks.crops(painted.masks.flatten(0, 1), painted.boxes.flatten(0, 1))
    codes = vqvae.quantize(coder.codebook, vqvae.encode(coder, crops)).reshape(4, 4, 16)
    rng, asked = np.random.default_rng(0), []
    for i, scene in enumerate(drawn):
        names = [thing.name for thing in scene.things]
        rows = [texts.captions(scene, at.catalog, rng), texts.ocr(scene, at.catalog, rng)]
        asked += [(i, row) for row in [*rows, texts.located("detect", scene, list(dict.fromkeys(names))),
                                       texts.located("segment", scene, names[:1])]]  # fmt: skip
    packed = batches.pack([batches.template(vocab, row) for _, row in asked], [i for i, _ in asked], 64)
    tokens, learned = batches.fill(packed, painted.boxes, codes, vocab), (packed.causal & packed.valid).sum()
    batch = painted.pixels, tokens, packed.valid, packed.causal, learned
    return asked, batch, answers(asked, drawn, painted, codes)


def answers(asked, drawn, painted: render.Rendered, codes: torch.Tensor) -> list[str]:
    """The suffixes with their boxes and masks, written by pgfunc's own functions."""
    said = []
    for i, row in asked:
        boxes = [detect.Box(*(painted.boxes[i, j] * 224).tolist()) for j in row.things]
        pieces = [
            detect.write(detect.to_locations(box, 224, 224), drawn[i].things[j].name,
                         codes[i, j].tolist() if row.task == "segment" else ())
            for j, box in zip(row.things, boxes, strict=True)
        ]  # fmt: skip
        said.append(" ; ".join(pieces) if pieces else row.suffix)
    return said


def test_a_model_that_learned_four_scenes_by_heart_writes_their_captions_boxes_masks_and_signs(tmp_path):
    at, coder = world.small(), vqvae.init(3)
    vocab = batches.vocabulary(pg.tokenizer.wrap(tokenizer.build(at.catalog.names), "the tokenizer"))
    asked, batch, expected = lesson(vocab, at, coder)
    loss = partial(train.speak, LARGER.model, 4)
    start, plan = paligemma.init(LARGER.model), LARGER.plans["speak"]
    assert fit.fit("speak", start, loss, lambda n: itertools.repeat(batch, plan.steps - n), plan, tmp_path, 1e30)
    fit.write(tmp_path / "masks.safetensors", tree.flatten(coder))
    fit.write(tmp_path / "align.safetensors", tree.flatten(siglip_dual.init(LARGER.siglip)._replace(vision=())))
    export.export(LARGER, at.catalog.names, tmp_path, tmp_path / "out")
    model = pg.load(tmp_path / "out", dtype="float32")
    pictures = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in batch[0]]
    done = pg.generate(model, [pictures[i] for i, _ in asked], [row.prefix for _, row in asked], max_new_tokens=60)
    assert [completion.text for completion in done] == expected
    assert {completion.finish for completion in done} == {"eos"}


# --- masks ------------------------------------------------------------------------------------------------------------


def test_follow_keeps_running_means_of_the_features_that_choose_a_code():
    generator = torch.Generator().manual_seed(0)
    codes = masks.Codes(torch.rand(128, generator=generator) + 1, torch.randn(128, 512, generator=generator))
    features = torch.randn(600, 512, generator=generator)
    found = masks.follow(codes, features, generator)
    book, given = (codes.total / codes.chosen[:, None]).numpy(), features.numpy()
    nearest = ((given[:, None] - book[None]) ** 2).sum(-1).argmin(1)
    chosen, total = 0.99 * codes.chosen.numpy(), 0.99 * codes.total.numpy()
    for feature, code in zip(given, nearest, strict=True):
        chosen[code] += 0.01
        total[code] += 0.01 * feature
    np.testing.assert_allclose(found.chosen, chosen, rtol=1e-4)
    np.testing.assert_allclose(found.total, total, atol=1e-4)
    np.testing.assert_allclose(found.book, total / chosen[:, None], atol=1e-4)


def test_a_code_that_nothing_chooses_starts_anew_at_a_feature():
    chosen = torch.ones(128)
    chosen[7] = 0.01
    codes = masks.Codes(chosen, chosen[:, None] * torch.randn(128, 512))
    features = torch.randn(40, 512)
    found = masks.follow(codes, features, torch.Generator().manual_seed(0))
    assert (found.book[7] - features).abs().amax(1).min() < 1e-4
    assert found.chosen[7] == pytest.approx(float(found.chosen.mean()), rel=0.02)


def blobs(count: int, generator: torch.Generator) -> torch.Tensor:
    """Filled ellipses that touch the edges of their crop, or half of them."""
    place = torch.linspace(-1, 1, 64)
    y, x = place[None, :, None], place[None, None, :]
    tilt, cut = torch.rand(2, count, 1, 1, generator=generator) * 2 - 1
    return ((y**2 + x**2 + tilt * x * y < 1 - 0.3 * tilt.abs()) & (y > cut - 0.5)).float()


def test_the_codes_learn_to_say_masks(tmp_path):
    generator, plan = torch.Generator().manual_seed(0), Plan(steps=80, scenes=0, peak=2e-3, warmup=5)
    learned = masks.train((blobs(12, generator) for _ in range(plan.steps)), plan, 0, tmp_path, "cpu")
    found = blobs(64, generator)

    def iou(params: vqvae.Params) -> float:
        codes = vqvae.quantize(params.codebook, vqvae.encode(params, found))
        said = vqvae.decode(params, vqvae.lookup(params.codebook, codes)) > 0
        return float(masks.iou(said, found > 0.5).mean())

    full = float(masks.iou(torch.ones_like(found) > 0, found > 0.5).mean())
    assert iou(vqvae.init(0)) < full < 0.8
    assert iou(learned) > 0.85


def test_the_iou_of_masks():
    a, b = torch.zeros(3, 2, 2, dtype=torch.bool), torch.zeros(3, 2, 2, dtype=torch.bool)
    a[0, 0], b[0, :, 0] = True, True
    a[1], b[1] = True, True
    assert masks.iou(a, b).tolist() == pytest.approx([1 / 3, 1, 0])


def test_time_is_up_is_said_and_the_same_command_goes_on(tmp_path, capsys, trained):
    for needed in ("masks", "contrast"):
        shutil.copy(trained / f"{needed}.safetensors", tmp_path)
    command(train, tmp_path, "speak", "--seconds", "0")
    assert capsys.readouterr().out.endswith("speak: time is up; the same command goes on\n")
    assert (tmp_path / "speak.going.safetensors").exists()
    command(train, tmp_path, "speak")
    assert (tmp_path / "speak.safetensors").read_bytes() == (trained / "speak.safetensors").read_bytes()
