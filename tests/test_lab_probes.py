"""Probes are the minimum of what they say they minimize, and read what is there."""

import pytest
import torch
import torch.nn.functional as F

from pgfunc import lab
from pgfunc.errors import SettingError

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(200, 6, generator=GENERATOR) * torch.tensor([1.0, 30.0, 0.01, 1.0, 1.0, 1.0])
X[:, 4:] += 5
SCORE = X[:, 1] / 30 + X[:, 3]
LABELS = (SCORE > -0.5).long() + (SCORE > 1).long()


@pytest.mark.parametrize("penalty", [0.1, 1.0, 100.0])
def test_a_probe_is_the_minimum_of_the_penalized_cross_entropy(penalty):
    found = lab.probe(X, LABELS, penalty=penalty)
    scale = X.double().std(0, correction=0)

    def objective(weight, bias):  # of scaled features
        logits = X.double() @ (weight / scale).T + bias
        return F.cross_entropy(logits, LABELS, reduction="sum") + penalty / 2 * weight.square().sum()

    gradients = torch.func.grad(objective, (0, 1))(found.weight.double() * scale, found.bias.double())
    assert max(g.abs().max() for g in gradients) < 2e-3  # weights are rounded to float32; 60 if all weights are 0


def test_a_probe_reads_labels_that_are_there_and_not_shuffled_ones():
    found = lab.probe(X[:150], LABELS[:150])
    assert (found(X[150:]).argmax(-1) == LABELS[150:]).float().mean() > 0.9
    shuffled = LABELS[torch.randperm(200, generator=GENERATOR)]
    control = lab.probe(X[:150], shuffled[:150])
    assert (control(X[150:]).argmax(-1) == shuffled[150:]).float().mean() < 0.7


def test_ridge_is_the_solution_of_its_equation_and_goes_through_the_mean():
    targets = torch.stack([X[:, 0] - 2 * X[:, 4], 100 * X[:, 2]], 1)
    found = lab.ridge(X, targets, penalty=1e-6)
    torch.testing.assert_close(found(X), targets, rtol=1e-3, atol=1e-3)
    strong = lab.ridge(X, targets, penalty=1e12)
    torch.testing.assert_close(strong(X), targets.mean(0).expand(200, 2), rtol=1e-4, atol=1e-4)
    scaled = (X.double() - X.double().mean(0)) / X.double().std(0, correction=0)
    weight = lab.ridge(X, targets, penalty=3.0).weight.double() * X.double().std(0, correction=0)
    residual = (targets - targets.mean(0)).double() - scaled @ weight.T
    torch.testing.assert_close(scaled.T @ residual, 3.0 * weight.T, rtol=1e-3, atol=1e-2)


def test_constant_features_half_precision_and_missing_labels_are_fine():
    x = torch.cat([X, torch.ones(200, 1)], 1)
    found = lab.probe(x.bfloat16(), LABELS, classes=5)
    assert found.weight.shape == (5, 7)
    assert found.weight.isfinite().all()
    assert found.weight.dtype == torch.float32
    assert (found(x.bfloat16()).argmax(-1) == LABELS).float().mean() > 0.9


@pytest.mark.parametrize("labels", [LABELS - 1, LABELS + 1])
def test_labels_outside_of_the_classes_are_an_error(labels):
    with pytest.raises(SettingError, match=r"^labels are -?\d to \d, expected 0 to 2$"):
        lab.probe(X, labels, classes=3)
