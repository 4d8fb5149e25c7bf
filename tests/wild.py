"""Checkpoints as people make them: a table, of which each row is one line.

A row says how a folder is made, from one that transformers saved, and what is expected of it: that the model which
loads is the one that transformers loads from it (`SAME`); that it is the one which was saved, where transformers finds
it no longer and makes up the weights (`OURS`); or the words of the line that refuses it. `test_wild.py` runs the table.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import reference
import torch
from cases import edit_arrays
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file, save_model
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import pgfunc as pg
from pgfunc import checkpoint, tokenizer
from pgfunc.checkpoint import bigvision, hf, processor
from pgfunc.checkpoint.writing import as_json
from pgfunc.errors import CheckpointError, PgfuncError, SettingError
from pgfunc.files.atomic import changing
from pgfunc.train import lora

SAME, OURS = "as transformers loads it", "as it was saved"

Make = Callable[[Path, nn.Module], Any]


class Row(NamedTuple):
    make: Make  # changes the folder, from a copy of the model that is in it
    expected: str = SAME
    source: str = ""  # what is loaded, in the folder
    options: Mapping[str, Any] = {}  # of pg.load
    error: type[PgfuncError] = CheckpointError


# --- the folder that rows start from ----------------------------------------------------------------------------------


def base(folder: Path, variant: str = "gemma-2kv") -> nn.Module:
    """A random checkpoint with all that a folder holds; the model that is in it."""
    reference.save_random(folder, variant)
    cfg = pg.load(folder, device="meta").cfg
    settings = processor.render(cfg, processor_class="PaliGemmaProcessor", image_seq_length=cfg.vision.tokens)
    with changing(folder) as change:
        checkpoint.put_tokenizer(change, tokenizer.wrap(letters(), "the tests' tokenizer"), cfg)
        change.write(processor.NAME, as_json(settings))
    return reference.load(folder)


def letters() -> Backend:
    """A tokenizer of single letters, with as many tokens as the model has."""
    known = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "▁", *map(chr, range(33, 34 + 88))]
    backend = Backend(models.BPE({word: id for id, word in enumerate(known)}, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in known[:4]])
    backend.add_tokens([AddedToken("<loc0000>", normalized=False, special=False)])
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    assert backend.token_to_id("<image>") == reference.IMAGE
    return backend


# --- how folders are made ---------------------------------------------------------------------------------------------


def untouched(folder: Path, model: nn.Module) -> None:
    """As transformers saved it, which wrote everything in its newest form."""


def both(*makes: Make) -> Make:
    """One after another."""
    return lambda folder, model: [make(folder, model) for make in makes]


def emptied(folder: Path) -> Path:
    """The folder without weights."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    return folder


def saved(dtype: torch.dtype = torch.float32, **options: Any) -> Make:
    """By save_pretrained."""
    return lambda folder, model: model.to(dtype).save_pretrained(emptied(folder), **options)


def state(part: str = "", prefix: str = "", drop: str = "none") -> Make:
    """The state_dict of the model or of a part of it, every key with a prefix, by save_file."""

    def make(folder: Path, model: nn.Module) -> None:
        arrays = {
            prefix + key: x.clone() for key, x in model.get_submodule(part).state_dict().items() if drop not in key
        }
        save_file(arrays, emptied(folder) / hf.SINGLE)

    return make


def renamed(old: str, new: str) -> Make:
    """Keys with another text in place of one."""

    def change(arrays: dict[str, Tensor]) -> None:
        for key in [key for key in arrays if old in key]:
            arrays[key.replace(old, new)] = arrays.pop(key)

    return arrays(change)


def arrays(change: Callable[[dict[str, Tensor]], object]) -> Make:
    """Other arrays in the file."""
    return lambda folder, model: edit_arrays(folder / hf.SINGLE, change)


def more(*names: str, array: Tensor = torch.ones(2, 3)) -> Make:  # noqa: B008
    """More arrays in the file."""
    return arrays(lambda found: found.update({name: array.clone() for name in names}))


def head(key: str, factor: float = 1.0) -> Make:
    """The embedding stands there as head too, in float32."""
    return arrays(lambda found: found.update({key: factor * found[EMBED].float()}))


def layout(name: str) -> Make:
    return lambda folder, model: reference.relayout(folder, name)


