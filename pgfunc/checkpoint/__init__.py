"""Checkpoints: load, save, convert. Where a model comes from is decided here; how a format looks, in its own file."""

import re
from pathlib import Path

import torch
from torch import Tensor

from pgfunc import paligemma, quant, tree
from pgfunc import tokenizer as tokenizers
from pgfunc.atomic import Change, changing
from pgfunc.checkpoint import bigvision, hf, processor
from pgfunc.checkpoint.hf_config import CONFIG, parse_file, read_config, read_methods, render, with_methods
from pgfunc.checkpoint.writing import as_json, check_save, written
from pgfunc.config import PUBLISHED, Config
from pgfunc.errors import CheckpointError, DeviceError, SettingError, first_line
from pgfunc.journal import reading
from pgfunc.prompt import Model
from pgfunc.tokenizer import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ADAPTER = "adapter_config.json"  # of PEFT
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")

Source = str | Path | None


def load(
    source: Source = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    quantize: str | None = None,
) -> Model:
    """A model in memory.

    source: None for the shipped checkpoint; a folder in Hugging Face layout; a big_vision `.npz`, with `config` a
    published name or the path of a `config.json` or its folder, and `tokenizer` the path of a `tokenizer.json`; or a
    hub id, `owner/name` or `owner/name@revision`, by huggingface_hub with its cache and its offline switch.
    dtype: None keeps what the files hold. device: None is CUDA where there is one, else the CPU; "meta" reads only
    headers. Weights in Hugging Face layout are memory-mapped, and not copied while dtype and device stay.
    quantize: "int8", "fp8", "int4", "int4-64" or "int4-32" makes the language model smaller once it is on the device,
    see `quant.quantize`; one that was saved quantized is so without it.
    Raises CheckpointError, naming file, key and shapes, for files that do not fit; DeviceError, SettingError.
    """
    where, kind = as_device(device), as_dtype(dtype)
    first = torch.device("cpu") if where.type == "cuda" else where
    path = find(source)
    with reading(path if path.is_dir() else path.parent):
        if path.is_dir():
            if config is not None:
                raise SettingError(f"config {config} is for a .npz; {path} has a {CONFIG} of its own")
            if (path / ADAPTER).exists() and not (path / CONFIG).exists():
                raise CheckpointError(
                    f"{path}: a LoRA adapter, not a model; `pgfunc merge` makes one of it and its base"
                )
            cfg = read_config(path)
            check_save(path, CONFIG)
            params = hf.load(path, cfg, kind, first, read_methods(path, cfg))
            tokenizer = tokenizer or (path / TOKENIZER if (path / TOKENIZER).exists() else None)
        elif path.suffix == ".npz":
            cfg = named_config(config, path)
            params = bigvision.load(path, cfg, kind, first)
        else:
            raise CheckpointError(f"{path}: neither a folder in Hugging Face layout nor a big_vision .npz")
        vocabulary = tokenizers.load(Path(tokenizer)) if tokenizer else None
    params = quant.arranged(paligemma.packed(params, where), where) if where.type == "cuda" else params
    params = params if quantize is None else quant.quantize(params, quantize)
    return Model(cfg, params, vocabulary)


