"""The mask VQ-VAE equals a PyTorch module with the same keys, can be trained, and refuses files that do not fit."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pgfunc as pg
from pgfunc.checkpoint import vqvae as files
from pgfunc.errors import CheckpointError
from pgfunc.objects import vqvae

VQ = vqvae.init(3)


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        wide = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*wide, nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def halving(i: int, o: int) -> list[nn.Module]:
    return [nn.Conv2d(i, o, 4, 2, 1), nn.ReLU()]


def doubling(i: int, o: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(i, o, 4, 2, 1), nn.ReLU()]


class Reference(nn.Module):
    """The module whose state dict `vae-oid.npz` holds, built from the published description."""

    def __init__(self):
        super().__init__()
        down = halving(1, 16) + halving(16, 32) + halving(32, 64) + halving(64, 128)
        up = doubling(128, 128) + doubling(128, 64) + doubling(64, 32) + doubling(32, 16)
        self.encoder = nn.Sequential(*down, Residual(128), Residual(128), nn.Conv2d(128, 512, 1))
        start = [nn.Conv2d(512, 128, 1), nn.ReLU(), Residual(128), Residual(128)]
        self.decoder = nn.Sequential(*start, *up, nn.Conv2d(16, 1, 1))
        self._vq_vae = nn.Module()
        # near the features of real masks; otherwise all masks would have the same code
        near = self.features(masks(8, seed=9)).detach()
        self._vq_vae.register_buffer("_embedding", near + 0.1 * near.std() * torch.randn(128, 512))

    def features(self, masks: Tensor) -> Tensor:
        return self.encoder(2 * (masks[:, None] - 0.5)).permute(0, 2, 3, 1).reshape(-1, 512)

    def codes(self, masks: Tensor) -> Tensor:
        return torch.cdist(self.features(masks).double(), self._vq_vae._embedding.double()).argmin(1).reshape(-1, 16)

    def maps(self, codes: Tensor) -> Tensor:
        return self.decoder(self._vq_vae._embedding[codes].reshape(-1, 4, 4, 512).permute(0, 3, 1, 2))[:, 0]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A random reference, and its file in the layout of `vae-oid.npz`."""
    torch.manual_seed(1)
    module, path = Reference(), tmp_path_factory.mktemp("vq") / "vae.npz"
    np.savez(path, **{key: array.detach().numpy() for key, array in module.state_dict().items()})
    return module, path


