# a table is a tree of parameters whose leaves are Slots
# pyright: reportArgumentType=false
"""Files of the mask VQ-VAE: big_vision's `vae-oid.npz`, and safetensors with the same keys.

The keys are those of a PyTorch module, whose Sequential counts the ReLUs as well. Source of the names: big_vision
`evaluators/proj/paligemma/transfers/segmentation.py` (decoder), `pp/proj/paligemma/segmentation.py` (encoder).
"""

from pathlib import Path

import torch

from pgfunc import tree
from pgfunc.checkpoint import bigvision, shards
from pgfunc.checkpoint.source import shipped
from pgfunc.checkpoint.tables import Slot, from_arrays, to_arrays
from pgfunc.checkpoint.writing import write_safetensors
from pgfunc.errors import CheckpointError
from pgfunc.files.atomic import replacing
from pgfunc.files.outputs import write_errors
from pgfunc.names import MASKS
from pgfunc.objects import vqvae
from pgfunc.objects.vqvae import Block, Conv, Params, Transposed

CODEBOOK = "_vq_vae._embedding"
TRAINING_ONLY = ("_vq_vae._ema_cluster_size", "_vq_vae._ema_w")  # running sums of the codebook


def table() -> Params:
    """Where every parameter is stored."""

    def layer(name: str, layer_type: type = Conv):
        return layer_type(Slot(f"{name}.weight"), Slot(f"{name}.bias"))

    def block(name: str) -> Block:
        return Block(*(layer(f"{name}.net.{i}") for i in (0, 2, 4)))

    return Params(
        down=tuple(layer(f"encoder.{i}") for i in (0, 2, 4, 6)),
        encoder=tuple(block(f"encoder.{i}") for i in (8, 9)),
        to_feature=layer("encoder.10"),
        codebook=Slot(CODEBOOK),
        from_feature=layer("decoder.0"),
        decoder=tuple(block(f"decoder.{i}") for i in (2, 3)),
        up=tuple(layer(f"decoder.{i}", Transposed) for i in (4, 6, 8, 10)),
        to_map=layer("decoder.12"),
    )


def load(path: str | Path | None = None, device: str | torch.device = "cpu") -> Params:
    """The parameters in a `.npz` or `.safetensors`, in float32; by default, those of the shipped checkpoint.

    Raises CheckpointError, naming key and shapes, for a file that is missing, incomplete or of another model.
    """
    path = shipped() / MASKS if path is None else Path(path)
    open_file = {".npz": bigvision.open_file, ".safetensors": shards.open_file}.get(path.suffix)
    if open_file is None:
        raise CheckpointError(f"{path}: neither a .npz nor a .safetensors file")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    entries = {key: entry for key, entry in open_file(path).items() if key not in TRAINING_ONLY}
    if CODEBOOK not in entries:
        raise CheckpointError(f"{path}: {CODEBOOK} is missing; expected a mask VQ-VAE such as big_vision's vae-oid.npz")
    device = torch.device(device)
    return from_arrays(table(), vqvae.abstract(), entries, str(path), torch.float32, device, "a mask VQ-VAE")


def save(path: str | Path, params: Params) -> None:
    """Write the parameters as `.safetensors`; an existing file is replaced at once."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: masks are saved as .safetensors; give a name that ends in it")
    tree.check_finite(params, str(path))
    with write_errors(path, CheckpointError), replacing(path) as file:
        write_safetensors(file, to_arrays(table(), params), {})