def settings(name: str = "config.json", part: str = "", drop: str = "", **changes: Any) -> Make:
    """Other values in a JSON file."""

    def make(folder: Path, model: nn.Module) -> None:
        raw = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        inner = raw[part] if part else raw
        inner |= changes
        inner.pop(drop, None)
        (folder / name).write_text(json.dumps(raw))

    return make


def minimal(folder: Path, model: nn.Module) -> None:
    """A config without what equals a default of its class, as those on the hub are."""
    raw = json.loads((folder / "config.json").read_text())
    text, vision = raw["text_config"], raw["vision_config"]
    kept = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
            "num_key_value_heads", "vocab_size", "image_size", "patch_size", "vision_use_head")  # fmt: skip
    raw |= {"torch_dtype": "float32", "ignore_index": -100, "_name_or_path": "x", "auto_map": {"AutoConfig": "x.y"},
            "text_config": {key: text[key] for key in kept if key in text},
            "vision_config": {key: vision[key] for key in kept if key in vision}}  # fmt: skip
    del raw["dtype"], raw["tie_word_embeddings"], raw["transformers_version"]
    (folder / "config.json").write_text(json.dumps(raw))


def trainer(folder: Path, model: nn.Module) -> None:
    """By Trainer, whose state lies beside."""
    Trainer(model, TrainingArguments(str(emptied(folder)), report_to=[])).save_model()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"\x80")
    (folder / "trainer_state.json").write_text("{}")


def merged(folder: Path, model: nn.Module) -> None:
    """By PEFT's merge_and_unload."""
    tuned(model).merge_and_unload().save_pretrained(emptied(folder))


def unmerged(folder: Path, model: nn.Module) -> None:
    """The whole state_dict of a model that PEFT has wrapped."""
    state()(folder, tuned(model))


def tuned(model: nn.Module, **options: Any) -> Any:
    """The model with a LoRA adapter by PEFT, whose b is not zero."""
    pattern = r".*language_model.*(q_proj|down_proj)|.*vision_tower.*fc1|.*multi_modal_projector.linear"
    wrapped = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": pattern} | options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return wrapped


def pickled(folder: Path, model: nn.Module) -> None:
    torch.save(model.state_dict(), emptied(folder) / "pytorch_model.bin")


def foreign(name: str) -> Make:
    """A file of another kind, in place of safetensors."""
    return lambda folder, model: (emptied(folder) / name).write_bytes(b"GGUF")


def without(name: str) -> Make:
    return lambda folder, model: (folder / name).unlink()


def moved(name: str) -> Make:
    """The weights under another name."""
    return lambda folder, model: (folder / hf.SINGLE).rename(folder / name)


def encoded(encoding: str) -> Make:
    """JSON as some editors save it."""

    def make(folder: Path, model: nn.Module) -> None:
        for path in folder.glob("*.json"):
            path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)

    return make


def index(change: Callable[[dict[str, Any]], object]) -> Make:
    """Shards with another index."""

    def make(folder: Path, model: nn.Module) -> None:
        model.save_pretrained(emptied(folder), max_shard_size="40KB")
        raw = json.loads((folder / hf.INDEX).read_text())
        change(raw)
        (folder / hf.INDEX).write_text(json.dumps(raw))

    return make


def reordered(raw: dict[str, Any]) -> None:
    raw["weight_map"] = dict(sorted(raw["weight_map"].items(), key=lambda pair: pair[::-1], reverse=True))


def cached(folder: Path, model: nn.Module) -> None:
    """As the hub's cache lays files out: snapshots of links to blobs."""
    snapshot, blobs = folder / "snapshots" / ("a" * 40), folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))


def inside(name: str) -> Make:
    """All files in a folder of the folder."""

    def make(folder: Path, model: nn.Module) -> None:
        files = list(folder.iterdir())
        (folder / name).mkdir()
        for path in files:
            shutil.move(path, folder / name)

    return make


def side(pixels: int) -> Make:
    """A model for pictures whose side is no multiple of the patch."""
    return both(settings(part="vision_config", image_size=pixels), looks(size=square(pixels)))


def texts(**changes: Any) -> Make:
    return settings(part="text_config", **changes)


