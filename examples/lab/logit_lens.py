"""What do the residual streams say before the last layer?

    python -m examples.lab.logit_lens

Method: `lab.lens` reads the residual stream of 100 scenes with three shapes, which are asked for the colour of one
shape, or for its existence (in every other scene with a colour that it does not have). A reading counts if the right
answer is first of the possible answers: 12 colours, or yes and no. At image tokens, that of the shape's colour.

Control: the same lens with the answer of another scene, and through random rotations of the stream. At image tokens:
the colour of another shape, the tokens of the background, and a rotation. A fixed guess has 1/12, or 1/2.

Result: the last token does not hold the right colour after layer 2 (0.05 [0.01, 0.10]); after layers 3 to 5 it does in
0.58 [0.48, 0.67], 0.90 [0.84, 0.95] and 1.00. Existence is decided after layer 3 (0.99 [0.97, 1.00]; after layer 2,
0.50 [0.40, 0.60]). The kind of answer comes first: after layer 2 the first of all tokens is some colour in 0.96 [0.92,
0.99], and `yes` or `no` in all scenes, but the right one no more often than by chance. The name of the shape says
little about its colour (at most 0.15 [0.08, 0.22]; that of another scene 0.08 [0.03, 0.14]). At image tokens the lens
is nearly blind: at chance up to layer 2; after layer 3, 0.16 [0.11, 0.20] of a shape's tokens say its colour and
0.06 [0.03, 0.09] that of another, and it is hardly ever the first of all tokens (at most 0.05 [0.03, 0.07]). They do
hold the colour, see steering.py ("patched"), but not in the coordinates of the head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor

import pgfunc as pg
from examples.lab import common
from examples.lab.common import Estimate, batches, estimates, load, options, token
from examples.lab.figures import band
from examples.lab.scenes import Painted, Scene, colour_question, draw, outline, paint
from examples.tiny.shapes import COLOURS
from pgfunc import lab
from pgfunc.lab.pictures import ink, shown
from pgfunc.prompt import text_ids, tokenizer_of

NAMES = [*COLOURS]
READERS = ("last token", "name of the thing")
SHADES = ("#c23b22", "#4c8bbf", "#7a9a3a", "#9467bd")  # of the curves
READ = ("language.0.resid_pre", "language.*.resid_post")  # in order: the input, then the output of each layer


class Streams(NamedTuple):
    """The residual streams of one question about each scene, at r readers: the last token, and the thing's name."""

    text: Float[Tensor, "s l r d"]
    image: Float[Tensor, "s l p d"]
    words: list[str]  # of the first scene's prompt
    all_text: Float[Tensor, "l t d"]  # of the first scene


class Curves(NamedTuple):
    """What a lens says about the right answer, by layer."""

    top: list[Estimate]  # the share of scenes in which it is the first of all tokens
    kind: list[Estimate]  # in which any of the possible answers is
    choice: list[Estimate]  # in which the right one is the first of the possible answers
    probability: list[Estimate]
    rank: list[float]  # the median; 1 is the first


class Result(NamedTuple):
    """Question or group of image tokens -> lens -> curves by layer."""

    text: dict[str, dict[str, Curves]]
    image: dict[str, list[Estimate]]
    example: tuple[list[str], list[list[str]], Float[Tensor, "l t"]]


def streams(model: pg.Model, painted: Painted, questions: Sequence[str]) -> Streams:
    """Run the model; the last tokens of all questions are `star ? newline`."""
    prompt = pg.prepare(model, painted.pictures, questions)
    patches, parts = model.cfg.vision.tokens, []
    for rows in batches(len(questions)):
        part = common.rows(prompt, rows)
        _, seen = lab.capture(pg.forward, *READ)(model.params, part, model.cfg)
        parts.append(torch.stack([*seen.values()], 1))
    stream = torch.cat(parts)
    return Streams(
        stream[:, :, [-1, -3]], stream[:, :, :patches], said(model, prompt.tokens[0]), stream[0, :, patches:]
    )


def curves(
    model: pg.Model, views: Float[Tensor, "n s l d"], right: Int[Tensor, "s"], possible: Int[Tensor, "a"]
) -> Curves:
    """What the lens says about the right answers among all tokens, and among the possible ones; the mean of n views."""
    logits = lab.lens(model.params, views, model.cfg)
    own = logits.gather(-1, right[:, None, None].expand(*logits.shape[:-1], 1))
    rank = 1.0 + (logits > own).sum(-1)
    first = (logits[..., possible] > own).sum(-1) == 0
    probability = (own[..., 0] - logits.logsumexp(-1)).exp()
    kind = torch.isin(logits.argmax(-1), possible)
    top, kind, choice, chance = (estimates(x.double().mean(0)) for x in (rank == 1, kind, first, probability))
    return Curves(top, kind, choice, chance, rank.flatten(0, 1).median(0).values.tolist())


