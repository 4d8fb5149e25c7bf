"""A toy model, and five laws that it keeps: `python examples/laws_of_a_toy.py`."""

import torch

from pgfunc import laws

words = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def forward(prompt):
    """The sum of the prefix, of the suffix up to each token, and of the pictures, each picture with its own weight."""
    prefix = words[prompt.tokens].where((prompt.valid & ~prompt.causal)[..., None], 0).sum(1, keepdim=True)
    suffix = words[prompt.tokens].where(prompt.causal[..., None], 0).cumsum(1)
    pictures = sum(prompt.pixels[:, i].mean((1, 2, 3)) * (i + 1) for i in range(prompt.pixels.shape[1]))
    return prefix + suffix + torch.as_tensor(pictures).reshape(-1, 1, 1)


toy = laws.System("a toy", vocab=64, image_size=28, forward=forward)
for result in laws.check(toy, laws.MODEL[5:10]):  # what a token attends to
    print(f"{result.law.name:40} {result.verdict} {result.counterexample}")
