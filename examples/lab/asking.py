"""What reproductions of papers share: questions about one of two shapes, answers after edits, and the printed numbers.

    reply = knockout(batch, "Image -> Last", range(2, 4))     # the last token does not see the image in layers 2 and 3
    numbers = reproduce(args, {"what": "the paper's claim"}, (measure, colour))

Axes: b scenes of a batch, s sequence (image tokens first), p image tokens, l layers, d width, v vocabulary.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

import pgfunc as pg
from examples.lab import common, scenes
from examples.lab.selections import random_of, widened
from examples.tiny.scenes import Scene
from examples.tiny.texts import article
from pgfunc import lab
from pgfunc.taps import Tap

Question = Callable[[Scene], tuple[str, str]]  # a scene -> a question about its first thing, and the right answer


class Batch(NamedTuple):
    """Questions about the first of two things, and the language model's activations without an edit."""

    model: pg.Model
    scenes: list[Scene]
    prompt: pg.Prompt
    kind: str  # the name of the question
    truth: Int[Tensor, "b"]  # the token of the right answer
    places: dict[str, Bool[Tensor, "b s"]]  # see `places_of`
    streams: list[Float[Tensor, "b s d"]]  # the input of each layer, then the output of the last one
    last: Int[Tensor, "b"]  # the position of each row's last token, after which the answer stands
    seed: int  # of random controls; each batch has its own


class Reply(NamedTuple):
    """The probability of the right answer, and whether it is the most likely token."""

    probability: Float[Tensor, "b"]
    right: Bool[Tensor, "b"]


Measure = Callable[[Batch], Mapping[str, Float[Tensor, "b *n"] | Bool[Tensor, "b *n"]]]


def colour(scene: Scene) -> tuple[str, str]:
    return scenes.colour_question(scene), scene.things[0].colour


def existence(scene: Scene) -> tuple[str, str]:
    return f"answer en is there {article(scene.things[0].name)}?", "yes"


def reproduce(
    args: argparse.Namespace, paper: Mapping[str, str], *experiments: tuple[Measure, Question]
) -> dict[str, Any]:
    """Run the experiments, print each number under what the paper says about it, and return the numbers."""
    numbers = {}
    for measure, question in experiments:
        numbers |= over_scenes(measure, args, question)
    print(f"here: means over {args.scenes} scenes, with 95% intervals")
    for name, value in numbers.items():
        values = value if isinstance(value, list) else [value]
        print(name, f"    paper  {paper.get(name, '-')}", f"    here   {'  '.join(map(str, values))}", sep="\n")
    return numbers


@torch.no_grad()
def over_scenes(measure: Measure, args: argparse.Namespace, question: Question) -> dict[str, Any]:
    """What `measure` returns, batch by batch, as means over all scenes with intervals (`common.estimates`)."""
    model, drawn = common.load(), scenes.draw(args.scenes, seed=args.seed)
    painted, parts = scenes.paint(drawn), []
    for rows in common.batches(args.scenes):
        seed = 1000 * args.seed + rows.start
        parts.append(measure(ask(model, drawn[rows], painted.pictures[rows], painted.masks[rows], question, seed)))
    return {name: common.estimates(torch.cat([part[name] for part in parts])) for name in parts[0]}


def ask(
    model: pg.Model,
    drawn: list[Scene],
    pictures: list[Image.Image],
    masks: Bool[Tensor, "b k y x"],
    question: Question,
    seed: int,
) -> Batch:
    """The questions about these scenes, run once."""
    texts, answers = zip(*map(question, drawn), strict=True)
    prompt = pg.prepare(model, pictures, list(texts))
    last, layers = model.cfg.vision.tokens - 1 + prompt.valid.sum(1), model.cfg.text.layers
    names = [*(f"language.{i}.resid_pre" for i in range(layers)), f"language.{layers - 1}.resid_post"]
    _, seen = lab.capture(pg.forward, *names)(model.params, prompt, model.cfg)
    truth = torch.tensor([common.token(model, word) for word in answers])
    things = lab.patches(masks[:, :2], model.cfg, share=1e-6)
    places = places_of(things, last, prompt.tokens.shape[1], seed)
    streams = [seen[name] for name in names]
    return Batch(model, drawn, prompt, question.__name__, truth, places, streams, last, seed)


