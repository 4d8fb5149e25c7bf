"""The training recipe of `weights/tiny`: a vision encoder that learns to look, then a PaliGemma that learns to speak.

    python -m examples.tiny.train --out weights/tiny

1. Look: the encoder alone, on crowded scenes; a throw-away linear probe names shape, colour and size at every patch.
2. Speak: the whole model, on PaliGemma's own prompt forms; cross-entropy of the suffix (answer and eos). The probe
   stays as a second loss, on the encoder's output that `forward` shows to its tap.

Owns the shape of the checkpoint, the prompts of a scene, the two losses and the loop. Training is resumable: the same
command goes on from `--run`, at a chunk's border, and ends with the same parameters up to rounding. Axes: n scenes,
k prompts of a scene, b rows of a batch, t text tokens, p patches, y x pixels.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from math import cos, pi
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW

import pgfunc as pg
from examples.tiny import scenes, tokenizer
from pgfunc import paligemma, siglip, tree
from pgfunc.config import Config, TextConfig, VisionConfig
from pgfunc.tokenizer import Tokenizer, encode, wrap

CFG = Config(
    VisionConfig(width=128, layers=4, heads=4, hidden=512, image_size=128, patch=16),
    TextConfig(
        vocab=2176, padding=64, width=160, layers=4, heads=4, kv_heads=1, head_dim=32, hidden=512, query_scale=32**-0.5
    ),
    image=2176,
)
SPLIT = {"look": "crowd", "speak": "train"}
SCENES, PROMPTS, ROWS = 1024, 4, 32  # scenes of a chunk, prompts of a scene, rows of a batch
STEPS = SCENES * PROMPTS // ROWS  # of a chunk
TOKENS = 24  # no prompt is longer
PEAK, WARMUP = {"look": 3e-3, "speak": 1.5e-3}, 300  # learning rates
PROBE = 0.3  # weight of the probe's loss beside the suffix's
CLASSES = (1 + len(scenes.OUTLINES), 1 + len(scenes.COLOURS), 1 + len(scenes.SIZES))  # 0 is background


class Chunk(NamedTuple):
    """Scenes as arrays. A prompt's suffix lies in [start, stop) of its tokens."""

    pixels: UInt8[np.ndarray, "n y x 3"]
    patches: Int[np.ndarray, "n p 3"]
    tokens: Int[np.ndarray, "n k t"]
    start: Int[np.ndarray, "n k"]
    stop: Int[np.ndarray, "n k"]


class Batch(NamedTuple):
    prompt: pg.Prompt
    patches: Int[Tensor, "b p 3"]


# --- data ------------------------------------------------------------------------------------------------------------


