"""In which layers does the text read the image?

In 100 scenes of three shapes, the model is asked for the colour, the existence and the position of one. Attention from
some queries to some keys is blocked in one layer or several (Geva et al. 2023, arXiv 2304.14767). Every second question
of existence is about the same outline in a colour that is not there, so a model that sees nothing is right in half of
them. On position, only the first word of the answer is judged: `top` of `top left`. The control blocks random image
tokens, as many as the object has. Arrows point from queries to keys. Layers are numbered from 0 to 5; the last token is
the newline after the question.

Drops of the right answer's probability, with 95% intervals over scenes:

                                  layers  colour             existence          position
    text -> image                 3       0.71 [0.64, 0.77]  0.01 [0.01, 0.01]  0.17 [0.12, 0.21]
    text -> image                 0-2     0.32 [0.25, 0.39]  0.00 [-0.00, 0.01] 0.09 [0.06, 0.13]
    text -> image                 3-5     0.91 [0.87, 0.95]  0.44 [0.40, 0.47]  0.72 [0.67, 0.76]
    text -> image                 all     0.96 [0.94, 0.97]  0.47 [0.41, 0.53]  0.84 [0.80, 0.87]
    last token -> image           3       0.71 [0.65, 0.78]  0.01 [0.00, 0.01]  0.14 [0.09, 0.19]
    question -> image             3       0.00 [0.00, 0.00]  0.00 [0.00, 0.00]  0.01 [0.00, 0.02]
    text -> the object's tokens   3       0.70 [0.63, 0.76]  0.01 [0.00, 0.02]  0.13 [0.08, 0.18]
    text -> random tokens         3       0.00 [-0.00, 0.00] 0.00 [-0.00, 0.00] 0.00 [-0.00, 0.00]
    last token -> question        0       0.99 [0.99, 1.00]  0.99 [0.97, 1.00]  1.00 [0.99, 1.00]
    image -> text                 0       0.99 [0.98, 0.99]  0.49 [0.39, 0.59]  0.72 [0.67, 0.77]

- Most of the reading is in layers 3 to 5, and the last token does it: the question's tokens need not see the image
  in any one of them. It reads the colour mostly in layer 3, and there from the object's tokens.
- The existence needs no single layer (at most 0.06 [0.03, 0.09], in layer 4), but layers 3 and 4 together: if
  both are blocked, the probability falls by 0.31, and 0.86 of the answers stay right.
- The image must read the text in layer 0: without that, 0.00 of the answers on colour, 0.50 on existence and 0.28
  on position are right, as few as without it in all layers. Blocking it in one layer from 2 on costs nothing.
- The last token must read the question in layer 0. Its block in layer 2 costs 0.19, 0.04 and 0.20, others at most 0.01.

    python -m examples.lab.knockout
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import pgfunc as pg
from examples.lab import common, scenes
from examples.lab.ablation import clear_scenes, third
from examples.lab.figures import band
from examples.lab.selections import random_of
from examples.tiny import shapes, texts
from pgfunc import lab

LATE = 3  # from here on, the parts of text -> image are blocked too: in each layer before, all of it does little
KINDS = {
    "text": "text -> image",
    "last": "last token -> image",
    "question": "question -> image",
    "words": "last token -> question",
    "image": "image -> text",
    "object": "text -> the object's tokens",
    "random": "text -> as many random tokens",
}
Blind = tuple[Bool[Tensor, "b t"], Bool[Tensor, "b t"]]  # queries, and the keys that they do not see
Window = tuple[int, int]  # layers from the first up to, but not including, the second


class Case(NamedTuple):
    """Prompts about one object in each scene, and the first token of the right answer."""

    prompt: pg.Prompt
    image: Float[Tensor, "s p d"]
    answer: Int[Tensor, "s"]
    object: Bool[Tensor, "s p"]
    random: Bool[Tensor, "s p"]


class Effect(NamedTuple):
    """The probability of the right answer without the block minus that with it, and the share of right answers."""

    drop: common.Estimate
    right: common.Estimate


Result = dict[str, dict[str, dict[Window, Effect]]]  # task -> kind -> layers


def pairs(case: Case) -> dict[str, Blind]:
    """The queries and keys of each kind, for positions in their order: image, then valid text, then padding."""
    rows, width = case.prompt.tokens.shape
    image = case.image.shape[1]
    position = torch.arange(image + width).expand(rows, -1)
    last, is_image = position == common.last_token(case.prompt, case.image.shape[1]), position < image
    text = ~is_image & (position <= common.last_token(case.prompt, case.image.shape[1]))
    none = torch.zeros(rows, width, dtype=torch.bool)
    own, random = (torch.cat([each, none], 1) for each in (case.object, case.random))
    return {
        "text": (text, is_image),
        "last": (last, is_image),
        "question": (text & ~last, is_image),
        "words": (last, text & ~last),
        "image": (is_image, text),
        "object": (text, own),
        "random": (text, random),
    }


def knockout(blind: Blind, last: Int[Tensor, "b 1"], window: Window, layers: int) -> dict[str, Callable[..., Any]]:
    """The edits that block these layers. The last layer computes only the last token, so its mask has one query."""
    (first, end), (queries, keys) = window, blind
    changes = {f"language.{i}.mask": lab.block(queries, keys) for i in range(first, min(end, layers - 1))}
    if end == layers:
        changes[f"language.{layers - 1}.mask"] = lab.block(queries.gather(1, last), keys)
    return changes


def probabilities(
    params: pg.Params, case: Case, cfg: pg.Config, windows: dict[str, list[Window]]
) -> tuple[Float[Tensor, "b v"], dict[tuple[str, Window], Float[Tensor, "b v"]]]:
    """The probabilities of the next token without a block, and for each kind and each window of layers."""
    last = common.last_token(case.prompt, case.image.shape[1])
    resid = common.language_input(params, case.image, case.prompt, cfg)
    logits, own = lab.capture(lab.resume, "language.*.resid_pre")(params, case.prompt, cfg, 0, resid, queries=last)
    blocked = {}
    for kind, blind in pairs(case).items():
        for first in sorted({first for first, _ in windows[kind]}):
            ends = [end for start, end in windows[kind] if start == first]
            each = blocked_from(params, case, cfg, blind, own[f"language.{first}.resid_pre"], first, ends)
            blocked |= {(kind, (first, end)): x[:, 0].softmax(-1) for end, x in each.items()}
    return logits[:, 0].softmax(-1), blocked


def blocked_from(
    params: pg.Params, case: Case, cfg: pg.Config, blind: Blind, x: Float[Tensor, "b s d"], first: int, ends: list[int]
) -> dict[int, Float[Tensor, "b 1 v"]]:
    """The logits for windows that begin in the layer `first`, whose input is x.

    The windows share the layers that they block: the longest runs, and the others continue from its residual stream.
    """
    prompt, last = case.prompt, common.last_token(case.prompt, case.image.shape[1])
    longest = knockout(blind, last, (first, max(ends)), cfg.text.layers)
    run = lab.capture(lab.edit(lab.resume, longest), "language.*.resid_pre")
    logits, seen = run(params, prompt, cfg, first, x, queries=last)
    shorter = {end: seen[f"language.{end}.resid_pre"] for end in ends if end < max(ends)}
    continued = {end: lab.resume(params, prompt, cfg, end, resid, queries=last) for end, resid in shorter.items()}
    return {max(ends): logits, **continued}


def measured(model: pg.Model, case: Case, windows: dict[str, list[Window]]) -> dict[str, dict[Window, Effect]]:
    """The effects of all blocks on one task."""
    after: dict[Any, list[Tensor]] = {}
    for rows in common.batches(len(case.answer)):
        part = Case(pg.Prompt(*(x[rows] for x in case.prompt)), *(x[rows] for x in case[1:]))
        clean, blocked = probabilities(model.params, part, model.cfg, windows)
        for where, probability in [((), clean), *blocked.items()]:
            chance = probability.gather(1, part.answer[:, None])[:, 0]
            after.setdefault(where, []).append(torch.stack([chance, (probability.argmax(1) == part.answer).float()]))
    results = {where: torch.cat(parts, 1) for where, parts in after.items()}
    clean = results.pop(())
    nothing = Effect(common.estimate(clean[0] - clean[0]), common.estimate(clean[1]))
    effects: dict[str, dict[Window, Effect]] = {"none": {(0, 0): nothing}}
    for (kind, window), (chance, right) in sorted(results.items()):
        effects.setdefault(kind, {})[window] = Effect(common.estimate(clean[0] - chance), common.estimate(right))
    return effects


def cases(model: pg.Model, count: int, seed: int) -> dict[str, Case]:
    """Questions about the colour, the existence and the position of one of three shapes."""
    chosen, asked = clear_scenes(count, seed)
    painted = scenes.paint(chosen)
    names = [scene.things[i].name for scene, i in zip(chosen, asked, strict=True)]
    colours, outlines = zip(*(name.split(" ") for name in names), strict=True)
    places = [words.split(" ")[0] for words in map(third, chosen, asked)]
    rows = {
        "colour": ([f"answer en what color is the {outline}?" for outline in outlines], colours),
        "existence": existence(names),
        "position": ([f"answer en where is the {name}?" for name in names], places),
    }
    own = lab.patches(painted.masks, model.cfg, share=0.3)[torch.arange(count), torch.tensor(asked)]
    random = random_of(~own, own.sum(1), seed)
    image, known = None, {}
    for task, (questions, words) in rows.items():
        prompt = pg.prepare(model, painted.pictures, questions)
        image = common.encode(model, prompt)["projector"] if image is None else image
        answer = torch.tensor([common.token(model, word) for word in words])
        known[task] = Case(prompt, image, answer, own, random)
    return known


def existence(names: list[str]) -> tuple[list[str], list[str]]:
    """Questions and answers. Every second asks for the same outline in a colour that is not there."""
    other = dict(zip(shapes.COLOURS, [*shapes.COLOURS][-1:] + [*shapes.COLOURS][:-1], strict=True))
    absent = [f"{other[name.split(' ')[0]]} {name.split(' ')[1]}" for name in names]
    asked = [(name, without)[i % 2] for i, (name, without) in enumerate(zip(names, absent, strict=True))]
    answers = [("yes", "no")[i % 2] for i in range(len(names))]
    return [f"answer en is there {texts.article(name)}?" for name in asked], answers


def windows(layers: int) -> dict[str, list[Window]]:
    """The layers to block: for `text`, windows of one to three, the first n and the last n; otherwise single layers."""
    short = [(first, first + size) for size in (1, 2, 3) for first in range(layers - size + 1)]
    ends = [(0, n) for n in range(1, layers + 1)] + [(layers - n, layers) for n in range(1, layers + 1)]
    late = dict.fromkeys(("last", "question", "object", "random"), short[LATE:layers])
    return {
        "text": [*dict.fromkeys(short + ends)],
        "words": short[:layers],
        "image": [*short[:layers], (0, layers)],
        **late,
    }


def draw_figure(result: Result, layers: int) -> Any:
    """The drop of the right answer's probability by layer: above for all kinds, below for windows of layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.4), dpi=120, layout="constrained")
    rows = figure.subplots(2, len(result), sharey=True)
    for above, below, (task, kinds) in zip(*rows, result.items(), strict=True):
        for i, (kind, label) in enumerate(KINDS.items()):
            drops = {first: effect.drop for (first, end), effect in kinds[kind].items() if end == first + 1}
            shifted = [first + 0.05 * (i - 3) for first in drops]  # so that equal lines are seen
            band(above, shifted, [*drops.values()], label)
        text = kinds["text"]
        for size, label in ((1, "one layer"), (2, "two, from this one"), (3, "three, from this one")):
            drops = {first: effect.drop for (first, end), effect in text.items() if end == first + size}
            band(below, [*drops], [*drops.values()], label)
        band(below, range(layers), [text[0, n].drop for n in range(1, layers + 1)], "the first up to this one")
        band(below, range(layers), [text[n, layers].drop for n in range(layers)], "this one up to the last")
        above.set_title(task, fontsize=11)
        for axes in (above, below):
            axes.set_xlabel("layer of the language model")
            axes.grid(alpha=0.3)
    for axes, title in zip(rows[:, -1], ("blocked in one layer", "text -> image, blocked in"), strict=True):
        axes.legend(title=title, fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1))
    for axes in rows[:, 0]:
        axes.set_ylabel("drop of the right answer's probability")
    return figure


@torch.no_grad()
def main(arguments: list[str] | None = None) -> Result:
    settings = common.options(__doc__, arguments)
    model = common.load()
    layers = model.cfg.text.layers
    known = cases(model, settings.scenes, settings.seed)
    result = {task: measured(model, case, windows(layers)) for task, case in known.items()}
    print("drop of the right answer's probability, and the share of right answers")
    print(f"{'blocked':30} layers  " + "".join(f"{task:27}" for task in result))
    for kind, name in {"none": "nothing", **KINDS}.items():
        for first, end in sorted(result["colour"][kind]):
            effects = [kinds[kind][first, end] for kinds in result.values()]
            cells = "".join(f"{each.drop!s:20} {each.right.mean:.2f}  " for each in effects)
            print(f"{name:30} {f'{first}-{end - 1}' if end else '':7}{cells}")
    common.save(draw_figure(result, layers), settings.out / "knockout.png")
    return result


if __name__ == "__main__":
    main()
