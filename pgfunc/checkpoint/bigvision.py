# a table is a tree of parameters whose leaves are Slots
# pyright: reportArgumentType=false
"""big_vision's `.npz` checkpoints: arrays `params/img/...` and `params/llm/...`, with layers stacked on the first axis.

bfloat16 is stored as numpy's void type of two bytes. Nothing is ever unpickled. Source of the names and shapes:
big_vision `models/vit.py`, `models/ppp/gemma.py`, `models/proj/paligemma/paligemma.py`.

Axes of the patterns: d width, n heads, k kv heads, h head dim, f hidden, p patches; y x c the pixels of a patch; e the
width of the vision encoder where d is that of the language model.
"""

import io
import zipfile
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from pgfunc import gemma, paligemma, quant, siglip, tree
from pgfunc.checkpoint import keys
from pgfunc.checkpoint.tables import IGNORED_DTYPE, Entry, Slot, from_arrays, to_arrays
from pgfunc.config import Config, TextConfig, VisionConfig
from pgfunc.errors import CheckpointError
from pgfunc.files.atomic import changing
from pgfunc.files.jsonfile import check_regular_file
from pgfunc.files.outputs import write_errors

DTYPES = {"f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "V2": torch.bfloat16}
HEADER_BYTES = 2**16  # read from the start of a member; its header must lie within them
# A file may expand to 64 MiB and 100 times its size: weights hardly compress, but zeros shrink to a thousandth.
MAX_EXPANSION, FREE_BYTES = 100, 2**26
EMBED = "llm/embedder/input_embedding"


def table(cfg: Config) -> paligemma.Params:
    """Where every parameter is stored."""
    return paligemma.Params(
        vision=_vision(cfg.vision),
        projector=Slot("img/head/kernel", (), "e d -> d e"),
        projector_bias=Slot("img/head/bias"),
        language=_language(cfg.text),
    )


def _vision(cfg: VisionConfig) -> siglip.Params:
    layers, heads = "img/Transformer/encoderblock/", {"n": cfg.heads}
    attention, mlp = layers + "MultiHeadDotProductAttention_0/", layers + "MlpBlock_0/"
    weight, bias = "d n h -> (n h) d", "n h -> (n h)"

    def layer(i: int) -> siglip.Layer:
        return siglip.Layer(
            norm1_scale=Slot(layers + "LayerNorm_0/scale", (i,)),
            norm1_bias=Slot(layers + "LayerNorm_0/bias", (i,)),
            q=Slot(attention + "query/kernel", (i,), weight, heads),
            q_bias=Slot(attention + "query/bias", (i,), bias, heads),
            k=Slot(attention + "key/kernel", (i,), weight, heads),
            k_bias=Slot(attention + "key/bias", (i,), bias, heads),
            v=Slot(attention + "value/kernel", (i,), weight, heads),
            v_bias=Slot(attention + "value/bias", (i,), bias, heads),
            out=Slot(attention + "out/kernel", (i,), "n h d -> d (n h)", heads),
            out_bias=Slot(attention + "out/bias", (i,)),
            norm2_scale=Slot(layers + "LayerNorm_1/scale", (i,)),
            norm2_bias=Slot(layers + "LayerNorm_1/bias", (i,)),
            up=Slot(mlp + "Dense_0/kernel", (i,), "d f -> f d"),
            up_bias=Slot(mlp + "Dense_0/bias", (i,)),
            down=Slot(mlp + "Dense_1/kernel", (i,), "f d -> d f"),
            down_bias=Slot(mlp + "Dense_1/bias", (i,)),
        )

    learned = cfg.position == "learned"
    return siglip.Params(
        patch=Slot("img/embedding/kernel", (), "y x c d -> d c y x"),
        patch_bias=Slot("img/embedding/bias"),
        position=Slot("img/pos_embedding", (), "1 p d -> p d") if learned else (),
        layers=tuple(layer(i) for i in range(cfg.layers)),
        norm_scale=Slot("img/Transformer/encoder_norm/scale"),
        norm_bias=Slot("img/Transformer/encoder_norm/bias"),
    )


def _language(cfg: TextConfig) -> gemma.Params:
    def layer(i: int) -> gemma.Layer:
        heads = {"h": cfg.head_dim}
        if cfg.heads == cfg.kv_heads:  # big_vision then keeps all three in one array
            q, k, v = (Slot("llm/layers/attn/qkv_einsum/w", (i, part), "n d h -> (n h) d", heads) for part in range(3))
        else:
            q = Slot("llm/layers/attn/q_einsum/w", (i,), "n d h -> (n h) d", heads)
            k, v = (Slot("llm/layers/attn/kv_einsum/w", (i, part), "k d h -> (k h) d", heads) for part in range(2))
        post_attention, post_mlp = (
            Slot(f"llm/layers/{name}/scale", (i,)) if cfg.post_norms else ()
            for name in ("post_attention_norm", "post_ffw_norm")
        )
        return gemma.Layer(
            attention_norm=Slot("llm/layers/pre_attention_norm/scale", (i,)),
            q=q, k=k, v=v,
            out=Slot("llm/layers/attn/attn_vec_einsum/w", (i,), "n h d -> d (n h)", heads),
            post_attention_norm=post_attention,
            mlp_norm=Slot("llm/layers/pre_ffw_norm/scale", (i,)),
            gate=Slot("llm/layers/mlp/gating_einsum", (i, 0), "d f -> f d"),
            up=Slot("llm/layers/mlp/gating_einsum", (i, 1), "d f -> f d"),
            down=Slot("llm/layers/mlp/linear", (i,), "f d -> d f"),
            post_mlp_norm=post_mlp,
        )  # fmt: skip

    return gemma.Params(
        embed=Slot(EMBED),
        layers=tuple(layer(i) for i in range(cfg.layers)),
        norm=Slot("llm/final_norm/scale"),
    )


def load(path: Path, cfg: Config, dtype: torch.dtype | None, device: torch.device) -> paligemma.Params:
    """The parameters in a `.npz`; on the meta device only its headers are read."""
    model = "the model that its config describes"
    return from_arrays(table(cfg), paligemma.abstract(cfg), open_file(path), str(path), dtype, device, model)


def with_padding(path: Path, cfg: Config) -> Config:
    """The config with the padding rows of the file's embedding, which a conversion from Hugging Face keeps."""
    embed = open_file(path).get(EMBED)
    extra = embed.shape[0] - cfg.text.vocab if embed and embed.shape else 0
    return replace(cfg, text=replace(cfg.text, padding=extra if 0 < extra < cfg.text.vocab else 0))


def open_file(path: Path) -> dict[str, Entry]:
    """Every array of a `.npz`, by its name without the `params/` prefix; only headers are read.

    If some names have the prefix, the others belong to the state of a training run and are ignored.
    """
    check_regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            members = {member.filename.removesuffix(".npy"): member for member in arrays}
            parameters = {name for name in members if name.startswith("params/")} or set(members)
            headers = {name: _header(archive, member) for name, member in members.items() if name in parameters}
    except Exception as error:  # zipfile and numpy raise many types of error for a damaged file
        raise CheckpointError(f"{path}: not a complete npz file ({error}); download it again") from error
    if sum(member.file_size for member in arrays) > FREE_BYTES + MAX_EXPANSION * path.stat().st_size:
        raise CheckpointError(f"{path}: expands to more than {MAX_EXPANSION} times its size; weights never do")
    keys.warn_unused(members.keys() - parameters, str(path))
    return {
        name.removeprefix("params/"): Entry(shape, _dtype(dtype, name, path), partial(_read, path, name, shape, dtype))
        for name, (shape, dtype) in headers.items()
    }


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    with archive.open(member) as content:
        file = io.BytesIO(content.read(HEADER_BYTES))
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"{member.filename} is an npy file of version {version}")
    shape, _, dtype = read(file)
    return shape, dtype