def looks(**changes: Any) -> Make:
    return settings("preprocessor_config.json", **changes)


def narrow() -> Make:
    """bfloat16, but for vectors, as norms are kept when a model is trained in few bits."""
    return arrays(lambda a: a.update({key: x.bfloat16() for key, x in a.items() if x.dim() > 1}))


def square(pixels: int) -> dict[str, int]:
    return {"height": pixels, "width": pixels}


def npz(change: Callable[[dict[str, np.ndarray]], object] = dict, name: str = "model.npz") -> Make:
    """big_vision's layout, by numpy, beside the json files."""

    def make(folder: Path, model: nn.Module) -> None:
        ours = pg.load(folder, device="cpu", mmap=False)
        emptied(folder)
        bigvision.save(folder / name, ours.cfg, ours.params)
        with np.load(folder / name) as file:
            found = dict(file)
        change(found)
        np.savez(folder / name, **found)  # pyright: ignore[reportArgumentType]

    return make


def every(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda found: found.update({key: change(x) for key, x in found.items()})


def put(name: str, array: np.ndarray) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda found: found.update({f"params/{name}": array})


def training(found: dict[str, Any]) -> None:
    """What big_vision's checkpoints of a running training hold beside the parameters."""
    found |= {f"opt/0/mu/{key}": x for key, x in list(found.items())[:3]}
    found |= {"opt/0/count": np.array(7), "chrono/accum_train_time": np.array(1.5), "step": np.array(3, "i8"),
              "extra": np.array([{}], object)}  # fmt: skip


def bare(found: dict[str, np.ndarray]) -> None:
    for key in list(found):
        found[key.removeprefix("params/")] = found.pop(key)


def one_wide(found: dict[str, np.ndarray]) -> None:
    found["params/img/head/bias"] = found["params/img/head/bias"].astype("f8")


EMBED, NORM = "language_model.model.embed_tokens.weight", "language_model.model.norm.weight"
VISION = "vision_tower.vision_model.embeddings."
ATTENTION, IDS = "language_model.model.layers.0.self_attn.", torch.arange(4)[None]
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
ROWS: dict[str, Row] = {
    # written by transformers, and by what builds on it
    "fresh": Row(untouched),
    "float32": Row(saved()),
    "bfloat16": Row(saved(torch.bfloat16)),
    "float16": Row(saved(torch.float16)),
    "float64": Row(saved(torch.float64)),
    "sharded": Row(saved(max_shard_size="40KB")),
    "Trainer": Row(trainer),
    "merged by PEFT": Row(merged),
    "the hub's layout, saved again": Row(both(layout("hub"), lambda d, m: reference.load(d).save_pretrained(d))),
    # layouts of keys
    "layout of the hub": Row(layout("hub")),
    "layout of 4.52": Row(layout("4.52")),
    "layout of 5": Row(layout("5.x")),
    "state_dict": Row(state()),
    "state_dict of the inner model": Row(state("model")),
    "state_dict of the inner model, named": Row(state("model", prefix="model.")),
    "save_model, which keeps one of two that are tied": Row(lambda d, m: save_model(m, str(emptied(d) / hf.SINGLE))),
    "state_dict without the head": Row(state(drop="lm_head")),
    "state_dict without the embedding": Row(state(drop="embed_tokens")),
    "a prefix too many": Row(state(prefix="model.")),
    # wrappers
    "torch.compile": Row(state(prefix="_orig_mod."), OURS),
    "a part by torch.compile": Row(renamed("language_model.", "language_model._orig_mod."), OURS),
    "layers by torch.compile": Row(renamed("layers.0.", "layers.0._orig_mod."), OURS),
    "DDP": Row(state(prefix="module."), OURS),
    "DDP of torch.compile": Row(state(prefix="module._orig_mod."), OURS),
    "FSDP": Row(renamed("layers.1.", "layers.1._fsdp_wrapped_module."), OURS),
    "recomputed layers": Row(renamed("layers.1.", "layers.1._checkpoint_wrapped_module."), OURS),
    "PEFT's names": Row(state(prefix="base_model.model."), OURS),
    "wrapped in a module of one's own": Row(state(prefix="policy.paligemma."), OURS),
    "one name with and without a wrapper": Row(more("x", "_orig_mod.x"), "with and without"),
    "PEFT before merging": Row(unmerged, "is LoRA's.*merge_and_unload"),
    # the head
    "head of 4.52": Row(head("lm_head.weight")),
    "head of the language model": Row(head("language_model.lm_head.weight")),
    "head of its own": Row(head("lm_head.weight", 2.0), "lm_head.weight differs from embed_tokens.weight"),
    "head, said not to be tied": Row(both(head("lm_head.weight"), settings(tie_word_embeddings=False))),
    "no head, said not to be tied": Row(settings(tie_word_embeddings=False), "lm_head.weight is missing, though"),
    "not tied, says the text_config": Row(texts(tie_word_embeddings=False)),
    "tied or not, nobody says": Row(settings(drop="tie_word_embeddings")),
    # buffers that nobody reads
    "position_ids": Row(more("vision_tower.embeddings.position_ids", array=IDS)),
    "position_ids in the hub's layout": Row(both(layout("hub"), more(VISION + "position_ids", array=IDS))),
    "inv_freq": Row(more("language_model.model.rotary_emb.inv_freq")),
    "inv_freq of each layer": Row(more(ATTENTION + "rotary_emb.inv_freq")),
    "causal_mask": Row(more("language_model.model.causal_mask", array=torch.ones(3, 3).bool()), OURS),
    "masked_bias": Row(more(ATTENTION + "masked_bias", array=torch.tensor(-1e9)), OURS),
    "pooling head": Row(more("vision_tower.head.probe", "vision_tower.head.layernorm.weight"), OURS),
    "unknown": Row(more("x"), r"x with shape \(2, 3\) is not part of the model"),
    # dtypes
    "norms in float32": Row(narrow(), "choose one with dtype="),
    "norms in float32, dtype given": Row(narrow(), options={"dtype": "float32"}),
    "head in float32": Row(both(saved(torch.bfloat16), head("lm_head.weight"))),
    "float8": Row(more(NORM, array=torch.ones(24).to(torch.float8_e4m3fn)), f"{NORM}: expected floating point"),
    "float8 of another kind": Row(more(NORM, array=torch.ones(24).to(torch.float8_e5m2)), "F8_E5M2 is not one of"),
    "bitsandbytes": Row(settings(quantization_config=BITS), "bitsandbytes has quantized"),
    "torchao": Row(settings(quantization_config={"quant_method": "torchao"}), "torchao has quantized"),
    "quantization_config null": Row(settings(quantization_config=None)),
    # configs
    "config of 4.41": Row(minimal),
    "image_token_id": Row(both(settings(image_token_id=reference.IMAGE), settings(drop="image_token_index"))),
    "text_config without a model_type": Row(texts(drop="model_type")),
    "hidden_act gelu": Row(texts(hidden_act="gelu")),
    "rope_theta null": Row(texts(rope_theta=None)),
    "rope_scaling default": Row(texts(rope_scaling={"type": "default"})),
    "rope_scaling linear": Row(texts(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is"),
    "with a pooling head, it says": Row(settings(part="vision_config", vision_use_head=True), OURS),
    "dtype of a part": Row(texts(dtype="bfloat16")),
    "another projection_dim": Row(settings(projection_dim=2048), "projection_dim is 2048"),
    "a side that is no multiple of the patch": Row(side(33)),
    "another architecture": Row(settings(model_type="llava"), "model_type is 'llava', expected 'paligemma'"),
    # processors
    "processor of 5": Row(lambda d, m: nested(d)),
    "both processors, of which the newer counts": Row(lambda d, m: nested(d, stale=True)),
    "no processor": Row(without("preprocessor_config.json"), OURS),
    "bilinear": Row(looks(resample=2)),
    "resample absent": Row(looks(drop="resample")),
    "size of another model": Row(looks(size=square(224)), "size is"),
    "the shortest edge": Row(looks(size={"shortest_edge": 28}), "size is"),
    "a number, which is the shortest edge": Row(looks(size=28), "size is 28, expected"),
    "not normalised": Row(looks(do_normalize=False), "do_normalize is False"),
    "cropped": Row(looks(do_center_crop=True, crop_size=square(14)), "do_center_crop is True"),
    # json and folders
    "json with a byte order mark": Row(encoded("utf-8-sig"), OURS),
    "json in UTF-16": Row(encoded("utf-16"), OURS),
    "the hub's cache": Row(cached, source=f"snapshots/{'a' * 40}"),
    "the hub's cache, its folder": Row(cached, "snapshots: a folder of the hub's cache"),
    "a training run": Row(inside("checkpoint-500"), "checkpoint-500: a training run; give one of its"),
    "a slash at the end": Row(untouched, source="./"),
    "the weights' file": Row(untouched, "one file of a checkpoint; give its folder", source=hf.SINGLE),
    "the config's file": Row(untouched, "one file of a checkpoint; give its folder", source="config.json"),
    "an index with more metadata": Row(index(lambda raw: raw["metadata"].update(total_parameters=1, format="pt"))),
    "an index without metadata": Row(index(lambda raw: raw.pop("metadata")), OURS),
    "an index in another order": Row(index(reordered)),
    "a stale index": Row(lambda d, m: (d / hf.INDEX).write_text('{"weight_map": {"x": "gone.safetensors"}}')),
    # other formats
    "pickled": Row(pickled, "pytorch_model.bin: pickled weights.*save_pretrained"),
    "pickled, the file": Row(pickled, "one file of a checkpoint; give its folder", source="pytorch_model.bin"),
    "llama.cpp": Row(foreign("x-Q4_K_M.gguf"), "x-Q4_K_M.gguf: weights of llama.cpp"),
    "Flax": Row(foreign("flax_model.msgpack"), "weights of Flax"),
    "TensorFlow": Row(foreign("tf_model.h5"), "weights of TensorFlow"),
    "a variant": Row(moved("model.fp16.safetensors"), "a variant of the weights"),
    "consolidated": Row(moved("consolidated.safetensors"), "consolidated.safetensors: weights under another name"),
    "no weights": Row(lambda d, m: emptied(d), "holds neither model.safetensors nor"),
    # tokenizers
    "no tokenizer.json": Row(lambda d, m: (d / "tokenizer.json").rename(d / "tokenizer.model"), OURS),
    # big_vision's
    "npz": Row(npz(), OURS),
    "npz, the file": Row(npz(), OURS, "model.npz", {"config": "config.json"}),
    "npz without a config": Row(both(npz(), without("config.json")), r"model.npz: a .npz needs config="),
    "config for a folder": Row(untouched, "config .* is for a .npz", options={"config": "x"}, error=SettingError),
    "npz without params/": Row(npz(bare), OURS),
    "npz of a training": Row(npz(training), OURS),
    "npz big-endian": Row(npz(every(lambda x: x.astype(">f4"))), OURS),
    "npz in Fortran order": Row(npz(every(np.asfortranarray)), OURS),
    "npz float64": Row(npz(every(lambda x: x.astype("f8"))), OURS),
    "npz of two dtypes": Row(npz(one_wide), "choose one with dtype="),
    "npz of two dtypes, one given": Row(npz(one_wide), OURS, options={"dtype": "float32"}),
    "npz with a pooling head": Row(npz(put("img/MAPHead_0/probe", np.ones((1, 1, 32), "f4"))), OURS),
    "npz of integers": Row(npz(put("img/head/bias", np.zeros(24, "i4"))), "img/head/bias has dtype <i4"),
    "npz of objects": Row(npz(put("img/head/bias", np.array([{}]))), r"img/head/bias has dtype \|O"),
    "npz, one of several": Row(both(npz(), foreign("other.npz")), "model.npz, other.npz; give the path of one"),
}  # fmt: skip


def nested(folder: Path, stale: bool = False) -> None:
    """The image processor's settings in processor_config.json, with another filter than an old file beside it says."""
    path = folder / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": raw | {"resample": 2}, "processor_class": "PaliGemmaProcessor"})
    )
    if not stale:
        path.unlink()


# --- adapters: a folder that PEFT saved, and the wrapped model that is in it ------------------------------------------


def adapter(**options: Any) -> Make:
    """Saved by PEFT, with other options of LoRA; or of save_pretrained, behind a `_`."""
    how = {key.removeprefix("_"): options.pop(key) for key in [*options] if key.startswith("_")}

    def make(folder: Path, wrapped: Any) -> None:
        tuned(wrapped.unload(), **options).save_pretrained(folder, **how)

    return make


def pairs(change: Callable[[dict[str, Tensor]], object]) -> Make:
    """Other arrays in the adapter's file."""
    return lambda folder, wrapped: edit_arrays(folder / lora.WEIGHTS, change)


def pairs_renamed(old: str, new: str) -> Make:
    return pairs(lambda found: [found.update({key.replace(old, new): found.pop(key)}) for key in [*found]])


def whole_state(folder: Path, wrapped: Any) -> None:
    """The adapter's part of the state_dict, in which its arrays bear its name."""
    save_file({key: x for key, x in wrapped.state_dict().items() if "lora_" in key}, folder / lora.WEIGHTS)


def beside(name: str, factor: float = 1.0) -> Make:
    """The embedding stands beside the pairs, equal to the base's or not."""

    def make(folder: Path, wrapped: Any) -> None:
        embed = factor * wrapped.get_input_embeddings().weight.detach()
        edit_arrays(folder / lora.WEIGHTS, lambda found: found.update({name: embed}))

    return make


def pickled_pairs(folder: Path, wrapped: Any) -> None:
    torch.save({}, folder / "adapter_model.bin")
    (folder / lora.WEIGHTS).unlink()


def half_narrow(found: dict[str, Tensor]) -> None:
    found.update({key: x.bfloat16() for key, x in found.items() if "lora_A" in key})


PEFT, PLAIN = "base_model.model.", {"target_modules": ["q_proj", "v_proj"]}
EMBEDDING = PEFT + "model.language_model.embed_tokens.weight"
OLD = both(pairs_renamed("model.language_model.", "language_model.model."),
           pairs_renamed("model.vision_tower.", "vision_tower.vision_model."))  # fmt: skip

ADAPTERS: dict[str, Row] = {
    "PEFT": Row(untouched),
    "attention alone": Row(adapter(**PLAIN)),
    "attention, bfloat16": Row(pairs(lambda found: found.update({key: x.bfloat16() for key, x in found.items()}))),
    "of two dtypes": Row(pairs(half_narrow)),
    "of transformers 4": Row(OLD, OURS),
    "state_dict": Row(whole_state, OURS),
    "torch.compile": Row(pairs_renamed(PEFT, "_orig_mod." + PEFT), OURS),
    "torch.compile inside": Row(pairs_renamed(PEFT, PEFT + "_orig_mod."), OURS),
    "DDP": Row(pairs_renamed(PEFT, "module." + PEFT), OURS),
    "bare names": Row(pairs_renamed(PEFT, ""), OURS),
    "bare names of the inner model": Row(pairs_renamed(PEFT + "model.", ""), OURS),
    "embeddings beside, the base's": Row(adapter(**PLAIN, _save_embedding_layers=True)),
    "embeddings beside, trained": Row(beside(EMBEDDING, 2.0), "embed_tokens.weight stands beside.*merge_and_unload"),
    "head beside, the base's": Row(beside(PEFT + "lm_head.weight"), OURS),
    "head beside, trained": Row(beside(PEFT + "lm_head.weight", 2.0), "lm_head.weight stands beside.*merge_and_unload"),
    "projector beside, the base's": Row(adapter(**PLAIN, modules_to_save=["multi_modal_projector"])),
    "rslora": Row(adapter(**PLAIN, use_rslora=True), "use_rslora is True; only plain LoRA"),
    "dora": Row(adapter(**PLAIN, use_dora=True), "use_dora is True; only plain LoRA"),
    "ranks of a pattern": Row(adapter(**PLAIN, rank_pattern={"q_proj": 3}), "rank_pattern is .*; only plain LoRA"),
    "LoRA of the embedding": Row(pairs_renamed("lora_", "lora_embedding_"), "lora_embedding_A.weight is no linear"),
    "two in one file": Row(both(whole_state, pairs(lambda found: found.update(
        {key.replace(".default.", ".other."): x.clone() for key, x in found.items()}))), "holds several adapters"),
    "pickled": Row(pickled_pairs, "adapter_model.bin: is pickled.*writes safetensors"),
    "no pairs": Row(without(lora.WEIGHTS), "adapter_model.safetensors: missing"),
    "no settings": Row(without("adapter_config.json"), "adapter_config.json: missing"),
}  # fmt: skip