def places_of(
    things: Bool[Tensor, "b 2 p"], last: Int[Tensor, "b"], text: int, seed: int
) -> dict[str, Bool[Tensor, "b s"]]:
    """Groups of tokens. `Random` lies outside `Object and ring` and has as many tokens, as far as there are.

    `Question` is what follows bos and "answer en": "what color is the star?". `Last` is the newline after it.
    """
    (thing, second), count = things.unbind(1), things.shape[-1]
    ring, row = widened(thing), torch.arange(count) >= count - round(count**0.5)
    image = {
        "Image": thing | True,
        "Object": thing,
        "Object and ring": ring,
        "Random": random_of(~ring, ring.sum(1), seed),
        "Others": ~thing,
        "Second object": second,
        "Last row": row.expand_as(thing),
    }
    position, end = torch.arange(count + text), rearrange(last, "b -> b 1")
    words = {"Last": position == end, "Question": (position > count + 2) & (position < end)}
    return {name: F.pad(tokens, (0, text)) for name, tokens in image.items()} | words


def answer(batch: Batch, changes: Mapping[str, Callable[[Tensor], Tensor]], layer: int = 0) -> Reply:
    """The answers after edits of the language model from this layer on; the layers before it are not computed again."""
    params, cfg = batch.model.params, batch.model.cfg
    logits = lab.edit(lab.resume, changes)(params, batch.prompt, cfg, layer, batch.streams[layer])
    return reply(batch, logits)


def capture(batch: Batch, *names: str, tap: Tap) -> tuple[Reply, dict[str, Tensor]]:
    """The answers of a whole run with a tap, and some of its activations."""
    logits, seen = lab.capture(pg.forward, *names)(batch.model.params, batch.prompt, batch.model.cfg, tap=tap)
    return reply(batch, logits), seen


def reply(batch: Batch, logits: Float[Tensor, "b t v"]) -> Reply:
    """What the logits at the text positions say after each row's last token."""
    row = torch.arange(len(batch.truth))
    after = logits[row, batch.last - batch.model.cfg.vision.tokens]
    return Reply(after.softmax(-1)[row, batch.truth], after.argmax(-1) == batch.truth)


def knockout(batch: Batch, pair: str, layers: range) -> Reply:
    """The answers if one place is blocked from another in these layers: "Image -> Last" has keys `Image`."""
    keys, queries = (batch.places[name] for name in pair.split(" -> "))
    return answer(batch, {f"language.{i}.mask": lab.block(queries, keys) for i in layers}, layers[0])


def lens_share(batch: Batch, words: list[list[str]], place: str) -> Float[Tensor, "b l"]:
    """The share of a place's tokens whose logit lens says one of the scene's words (each one token), by layer."""
    params, cfg = batch.model.params, batch.model.cfg
    ids = rearrange(torch.tensor([[common.token(batch.model, word) for word in row] for row in words]), "b w -> b 1 w")
    said = [lab.lens(params, x, cfg).argmax(-1, keepdim=True) for x in batch.streams[1:]]
    hits, tokens = torch.stack([(each == ids).any(-1) for each in said], 1), batch.places[place]
    return (hits & rearrange(tokens, "b s -> b 1 s")).sum(-1) / tokens.sum(1, keepdim=True)


def lens_at_last(batch: Batch) -> Float[Tensor, "b l"]:
    """The lens's probability of the answer at the last token: at the input of each layer, then after the last one."""
    row, model = torch.arange(len(batch.truth)), batch.model
    at_last = [lab.lens(model.params, x[row, batch.last], model.cfg).softmax(-1) for x in batch.streams]
    return torch.stack([each[row, batch.truth] for each in at_last], 1)
