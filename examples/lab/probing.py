"""What can a linear probe read, and in which layer?

    python -m examples.lab.probing

Method: scenes have one shape, whose colour is asked for. Logistic regression (`lab.probe`) reads its colour and its
outline from the mean of its image tokens, from the two top corners if it does not cover them, and from the mean of all
other image tokens (some of which it covers in part), after each layer of the vision encoder; and its colour from the
last token of the question, which `lab.collect` writes to disk. A probe learns from 400 scenes and is tested on 100
others. Control: shuffled labels.

Result, share of held-out scenes read right, after layers 0 to 7 and the projector:

    colour   its image tokens  1.00 after each layer
             2 top corners      .12  .12  .13  .92  .94  .97 1.00 1.00 1.00    after layer 3: [0.86, 0.97]
             all other tokens   .18  .19  .24  .47  .59  .68  .75  .90  .92
    outline  its image tokens   .61  .61  .67  .70  .77  .82  .85  .88  .90
             2 top corners      .19  .22  .27  .39  .52  .52  .61  .67  .70
             all other tokens   .36  .34  .40  .50  .63  .65  .70  .70  .74

- The colour stands in the shape's tokens from the first layer on. In layer 3 it also arrives in the two top corners
  (chance is .08), and later in the mean of all others. Patching shows that the model uses the corners (`vision`).
- The outline is harder to read, and becomes clearer with each layer.
- At the last token of the question the colour can be read after the language model's layer 0 (.83 [0.75, 0.90]) and
  after layer 1 (.99). In scenes of three shapes the logit lens finds the answer only from layer 3 on (`logit_lens`),
  and if the text does not see the image in layers 0 and 1, the right answer's probability falls by only 0.12
  (`knockout`). So a probe that reads a colour does not show that the model uses it there.
- Shuffled labels are read right in .05 to .16, near chance.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import pgfunc as pg
from examples.lab import common, scenes
from examples.lab.figures import band
from examples.lab.selections import CORNERS
from examples.tiny import shapes
from examples.tiny.scenes import Scene
from pgfunc import lab, paligemma

TRAINING = 4  # training scenes for each test scene
PENALTY = 10.0
SITES = {
    "object": "its image tokens, mean",
    "corners": "2 top corners, if not its own",
    "elsewhere": "all other image tokens, mean",
    "last": "last token of the question",
}
TARGETS = {"colour": list(shapes.COLOURS), "outline": list(shapes.OUTLINES)}


class Result(NamedTuple):
    """For each site and target: one estimate for each layer. `control`: the same with shuffled labels."""

    read: dict[tuple[str, str], list[common.Estimate]]
    control: dict[tuple[str, str], list[common.Estimate]]


def image_features(
    model: pg.Model, prompt: pg.Prompt, own: Bool[Tensor, "s p"]
) -> dict[str, list[Float[Tensor, "s _"]]]:
    """For each site of the image: its vector after each layer of the vision encoder, and after the projector."""
    run, parts = lab.capture(paligemma.encode_images, "vision.*.resid_post", "projector"), []
    corners = torch.zeros_like(own).index_fill(1, torch.tensor(CORNERS), True) & ~own
    for rows in common.batches(len(prompt.pixels)):
        _, seen = run(model.params, prompt.pixels[rows], model.cfg)
        masks = {"object": own[rows], "elsewhere": ~(own | corners)[rows]}
        part = {site: [mean_of(x, mask) for x in seen.values()] for site, mask in masks.items()}
        part["corners"] = [(x * corners[rows, :, None])[:, CORNERS].flatten(1) for x in seen.values()]
        parts.append(part)
    return {
        site: [torch.cat(layer) for layer in zip(*(part[site] for part in parts), strict=True)] for site in parts[0]
    }


def mean_of(x: Float[Tensor, "s p d"], mask: Bool[Tensor, "s p"]) -> Float[Tensor, "s d"]:
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def last_features(model: pg.Model, pictures: list[Any], questions: list[str]) -> list[Float[Tensor, "s d"]]:
    """The last token's residual stream, into the language model and after each layer."""
    names = ["language.0.resid_pre", *(f"language.{i}.resid_post" for i in range(model.cfg.text.layers))]
    with TemporaryDirectory() as folder:
        rows = zip(pictures, questions, strict=True)
        found = lab.collect(model, rows, names, Path(folder) / "last", tokens="last", batch=25)
        return [found.load(name) for name in names]


def correct(x: Float[Tensor, "s d"], labels: Int[Tensor, "s"], test: int, classes: int) -> Bool[Tensor, "r"]:
    """Whether a probe of the scenes after the first `test` ones is right about those."""
    return lab.probe(x[test:], labels[test:], classes, PENALTY)(x[:test]).argmax(-1) == labels[:test]


def draw_figure(result: Result) -> Any:
    """One panel for each target: curves over layers, with intervals; the controls are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(16, 9))
    for axes, target in zip(panels, TARGETS, strict=True):
        for i, site in enumerate(site for site in SITES if (site, target) in result.read):
            for kind, style in ((result.read, "o-"), (result.control, "o:")):
                curve, start = kind[site, target], 10 if site == "last" else 1
                x = [start + j for j in range(len(curve))]
                name = SITES[site] if kind is result.read else ""
                band(axes, x, curve, name, f"C{i}", style)
        ticks = [*map(str, range(8)), "proj.", *(["in", *map(str, range(6))] if target == "colour" else [])]
        axes.set_xticks(range(1, len(ticks) + 1), ticks, fontsize=8)
        axes.set_xlabel("after layer: vision, then language" if target == "colour" else "after layer: vision")
        axes.axhline(1 / len(TARGETS[target]), color="gray", lw=0.8)
        axes.set_title(f"{target}, {len(TARGETS[target])} classes")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of held-out scenes read right")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=9, title="dotted: shuffled labels")
    return figure


@torch.no_grad()
def main(arguments: list[str] | None = None) -> Result:
    settings = common.options(__doc__, arguments)
    model, test = common.load(), settings.scenes
    chosen = scenes.draw((1 + TRAINING) * test, 1, settings.seed)
    painted = scenes.paint(chosen)
    questions = [*map(scenes.colour_question, chosen)]
    own = lab.patches(painted.masks[:, 0], model.cfg, share=0.3)
    features = image_features(model, pg.prepare(model, painted.pictures, questions), own)
    features["last"] = last_features(model, painted.pictures, questions)
    shuffled = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(settings.seed))
    read, control = {}, {}
    for target, names in TARGETS.items():
        labels = torch.tensor([names.index(thing(scene, target)) for scene in chosen])
        measure = partial(correct, test=test, classes=len(names))
        for site, layers in features.items():
            if (site, target) == ("last", "outline"):
                continue  # the question names it
            read[site, target] = [common.estimate(measure(x, labels)) for x in layers]
            control[site, target] = [common.estimate(measure(x, labels[shuffled])) for x in layers]
            for kind, row in (("", read), (", shuffled labels", control)):
                print(f"{target + kind:24} {SITES[site]:30} " + " ".join(f"{e.mean:.2f}" for e in row[site, target]))
    result = Result(read, control)
    common.save(draw_figure(result), settings.out / "probing.png")
    return result


def thing(scene: Scene, target: str) -> str:
    """The colour or the outline of the asked object."""
    return scene.things[0].colour if target == "colour" else scenes.outline(scene, 0)


if __name__ == "__main__":
    main()