def rotations(width: int, count: int = 8) -> Float[Tensor, "n d d"]:
    """Random rotations or reflections (seed 0)."""
    return torch.linalg.qr(torch.randn(count, width, width, generator=torch.Generator().manual_seed(0))).Q


def elsewhere(right: Int[Tensor, "s"]) -> Int[Tensor, "s"]:
    """For each scene, the answer of the next scene that has another one."""
    rolled = [right.roll(-shift) for shift in range(1, len(right))]
    found = rolled[0].clone()
    for other in rolled[1:]:
        found = torch.where(found == right, other, found)
    return found


def lenses(
    model: pg.Model, stream: Float[Tensor, "s l d"], right: Int[Tensor, "s"], possible: Int[Tensor, "a"]
) -> dict[str, Curves]:
    """The lens, the same lens with the answer of another scene, and through random rotations (their mean)."""
    turned = stream @ rotations(stream.shape[-1])[:, None]
    return {
        "right answer": curves(model, stream[None], right, possible),
        "answer of another scene": curves(model, stream[None], elsewhere(right), possible),
        "randomly rotated": curves(model, turned, right, possible),
    }


def questions(scenes: Sequence[Scene]) -> tuple[list[str], list[str], list[bool]]:
    """For the first thing: its colour; its existence, in every other scene with a colour that it does not have."""
    colour = [*map(colour_question, scenes)]
    present = [i % 2 == 0 for i in range(len(scenes))]
    named = [
        f"{scene.things[0 if there else 1].colour} {outline(scene, 0)}"
        for scene, there in zip(scenes, present, strict=True)
    ]
    existence = [f"answer en is there {'an' if name[0] == 'o' else 'a'} {name}?" for name in named]
    return colour, existence, present


def share(hit: Bool[Tensor, "s l p"], where: Bool[Tensor, "s p"]) -> list[Estimate]:
    """The share of hits among these image tokens of a scene, by layer."""
    return estimates((hit & where[:, None]).sum(-1) / where.sum(-1, keepdim=True))


def image_tokens(
    model: pg.Model, image: Float[Tensor, "s l p d"], scenes: Sequence[Scene], owned: Bool[Tensor, "s k p"]
) -> dict[str, list[Estimate]]:
    """How often the lens at image tokens says the colour of the first thing. ` red` and `red` both count as red."""
    forms = torch.tensor([[token(model, name), text_ids(model, f" {name}")[0]] for name in NAMES])
    number = torch.tensor([[NAMES.index(thing.colour) for thing in scene.things] for scene in scenes])
    own, other = (rearrange(number[:, k], "s -> s 1 1") for k in (0, 1))

    def colours(stream: Float[Tensor, "s l p d"]) -> Int[Tensor, "s l p"]:
        allowed = forms.flatten()
        parts = [
            lab.lens(model.params, stream[rows], model.cfg, allowed).argmax(-1) // 2 for rows in batches(len(scenes))
        ]
        return torch.cat(parts)

    said, turned = colours(image), colours(image @ rotations(image.shape[-1])[0])
    inside = image.transpose(1, 2)[owned[:, 0]]  # in rows: the tokens of all scenes
    row = owned[:, 0].nonzero()[:, 0]
    top = torch.cat([lab.lens(model.params, part, model.cfg).argmax(-1) for part in inside.split(500)])
    first = torch.zeros(image.shape[:3], dtype=torch.bool)
    first.transpose(1, 2)[owned[:, 0]] = (rearrange(forms[number[row, 0]], "n f -> n 1 f") == top[..., None]).any(-1)
    return {
        "own tokens: own colour": share(said == own, owned[:, 0]),
        "own tokens: colour of another thing": share(said == other, owned[:, 0]),
        "background: colour of the thing": share(said == own, ~owned.any(1)),
        "own tokens, randomly rotated": share(turned == own, owned[:, 0]),
        "own tokens: own colour is first of all tokens": share(first, owned[:, 0]),
    }


def example(model: pg.Model, asked: Streams) -> tuple[list[str], list[list[str]], Float[Tensor, "l t"]]:
    """The first scene: the words of the prompt, the first token of the lens by layer, and its probability."""
    probability, top = lab.lens(model.params, asked.all_text, model.cfg).softmax(-1).max(-1)
    return asked.words, [said(model, line) for line in top], probability


