"""Does the vision encoder make outlier tokens, and do a few neurons move them? Test-time registers.

Paper: Jiang, Dravid, Efros, Gandelsman, "Vision Transformers Don't Need Trained Registers", NeurIPS 2025, arXiv
2506.08010. Differs: SigLIP, 8 layers, two shapes; neurons are found with the next seed's scenes. A row of five numbers:
maximum norm and outliers after layer 2; attention to the corners and to the new token in layer 7; right answers.
Here (100 scenes): 5 neurons remove the outliers, the top corners, and no answer is wrong: agrees. But the corners keep
their attention; 20 move it to the new token, and 0.69 are right, 0.67 if they are zeroed: nothing is rescued: differs.
"""

from functools import partial

import torch

import pgfunc as pg
from examples.lab import asking, common, scenes

CORNERS, NEW = [0, 15], 256  # outliers first appear in layer 2, in the top corners; the new token
RUNS = {  # the first word is the number of neurons; what the paper's text says
    "0 neurons": "outliers have norms > 75 in OpenCLIP B/16, up to 7000 in InternViT-6B",
    "5 neurons": "300 neurons of InternViT: maximum 7000 -> 608; LLaVA's benchmarks are preserved",
    "20 neurons": "-",
    "20 neurons, zeroed": "with 10 in OpenCLIP: ImageNet accuracy 70.4 -> 55.6",
    "20 random neurons": "no effect on attacks; 10 random ones, zeroed: ImageNet 69.3 +- 1.1",
}


def move(neurons: dict[str, torch.Tensor], target: int, name: str, x: torch.Tensor) -> torch.Tensor:
    """The tap that gives the maximum of each of these neurons over the image to one token, and 0 to the others."""
    if name in neurons:
        return torch.where(neurons[name], x[:, :NEW].amax(1, keepdim=True) * (torch.arange(257) == target)[:, None], x)
    x = torch.nn.functional.pad(x, (0, 0, 0, 1)) if name == "vision.embed" else x  # zeros, without a position
    return x[:, :NEW] if name == "vision.out" else x


def measure(limit: torch.Tensor, scores: torch.Tensor, batch: asking.Batch) -> dict[str, torch.Tensor]:
    values, random = {}, torch.rand(scores.shape, generator=torch.Generator().manual_seed(batch.seed))
    for name in RUNS:
        ranked = random if "random" in name else scores
        chosen = ranked > ranked.flatten().sort(descending=True).values[int(name.split(" ")[0])]
        tap = partial(move, {f"vision.{i}.mlp_hidden": chosen[i] for i in range(3)}, -1 if "zeroed" in name else NEW)
        reply, seen = asking.capture(batch, "vision.2.resid_post", "vision.7.pattern", tap=tap)
        norms = seen["vision.2.resid_post"][:, :NEW].norm(dim=-1)
        attention = seen["vision.7.pattern"].mean((1, 2)) * (NEW + 1)  # 1 if it were uniform
        row = [norms.amax(1), (norms > limit).sum(1), attention[:, CORNERS].mean(1), attention[:, NEW]]
        values[name] = torch.stack([*row, reply.right], 1).double()
    return values


def main(arguments: list[str] | None = None) -> dict:
    args, model = common.options(__doc__, arguments), common.load()
    prompt = pg.prepare(model, scenes.paint(scenes.draw(args.scenes, seed=args.seed + 1)).pictures, "caption en")
    *hidden, resid, _ = common.encode(model, prompt, "vision.[0-2].mlp_hidden", "vision.2.resid_post").values()
    limit = resid.norm(dim=-1).mean() + 3 * resid.norm(dim=-1).std()
    scores = torch.stack([x[resid.norm(dim=-1) > limit].abs().mean(0) for x in hidden])
    return asking.reproduce(args, RUNS, (partial(measure, limit, scores), asking.colour))


if __name__ == "__main__":
    main()
