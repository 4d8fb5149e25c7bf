"""CUDA graphs without a GPU: a replay calls the captured function again, on the inputs of the capture."""

from collections import Counter

import pytest
import torch
from torch.utils import _pytree as pytree

from pgfunc.jit import cuda_graphs


def simulate_graphs(patch: pytest.MonkeyPatch) -> Counter:
    """Replace CUDA graphs by simulated ones, on any device. Returns counts of captures and replays."""
    counts = Counter()

    def tensors(results):
        return [x for x in pytree.tree_leaves(results) if isinstance(x, torch.Tensor)]

    def capture(fn, inputs):
        static_inputs = [x.detach() for x in inputs]
        with torch._dynamo.config.patch(error_on_recompile=True):  # a capture must not compile anything
            first = fn(inputs)
        with torch.inference_mode(False), torch.no_grad():  # the memory of a graph has no inference mode
            results = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, first)
        counts["captured"] += 1

        def replay():
            counts["replayed"] += 1
            for old, new in zip(tensors(results), tensors(fn(static_inputs)), strict=True):
                old.copy_(new)

        return replay, results

    patch.setattr(cuda_graphs, "capture", capture)
    patch.setattr(cuda_graphs, "can_capture", lambda leaves: True)
    return counts
