"""Which heads of the language model look at the thing that the question names?

    python -m examples.lab.heads

Method: the scenes have three shapes. We ask for the colour of the first one, where it is, and its box (`detect`). A
head's ratio is the share of the thing's patches in its attention to the image, divided by their share of the area: 1 if
it does not prefer the thing. The attention is that of the last token of the prompt, or of the thing's name (`star`).
Then heads are ablated in 100 other scenes: their `z` gets its mean over the first scenes, at all tokens of the text.
Right is the first token of the answer: the colour; `top`, `left` ...; the upper edge within half a patch.

Control: the ratio of another shape, which is not named. For the ablation: as many random other heads, and all heads of
another layer.

Result: for the colour, the last token looks through layer 3, with all four heads: ratios of 8.65 [7.01, 10.43] to 19.26
[16.73, 22.04], for the other shape at most 0.78 [0.51, 1.09]; no other head has more than 2.08 [1.85, 2.35]. Without
them, 0.37 [0.28, 0.47] of the answers are right and 0.62 [0.52, 0.71] are the colour of another shape: the model still
knows which colours there are, but not whose they are. Without another layer it is 0.99 [0.98, 1.00]. For `where` and
`detect`, heads of layers 2 to 5 look (ratios of 4 to 8), and less depends on them: without the four that look most,
0.75 [0.67, 0.83] and 0.95 [0.90, 0.99] are right, without four others 0.96 [0.93, 0.98] and 0.97 [0.94, 0.99]; without
eight, 0.70 [0.61, 0.79] and 0.53 [0.43, 0.63], without eight others 0.92 [0.87, 0.96] and 0.92 [0.86, 0.96]. For
`detect`, four heads that look 6 times as much show no effect: a head that looks is not always one that is needed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor

import pgfunc as pg
from examples.lab import common
from examples.lab.common import Estimate, batches, estimate, estimates, load, options, token
from examples.lab.scenes import SIDE, Scene, colour_question, draw, paint
from examples.tiny import texts
from pgfunc import lab
from pgfunc.paligemma import join
from pgfunc.prompt import text_ids

COUNTS = (4, 8)  # heads that are ablated together; a layer has 4
DRAWS = 2  # of random heads for each scene
NEW = 1000  # is added to the seed for the scenes of the ablation
BINS = 1024  # location tokens
COLOURS = ("#888888", "#c23b22", "#4c8bbf", "#c23b22", "#4c8bbf", "#9ec5e0")  # of the bars: red for heads that look
QUESTIONS: dict[str, Callable[[Scene], str]] = {
    "colour": colour_question,
    "where": lambda scene: f"answer en where is the {scene.things[0].name}?",
    "detect": lambda scene: f"detect {scene.things[0].name}",
}
NAME_AT = {"colour": -3, "where": -3, "detect": -2}  # `star ? newline`, `star newline`; a name is one token


class Asked(NamedTuple):
    """One question about each scene, ready for the language model. All rows have the same length."""

    prompt: pg.Prompt
    embed: Float[Tensor, "s t d"]
    right: Bool[Tensor, "s k v"]  # the first tokens that would be right if the question named thing k

    def rows(self, rows: slice) -> "Asked":
        return Asked(common.rows(self.prompt, rows), self.embed[rows], self.right[rows])


class Result(NamedTuple):
    """For each question; axes: r readers (last token, name), k the named thing and another, l layers, n heads."""

    ratios: dict[str, Float[Tensor, "s r k l n"]]
    order: dict[str, Int[Tensor, "ln"]]  # the heads, those that look most at the named thing first
    answers: dict[str, dict[str, list[Estimate]]]  # right, another thing's


def scenes_of(count: int, seed: int) -> list[Scene]:
    """Scenes with three shapes. It is clear in which ninth of the picture the first one lies."""
    known = draw(3 * count + 20, 3, seed)
    return [scene for scene in known if texts.clear(scene.things[0])][:count]


def ask(model: pg.Model, scenes: Sequence[Scene]) -> tuple[dict[str, Asked], Bool[Tensor, "s k p"]]:
    """All questions about these scenes, and the image tokens of two things. Each picture is encoded once."""
    painted = paint(scenes)
    prompts = {
        name: pg.prepare(model, painted.pictures, [text(scene) for scene in scenes]) for name, text in QUESTIONS.items()
    }
    image = common.encode(model, prompts["colour"])["projector"]
    asked = {}
    for name, prompt in prompts.items():
        answers = torch.stack([right(model, name, scenes, painted.masks, number) for number in range(3)], 1)
        asked[name] = Asked(prompt, join(model.params, image, prompt, model.cfg).x, answers)
    return asked, lab.patches(painted.masks[:, :2], model.cfg)


def right(
    model: pg.Model, question: str, scenes: Sequence[Scene], masks: Bool[Tensor, "s k y x"], number: int
) -> Bool[Tensor, "s v"]:
    """The first tokens that count as the right answer about one thing."""
    (first,) = text_ids(model, "<loc0000>")
    half = BINS // model.cfg.vision.grid // 2
    table = torch.zeros(len(scenes), model.cfg.text.vocab, dtype=torch.bool)
    for row, scene, mask in zip(table, scenes, masks[:, number], strict=True):
        thing = scene.things[number]
        column, line = (int(3 * coordinate) for coordinate in thing.centre)
        top = int(mask.any(1).int().argmax()) * BINS // SIDE
        if question == "detect":
            row[first + max(top - half, 0) : first + min(top + half, BINS - 1) + 1] = True
        else:
            where = texts.ROWS[line] or texts.COLUMNS[column] or "center"
            row[token(model, thing.colour if question == "colour" else where)] = True
    return table


def attention(
    model: pg.Model, asked: Asked, owned: Bool[Tensor, "s k p"], readers: list[int]
) -> tuple[Float[Tensor, "s r k l n"], Float[Tensor, "l t n h"]]:
    """A thing's share of each reader's attention to the image, over its share of the area; and the mean of each z."""
    area, ratios, total = owned.float() / owned.float().mean(-1, keepdim=True), [], torch.zeros(())
    for rows in batches(len(owned)):
        part = asked.rows(rows)
        run = lab.capture(lab.resume, "language.*.pattern", "language.*.z")
        _, seen = run(model.params, part.prompt, model.cfg, 0, part.embed)
        pattern, z = (
            torch.stack([x for key, x in seen.items() if key.endswith(f".{name}")]) for name in ("pattern", "z")
        )
        looked = pattern[..., readers, : owned.shape[-1]]
        looked = looked / looked.sum(-1, keepdim=True)
        ratios.append(einsum(looked, area[rows], "l b n r p, b k p -> b r k l n"))
        total = total + z.sum(1)
    return torch.cat(ratios), total / len(owned)


def answers(
    model: pg.Model, asked: Asked, means: Float[Tensor, "l t n h"], ablated: Bool[Tensor, "s l n"]
) -> Bool[Tensor, "s 2"]:
    """Whether the answer is right, and whether it is that of another thing, if these heads have their mean z.

    The heads have it at all tokens of the text.
    """
    is_text = torch.arange(means.shape[1]) >= model.cfg.vision.tokens
    found = []
    for rows in batches(len(ablated)):
        part = asked.rows(rows)
        where = rearrange(is_text, "t -> t 1 1") & rearrange(ablated[rows], "b l n -> l b 1 n 1")
        changes = {f"language.{i}.z": lab.put(means[i], where[i]) for i in range(len(means)) if where[i].any()}
        run = lab.edit(lab.resume, changes)
        first = run(model.params, part.prompt, model.cfg, 0, part.embed)[:, -1].argmax(-1)
        found.append(part.right.take_along_dim(rearrange(first, "b -> b 1 1"), 2)[..., 0])
    own, *others = torch.cat(found).unbind(1)
    return torch.stack([own, torch.stack(others).any(0) & ~own], 1)


def ablations(
    model: pg.Model, asked: Asked, means: Float[Tensor, "l t n h"], order: list[int]
) -> dict[str, list[Estimate]]:
    """`answers` without the first heads of an order, without others, and without all heads of another layer."""
    rng, heads = np.random.default_rng(0), model.cfg.text.heads

    def run(pick: Callable[[], Any], draws: int = 1) -> list[Estimate]:
        flags = torch.zeros(draws, len(asked.embed), len(order), dtype=torch.bool)
        for row in flags.flatten(0, 1):
            row[pick()] = True
        flags = rearrange(flags, "draw s (l n) -> draw s l n", n=heads)
        return estimates(torch.stack([answers(model, asked, means, each).double() for each in flags]).mean(0))

    results = {"all heads": run(list)}
    for count in COUNTS:
        results[f"without the {count} that look"] = run(lambda count=count: order[:count])
        results[f"without {count} others"] = run(lambda count=count: rng.choice(order[count:], count, False), DRAWS)
    layers = {head // heads for head in order[:heads]}
    if len(layers) == 1:  # those that look are one layer
        free = [layer for layer in range(model.cfg.text.layers) if layer not in layers]
        results["without another layer"] = run(lambda: rng.choice(free) * heads + np.arange(heads), DRAWS)
    return results


def main(arguments: list[str] | None = None) -> Result:
    args, model = options(__doc__, arguments), load()
    with torch.no_grad():
        asked, owned = ask(model, scenes_of(args.scenes, args.seed))
        fresh, _ = ask(model, scenes_of(args.scenes, args.seed + NEW))
        ratios, order, results = {}, {}, {}
        for name in QUESTIONS:
            ratios[name], means = attention(model, asked[name], owned, [-1, NAME_AT[name]])
            more = (ratios[name][:, 0, 0] - ratios[name][:, 0, 1]).flatten(1)
            order[name] = more.mean(0).argsort(descending=True)
            results[name] = ablations(model, fresh[name], means, order[name].tolist())
    result = Result(ratios, order, results)
    report(result, model.cfg.text.heads)
    common.save(draw_figure(result), args.out / "heads.png")
    return result


def report(result: Result, heads: int) -> None:
    """Print the heads that look, and the accuracy without them."""
    for name, ratios in result.ratios.items():
        for reader, label in enumerate(("last token", "name")):
            more = (ratios[:, reader, 0] - ratios[:, reader, 1]).flatten(1)
            above = sum(each.low > 0 for each in estimates(more))
            print(
                f"\n{name}, {label}: the interval of named minus other is above 0 for {above} of {more.shape[1]} heads"
            )
            for head in more.mean(0).topk(8).indices.tolist():
                named, other = (estimate(ratios[:, reader, k].flatten(1)[:, head]) for k in (0, 1))
                print(f"  layer {head // heads} head {head % heads}: named {named}, other {other}")
        for ablation, (own, other) in result.answers[name].items():
            print(f"  {ablation:26} right {own}, another thing's {other}")


def draw_figure(result: Result) -> Figure:
    """The ratios of all heads, and the accuracy without the heads that look most."""
    figure = Figure(figsize=(12.6, 8.4), dpi=120, layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.7, 1))
    left, right = parts
    panels = left.subplots(3, 3)
    rows = (("last token → named thing", 0, 0), ("last token → other thing", 0, 1), ("name → named thing", 1, 0))
    image: Any = None
    for column, (name, ratios) in enumerate(result.ratios.items()):
        for axes, (label, reader, thing) in zip(panels[:, column], rows, strict=True):
            table = ratios[:, reader, thing].mean(0).numpy()
            image = axes.imshow(table, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=8)
            for y, x in np.ndindex(table.shape):
                axes.text(
                    x,
                    y,
                    f"{table[y, x]:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black" if table[y, x] > 5 else "white",
                )
            axes.set_title(f"{name}: {label}", fontsize=9)
            axes.set_xticks(range(table.shape[1]))
            axes.set(xlabel="head" if axes is panels[-1, column] else "", ylabel="layer" if column == 0 else "")
    left.colorbar(
        image, ax=panels, fraction=0.03, extend="max", label="share of the attention to the image / share of the area"
    )
    axes = right.subplots()
    y, labels = 0.0, []
    for name, bars in result.answers.items():
        for (ablation, (share, _)), colour in zip(bars.items(), COLOURS, strict=False):
            axes.barh(
                y, share.mean, color=colour, xerr=[[share.mean - share.low], [share.high - share.mean]], capsize=3
            )
            labels.append((y, f"{name}: {ablation}"))
            y -= 1
        y -= 0.6
    axes.set_yticks([y for y, _ in labels], [label for _, label in labels], fontsize=8)
    axes.set(xlim=(0, 1.02), xlabel="share of right answers")
    axes.set_title("ablation: z at the text is its mean", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
