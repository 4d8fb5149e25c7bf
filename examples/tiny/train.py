"""The training of the shipped checkpoint, a stage a command; an interrupted stage goes on where it was.

    python -m examples.tiny.train masks contrast speak align --run runs/tiny

    masks     the VQ-VAE of masks
    contrast  the vision encoder, beside a text encoder (SigLIP's loss)
    speak     the whole model, on the mix of all tasks (cross-entropy of the suffix)
    align     a text encoder for the vision encoder as it then is, which stays (LiT, Zhai et al. 2022)

Several GPUs divide the scenes of each batch of the stage `speak`, which is the long one:

    torchrun --nproc-per-node 2 -m examples.tiny.train speak

`--small` runs the same code at toy sizes on a CPU, with a stand-in for the fetched pictures.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

import pgfunc as pg
from examples.tiny import batches, fit, masks, recipe, render, tokenizer, world
from examples.tiny.recipe import Recipe
from pgfunc import gemma, paligemma, siglip_dual, tree
from pgfunc.config import Config, SiglipConfig
from pgfunc.objects import vqvae
from pgfunc.train import contrastive


class Job(NamedTuple):
    """What every stage needs."""

    recipe: Recipe
    world: world.World
    vocab: batches.Vocabulary
    bank: render.Bank
    folder: Path
    device: str
    workers: int
    seed: int
    until: float
    process: int  # of so many
    processes: int


def stream(job: Job, stage: str, written: str) -> batches.Stream:
    """This process's share of the batches of a stage."""
    plan, number = job.recipe.plans[stage], recipe.STAGES.index(stage)
    share = plan.scenes // job.processes
    prompts = job.recipe.prompts if written == "prompts" else 0
    start = ((job.seed * len(recipe.STAGES) + number) << 32) + job.process * share
    return batches.Stream(job.world.catalog, job.vocab, written, share, prompts, job.recipe.width, job.recipe.side,
                          start, stride=plan.scenes)  # fmt: skip


def painted(job: Job, stage: str, written: str, first: int) -> Iterable[tuple[render.Rendered, batches.Texts]]:
    """The rendered batches of a stage from number `first` on, with their texts, on the device."""
    last = job.recipe.plans[stage].steps
    for i, batch in enumerate(batches.loader(stream(job, stage, written), first, last, job.workers), first):
        layout, texts = tree.map(lambda leaf: leaf.to(job.device, non_blocking=True), tuple(batch))
        yield render.render(job.bank, layout, job.recipe.side, seed=i * job.processes + job.process), texts


def scaled(pixels: Tensor) -> Tensor:
    return rearrange(pixels, "s c y x -> s 1 c y x").float() / 127.5 - 1


# --- masks -----------------------------------------------------------------------------------------------------------


def train_masks(job: Job) -> bool:
    def crops() -> Iterable[Tensor]:
        for drawn, _ in painted(job, "masks", "", 0):
            found = drawn.masks.flatten(2).sum(-1) > 60
            yield masks.crops(drawn.masks[found], drawn.boxes[found])

    params = masks.train(crops(), job.recipe.plans["masks"], job.seed, job.folder, job.device)
    fit.write(job.folder / "masks.safetensors", tree.flatten(params))
    return True


# --- contrast and align ----------------------------------------------------------------------------------------------


