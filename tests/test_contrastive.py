"""Contrastive losses equal their formulas, at once, in chunks and over processes, and are stable; recall."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pgfunc.errors import SettingError
from pgfunc.train.contrastive import class_vectors, recall, rows_loss, sigmoid_loss, softmax_loss

WIDTH = 6
sizes = st.integers(1, 9)


def batch(size: int, seed: int, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    """Unit vectors of pictures and texts, the logarithm of the factor, and the bias."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, size, width, generator=generator, dtype=torch.float64)
    scale, bias = torch.tensor(1.7, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    unit = torch.nn.functional.normalize
    return tuple(t.to(dtype) for t in (unit(x, dim=-1), unit(y, dim=-1), scale, bias))


def softmax(x, y, scale, bias, **options):
    """`softmax_loss` with the signature of `sigmoid_loss`, for tests of both."""
    return softmax_loss(x, y, scale, **options) + 0 * bias


LOSSES = {"softmax": softmax, "sigmoid": sigmoid_loss}


def value_and_grads(loss, inputs, **options) -> list[torch.Tensor]:
    grads, value = torch.func.grad_and_value(lambda *args: loss(*args, **options), argnums=(0, 1, 2, 3))(*inputs)
    return [value, *grads]


def assert_equal(actual, expected, **tolerance) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@given(sizes, seeds)
def test_sigmoid_loss_equals_the_formula_of_the_paper(size, seed):
    x, y, scale, bias = (t.numpy() for t in batch(size, seed, torch.float64))
    z = 2 * np.eye(size) - 1
    expected = np.log1p(np.exp(-z * (np.exp(scale) * x @ y.T + bias))).sum() / size
    actual = sigmoid_loss(*batch(size, seed, torch.float64))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)  # float64
    np.testing.assert_allclose(sigmoid_loss(*batch(size, seed)), expected, rtol=1e-5)  # float32


