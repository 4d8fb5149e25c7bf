"""CUDA graphs without a GPU: a replay that runs the captured function again, where the capture found its inputs."""

from collections import Counter

import pytest
import torch
from torch.utils import _pytree as pytree

from pgfunc.jit import cuda_graphs


def played(patch: pytest.MonkeyPatch) -> Counter:
    """Let everything be captured in such graphs; how often that and a replay happen is counted."""
    counted = Counter()

    def tensors(results):
        return [x for x in pytree.tree_leaves(results) if isinstance(x, torch.Tensor)]

    def capture(fn, inputs):
        places = [x.detach() for x in inputs]
        with torch._dynamo.config.patch(error_on_recompile=True):  # nothing may be compiled during a capture
            made = fn(inputs)
        with torch.inference_mode(False), torch.no_grad():  # a graph's memory knows no modes
            results = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, made)
        counted["captured"] += 1

        def again():
            counted["replayed"] += 1
            for old, new in zip(tensors(results), tensors(fn(places)), strict=True):
                old.copy_(new)

        return again, results

    patch.setattr(cuda_graphs, "capture", capture)
    patch.setattr(cuda_graphs, "possible", lambda leaves: True)
    return counted
