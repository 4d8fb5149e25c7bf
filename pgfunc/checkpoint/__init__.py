"""Checkpoints: load and save a model. Each format has its own module; this one decides which format a source is in."""

import re
from pathlib import Path

import torch

from pgfunc import packing, quant, tree
from pgfunc import tokenizer as tokenizers
from pgfunc.checkpoint import bigvision, hf, keys, lora, processor, shards
from pgfunc.checkpoint.hf_config import CONFIG, read_config, read_storage, render, with_methods
from pgfunc.checkpoint.source import ADAPTER, Source, check_model_folder, check_weights, find, named_config, npz_in
from pgfunc.checkpoint.source import HUB_ID as HUB_ID
from pgfunc.checkpoint.source import shipped as shipped
from pgfunc.checkpoint.writing import as_json, check_params, check_same_save
from pgfunc.config import Config, with_vocabulary
from pgfunc.errors import CheckpointError, DeviceError, SettingError, first_line
from pgfunc.files.atomic import Change, changing
from pgfunc.files.journal import reading
from pgfunc.files.jsonfile import read_json
from pgfunc.files.outputs import write_errors
from pgfunc.prompt import Model
from pgfunc.tokenizer import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# files in which older versions declare tokens; beside a new tokenizer they would add those of a previous model
TOKEN_DECLARATIONS = re.compile(r"special_tokens_map\.json|added_tokens\.json")
MAX_GAPS = 100  # in the ids of a tokenizer, because logits are masked gap by gap; real tokenizers have fewer


def load(
    source: Source = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    quantize: str | None = None,
    *,
    adapter: str | Path | None = None,
    mmap: bool = True,
) -> Model:
    """Load a model into memory.

    source: None for the shipped checkpoint; a folder in Hugging Face layout; a big_vision `.npz`, or a folder with one;
    or a hub id, `owner/name` or `owner/name@revision`, which huggingface_hub fetches (its cache and its offline switch
    are respected).
    config: for a `.npz`, the name of a published config, or the path of a `config.json` or of its folder. Default: the
    `config.json` in the source, if it is a folder with one; else the published name within the file's or source's name.
    tokenizer: for a `.npz`, the path of a `tokenizer.json`.
    dtype: None keeps the dtype of the files. device: None is CUDA if available, else the CPU; "meta" reads only
    headers.
    adapter: a LoRA adapter of the model as PEFT writes it, a folder or a hub id. Its pairs are added to the weights,
    and its tokenizer is used if it has one.
    mmap: True maps weights in Hugging Face layout from their files, without a copy unless dtype or device change.
    Writing into such a file then changes the model, and truncating it ends the process (SIGBUS); replacing it by
    another file of the same name is safe, and `save` does that. False copies the weights.
    quantize: "int8", "fp8", "int4", "int4-64" or "int4-32" quantizes the language model once it is on the device, see
    `quant.quantize`. A model that was saved quantized is loaded quantized without it.
    Arrays that no model uses, such as `position_ids`, are ignored, with a warning through the logger `pgfunc`.
    Raises CheckpointError, naming file, key and shapes, for files that do not fit; DeviceError; SettingError.
    """
    target, cast = as_device(device), as_dtype(dtype)
    read_to = torch.device("cpu") if target.type == "cuda" else target
    path = find(source)
    if tokenizer is None and adapter is not None and (find(adapter) / TOKENIZER).exists():
        tokenizer = find(adapter) / TOKENIZER  # an adapter may add tokens
    with reading(path if path.is_dir() else path.parent):
        if tokenizer is None and path.is_dir() and (path / TOKENIZER).exists():
            tokenizer = path / TOKENIZER
        if npz := npz_in(path):
            if config is None and path.is_dir() and (path / CONFIG).exists():
                config = path
            loaded_tokenizer, cfg = load_tokenizer(tokenizer, named_config(config, npz, source))
            params = bigvision.load(npz, cfg, cast, read_to)
        else:
            check_hf_folder(path, config)
            loaded_tokenizer, cfg = load_tokenizer(tokenizer, read_config(path))
            warn_other_ends(path, cfg)
            check_weights(path)
            check_same_save(path, CONFIG)
            params = hf.load(path, cfg, cast, read_to, *read_storage(path, cfg), mmap)
    if adapter is not None:
        params = lora.merge(params, lora.load(adapter, cfg, params))
    params = quant.to_device_layout(packing.packed(params, target), target) if target.type == "cuda" else params
    params = params if quantize is None else quant.quantize(params, quantize)
    return Model(cfg, params, loaded_tokenizer)


def check_hf_folder(path: Path, config: str | Path | None) -> None:
    """Raise for a path that is not a model's folder, or if `config` is given; warn of an adapter that is ignored."""
    check_model_folder(path)
    if config is not None:
        raise SettingError(f"config {config} is for a .npz; {path} has its own {CONFIG}")
    if (path / ADAPTER).exists():
        keys.warn_once(f"{path}: {ADAPTER} is ignored: the folder also holds a model, which is loaded without it")