def masks(count: int, seed: int = 0) -> Tensor:
    """Soft discs of different sizes and positions."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    cy, cx, r = (torch.rand(3, count, 1, 1, generator=draw) * torch.tensor([40.0, 40, 16]).reshape(3, 1, 1, 1)) + 12
    return (r - ((y - cy) ** 2 + (x - cx) ** 2).sqrt() + 0.5).clamp(0, 1)


def test_encoder_and_decoder_equal_the_reference(reference):
    module, path = reference
    vq = files.load(path)
    inputs = masks(5)
    features = vqvae.encode(vq, inputs)
    codes = vqvae.quantize(vq.codebook, features)
    with torch.no_grad():
        torch.testing.assert_close(codes, module.codes(inputs))
        assert len(codes.unique()) > 8, "the test needs many different codes"
        maps = vqvae.decode(vq, vqvae.lookup(vq.codebook, codes))
        # float32, 15 layers; the order of summation differs
        torch.testing.assert_close(maps, module.maps(codes), atol=1e-5, rtol=1e-5)
    assert maps.shape == (5, 64, 64)


def test_codes_are_in_row_order(reference):
    """A change at the top right of the mask changes mainly the last code of the first row, not that of the last row."""
    vq = files.load(reference[1])
    one = torch.zeros(1, 64, 64)
    two = one.clone()
    two[:, :4, -4:] = 1
    changed = (vqvae.encode(vq, one) - vqvae.encode(vq, two)).square().sum(-1)[0]
    assert changed.argmax() == 3
    assert changed[3] > 10 * changed[12]


def test_parameters_have_the_count_and_keys_of_the_reference(reference):
    state = reference[0].state_dict()
    assert pg.tree.count(vqvae.abstract()) == sum(array.numel() for array in state.values())
    assert {slot.key for slot in pg.tree.flatten(files.table()).values()} == set(state)


def test_signals_neither_vanish_nor_explode_after_init():
    features = vqvae.encode(VQ, masks(16))
    assert 0.1 < features.std() < 10
    assert 0.1 < vqvae.decode(VQ, vqvae.lookup(VQ.codebook, torch.arange(128).reshape(8, 16))).std() < 10


def loss(p: vqvae.Params, inputs: Tensor) -> Tensor:
    """Reconstruction loss with a straight-through gradient, and commitment loss."""
    features = vqvae.encode(p, inputs)
    nearest = vqvae.lookup(p.codebook, vqvae.quantize(p.codebook, features)).detach()
    maps = vqvae.decode(p, features + (nearest - features).detach())
    return (maps - (inputs * 2 - 1)).square().mean() + 0.25 * (features - nearest).square().mean()


def test_training_steps_lower_the_loss():
    inputs = masks(8)
    p = vqvae.init(0)
    p = p._replace(codebook=vqvae.encode(p, inputs).reshape(128, 512).detach())
    losses = []
    for _ in range(12):
        grads, value = torch.func.grad_and_value(loss)(p, inputs)
        # steps of fixed length, because the claim is about the direction
        norm = sum(leaf.square().sum() for leaf in pg.tree.flatten(grads).values()).sqrt()
        p = pg.tree.map(lambda leaf, slope, norm=norm: leaf - 0.2 * slope / norm, p, grads)
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(leaf.abs().sum() > 0 for path, leaf in pg.tree.flatten(grads).items() if path != "codebook")


def test_the_jvp_of_the_decoder_equals_finite_differences():
    p = pg.tree.map(lambda leaf: leaf.double(), VQ)
    features, direction = torch.randn(2, 1, 16, 512, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda x: vqvae.decode(p, x), (features,), (direction,))
    size = 1e-6
    ahead, behind = (vqvae.decode(p, features + sign * size * direction) for sign in (1, -1))
    measured = (ahead - behind) / (2 * size)
    # a ReLU whose input changes sign within the step is wrong by its whole slope, which reaches very few pixels
    torch.testing.assert_close(slope, measured, atol=1e-5, rtol=1e-5)


def test_vmap_runs_an_ensemble():
    inputs = masks(2)
    stacked = pg.tree.stack([VQ, vqvae.init(4)])
    both = torch.func.vmap(vqvae.encode, in_dims=(0, None))(stacked, inputs)
    # float32 convolutions of another batch size
    torch.testing.assert_close(both[1], vqvae.encode(vqvae.init(4), inputs), atol=1e-4, rtol=1e-4)


def test_init_depends_only_on_the_seed():
    same, other = pg.tree.flatten(vqvae.init(3)), pg.tree.flatten(vqvae.init(4))
    for path, leaf in pg.tree.flatten(VQ).items():
        assert torch.equal(leaf, same[path])
        assert leaf.dim() == 1 or not torch.equal(leaf, other[path])


def test_npz_saved_as_safetensors_loads_with_the_same_bits(reference, tmp_path):
    vq = files.load(reference[1])
    files.save(tmp_path / "masks.safetensors", vq)
    again = pg.segment.load(tmp_path / "masks.safetensors")
    assert all(map(torch.equal, pg.tree.flatten(vq).values(), pg.tree.flatten(again).values()))
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]


def test_half_precision_files_load_as_float32(tmp_path):
    files.save(tmp_path / "masks.safetensors", pg.tree.map(lambda leaf: leaf.bfloat16(), VQ))
    vq = files.load(tmp_path / "masks.safetensors")
    assert {leaf.dtype for leaf in pg.tree.flatten(vq).values()} == {torch.float32}
    torch.testing.assert_close(vq.codebook, VQ.codebook, rtol=2**-8, atol=0)  # bf16 has 8 bits


def without(arrays, key):
    del arrays[key]


def shorter(arrays, key):
    arrays[key] = arrays[key][:-1]


def more(arrays, key):
    arrays[key] = np.zeros(2)


DAMAGE = {
    "missing": (without, "decoder.4.weight", "decoder.4.weight is missing, expected shape (128, 128, 4, 4)"),
    "no codebook": (without, "_vq_vae._embedding", "_vq_vae._embedding is missing; expected a mask VQ-VAE"),
    "shape": (shorter, "encoder.10.bias", "encoder.10.bias: expected (512,), found (511,)"),
    "more": (more, "head.bias", "head.bias with shape (2,) is not part of a mask VQ-VAE"),
    "integers": (lambda arrays, key: arrays.update({key: np.zeros(512, "i4")}), "encoder.10.bias", "has dtype <i4"),
    "pickled": (lambda arrays, key: arrays.update({key: np.array([{}])}), "encoder.10.bias", "has dtype |O"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_does_not_fit_is_refused_with_key_and_shapes(reference, tmp_path, damage):
    change, key, message = DAMAGE[damage]
    arrays = dict(np.load(reference[1]))
    change(arrays, key)
    np.savez(tmp_path / "vae.npz", **arrays)
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        files.load(tmp_path / "vae.npz")
    assert str(tmp_path / "vae.npz") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_running_sums_of_training_are_ignored(reference, tmp_path):
    sums = {"_vq_vae._ema_cluster_size": np.ones(128, "f4"), "_vq_vae._ema_w": np.ones((128, 512), "f4")}
    np.savez(tmp_path / "vae.npz", **np.load(reference[1]), **sums)
    assert torch.equal(files.load(tmp_path / "vae.npz").codebook, files.load(reference[1]).codebook)


def test_a_path_that_is_not_a_file_of_masks_is_refused(tmp_path):
    messages = {"a.npz": "no such file", "a.safetensors": "no such file", "a.pt": "neither a .npz nor"}
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message):
            files.load(tmp_path / name)
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 7)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        files.load(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"saved as \.safetensors"):
        files.save(tmp_path / "a.npz", VQ)
    with pytest.raises(CheckpointError, match="cannot be written"):
        files.save(tmp_path / "none" / "a.safetensors", VQ)