@given(sizes, seeds)
def test_softmax_loss_is_the_cross_entropy_in_both_directions(size, seed):
    x, y, scale, _ = (t.numpy() for t in batch(size, seed, torch.float64))
    weights = np.exp(np.exp(scale) * x @ y.T)
    own = np.diag(weights)
    expected = -(np.log(own / weights.sum(0)).mean() + np.log(own / weights.sum(1)).mean()) / 2
    np.testing.assert_allclose(softmax_loss(*batch(size, seed, torch.float64)[:3]), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(softmax_loss(*batch(size, seed)[:3]), expected, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_extreme_logits_give_finite_losses_and_gradients(loss, sign, chunk):
    """Logits of ±10,000: the loss of a right pair is 0, and that of a wrong pair is exactly its logit."""
    x = torch.eye(8)[[0, 1, 2, 3]] - torch.eye(8)[[4, 5, 6, 7]]
    inputs = (x / 2**0.5, sign * x / 2**0.5, torch.tensor(math.log(1e4)), torch.tensor(0.0))
    actual = value_and_grads(loss, inputs, chunk=chunk)
    assert all(leaf.isfinite().all() for leaf in actual)
    wrong = 0.0 if sign > 0 else 1e4
    rest = 3 * math.log(2) if loss is sigmoid_loss else math.log(3) if sign < 0 else 0.0  # for the logits that are 0
    torch.testing.assert_close(actual[0], torch.tensor(wrong + rest), rtol=1e-5, atol=1e-3)
    low = *batch(5, 1)[:2], torch.tensor(0.0), torch.tensor(-1e4 * sign)
    assert all(leaf.isfinite().all() for leaf in value_and_grads(loss, low, chunk=chunk))


def test_half_precision_is_computed_in_float32():
    x, y, scale, bias = batch(6, 0, torch.bfloat16)
    for loss in LOSSES.values():
        actual = loss(x, y, scale, bias)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, loss(*(t.float() for t in (x, y, scale, bias))))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation creates."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(leaf.numel() for leaf in tensors)])
        return out


def cost(loss, size: int, chunk: int) -> tuple[int, int]:
    """Elements of the largest tensor in both passes, and of the tensors saved between the passes."""
    saved: dict[int, int] = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    inputs = [t.requires_grad_() for t in batch(size, 0)]
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            value = loss(*inputs, chunk=chunk)
        value.backward()
    return largest.elements, sum(saved.values())


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_memory_with_chunks_grows_linearly_with_the_batch(loss):
    """The largest tensor of both passes is linear in the batch, and only vectors are saved between the passes."""
    for size in (64, 256):
        largest, saved = cost(loss, size, chunk=8)
        assert largest == 8 * size
        assert saved <= 2 * size * WIDTH + 8
        assert cost(loss, size, chunk=0)[0] == size**2  # so the count does see a square


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_vmap_computes_a_stack_of_batches(loss, chunk):
    several = [batch(5, seed) for seed in range(3)]
    stacked = [torch.stack(column) for column in zip(*several, strict=True)]
    actual = torch.func.vmap(lambda *args: torch.stack([g.sum() for g in value_and_grads(loss, args, chunk=chunk)]))
    expected = [torch.stack([g.sum() for g in value_and_grads(loss, args)]) for args in several]
    torch.testing.assert_close(actual(*stacked), torch.stack(expected), atol=1e-5, rtol=1e-5)  # float32


COMPILED = """
import sys

import torch
from test_contrastive import LOSSES, assert_equal, batch, value_and_grads

device, backend = sys.argv[1:]
inputs = [t.to(device) for t in batch(5, 0)]
for loss in LOSSES.values():
    for chunk in (0, 2):
        step = lambda *args: value_and_grads(loss, args, chunk=chunk)
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        assert_equal(compiled(*inputs), step(*inputs), atol=1e-5, rtol=1e-4)  # float32, sums in another order
"""


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
def test_loss_and_gradient_compile_as_one_graph(device, backend):
    """It runs in a separate process, because the import hook of the tests, which checks shapes, cannot be compiled."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    command = [sys.executable, "-c", COMPILED, device, backend]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def one_process(rank: int, folder: str) -> None:
    """One of two processes: it computes its rows of the batch, and gradients are averaged as DDP does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    actual = {}
    for name, chunk, seed in itertools.product(LOSSES, (0, 2), range(2)):
        weight, inputs = model_and_inputs(seed)
        mine = [part.chunk(2)[rank] for part in inputs[:2]]
        results = whole_step(LOSSES[name], weight, [*mine, *inputs[2:]], chunk=chunk, group=dist.group.WORLD)
        for result in results:
            dist.all_reduce(result)
        actual[name, chunk, seed] = [result / 2 for result in results]
    torch.save(actual, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def model_and_inputs(seed: int):
    x, y, scale, bias = batch(6, seed, torch.float64)
    return batch(WIDTH, seed + 9, torch.float64)[0], (x, y, scale, bias)


def whole_step(loss, weight, inputs, **options) -> list[torch.Tensor]:
    """Loss and gradients of a model with one matrix, which computes both vectors."""

    def objective(weight, scale, bias):
        unit = torch.nn.functional.normalize
        return loss(unit(inputs[0] @ weight, dim=-1), unit(inputs[1] @ weight.T, dim=-1), scale, bias, **options)

    grads, value = torch.func.grad_and_value(objective, argnums=(0, 1, 2))(weight, *inputs[2:])
    return [value.detach().clone(), *(grad.detach().clone() for grad in grads)]


def test_two_processes_equal_one(tmp_path):
    """Loss and gradients averaged over the processes are those of one process, with torch.func and with chunks."""
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for (name, _, seed), actual in torch.load(tmp_path / f"{rank}.pt").items():
            assert_equal(actual, whole_step(LOSSES[name], *model_and_inputs(seed)))


@given(st.integers(2, 12), st.integers(1, 12), seeds)
def test_recall_equals_that_by_sorting(size, k, seed):
    k = min(k, size)
    x, y, *_ = batch(size, seed, torch.float64)
    similar = (x @ y.T).numpy()
    texts = np.mean([i in np.argsort(-similar[i])[:k] for i in range(size)])
    images = np.mean([i in np.argsort(-similar[:, i])[:k] for i in range(size)])
    assert recall(x, y, k) == pytest.approx((texts, images))
    assert recall(x, x, 1) == (1, 1)
    assert recall(x, y, size) == (1, 1)


def test_recall_of_equal_vectors_is_zero():
    same = torch.ones(4, 3) / 3**0.5
    assert recall(same, same, 1) == (0, 0)


@pytest.mark.parametrize("k", [0, 5])
def test_recall_needs_k_within_the_batch(k):
    with pytest.raises(SettingError, match=f"k is {k}, expected 1 to 4"):
        recall(torch.eye(4), torch.eye(4), k)


def test_different_numbers_of_pictures_and_texts_are_an_error():
    zero = torch.zeros(())
    with pytest.raises(SettingError, match="expected as many pictures as texts, found 3 and 2"):
        rows_loss("sigmoid", torch.randn(3, 4), torch.randn(2, 4), zero, zero, 0, None)


def test_a_negative_chunk_is_an_error():
    with pytest.raises(SettingError, match="chunk is -1"):
        sigmoid_loss(*batch(3, 0), chunk=-1)


def test_class_vectors_are_the_normalized_means_of_their_prompts():
    prompts = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.6, 0.8]]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]])
    torch.testing.assert_close(class_vectors(prompts), expected)
