"""Check five laws on a toy implementation: `python examples/laws_of_a_toy.py`."""

import torch

from pgfunc import laws

table = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def forward(prompt):
    """Logits are sums: the prefix, the suffix up to each token, and the pictures, each with a weight of its own."""
    prefix = table[prompt.tokens].where((prompt.valid & ~prompt.causal)[..., None], 0).sum(1, keepdim=True)
    suffix = table[prompt.tokens].where(prompt.causal[..., None], 0).cumsum(1)
    pictures = sum(prompt.pixels[:, i].mean((1, 2, 3)) * (i + 1) for i in range(prompt.pixels.shape[1]))
    return prefix + suffix + torch.as_tensor(pictures).reshape(-1, 1, 1)


toy = laws.System("a toy", vocab=64, image_size=28, forward=forward)
for result in laws.check(toy, laws.MODEL[5:10]):  # the laws of masks
    print(f"{result.law.name:40} {result.verdict} {result.counterexample}")
