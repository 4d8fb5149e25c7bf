"""Which image tokens carry an object?

In 100 scenes of three shapes, image tokens at the input of the language model are replaced by the mean over scenes at
the same position. Three questions are about one shape: its colour, whether it exists (the answer is yes), and its
position. In the caption, its name is judged after the true words before it. The shape's tokens are those of which it
covers 0.3 or more. The controls are as many random tokens, none of them the shape's or a top corner.

Shares of right answers that become wrong, with 95% intervals over scenes:

                            tokens  colour             existence          position           caption
    its tokens                  21  0.81 [0.73, 0.88]  1.00 [1.00, 1.00]  0.52 [0.42, 0.62]  0.94 [0.89, 0.98]
    its tokens + a ring         47  0.87 [0.80, 0.93]  1.00 [1.00, 1.00]  0.87 [0.80, 0.93]  0.98 [0.95, 1.00]
    2 top corners                2  0.05 [0.01, 0.09]  0.34 [0.25, 0.43]  0.00 [0.00, 0.00]  0.07 [0.03, 0.12]
    its tokens + 2 corners      23  0.88 [0.81, 0.94]  1.00 [1.00, 1.00]  0.52 [0.42, 0.62]  0.99 [0.97, 1.00]
    highest norm                21  0.00               0.00               0.00               0.00
    random                      21  0.00               0.00               0.00               0.00
    random, as many as + ring   47  0.00               0.01 [0.00, 0.03]  0.00               0.00
    another object              20  0.00               0.00               0.00               0.00
    all but its tokens         235  0.07 [0.02, 0.12]  0.50 [0.40, 0.60]  0.01 [0.00, 0.03]  0.16 [0.09, 0.24]

- An object's own tokens carry it. Its position is also in the ring around them, some of whose tokens it covers in part.
- The two top corners alone break a third of the answers on existence, and few others. In addition to the object's
  tokens they break 0.07 [0.01, 0.14] more answers on colour and 0.05 [0.01, 0.10] more names: they hold a part of both
  (`vision`).
- Own tokens alone suffice for 0.93 or more of the answers on colour and position, for half of those on existence, if
  the others have the mean of their position. (With one mean for all positions they suffice for less: p2410_07149.)
- The norms have outliers (above mean + 3 sd) inside the vision encoder: the two top corners, after layers 2 to 5, in
  most scenes. At the projector there are none, and the tokens with the highest norm there carry nothing that is asked.

    python -m examples.lab.ablation
"""

from collections.abc import Sequence
from textwrap import fill
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import pgfunc as pg
from examples.lab import common, scenes
from examples.lab.figures import spread
from examples.lab.selections import CORNERS, highest, outliers, random_of, widened
from examples.tiny import texts
from examples.tiny.scenes import Scene
from pgfunc import lab
from pgfunc.prompt import text_ids

LABELS = {
    "object": "its tokens",
    "ring": "its tokens + a ring",
    "corners": "2 top corners",
    "both": "its tokens + 2 corners",
    "norm": "highest norm",
    "random": "random",
    "wide": "random, as many as + ring",
    "other": "another object",
    "rest": "all but its tokens",
}


class Task(NamedTuple):
    """A prompt with its answer as suffix, and the tokens of it that have to be right."""

    prompt: pg.Prompt
    judged: Bool[Tensor, "s t"]


class Result(NamedTuple):
    """For each task: the share of right answers, and for each ablation the share of them that become wrong.

    `corners_add`: the share for `both` minus that for `object`, paired by scene. `above`: see `above`.
    """

    right: dict[str, common.Estimate]
    wrong: dict[str, dict[str, common.Estimate]]
    corners_add: dict[str, common.Estimate]
    above: dict[str, tuple[float, list[int]]]


def is_right(model: pg.Model, image: Float[Tensor, "s p d"], task: Task) -> Bool[Tensor, "s"]:
    """Whether each judged token is the likeliest after the tokens before it: then greedy decoding writes them too."""
    rows, width = task.prompt.tokens.shape
    before = torch.arange(width) + image.shape[1] - 1
    likeliest = common.answers(model, image, task.prompt, before.expand(rows, -1)).argmax(-1)
    return ((likeliest == task.prompt.tokens) | ~task.judged).all(1)


def clear_scenes(count: int, seed: int) -> tuple[list[Scene], list[int]]:
    """Scenes of three shapes, and in each the number of the first whose position is clear."""
    chosen = [scene for scene in scenes.draw(2 * count, 3, seed) if any(map(texts.clear, scene.things))][:count]
    return chosen, [[texts.clear(thing) for thing in scene.things].index(True) for scene in chosen]


def tasks(model: pg.Model, chosen: Sequence[Scene], asked: Sequence[int], pictures: Any) -> dict[str, Task]:
    """Three questions about the asked object, and the caption, in which only the object's name is judged."""
    names = [scene.things[i].name for scene, i in zip(chosen, asked, strict=True)]
    colours, outlines = zip(*(name.split(" ") for name in names), strict=True)
    rows = {
        "colour": ([f"answer en what color is the {outline}?" for outline in outlines], [*colours]),
        "existence": ([f"answer en is there {texts.article(name)}?" for name in names], ["yes"] * len(names)),
        "position": ([f"answer en where is the {name}?" for name in names], [*map(third, chosen, asked)]),
        "caption": (["caption en"] * len(names), [texts.caption(scene) for scene in chosen]),
    }
    prompts = {task: pg.prepare(model, pictures, *columns) for task, columns in rows.items()}
    known = {task: Task(prompt, prompt.causal & prompt.valid) for task, prompt in prompts.items()}
    caption = prompts["caption"]
    judged = [
        named(tokens, text_ids(model, f"a {name}")[1:]) for tokens, name in zip(caption.tokens, names, strict=True)
    ]
    return known | {"caption": Task(caption, torch.stack(judged))}