def start_contrast(job: Job) -> siglip_dual.DualParams:
    """Random, but patch positions begin as sines of row and column: neighbours are alike from the first step."""
    params, vision = siglip_dual.init(job.recipe.siglip, job.seed), job.recipe.model.vision
    if vision.position != "learned":
        return params
    place = torch.arange(vision.grid)[:, None] * 0.01 ** torch.linspace(0, 1, vision.width // 4)
    waves = 0.7 * torch.cat([place.sin(), place.cos()], -1)
    grid = [repeat(waves, "y d -> (y x) d", x=vision.grid), repeat(waves, "x d -> (y x) d", y=vision.grid)]
    return tree.replace(params, {"vision.position": torch.cat(grid, -1)})


def train_contrast(job: Job) -> bool:
    params = tree.map(lambda leaf: leaf.to(job.device), start_contrast(job))
    loss = torch.compile(partial(contrast, job.recipe.siglip), disable=job.device == "cpu")
    return fit.fit("contrast", params, loss, partial(pairs, job, "contrast"), job.recipe.plans["contrast"], job.folder,
                   job.until)  # fmt: skip


def train_align(job: Job) -> bool:
    """The other half alone: the vision encoder is the one that learned to speak."""
    params = siglip_dual.init(job.recipe.siglip, job.seed)
    spoken = fit.read(job.folder / "speak.safetensors", paligemma.init(job.recipe.model))
    locked = tree.map(lambda leaf: leaf.to(job.device).bfloat16(), spoken.vision)
    half = tree.map(lambda leaf: leaf.to(job.device), params._replace(vision=()))
    loss = torch.compile(partial(contrast, job.recipe.siglip, vision=locked), disable=job.device == "cpu")
    return fit.fit("align", half, loss, partial(pairs, job, "align"), job.recipe.plans["align"], job.folder, job.until)


def pairs(job: Job, stage: str, first: int) -> Iterable[tuple[Tensor, Tensor]]:
    for drawn, texts in painted(job, stage, "description", first):
        yield drawn.pixels, texts.tokens


def contrast(
    cfg: SiglipConfig, params: siglip_dual.DualParams, batch: tuple[Tensor, Tensor], vision: Any = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """SigLIP's loss of a batch of pictures and their descriptions, the encoders in bf16."""
    pixels, ids = batch
    low = tree.map(lambda leaf: leaf.bfloat16(), params)
    low = low._replace(vision=vision) if vision else low
    images = siglip_dual.embed_images(low, rearrange(scaled(pixels), "s 1 c y x -> s c y x"), cfg)
    texts = siglip_dual.embed_texts(low, ids, cfg)
    found = contrastive.recall(images.detach()[:100], texts.detach()[:100])
    return contrastive.sigmoid_loss(images, texts, params.scale, params.bias), {"recall": found.texts}


# --- speak -----------------------------------------------------------------------------------------------------------


def train_speak(job: Job) -> bool:
    params = paligemma.init(job.recipe.model, job.seed)
    seen = fit.read(job.folder / "contrast.safetensors", siglip_dual.init(job.recipe.siglip)).vision
    params = tree.map(lambda leaf: leaf.to(job.device), params._replace(vision=seen))
    loss = torch.compile(partial(speak, job.recipe.model, job.recipe.prompts), disable=job.device == "cpu")
    return fit.fit("speak", params, loss, partial(prompts, job), job.recipe.plans["speak"], job.folder, job.until)


def prompts(job: Job, first: int) -> Iterable[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Pixels a scene; tokens with their places and codes, and what is valid and causal, a row; the number of tokens to
    learn (of several processes, their mean)."""
    coder = fit.read(job.folder / "masks.safetensors", vqvae.init())
    coder = tree.map(lambda leaf: leaf.to(job.device), coder)
    for drawn, texts in painted(job, "speak", "prompts", first):
        crops = masks.crops(drawn.masks.flatten(0, 1), drawn.boxes.flatten(0, 1).clamp(0, 1))
        codes = vqvae.quantize(coder.codebook, vqvae.encode(coder, crops))
        codes = rearrange(codes, "(s k) c -> s k c", k=render.THINGS)
        count = (texts.causal & texts.valid).sum().float()
        if job.processes > 1:
            dist.all_reduce(count)
        tokens = batches.fill(texts, drawn.boxes, codes, job.vocab)
        yield drawn.pixels, tokens, texts.valid, texts.causal, count / job.processes


def speak(cfg: Config, count: int, params: pg.Params, batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the suffixes in bf16; each picture is encoded once for its `count` prompts."""
    pixels, tokens, valid, causal, learned = batch
    low = tree.map(lambda leaf: leaf.bfloat16(), params)
    image = repeat(paligemma.encode_images(low, scaled(pixels), cfg), "s p d -> (s n) p d", n=count)
    x = paligemma.hidden(low, image, pg.Prompt(pixels, tokens, valid, causal), cfg)
    logits = gemma.unembed(low.language, x[:, -tokens.shape[1] : -1], cfg.text)
    target = (causal & valid)[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none") * target.flatten()
    right = (logits.detach().argmax(-1) == tokens[:, 1:]) | ~target
    return losses.sum() / learned, {"right": right.all(-1).float().mean()}


# --- the command -----------------------------------------------------------------------------------------------------

TRAIN: dict[str, Callable[[Job], bool]] = {
    "masks": train_masks, "contrast": train_contrast, "speak": train_speak, "align": train_align,
}  # fmt: skip


def job(args: argparse.Namespace) -> Job:
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    chosen = (recipe.small if args.small else recipe.full)(args.position)
    found = world.small() if args.small else world.load(args.data)
    vocab = batches.vocabulary(pg.tokenizer.wrap(tokenizer.of_run(args.run, found.catalog.names), "the tokenizer"))
    device = "cuda" if torch.cuda.is_available() and not args.small else "cpu"
    group = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Job(chosen, found, vocab, found.bank(device), args.run, device, args.workers, args.seed,
               time.monotonic() + args.seconds, *group)  # fmt: skip


def join() -> None:
    """This process's place among those that torchrun started: its GPU, and the group."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=recipe.STAGES)
    parser.add_argument("--data", type=Path, default=Path("runs/tiny"), help="what examples.tiny.fetch left")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="where the stages leave their parameters")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, to be resumed")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--position", choices=["learned", "rope2d"], default="learned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:  # torchrun set it
        if args.stages != ["speak"]:
            parser.error("torchrun divides the stage `speak` alone: run the others by themselves")
        join()
    at = job(args)
    if at.recipe.plans["speak"].scenes % at.processes:
        parser.error(f"{at.processes} processes cannot share {at.recipe.plans['speak'].scenes} scenes evenly")
    for stage in args.stages:
        if not (args.run / f"{stage}.safetensors").exists() and not TRAIN[stage](at):
            if fit.writes():
                print(f"{stage}: time is up; the same command goes on")
            break
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
