"""Checkpoints: load, save, convert. Where a model comes from is decided here; how a format looks, in its own file."""

import re
from pathlib import Path

import torch
from torch import Tensor

from pgfunc import packing, quant, tree
from pgfunc import tokenizer as tokenizers
from pgfunc.checkpoint import bigvision, hf, keys, lora, processor
from pgfunc.checkpoint.hf_config import CONFIG, read_config, read_storage, render, with_methods
from pgfunc.checkpoint.source import ADAPTER, Source, check_folder, check_weights, find, named_config, npz_in
from pgfunc.checkpoint.source import HUB_ID as HUB_ID
from pgfunc.checkpoint.source import shipped as shipped
from pgfunc.checkpoint.writing import as_json, check_save, written
from pgfunc.config import Config, with_vocabulary
from pgfunc.errors import CheckpointError, DeviceError, SettingError, first_line
from pgfunc.files.atomic import Change, changing
from pgfunc.files.journal import reading
from pgfunc.files.jsonfile import read_json
from pgfunc.prompt import Model
from pgfunc.tokenizer import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
DECLARED = re.compile("special_tokens_map.json|added_tokens.json")  # which would add an older model's tokens
GAPS = 100  # more than the ids of a tokenizer have; logits are masked gap by gap


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
    """A model in memory.

    source: None for the shipped checkpoint; a folder in Hugging Face layout; a big_vision `.npz`, or a folder of one;
    or a hub id, `owner/name` or `owner/name@revision`, by huggingface_hub with its cache and its offline switch.
    config, tokenizer: for a `.npz`, a published name or the path of a `config.json` or its folder, where the name of
    the source does not say it; and the path of a `tokenizer.json`.
    dtype: None keeps what the files hold. device: None is CUDA where there is one, else the CPU; "meta" reads only
    headers.
    adapter: a LoRA adapter of that model, a folder or a hub id as PEFT writes it; its pairs are added to the weights,
    and where it has a tokenizer that one is taken.
    mmap: weights in Hugging Face layout are mapped from their files, and not copied while dtype and device stay.
    Whoever then writes into such a file changes the model, and whoever shortens it ends the process (SIGBUS); a file
    may be replaced by another of its name, as `save` does. False copies them.
    quantize: "int8", "fp8", "int4", "int4-64" or "int4-32" makes the language model smaller once it is on the device,
    see `quant.quantize`; one that was saved quantized is so without it.
    Arrays that no model reads, such as `position_ids`, are left out and named by the logger `pgfunc`.
    Raises CheckpointError, naming file, key and shapes, for files that do not fit; DeviceError, SettingError.
    """
    where, kind = as_device(device), as_dtype(dtype)
    first = torch.device("cpu") if where.type == "cuda" else where
    path = find(source)
    if tokenizer is None and adapter is not None and (find(adapter) / TOKENIZER).exists():
        tokenizer = find(adapter) / TOKENIZER  # which may have tokens of its own
    with reading(path if path.is_dir() else path.parent):
        if tokenizer is None and path.is_dir() and (path / TOKENIZER).exists():
            tokenizer = path / TOKENIZER
        if npz := npz_in(path):
            if config is None and path.is_dir() and (path / CONFIG).exists():
                config = path
            words, cfg = vocabulary(tokenizer, named_config(config, npz, source))
            params = bigvision.load(npz, cfg, kind, first)
        else:
            check_folder(path)
            if config is not None:
                raise SettingError(f"config {config} is for a .npz; {path} has a {CONFIG} of its own")
            if (path / ADAPTER).exists():
                keys.note(f"{path}: {ADAPTER} is left out: the folder holds a model too, which is read without it")
            words, cfg = vocabulary(tokenizer, read_config(path))
            note_ends(path, cfg)
            check_weights(path)
            check_save(path, CONFIG)
            params = hf.load(path, cfg, kind, first, *read_storage(path, cfg), mmap)
    if adapter is not None:
        params = lora.merge(params, lora.load(adapter, cfg, params))
    params = quant.to_device_layout(packing.packed(params, where), where) if where.type == "cuda" else params
    params = params if quantize is None else quant.quantize(params, quantize)
    return Model(cfg, params, words)


def note_ends(folder: Path, cfg: Config) -> None:
    """Say which ids end an answer in transformers and not here: a list has several."""
    for name in (CONFIG, "generation_config.json"):
        raw = read_json(folder / name) if (folder / name).exists() else {}
        ends = raw.get("eos_token_id")
        others = {*(ends if isinstance(ends, list) else [ends])} - {None, cfg.eos}
        if others:
            said = ", ".join(map(str, sorted(others, key=str)))
            keys.note(f"{folder / name}: eos_token_id has {said}, which ends no answer here; {cfg.eos} does")


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
    change.supersede(re.compile(re.escape(processor.IN_PROCESSOR)))  # which would count before
    if model.tokenizer is not None:
        put_tokenizer(change, model.tokenizer, model.cfg)
    config = with_methods(render(model.cfg, dtype), quant.methods(model.params))
    hf.write(change, hf.arrays(model.cfg, model.params), config, shard_bytes)


def put_tokenizer(change: Change, tokenizer: Tokenizer, cfg: Config) -> None:
    """Write `tokenizer.json`, and the `tokenizer_config.json` with which transformers reads it."""
    backend = tokenizer.backend
    ids = {"bos": cfg.bos, "eos": cfg.eos, "pad": cfg.pad, "unk": backend.token_to_id("<unk>"), "image": cfg.image}
    named = {name: backend.id_to_token(id) for name, id in ids.items() if id is not None}
    names = {f"{name}_token": token for name, token in named.items() if token is not None}
    extra = {"image_token": names.get("image_token", tokenizers.IMAGE)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "PaliGemmaProcessor",
                "extra_special_tokens": extra, "clean_up_tokenization_spaces": False}  # fmt: skip
    change.write(TOKENIZER, tokenizer.backend.to_str(pretty=True))
    change.write(TOKENIZER_CONFIG, as_json(names | settings))
    change.supersede(DECLARED)


def dtype_name(array: Tensor) -> str:
    """`bfloat16`, as files and options say it."""
    return str(array.dtype).removeprefix("torch.")


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