def prompts(scene: scenes.Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """The caption twice and two questions of different kinds: prefixes and suffixes."""
    asked = scenes.questions(scene, rng)
    kinds = rng.permutation(sorted({q.kind for q in asked}))[:2]
    picked = [[q for q in asked if q.kind == kind] for kind in kinds]
    answers = [same[rng.integers(len(same))] for same in picked]
    return [("caption en", scenes.caption(scene))] * 2 + [(f"answer en {q.text}", q.answer) for q in answers]


def patch_classes(scene: scenes.Scene) -> Int[np.ndarray, "p 3"]:
    """Shape, colour and size at every patch whose centre lies in an object's box; 0 elsewhere."""
    places = (np.arange(CFG.vision.grid) + 0.5) / CFG.vision.grid
    out = np.zeros((CFG.vision.grid, CFG.vision.grid, 3), dtype=np.int64)
    tables = [list(table) for table in (scenes.OUTLINES, scenes.COLOURS, scenes.SIZES)]
    for thing in scene.objects:
        ymin, xmin, ymax, xmax = thing.box
        inside = np.outer((ymin < places) & (places < ymax), (xmin < places) & (places < xmax))
        values = (thing.shape, thing.colour, thing.size)
        out[inside] = [1 + table.index(value) for table, value in zip(tables, values, strict=True)]
    return out.reshape(-1, 3)


def chunk(stage: str, index: int) -> Chunk:
    """Scenes index * SCENES onwards, rendered and, in the second stage, asked and tokenized."""
    words, rng, side = vocabulary(), np.random.default_rng((99, index)), CFG.vision.image_size
    drawn = [scenes.sample(SPLIT[stage], i) for i in range(index * SCENES, (index + 1) * SCENES)]
    tokens = np.full((SCENES, PROMPTS, TOKENS), CFG.pad)
    start, stop = np.zeros((2, SCENES, PROMPTS), dtype=np.int64)
    for n, scene in enumerate(drawn if stage == "speak" else []):
        for k, texts in enumerate(prompts(scene, rng)):
            # the newline is tokenized by itself (big_vision)
            prefix, suffix = (encode(words, text) for text in texts)
            row = [CFG.bos, *prefix, words.newline, *suffix, CFG.eos]
            tokens[n, k, : len(row)] = row
            start[n, k], stop[n, k] = len(row) - len(suffix) - 1, len(row)
    pixels = np.stack([scenes.render(scene, side, side) for scene in drawn])
    return Chunk(pixels, np.stack([patch_classes(scene) for scene in drawn]), tokens, start, stop)


@cache
def vocabulary() -> Tokenizer:
    return wrap(tokenizer.build(), "examples.tiny.tokenizer")


def batches(data: Chunk, order: Int[np.ndarray, "nk"]) -> Iterator[Batch]:
    """Every prompt of every scene once, in that order."""
    for rows in order.reshape(STEPS, ROWS):
        n, k = rows // PROMPTS, rows % PROMPTS
        pixels = torch.from_numpy(data.pixels[n]).float() / 127.5 - 1
        place, start, stop = np.arange(data.stop[n, k].max()), data.start[n, k, None], data.stop[n, k, None]
        valid, causal = torch.from_numpy(place < stop), torch.from_numpy((place >= start) & (place < stop))
        tokens = torch.from_numpy(data.tokens[n, k, : len(place)])
        prompt = pg.Prompt(rearrange(pixels, "b y x c -> b 1 c y x"), tokens, valid, causal)
        yield Batch(prompt, torch.from_numpy(data.patches[n]))


# --- losses ----------------------------------------------------------------------------------------------------------


def look(params: paligemma.Params, probe: Float[Tensor, "c d"], batch: Batch) -> Tensor:
    """The probe's loss on the encoder alone."""
    pixels = rearrange(batch.prompt.pixels, "b 1 c y x -> b c y x")
    return probed(probe, siglip.encode_image(params.vision, pixels, CFG.vision), batch.patches)


def speak(params: paligemma.Params, probe: Float[Tensor, "c d"], batch: Batch) -> Tensor:
    """Cross-entropy of the suffix tokens, each predicted from all before it, and the probe's loss."""
    seen = {}
    logits = pg.forward(params, batch.prompt, CFG, tap=lambda name, x: seen.setdefault(name, x))[:, :-1]
    suffix = (batch.prompt.causal & batch.prompt.valid)[:, 1:]
    loss = F.cross_entropy(logits[suffix], batch.prompt.tokens[:, 1:][suffix])
    return loss + PROBE * probed(probe, seen["vision.out"], batch.patches)


def probed(probe: Float[Tensor, "c d"], seen: Float[Tensor, "b p d"], patches: Int[Tensor, "b p 3"]) -> Tensor:
    """Cross-entropy of shape, colour and size at every patch; background counts a fifth."""
    logits = rearrange(F.linear(seen, probe).float(), "b p c -> (b p) c").split(CLASSES, dim=-1)
    targets = rearrange(patches, "b p a -> a (b p)")
    weights = [torch.tensor([0.2] + [1.0] * (count - 1)) for count in CLASSES]
    return torch.stack([F.cross_entropy(*each) for each in zip(logits, targets, weights, strict=True)]).mean()


# --- the loop --------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What training changes, in place. The leaves are those of the parameters, and the probe."""

    params: paligemma.Params
    probe: Float[Tensor, "c d"]
    optimizer: AdamW

    @property
    def leaves(self) -> list[Tensor]:
        return [*tree.flatten(self.params).values(), self.probe]


def start(seed: int) -> State:
    """Random parameters, but positions begin as sines of row and column: neighbours are alike from the first step."""
    params = paligemma.init(CFG, seed)
    place = torch.arange(CFG.vision.grid)[:, None] * 0.01 ** torch.linspace(0, 1, CFG.vision.width // 4)
    waves = 0.7 * torch.cat([place.sin(), place.cos()], -1)
    grid = [repeat(waves, "y d -> (y x) d", x=CFG.vision.grid), repeat(waves, "x d -> (y x) d", y=CFG.vision.grid)]
    params = tree.replace(params, {"vision.position": torch.cat(grid, -1)})
    params, probe = tree.map(lambda leaf: leaf.requires_grad_(), (params, torch.zeros(sum(CLASSES), CFG.vision.width)))
    leaves = [*tree.flatten(params).values(), probe]
    return State(params, probe, AdamW(leaves, betas=(0.9, 0.98), weight_decay=0.02))


def rate(stage: str, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    return PEAK[stage] * min(1.0, (step + 1) / WARMUP) * (0.505 + 0.495 * cos(pi * step / steps))


def update(state: State, stage: str, batch: Batch) -> float:
    """One step: bf16 copies of float32 parameters, gradients clipped to norm 1."""
    low = tree.map(lambda leaf: leaf.bfloat16(), (state.params, state.probe))
    # the fused attention trains slower than the plain one here: 119 against 149 rows a second (bf16, two cores)
    with sdpa_kernel(SDPBackend.MATH):
        loss = {"look": look, "speak": speak}[stage](*low, batch)
        state.optimizer.zero_grad()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(state.leaves, 1.0)
    state.optimizer.step()
    return float(loss.detach())


def train(lengths: dict[str, int], seed: int, run: Path) -> paligemma.Params:
    """Both stages, chunk after chunk, from the last one saved."""
    state = start(seed)
    plan = [(stage, index) for stage, length in lengths.items() for index in range(length)]
    done, spent = resume(run / "state.pt", state)
    began = time.monotonic() - spent
    with ProcessPoolExecutor(1, initializer=os.nice, initargs=(10,)) as pool:
        # one chunk ahead: the next is rendered while this one is learned
        ahead = [pool.submit(chunk, *each) for each in plan[done : done + 1]]
        for count, (stage, index) in enumerate(plan[done:], done + 1):
            data = ahead.pop().result()
            ahead += [pool.submit(chunk, *each) for each in plan[count : count + 1]]
            order = np.random.default_rng((seed, count)).permutation(SCENES * PROMPTS)
            losses = []
            for step, batch in enumerate(batches(data, order), index * STEPS):
                state.optimizer.param_groups[0]["lr"] = rate(stage, step, lengths[stage] * STEPS)
                losses.append(update(state, stage, batch))
            spent = time.monotonic() - began
            save(run / "state.pt", state, count, spent)
            log = {
                "stage": stage,
                "step": count * STEPS,
                "loss": round(float(np.mean(losses)), 4),
                "seconds": round(spent),
            }
            print(json.dumps(log), flush=True)
    return tree.map(lambda leaf: leaf.detach(), state.params)


def save(path: Path, state: State, done: int, spent: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"leaves": state.leaves, "optimizer": state.optimizer.state_dict(), "done": done, "spent": spent}
    torch.save(values, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def resume(path: Path, state: State) -> tuple[int, float]:
    """Fill the state from the file, if there is one: the chunks done, and the seconds they took."""
    if not path.exists():
        return 0, 0.0
    saved = torch.load(path, weights_only=True)
    with torch.no_grad():
        for leaf, value in zip(state.leaves, saved["leaves"], strict=True):
            leaf.copy_(value)
    state.optimizer.load_state_dict(saved["optimizer"])
    return saved["done"], saved["spent"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"))
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="where an interrupted training goes on")
    parser.add_argument("--look", type=int, default=48, help=f"length of the first stage, in chunks of {STEPS} steps")
    parser.add_argument("--speak", type=int, default=48, help="length of the second stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    params = train({"look": args.look, "speak": args.speak}, args.seed, args.run)
    pg.save(pg.Model(CFG, params, vocabulary()), args.out)


if __name__ == "__main__":
    main()