def _dtype(dtype: np.dtype, name: str, path: Path) -> torch.dtype:
    """PyTorch's dtype for numpy's, in either byte order."""
    if dtype.str[1:] not in DTYPES and not keys.UNUSED.fullmatch(name):
        raise CheckpointError(f"{path}: {name} has dtype {dtype.str}, expected one of {', '.join(DTYPES)}")
    return DTYPES.get(dtype.str[1:], IGNORED_DTYPE)


def _read(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    try:
        with np.load(path, allow_pickle=False) as archive:
            member = f"{name}.npy"  # with the suffix, because numpy would prefer a member named without it
            if archive.zip.getinfo(member).file_size < prod(shape) * dtype.itemsize:
                raise ValueError("it is shorter than its header says")
            array = archive[member].astype(dtype.newbyteorder("="), order="C", copy=False)
    except Exception as error:  # as in open_file
        raise CheckpointError(f"{path}: {name} cannot be read ({error}); download it again") from error
    return torch.from_numpy(array.view("u2")).view(torch.bfloat16) if dtype.kind == "V" else torch.from_numpy(array)


def save(path: Path, cfg: Config, params: paligemma.Params) -> None:
    """Write the parameters as big_vision does; an existing file is replaced at once.

    Raises SettingError for quantized parameters, which the format does not have.
    """
    check_saveable(path, params)
    with write_errors(path, CheckpointError), changing(path.parent) as change, change.new(path.name) as file:
        write(file, cfg, params)


def check_saveable(path: Path, params: paligemma.Params) -> None:
    """Raise if the parameters cannot be saved in this format, before anything is written."""
    quant.check_plain(params, f"{path}: big_vision's layout")
    tree.check_finite(params, str(path))


def write(file: IO[bytes], cfg: Config, params: paligemma.Params) -> None:
    """Write the parameters to an open file."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for key, array in to_arrays(table(cfg), params).items():
            with archive.open(f"params/{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, _numpy(array), allow_pickle=False)


def _numpy(array: Tensor) -> np.ndarray:
    array = array.detach().cpu().contiguous()
    return array.view(torch.uint16).numpy().view("V2") if array.dtype == torch.bfloat16 else array.numpy()