def warn_other_ends(folder: Path, cfg: Config) -> None:
    """Warn of ids that end an answer in transformers but not here; transformers allows several."""
    for name in (CONFIG, "generation_config.json"):
        raw = read_json(folder / name) if (folder / name).exists() else {}
        ends = raw.get("eos_token_id")
        others = {*(ends if isinstance(ends, list) else [ends])} - {None, cfg.eos}
        if others:
            listed = ", ".join(map(str, sorted(others, key=str)))
            keys.warn_once(
                f"{folder / name}: eos_token_id has {listed}, which does not end an answer here; only {cfg.eos} does"
            )


def load_tokenizer(path: str | Path | None, cfg: Config) -> tuple[Tokenizer | None, Config]:
    """The tokenizer in a file, and the config with the tokenizer's ids, except those without a row in the embedding."""
    if not path:
        return None, cfg
    tokenizer = tokenizers.load(Path(path), control=(cfg.pad, cfg.eos, cfg.bos, cfg.image))
    cfg = with_vocabulary(cfg, tokenizers.readable(tokenizer, cfg.text.vocab + cfg.text.padding))
    if len(cfg.text.masked) > MAX_GAPS:
        raise CheckpointError(f"{path}: its ids have {len(cfg.text.masked)} gaps; expected this model's tokenizer")
    return tokenizer, cfg


def save(model: Model, folder: str | Path, shard_bytes: int = shards.SHARD_BYTES) -> None:
    """Write a model in Hugging Face layout, in shards of at most `shard_bytes`; transformers loads it.

    The folder's weights and configuration are replaced, and its tokenizer if the model has one. Other files stay.
    The replaced files change at once: after an interruption the folder holds the old model or the new one (see
    `atomic`), flushed to disk.
    A quantized weight is two arrays, `<key>.values` and `<key>.scale` (layouts: see `lowbit`), and config.json lists
    it under quantization_config. `load` restores it bit for bit; transformers cannot load it.
    Raises CheckpointError for a model that the layout cannot hold, or a folder that cannot be written; NumericalError
    for a parameter that is not finite.
    """
    folder = Path(folder)
    check_saveable(model, folder)
    with write_errors(folder, CheckpointError), changing(folder) as change:
        write_model(change, model, shard_bytes)


def check_saveable(model: Model, where: Path) -> None:
    """Raise if a model cannot be saved, before anything is written."""
    render(model.cfg, "")
    check_params(model.params, where)


def write_model(change: Change, model: Model, shard_bytes: int) -> None:
    """Write a model's files, as part of a change of a folder."""
    tokens = {"image_seq_length": model.cfg.vision.tokens}
    settings = processor.render(model.cfg, processor_class="PaliGemmaProcessor", **tokens)
    change.write(processor.PREPROCESSOR_CONFIG, as_json(settings))
    change.supersede(re.compile(re.escape(processor.PROCESSOR_CONFIG)))  # an older one would take precedence
    if model.tokenizer is not None:
        write_tokenizer(change, model.tokenizer, model.cfg)
    config = with_methods(render(model.cfg, tree.dtype_name(model.params.projector)), quant.methods(model.params))
    shards.write(change, hf.arrays(model.cfg, model.params), config, shard_bytes)


def write_tokenizer(change: Change, tokenizer: Tokenizer, cfg: Config) -> None:
    """Write `tokenizer.json`, and the `tokenizer_config.json` with which transformers reads it."""
    backend = tokenizer.backend
    ids = {"bos": cfg.bos, "eos": cfg.eos, "pad": cfg.pad, "unk": backend.token_to_id("<unk>"), "image": cfg.image}
    tokens = {name: backend.id_to_token(id) for name, id in ids.items() if id is not None}
    names = {f"{name}_token": token for name, token in tokens.items() if token is not None}
    extra = {"image_token": names.get("image_token", tokenizers.IMAGE)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "PaliGemmaProcessor",
                "extra_special_tokens": extra, "clean_up_tokenization_spaces": False}  # fmt: skip
    change.write(TOKENIZER, tokenizer.backend.to_str(pretty=True))
    change.write(TOKENIZER_CONFIG, as_json(names | settings))
    change.supersede(TOKEN_DECLARATIONS)


def as_device(device: str | torch.device | None) -> torch.device:
    """An available device; None is CUDA if available, else the CPU. Raises DeviceError."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        available = torch.device(device)
        torch.empty(0, device=available)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        raise DeviceError(f"device {device} is not available ({first_line(error)})") from error
    return available


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating point type by its name; None keeps the dtype of the files. Raises SettingError."""
    cast = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and cast not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise SettingError(f"dtype is {dtype}, expected float64, float32, bfloat16 or float16")
    return cast
