"""Packed weights: the same numbers, side by side in memory."""

import pytest
import torch
from cases import CONFIGS, params

import pgfunc as pg
from pgfunc import packing, paligemma, quant


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_parameters_are_the_same_and_lie_beside_one_another(name):
    given = params(CONFIGS[name])
    packed = packing.packed(given, torch.device("cpu"))
    assert all(
        torch.equal(*pair)
        for pair in zip(pg.tree.flatten(given).values(), pg.tree.flatten(packed).values(), strict=True)
    )
    for layer in packed.language.layers:
        assert packing.packed_view((layer.q, layer.k, layer.v)) is not None
        assert packing.packed_view((layer.gate, layer.up)) is not None
    for layer in packed.vision.layers:
        assert packing.packed_view((layer.q, layer.k, layer.v)) is not None
        assert packing.packed_view((layer.q_bias, layer.k_bias, layer.v_bias)) is not None
    small = quant.quantize(given, "int8")
    again = packing.packed(small, torch.device("cpu"))
    assert quant.methods(again) == quant.methods(small)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_packed_on_the_device_that_is_named_with_room_for_those_without_weights(name):
    given, room = params(CONFIGS[name]), packing.packed(paligemma.abstract(CONFIGS[name]), torch.device("cpu"))
    sizes = {path: leaf.shape for path, leaf in pg.tree.flatten(given).items()}
    for packed, device in ((room, "cpu"), (packing.packed(given, torch.device("meta")), "meta")):
        assert {leaf.device.type for leaf in pg.tree.flatten(packed).values()} == {device}
        assert {path: leaf.shape for path, leaf in pg.tree.flatten(packed).items()} == sizes
    assert packing.packed_view(room.language.layers[0][1:4]) is not None


def test_packed_tensors_are_one_view_and_others_are_none():
    parts = [torch.randn(rows, 3) for rows in (2, 1, 4)]
    packed = packing.pack(parts, torch.device("cpu"))
    view = packing.packed_view(packed)
    assert view is not None
    assert torch.equal(view, torch.cat(parts))
    assert view.data_ptr() == packed[0].data_ptr()
    assert all(torch.equal(*pair) for pair in zip(parts, packed, strict=True))
    assert all(x.is_meta for x in packing.pack(parts, torch.device("meta")))
    whole = torch.randn(6, 3)
    assert torch.equal(packing.packed_view([whole[::2][:1], whole[1:3]]), whole[:3])  # a row alone may have any stride
    others = [
        parts,
        packed[::-1],
        packed[::2],
        [whole[:2], whole[3:]],
        [whole.T[:1], whole.T[1:]],
        [whole[0], whole[1:]],
    ]
    for other in others:
        assert packing.packed_view(other) is None