def save(model: Model, folder: str | Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write a model in Hugging Face layout, in shards of at most `shard_bytes`; transformers loads it.

    The folder's weights and configuration are replaced, its tokenizer too if the model has one; other files stay. All
    change at once: interrupted, the folder holds the old model or the new one (`atomic`), on the disk.
    A quantized weight is two arrays, `<key>.values` and `<key>.scale` (layouts: see `lowbit`), and config.json lists
    them under quantization_config: `load` gives them back to the bit, transformers cannot load them.
    Raises CheckpointError for a model that the layout cannot hold, or a folder that cannot be written; NumericalError
    for a parameter that is not finite.
    """
    folder = Path(folder)
    check(model, folder)
    with written(folder), changing(folder) as change:
        put(change, model, shard_bytes)


def check(model: Model, where: Path) -> None:
    """Refuse what cannot be saved, before anything is written."""
    render(model.cfg, "")
    if model.params.projector.is_meta:
        raise CheckpointError(f"{where}: a model on the meta device has no weights to save")
    tree.check_finite(model.params, str(where))


def put(change: Change, model: Model, shard_bytes: int) -> None:
    """Write a model's files among those of a folder that change at once."""
    dtype, more = dtype_name(model.params.projector), {"image_seq_length": model.cfg.vision.tokens}
    settings = processor.render(model.cfg, processor_class="PaliGemmaProcessor", **more)
    change.write(processor.NAME, as_json(settings))
    if model.tokenizer is not None:
        put_tokenizer(change, model.tokenizer)
    config = with_methods(render(model.cfg, dtype), quant.methods(model.params))
    hf.write(change, hf.arrays(model.cfg, model.params), config, shard_bytes)


def put_tokenizer(change: Change, tokenizer: Tokenizer) -> None:
    """Write `tokenizer.json`, and the `tokenizer_config.json` with which transformers reads it."""
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "image")}
    extra = {"image_token": "<image>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "PaliGemmaProcessor",
                "extra_special_tokens": extra, "clean_up_tokenization_spaces": False}  # fmt: skip
    change.write(TOKENIZER, tokenizer.backend.to_str(pretty=True))
    change.write(TOKENIZER_CONFIG, as_json(names | settings))


def dtype_name(array: Tensor) -> str:
    """`bfloat16`, as files and options say it."""
    return str(array.dtype).removeprefix("torch.")


def find(source: Source) -> Path:
    """The file or folder that a source names, fetched from the hub when it is a hub id."""
    if source is None:
        return shipped()
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a name too long, no such user
        raise CheckpointError(f"{str(source)[:80]!r}: not the name of a file or folder ({error})") from error
    if HUB_ID.fullmatch(str(source)):
        return from_hub(str(source))
    raise CheckpointError(f"{source}: no such file or folder, and not a hub id such as google/paligemma2-3b-mix-224")


def shipped() -> Path:
    """The checkpoint that comes with the package: inside an installed one, beside the package in a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "weights" / "tiny", package.parent / "weights" / "tiny"):
        if (folder / CONFIG).exists():
            return folder
    raise CheckpointError(f"{package}: the shipped checkpoint weights/tiny is missing; reinstall pgfunc")


def from_hub(name: str) -> Path:
    """The folder of a hub id, `owner/name` or `owner/name@revision`, in huggingface_hub's cache; fetched if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=["*.json", "*.safetensors"])
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: gated; accept its licence on the hub and log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such folder, not in the hub's local cache, and the hub cannot be reached or is switched off"
        ) from error
    except Exception as error:  # the network and the hub raise what they like
        raise CheckpointError(f"{name}: the hub says {first_line(error)}") from error


def named_config(config: str | Path | None, path: Path) -> Config:
    """A published config by name, or the one in a `config.json`, or in a folder that has one."""
    if config is None:
        raise CheckpointError(
            f"{path}: a .npz needs config=, one of {', '.join(PUBLISHED)}, or the path of a config.json"
        )
    if str(config) in PUBLISHED:
        return bigvision.padded(path, PUBLISHED[str(config)])
    if not Path(config).exists():
        raise CheckpointError(f"config {config} is neither a file nor one of {', '.join(PUBLISHED)}")
    return read_config(Path(config)) if Path(config).is_dir() else parse_file(Path(config))


def as_device(device: str | torch.device | None) -> torch.device:
    """A device that is there; None is CUDA where there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        raise DeviceError(f"device {device} is not there ({first_line(error)})") from error
    return where


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating point type by its name; None keeps what the files hold."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise SettingError(f"dtype is {dtype}, expected float64, float32, bfloat16 or float16")
    return found