def third(scene: Scene, number: int) -> str:
    """The third of the picture in which a thing's centre lies: `top left`, `left`, `center`."""
    column, row = (int(3 * coordinate) for coordinate in scene.things[number].centre)
    return " ".join(word for word in (texts.ROWS[row], texts.COLUMNS[column]) if word) or "center"


def named(tokens: Int[Tensor, "t"], name: list[int]) -> Bool[Tensor, "t"]:
    """True at the tokens of a name, which occurs once."""
    starts = (tokens.unfold(0, len(name), 1) == torch.tensor(name)).all(1).nonzero()
    return torch.zeros(len(tokens), dtype=torch.bool).index_fill(0, starts[0, 0] + torch.arange(len(name)), True)


def selections(
    own: Bool[Tensor, "s p"], other: Bool[Tensor, "s p"], norms: Float[Tensor, "s p"], seed: int
) -> dict[str, Bool[Tensor, "s p"]]:
    """The image tokens that each ablation replaces, for the tokens of the asked object and of another one.

    The random ones are none of the corners, whose effect is measured by itself.
    """
    ring, count = widened(own), own.sum(1)
    corners = torch.zeros_like(own).index_fill(1, torch.tensor(CORNERS), True)
    return {
        "object": own,
        "ring": ring,
        "corners": corners,
        "both": own | corners,
        "norm": highest(norms, count),
        "random": random_of(~(own | corners), count, seed),
        "wide": random_of(~(ring | corners), ring.sum(1), seed),
        "other": other & ~own,
        "rest": ~own,
    }


def above(seen: dict[str, Float[Tensor, "s p d"]]) -> dict[str, tuple[float, list[int]]]:
    """How many tokens of a picture have a norm above mean + 3 sd, and which positions have it in most pictures."""
    high = {name: outliers(x, 3) for name, x in seen.items()}
    return {name: (float(x.sum(1).float().mean()), (x.float().mean(0) > 0.5).nonzero()[:, 0].tolist())
            for name, x in high.items()}  # fmt: skip


def draw_figure(wrong: dict[str, dict[str, common.Estimate]], counts: dict[str, int]) -> Any:
    """Grouped bars with intervals: for each ablation, one bar for each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(wrong)
    for i, (task, row) in enumerate(wrong.items()):
        x = [j + (i - (len(wrong) - 1) / 2) * width for j in range(len(row))]
        means, error = spread([*row.values()])
        axes.bar(x, means, width, yerr=error, capsize=2, label=f"{task} (n = {counts[task]})", error_kw={"lw": 0.9})
    axes.set_xticks(range(len(LABELS)), [fill(label, 12) for label in LABELS.values()])
    axes.set_ylabel("share of right answers that become wrong")
    axes.set_xlabel("image tokens that are replaced by their mean over scenes")
    axes.set_ylim(0, 1.05)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(title="question", fontsize=9)
    axes.set_title("Which image tokens does an answer about an object need?")
    return figure


@torch.no_grad()
def main(arguments: list[str] | None = None) -> Result:
    settings = common.options(__doc__, arguments)
    model = common.load()
    chosen, asked = clear_scenes(settings.scenes, settings.seed)
    painted = scenes.paint(chosen)
    objects = lab.patches(painted.masks, model.cfg, share=0.3)
    rows, number = torch.arange(len(chosen)), torch.tensor(asked)
    known = tasks(model, chosen, asked, painted.pictures)
    seen = common.encode(model, known["colour"].prompt, "vision.*.resid_post", "vision.out")
    image = seen["projector"]
    where = selections(objects[rows, number], objects[rows, (number + 1) % 3], image.norm(dim=-1), settings.seed)
    high = above(seen)
    for name, (count, positions) in high.items():
        print(f"{name:20} {count:5.2f} tokens above mean + 3 sd; in most scenes: {positions}")
    right = {task: is_right(model, image, each) for task, each in known.items()}
    print(f"\n{'tokens':26} {'number':>6}  " + "  ".join(f"{task:17}" for task in known))
    print(f"{'none: answers right':26} {0:6}  " + "  ".join(f"{common.estimate(each)!s:17}" for each in right.values()))
    wrong: dict[str, dict[str, common.Estimate]] = {task: {} for task in known}
    broken: dict[tuple[str, str], Bool[Tensor, "r"]] = {}
    for name, mask in where.items():
        ablated = lab.put(image.mean(0), mask[..., None])(image)
        for task, each in known.items():
            broken[task, name] = ~is_right(model, ablated, each)[right[task]]
            wrong[task][name] = common.estimate(broken[task, name])
        cells = "  ".join(f"{wrong[task][name]!s:17}" for task in known)
        print(f"{LABELS[name]:26} {mask.sum(1).float().mean():6.1f}  {cells}", flush=True)
    more = {task: common.estimate(broken[task, "both"].int() - broken[task, "object"].int()) for task in known}
    print(f"{'what the 2 corners add':26} {2.0:6}  " + "  ".join(f"{each!s:17}" for each in more.values()))
    common.save(
        draw_figure(wrong, {task: int(each.sum()) for task, each in right.items()}), settings.out / "ablation.png"
    )
    return Result({task: common.estimate(each) for task, each in right.items()}, wrong, more, high)


if __name__ == "__main__":
    main()
