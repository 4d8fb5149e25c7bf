"""Linear probes: what a linear map can read from activations.

A probe that reads something shows that the information is there, not that the model uses it. Compare it with a probe
of shuffled labels (Hewitt & Liang 2019), and with one of an earlier layer. Axes: n examples, d width, c classes or
targets.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc import ops
from pgfunc.errors import SettingError

STEPS = 200  # of L-BFGS, at most; a convex problem of a thousand features needs fewer


class Probe(NamedTuple):
    """A linear map: scores of classes, or predicted targets."""

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, "c"]

    def __call__(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b c"]:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def probe(x: Float[Tensor, "n d"], labels: Int[Tensor, "n"], classes: int | None = None, penalty: float = 1.0) -> Probe:
    """Multinomial logistic regression: `probe(x).argmax(-1)` predicts the label.

    It minimizes the sum of the cross-entropies plus penalty / 2 times the squared weights, for features that are scaled
    to variance 1; scikit-learn calls 1 / penalty `C`. The weights returned are those of unscaled features, in float32.
    `classes` is the number of classes if the largest label may be missing. Raises SettingError for labels outside of
    them.
    """
    count = int(labels.max()) + 1 if classes is None else classes
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        raise SettingError(f"labels are {int(labels.min())} to {int(labels.max())}, expected 0 to {count - 1}")
    scaled, mean, scale = standardized(x)
    labels = labels.long()
    weight = torch.zeros(count, x.shape[1], dtype=scaled.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(count, dtype=scaled.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(scaled, weight, bias), labels) + penalty / 2 * weight.square().sum() / len(x)
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return unscaled(weight.detach(), bias.detach(), mean, scale)


def ridge(x: Float[Tensor, "n d"], targets: Float[Tensor, "n c"], penalty: float = 1.0) -> Probe:
    """Ridge regression: `probe(x)` predicts numbers, such as the edges of a box.

    It minimizes the squared errors plus penalty times the squared weights, for features that are scaled to variance 1.
    The penalty is positive, or no feature is a sum of others.
    """
    scaled, mean, scale = standardized(x)
    middle = targets.double().mean(0)
    square = einsum(scaled, scaled, "n d, n e -> d e") + penalty * torch.eye(x.shape[1], device=x.device).double()
    weight = torch.linalg.solve(square, einsum(scaled, targets.double() - middle, "n d, n c -> d c")).T
    return unscaled(weight, middle, mean, scale)


def standardized(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "d"], Float[Tensor, "d"]]:
    """The features with mean 0 and variance 1, in float64, and what was subtracted and divided by."""
    x = ops.upcast(x.detach()).double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale == 0, 1.0, scale)
    return (x - mean) / scale, mean, scale


def unscaled(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> Probe:
    """The probe of unscaled features."""
    weight = weight / scale
    return Probe(weight.float(), (bias - weight @ mean).float())
