"""Checkpoints: load, save, convert. Where a model comes from is decided here; how a format looks, in its own file."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from pgfunc import paligemma, quant
from pgfunc import tokenizer as tokenizers
from pgfunc.checkpoint import bigvision, hf
from pgfunc.checkpoint.files import write_json
from pgfunc.checkpoint.hf_config import CONFIG, parse_file, read_config, read_methods, render, write_config
from pgfunc.config import PUBLISHED, Config, with_vocabulary
from pgfunc.errors import CheckpointError, DeviceError, SettingError, first_line
from pgfunc.prompt import Model
from pgfunc.tokenizer import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GAPS = 100  # more than the ids of a tokenizer have; logits are masked gap by gap
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
    if path.is_dir():
        if config is not None:
            raise SettingError(f"config {config} is for a .npz; {path} has a {CONFIG} of its own")
        if (path / ADAPTER).exists() and not (path / CONFIG).exists():
            raise CheckpointError(f"{path}: a LoRA adapter, not a model; `pgfunc merge` makes one of it and its base")
        cfg = read_config(path)
        tokenizer = tokenizer or (path / TOKENIZER if (path / TOKENIZER).exists() else None)
        words, cfg = vocabulary(tokenizer, cfg)
        params = hf.load(path, cfg, kind, first, read_methods(path, cfg))
    elif path.suffix == ".npz":
        words, cfg = vocabulary(tokenizer, named_config(config, path))
        params = bigvision.load(path, cfg, kind, first)
    else:
        raise CheckpointError(f"{path}: neither a folder in Hugging Face layout nor a big_vision .npz")
    params = quant.arranged(paligemma.packed(params, where), where) if where.type == "cuda" else params
    params = params if quantize is None else quant.quantize(params, quantize)
    return Model(cfg, params, words)


def vocabulary(path: str | Path | None, cfg: Config) -> tuple[Tokenizer | None, Config]:
    """The tokenizer in a file, and the config with its vocabulary, as far as the embedding has rows for it."""
    if not path:
        return None, cfg
    words = tokenizers.load(Path(path), control=(cfg.pad, cfg.eos, cfg.bos, cfg.image))
    cfg = with_vocabulary(cfg, tokenizers.readable(words, cfg.text.vocab + cfg.text.padding))
    if len(cfg.text.masked) > GAPS:
        raise CheckpointError(f"{path}: its ids have {len(cfg.text.masked)} gaps; expected the tokenizer of this model")
    return words, cfg


def save(model: Model, folder: str | Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write a model in Hugging Face layout, in shards of at most `shard_bytes`; transformers loads it.

    A quantized weight is two arrays, `<key>.values` and `<key>.scale` (layouts: see `lowbit`), and config.json lists
    them under quantization_config: `load` gives them back to the bit, transformers cannot load them.
    The folder's weights and configuration are replaced, its tokenizer too if the model has one; other files stay.
    Raises CheckpointError for a model that the layout cannot hold, or a folder that cannot be written.
    """
    folder = Path(folder)
    render(model.cfg, "")  # what cannot be said is refused before anything is written
    if model.params.projector.is_meta:
        raise CheckpointError(f"{folder}: a model on the meta device has no weights to save")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hf.save(folder, model.cfg, model.params, shard_bytes)
        dtype = str(model.params.projector.dtype).removeprefix("torch.")
        write_config(folder, model.cfg, dtype, quant.methods(model.params))
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, model.cfg, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error})") from error


def save_tokenizer(tokenizer: Tokenizer, cfg: Config, folder: Path) -> None:
    """Write `tokenizer.json`, and the `tokenizer_config.json` with which transformers reads it."""
    backend = tokenizer.backend
    backend.save(str(folder / TOKENIZER))
    ids = {"bos": cfg.bos, "eos": cfg.eos, "pad": cfg.pad, "unk": backend.token_to_id("<unk>"), "image": cfg.image}
    named = {name: backend.id_to_token(id) for name, id in ids.items() if id is not None}
    names = {f"{name}_token": token for name, token in named.items() if token is not None}
    extra = {"image_token": names.get("image_token", tokenizers.IMAGE)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "PaliGemmaProcessor",
                "extra_special_tokens": extra, "clean_up_tokenization_spaces": False}  # fmt: skip
    write_json(folder / TOKENIZER_CONFIG, names | settings)


def convert(
    source: Source,
    target: str | Path,
    dtype: str | torch.dtype | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    quantize: str | None = None,
) -> None:
    """Write a checkpoint in the other format: big_vision when the target ends in `.npz`, else Hugging Face layout.

    A `.npz` holds weights alone: for the way back keep the source's json files, and give their folder as `config`.
    It cannot hold quantized ones; a folder can, so `quantize` (see `load`) is for those.
    """
    target = Path(target)
    model = load(source, dtype, "cpu", config, tokenizer, quantize)
    if target.suffix != ".npz":
        return save(model, target)
    try:
        bigvision.save(target, model.cfg, model.params)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error})") from error


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