def said(model: pg.Model, ids: Int[Tensor, "t"]) -> list[str]:
    """The text of each token."""
    known = {model.cfg.bos: "<bos>", model.cfg.eos: "<eos>", model.cfg.pad: "<pad>"}
    return [known.get(each) or pg.tokenizer.decode(tokenizer_of(model), [each]) for each in ids.tolist()]


def main(arguments: list[str] | None = None) -> Result:
    args, model = options(__doc__, arguments), load()
    scenes = draw(args.scenes, 3, args.seed)
    painted, (colour, existence, present) = paint(scenes), questions(scenes)
    owned = lab.patches(painted.masks[:, :3], model.cfg)
    ids = {word: token(model, word) for word in (*NAMES, "yes", "no")}
    with torch.no_grad():
        asked = streams(model, painted, colour)
        possible = torch.tensor([ids[name] for name in NAMES])
        right = torch.tensor([ids[scene.things[0].colour] for scene in scenes])
        text = {
            f"colour, {reader}": lenses(model, asked.text[:, :, r], right, possible) for r, reader in enumerate(READERS)
        }
        image = image_tokens(model, asked.image, scenes, owned)
        row = example(model, asked)
        asked = streams(model, painted, existence)
        right = torch.tensor([ids["yes" if there else "no"] for there in present])
        yes_or_no = torch.tensor([ids["yes"], ids["no"]])
        text["existence, last token"] = lenses(model, asked.text[:, :, 0], right, yes_or_no)
    result = Result(text, image, row)
    report(result)
    common.save(draw_figure(result), args.out / "logit_lens.png")
    return result


def report(result: Result) -> None:
    """Print the curves by layer: the input of layer 0, then the output of each layer."""
    for question, kinds in result.text.items():
        print(f"\n{question}: first of the possible answers")
        for kind, each in kinds.items():
            print(f"  {kind:24}", *each.choice)
        right = kinds["right answer"]
        print(f"  {'first of all tokens':24}", *right.top)
        print(f"  {'any possible is first':24}", *right.kind)
        print(f"  {'its probability':24}", *right.probability)
        print(f"  {'its median rank':24}", *(f"{rank:<17.0f}" for rank in right.rank))
    print("\nimage tokens: first of the colours")
    for group, line in result.image.items():
        print(f"  {group:46}", *line)


def draw_figure(result: Result) -> Figure:
    """Curves by layer, and the first scene's prompt through the lens."""
    figure = Figure(figsize=(12.6, 8.6), dpi=120, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    above, below = parts
    panels = above.subplots(1, 4)
    layers = range(len(result.example[1]))
    for axes, (question, kinds) in zip(panels, result.text.items(), strict=False):
        for colour, (kind, each) in zip(SHADES, kinds.items(), strict=False):
            band(axes, range(7), each.choice, kind, colour, "-")
        band(axes, range(7), kinds["right answer"].top, "right answer, of all tokens", "black", "--")
        band(axes, range(7), kinds["right answer"].kind, "any possible answer, of all tokens", "#d9b310", "--")
        axes.set_title(f"{question}\nshare in which it is first", fontsize=9)
    for colour, (group, line) in zip((*SHADES, "black"), result.image.items(), strict=False):
        band(panels[3], range(7), line, group, colour, "--" if colour == "black" else "-")
    panels[3].axhline(1 / len(NAMES), color="gray", lw=0.8, ls=":")
    panels[3].set_title("image tokens: share whose first colour is it\n(dotted: 1/12)", fontsize=9)
    for axes in panels:
        axes.set(ylim=(0, 0.5 if axes is panels[3] else 1.02), xlabel="after layer")
        axes.set_xticks([*layers], ["in", *map(str, layers[:-1])])
    panels[1].legend(fontsize=7, loc="upper left")
    panels[3].legend(fontsize=7, loc="upper left")
    words, said, probability = result.example
    axes = below.subplots()
    image = axes.imshow(probability.numpy(), origin="lower", aspect="auto", cmap="Greens", vmin=0, vmax=1.2)
    for y, line in enumerate(said):
        for x, word in enumerate(line):
            axes.text(
                x,
                y,
                shown(word),
                ha="center",
                va="center",
                fontsize=8,
                color=ink(image, float(probability[y, x])),
                parse_math=False,
            )
    axes.set_xticks(range(len(words)), [shown(word) for word in words], fontsize=9, parse_math=False)
    axes.set_yticks([*layers], ["in", *map(str, layers[:-1])])
    axes.set(ylabel="after layer")
    axes.set_title("the first token of the lens at each token of one prompt; green: its probability", fontsize=9)
    return figure


if __name__ == "__main__":
    main()
