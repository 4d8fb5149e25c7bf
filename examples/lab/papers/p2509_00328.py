"""Häon, Stocking, Chuang, Tomlin: Mechanistic Interpretability for Steering Vision-Language-Action Models. CoRL 2025.
arXiv 2509.00328. Reproduced: neurons, named by the top 10 tokens of their value vectors, are overwritten everywhere.
Different: no robot, <loc> tokens stand for actions; 10 neurons at 1 or 2 x their peak in these scenes. Here (100): 1.6%
name only locations, none only colours. At 2 x, a colour's neurons make the model say it (0.95; random 0.01), low and
high ones move the mean location from 500 to 439 and 674 (random 484, 492): agrees; but 17 and 44 answers are no box.
"""

import torch

import pgfunc as pg
from examples.lab import common, scenes
from examples.tiny.shapes import COLOURS
from pgfunc import lab


def write(model: pg.Model, pictures: list, asked: list[str], neurons: torch.Tensor, values: torch.Tensor) -> list:
    """What the model writes, at most four tokens, if the neurons (s c) of each row have these values (l f)."""
    masks = torch.zeros(len(neurons), values.numel()).scatter(1, neurons, 1).view(-1, 1, *values.shape).bool()
    changes = {f"language.{i}.mlp_hidden": lab.put(value, masks[:, :, i]) for i, value in enumerate(values)}
    return pg.generate(model, pictures, asked, 4, tap=lab.edits(changes))


def main(arguments: list[str] | None = None) -> dict[str, common.Estimate]:
    chosen, model, results = common.options(__doc__, arguments), common.load(), {}
    drawn = scenes.draw(chosen.scenes, seed=chosen.seed)
    pictures = scenes.paint(drawn).pictures
    detect = [f"detect {scene.things[0].name}" for scene in drawn]
    colour = [*map(scenes.colour_question, drawn)]
    other = [[*COLOURS].index(scene.things[0].colour) - 1 for scene in drawn]  # -1 is the last colour
    language, loc = model.params.language, common.token(model, "<loc0000>")
    logits = torch.cat([layer.down.T for layer in language.layers]) @ language.embed[: model.cfg.text.vocab].T
    words, top = torch.tensor([common.token(model, name) for name in COLOURS]), logits.topk(10).indices
    pure = ((top >= loc) & (top < loc + 1024)).all(1)
    order = pure.nonzero()[:, 0][top[pure].float().mean(1).argsort()].repeat(len(drawn), 1)
    print(f"all locations: {pure.float().mean():.1%}, all colours: {torch.isin(top, words).all(1).float().mean():.1%}")
    prompt = pg.prepare(model, pictures, detect)
    _, seen = lab.capture(pg.prefill, "language.*.mlp_hidden")(model.params, prompt, model.cfg, 0)
    peak = torch.stack([each.amax((0, 1)) for each in seen.values()])
    print("paper: named neurons steer; random ones hardly do, as reported by others. Here:")
    for name, asked, named in (
        ("mean location, low neurons", detect, order[:, :10]),
        ("mean location, high neurons", detect, order[:, -10:]),
        ("share of another colour", colour, logits[:, words].topk(10, 0).indices.T[other]),
    ):
        random = named // 512 * 512 + torch.randint(512, named.shape, generator=torch.manual_seed(chosen.seed))
        for kind, ids, by in (("no", named[:, :0], 0), ("named", named, 1), ("named", named, 2), ("random", random, 2)):
            written = write(model, pictures, asked, ids, by * peak)
            boxes = sum(bool(pg.detect.parse(row.text, 224, 224)) for row in written)
            places = [[each - loc for each in row.tokens if loc <= each < loc + 1024] for row in written]
            values = [sum(row) / len(row) for row in places if row]  # of answers that have locations
            if asked is colour:
                values = [row.tokens[:1] == [words[i]] for row, i in zip(written, other, strict=True)]
            key = f"{name}, {kind} neurons, {by} x peak"
            results[key] = common.estimate(torch.tensor(values))
            print(f"{key:53}{results[key]}, n = {len(values)}, {boxes} boxes")
    return results


if __name__ == "__main__":
    main()
