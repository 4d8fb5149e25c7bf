"""Checkpoints as people make them: a table with one row for each way of making one.

A row changes a folder that transformers saved, and states the expected result: `SAME`, the same model as transformers
loads from the folder; `OURS`, the model that was saved, although transformers does not recognize its keys and loads
random weights; or a part of the message that refuses the folder. `test_wild.py` runs the table.
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

FolderChange = Callable[[Path, nn.Module], Any]


class Row(NamedTuple):
    change: FolderChange  # changes the folder; it is given a copy of the folder's model
    expected: str = SAME
    source: str = ""  # the path inside the folder that is loaded
    options: Mapping[str, Any] = {}  # arguments of pg.load
    error: type[PgfuncError] = CheckpointError


# --- the folder that every row changes --------------------------------------------------------------------------------


def base(folder: Path, variant: str = "gemma-2kv") -> nn.Module:
    """Write a random checkpoint with tokenizer and processor; return its model."""
    reference.save_random(folder, variant)
    cfg = pg.load(folder, device="meta").cfg
    settings = processor.render(cfg, processor_class="PaliGemmaProcessor", image_seq_length=cfg.vision.tokens)
    with changing(folder) as change:
        checkpoint.write_tokenizer(change, tokenizer.wrap(letters(), "the tests' tokenizer"), cfg)
        change.write(processor.PREPROCESSOR_CONFIG, as_json(settings))
    return reference.load(folder)


def letters() -> Backend:
    """A tokenizer with one token per letter, and as many tokens as the model has."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "▁", *map(chr, range(33, 34 + 88))]
    backend = Backend(models.BPE({token: id for id, token in enumerate(tokens)}, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in tokens[:4]])
    backend.add_tokens([AddedToken("<loc0000>", normalized=False, special=False)])
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    assert backend.token_to_id("<image>") == reference.IMAGE
    return backend


# --- ways of changing a folder ----------------------------------------------------------------------------------------


def unchanged(folder: Path, model: nn.Module) -> None:
    """Leave the folder as transformers saved it, in its newest form."""


def in_turn(*changes: FolderChange) -> FolderChange:
    """Apply several changes, one after another."""
    return lambda folder, model: [change(folder, model) for change in changes]


def without_weights(folder: Path) -> Path:
    """Delete the weights of a folder; return the folder."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    return folder


def save_pretrained(dtype: torch.dtype = torch.float32, **options: Any) -> FolderChange:
    """Save the model again by save_pretrained."""
    return lambda folder, model: model.to(dtype).save_pretrained(without_weights(folder), **options)


def save_state_dict(part: str = "", prefix: str = "", drop: str = "none") -> FolderChange:
    """Save the state_dict of the model, or of a part of it, by save_file, with a prefix before every key."""

    def change_folder(folder: Path, model: nn.Module) -> None:
        arrays = {
            prefix + key: x.clone() for key, x in model.get_submodule(part).state_dict().items() if drop not in key
        }
        save_file(arrays, without_weights(folder) / hf.SINGLE)

    return change_folder


def rename_keys(old: str, new: str) -> FolderChange:
    """Replace a text in the keys by another."""

    def change(arrays: dict[str, Tensor]) -> None:
        for key in [key for key in arrays if old in key]:
            arrays[key.replace(old, new)] = arrays.pop(key)

    return change_arrays(change)


def change_arrays(change: Callable[[dict[str, Tensor]], object]) -> FolderChange:
    """Change the arrays in the file."""
    return lambda folder, model: edit_arrays(folder / hf.SINGLE, change)


def add_arrays(*names: str, array: Tensor = torch.ones(2, 3)) -> FolderChange:  # noqa: B008
    """Add arrays to the file."""
    return change_arrays(lambda arrays: arrays.update({name: array.clone() for name in names}))


def add_head(key: str, factor: float = 1.0) -> FolderChange:
    """Save the embedding a second time as the head, multiplied by a factor, in float32."""
    return change_arrays(lambda arrays: arrays.update({key: factor * arrays[EMBED].float()}))


def relayout(name: str) -> FolderChange:
    """Rename the keys to another key layout."""
    return lambda folder, model: reference.relayout(folder, name)


def change_json(name: str = "config.json", part: str = "", drop: str = "", **changes: Any) -> FolderChange:
    """Change fields of a JSON file, or of an object in it, and drop one."""

    def change_folder(folder: Path, model: nn.Module) -> None:
        raw = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        inner = raw[part] if part else raw
        inner |= changes
        inner.pop(drop, None)
        (folder / name).write_text(json.dumps(raw))

    return change_folder


def minimal_config(folder: Path, model: nn.Module) -> None:
    """Remove the fields of the config that equal the defaults of their class, as in the configs on the hub."""
    raw = json.loads((folder / "config.json").read_text())
    text, vision = raw["text_config"], raw["vision_config"]
    fields = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
              "num_key_value_heads", "vocab_size", "image_size", "patch_size", "vision_use_head")  # fmt: skip
    raw |= {"torch_dtype": "float32", "ignore_index": -100, "_name_or_path": "x", "auto_map": {"AutoConfig": "x.y"},
            "text_config": {key: text[key] for key in fields if key in text},
            "vision_config": {key: vision[key] for key in fields if key in vision}}  # fmt: skip
    del raw["dtype"], raw["tie_word_embeddings"], raw["transformers_version"]
    (folder / "config.json").write_text(json.dumps(raw))


def save_by_trainer(folder: Path, model: nn.Module) -> None:
    """Save by Trainer, which also writes files with its state."""
    Trainer(model, TrainingArguments(str(without_weights(folder)), report_to=[])).save_model()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"\x80")
    (folder / "trainer_state.json").write_text("{}")


def save_merged(folder: Path, model: nn.Module) -> None:
    """Save a model merged by PEFT's merge_and_unload."""
    with_lora(model).merge_and_unload().save_pretrained(without_weights(folder))


def save_unmerged(folder: Path, model: nn.Module) -> None:
    """Save the complete state_dict of a model that PEFT has wrapped."""
    save_state_dict()(folder, with_lora(model))


def with_lora(model: nn.Module, **options: Any) -> Any:
    """The model with a LoRA adapter by PEFT whose matrices B are not zero."""
    pattern = r".*language_model.*(q_proj|down_proj)|.*vision_tower.*fc1|.*multi_modal_projector.linear"
    wrapped = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": pattern} | options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return wrapped


def save_pickled(folder: Path, model: nn.Module) -> None:
    torch.save(model.state_dict(), without_weights(folder) / "pytorch_model.bin")


def other_file(name: str) -> FolderChange:
    """Replace the safetensors by a file of another format."""
    return lambda folder, model: (without_weights(folder) / name).write_bytes(b"GGUF")


def delete(name: str) -> FolderChange:
    return lambda folder, model: (folder / name).unlink()


def rename_weights(name: str) -> FolderChange:
    """Give the file of the weights another name."""
    return lambda folder, model: (folder / hf.SINGLE).rename(folder / name)


def encode_json(encoding: str) -> FolderChange:
    """Rewrite the JSON files in another text encoding, as some editors do."""

    def change_folder(folder: Path, model: nn.Module) -> None:
        for path in folder.glob("*.json"):
            path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)

    return change_folder


def change_index(change: Callable[[dict[str, Any]], object]) -> FolderChange:
    """Save shards, and change their index."""

    def change_folder(folder: Path, model: nn.Module) -> None:
        model.save_pretrained(without_weights(folder), max_shard_size="40KB")
        raw = json.loads((folder / hf.INDEX).read_text())
        change(raw)
        (folder / hf.INDEX).write_text(json.dumps(raw))

    return change_folder


def reverse_weight_map(raw: dict[str, Any]) -> None:
    raw["weight_map"] = dict(sorted(raw["weight_map"].items(), key=lambda pair: pair[::-1], reverse=True))


def as_hub_cache(folder: Path, model: nn.Module) -> None:
    """Arrange the files as the hub's cache does: a snapshot with links to blobs."""
    snapshot, blobs = folder / "snapshots" / ("a" * 40), folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))


def move_into(name: str) -> FolderChange:
    """Move all files into a subfolder."""

    def change_folder(folder: Path, model: nn.Module) -> None:
        files = list(folder.iterdir())
        (folder / name).mkdir()
        for path in files:
            shutil.move(path, folder / name)

    return change_folder


def image_side(pixels: int) -> FolderChange:
    """Configure an image size that is not a multiple of the patch size."""
    return in_turn(change_json(part="vision_config", image_size=pixels), preprocessor(size=square(pixels)))


def text_config(**changes: Any) -> FolderChange:
    return change_json(part="text_config", **changes)


def preprocessor(**changes: Any) -> FolderChange:
    return change_json("preprocessor_config.json", **changes)


def bfloat16_matrices() -> FolderChange:
    """Cast matrices to bfloat16 but not vectors, as low-precision training keeps its norms."""
    return change_arrays(lambda a: a.update({key: x.bfloat16() for key, x in a.items() if x.dim() > 1}))


def square(pixels: int) -> dict[str, int]:
    return {"height": pixels, "width": pixels}


def npz(change: Callable[[dict[str, np.ndarray]], object] = dict, name: str = "model.npz") -> FolderChange:
    """Replace the safetensors by a `.npz` in big_vision's layout, written by numpy, with changed arrays."""

    def change_folder(folder: Path, model: nn.Module) -> None:
        ours = pg.load(folder, device="cpu", mmap=False)
        without_weights(folder)
        bigvision.save(folder / name, ours.cfg, ours.params)
        with np.load(folder / name) as file:
            arrays = dict(file)
        change(arrays)
        np.savez(folder / name, **arrays)  # pyright: ignore[reportArgumentType]

    return change_folder


def change_all(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: arrays.update({key: change(x) for key, x in arrays.items()})


def put_array(name: str, array: np.ndarray) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: arrays.update({f"params/{name}": array})


def add_training_state(arrays: dict[str, Any]) -> None:
    """Add what big_vision saves beside the parameters during training."""
    arrays |= {f"opt/0/mu/{key}": x for key, x in list(arrays.items())[:3]}
    arrays |= {"opt/0/count": np.array(7), "chrono/accum_train_time": np.array(1.5), "step": np.array(3, "i8"),
              "extra": np.array([{}], object)}  # fmt: skip


def drop_prefix(arrays: dict[str, np.ndarray]) -> None:
    for key in list(arrays):
        arrays[key.removeprefix("params/")] = arrays.pop(key)


def float64_bias(arrays: dict[str, np.ndarray]) -> None:
    arrays["params/img/head/bias"] = arrays["params/img/head/bias"].astype("f8")


EMBED, NORM = "language_model.model.embed_tokens.weight", "language_model.model.norm.weight"
VISION = "vision_tower.vision_model.embeddings."
ATTENTION, IDS = "language_model.model.layers.0.self_attn.", torch.arange(4)[None]
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
ROWS: dict[str, Row] = {
    # saved by transformers and by libraries that build on it
    "fresh": Row(unchanged),
    "float32": Row(save_pretrained()),
    "bfloat16": Row(save_pretrained(torch.bfloat16)),
    "float16": Row(save_pretrained(torch.float16)),
    "float64": Row(save_pretrained(torch.float64)),
    "sharded": Row(save_pretrained(max_shard_size="40KB")),
    "Trainer": Row(save_by_trainer),
    "merged by PEFT": Row(save_merged),
    "the hub's layout, saved again": Row(in_turn(relayout("hub"), lambda d, m: reference.load(d).save_pretrained(d))),
    # layouts of keys
    "layout of the hub": Row(relayout("hub")),
    "layout of 4.52": Row(relayout("4.52")),
    "layout of 5": Row(relayout("5.x")),
    "state_dict": Row(save_state_dict()),
    "state_dict of the inner model": Row(save_state_dict("model")),
    "state_dict of the inner model, named": Row(save_state_dict("model", prefix="model.")),
    "save_model, which saves one of two tied matrices": Row(
        lambda d, m: save_model(m, str(without_weights(d) / hf.SINGLE))
    ),
    "state_dict without the head": Row(save_state_dict(drop="lm_head")),
    "state_dict without the embedding": Row(save_state_dict(drop="embed_tokens")),
    "an extra prefix": Row(save_state_dict(prefix="model.")),
    # wrappers
    "torch.compile": Row(save_state_dict(prefix="_orig_mod."), OURS),
    "a part by torch.compile": Row(rename_keys("language_model.", "language_model._orig_mod."), OURS),
    "layers by torch.compile": Row(rename_keys("layers.0.", "layers.0._orig_mod."), OURS),
    "DDP": Row(save_state_dict(prefix="module."), OURS),
    "DDP of torch.compile": Row(save_state_dict(prefix="module._orig_mod."), OURS),
    "FSDP": Row(rename_keys("layers.1.", "layers.1._fsdp_wrapped_module."), OURS),
    "recomputed layers": Row(rename_keys("layers.1.", "layers.1._checkpoint_wrapped_module."), OURS),
    "PEFT's names": Row(save_state_dict(prefix="base_model.model."), OURS),
    "wrapped in a module of the user": Row(save_state_dict(prefix="policy.paligemma."), OURS),
    "one name with and without a wrapper": Row(add_arrays("x", "_orig_mod.x"), "with and without"),
    "PEFT before merging": Row(save_unmerged, "is a LoRA array.*merge_and_unload"),
    # the head
    "head of 4.52": Row(add_head("lm_head.weight")),
    "head of the language model": Row(add_head("language_model.lm_head.weight")),
    "a head that differs": Row(add_head("lm_head.weight", 2.0), "lm_head.weight differs from embed_tokens.weight"),
    "head, tie_word_embeddings false": Row(in_turn(add_head("lm_head.weight"), change_json(tie_word_embeddings=False))),
    "no head, tie_word_embeddings false": Row(change_json(tie_word_embeddings=False), "lm_head.weight is missing"),
    "tie_word_embeddings false in the text_config": Row(text_config(tie_word_embeddings=False)),
    "no tie_word_embeddings": Row(change_json(drop="tie_word_embeddings")),
    # buffers that no model uses
    "position_ids": Row(add_arrays("vision_tower.embeddings.position_ids", array=IDS)),
    "position_ids in the hub's layout": Row(in_turn(relayout("hub"), add_arrays(VISION + "position_ids", array=IDS))),
    "inv_freq": Row(add_arrays("language_model.model.rotary_emb.inv_freq")),
    "inv_freq of each layer": Row(add_arrays(ATTENTION + "rotary_emb.inv_freq")),
    "causal_mask": Row(add_arrays("language_model.model.causal_mask", array=torch.ones(3, 3).bool()), OURS),
    "masked_bias": Row(add_arrays(ATTENTION + "masked_bias", array=torch.tensor(-1e9)), OURS),
    "pooling head": Row(add_arrays("vision_tower.head.probe", "vision_tower.head.layernorm.weight"), OURS),
    "unknown": Row(add_arrays("x"), r"x with shape \(2, 3\) is not part of the model"),
    # dtypes
    "norms in float32": Row(bfloat16_matrices(), "choose one with dtype="),
    "norms in float32, with dtype=": Row(bfloat16_matrices(), options={"dtype": "float32"}),
    "head in float32": Row(in_turn(save_pretrained(torch.bfloat16), add_head("lm_head.weight"))),
    "float8": Row(add_arrays(NORM, array=torch.ones(24).to(torch.float8_e4m3fn)), f"{NORM}: expected floating point"),
    "float8, e5m2": Row(add_arrays(NORM, array=torch.ones(24).to(torch.float8_e5m2)), "F8_E5M2 is not one of"),
    "bitsandbytes": Row(change_json(quantization_config=BITS), "load the original weights"),
    "torchao": Row(change_json(quantization_config={"quant_method": "torchao"}), "load the original weights"),
    "quantization_config null": Row(change_json(quantization_config=None)),
    # configs
    "config of 4.41": Row(minimal_config),
    "image_token_id": Row(in_turn(change_json(image_token_id=reference.IMAGE), change_json(drop="image_token_index"))),
    "text_config without a model_type": Row(text_config(drop="model_type")),
    "hidden_act gelu": Row(text_config(hidden_act="gelu")),
    "rope_theta null": Row(text_config(rope_theta=None)),
    "rope_scaling default": Row(text_config(rope_scaling={"type": "default"})),
    "rope_scaling linear": Row(text_config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is"),
    "vision_use_head true": Row(change_json(part="vision_config", vision_use_head=True), OURS),
    "dtype of a part": Row(text_config(dtype="bfloat16")),
    "another projection_dim": Row(change_json(projection_dim=2048), "projection_dim is 2048"),
    "an image size that is not a multiple of the patch size": Row(image_side(33)),
    "another architecture": Row(change_json(model_type="llava"), "model_type is 'llava', expected 'paligemma'"),
    # processors
    "processor of 5": Row(lambda d, m: use_processor_config(d)),
    "both processors, the newer takes precedence": Row(lambda d, m: use_processor_config(d, stale=True)),
    "no processor": Row(delete("preprocessor_config.json"), OURS),
    "bilinear": Row(preprocessor(resample=2)),
    "resample absent": Row(preprocessor(drop="resample")),
    "size of another model": Row(preprocessor(size=square(224)), "size is"),
    "the shortest edge": Row(preprocessor(size={"shortest_edge": 28}), "size is"),
    "a number, which means the shortest edge": Row(preprocessor(size=28), "size is 28, expected"),
    "not normalised": Row(preprocessor(do_normalize=False), "do_normalize is False"),
    "cropped": Row(preprocessor(do_center_crop=True, crop_size=square(14)), "do_center_crop is True"),
    # JSON files and folders
    "json with a byte order mark": Row(encode_json("utf-8-sig"), OURS),
    "json in UTF-16": Row(encode_json("utf-16"), OURS),
    "the hub's cache": Row(as_hub_cache, source=f"snapshots/{'a' * 40}"),
    "the hub's cache, its folder": Row(as_hub_cache, "snapshots: a folder of the hub's cache"),
    "a training run": Row(move_into("checkpoint-500"), "checkpoint-500: a training run; give one of its"),
    "a slash at the end": Row(unchanged, source="./"),
    "the weights' file": Row(unchanged, "one file of a checkpoint; give its folder", source=hf.SINGLE),
    "the config's file": Row(unchanged, "one file of a checkpoint; give its folder", source="config.json"),
    "an index with more metadata": Row(
        change_index(lambda raw: raw["metadata"].update(total_parameters=1, format="pt"))
    ),
    "an index without metadata": Row(change_index(lambda raw: raw.pop("metadata")), OURS),
    "an index in another order": Row(change_index(reverse_weight_map)),
    "a stale index": Row(lambda d, m: (d / hf.INDEX).write_text('{"weight_map": {"x": "gone.safetensors"}}')),
    # other formats
    "pickled": Row(save_pickled, "pytorch_model.bin: pickled weights.*save_pretrained"),
    "pickled, the file": Row(save_pickled, "one file of a checkpoint; give its folder", source="pytorch_model.bin"),
    "llama.cpp": Row(other_file("x-Q4_K_M.gguf"), "x-Q4_K_M.gguf: weights of llama.cpp"),
    "Flax": Row(other_file("flax_model.msgpack"), "weights of Flax"),
    "TensorFlow": Row(other_file("tf_model.h5"), "weights of TensorFlow"),
    "a variant": Row(rename_weights("model.fp16.safetensors"), "a variant of the weights"),
    "consolidated": Row(rename_weights("consolidated.safetensors"), "consolidated.safetensors: weights under another"),
    "no weights": Row(lambda d, m: without_weights(d), "holds neither model.safetensors nor"),
    # tokenizers
    "no tokenizer.json": Row(lambda d, m: (d / "tokenizer.json").rename(d / "tokenizer.model"), OURS),
    # big_vision
    "npz": Row(npz(), OURS),
    "npz, the file": Row(npz(), OURS, "model.npz", {"config": "config.json"}),
    "npz without a config": Row(in_turn(npz(), delete("config.json")), r"model.npz: a .npz needs config="),
    "config for a folder": Row(unchanged, "config .* is for a .npz", options={"config": "x"}, error=SettingError),
    "npz without params/": Row(npz(drop_prefix), OURS),
    "npz of a training": Row(npz(add_training_state), OURS),
    "npz big-endian": Row(npz(change_all(lambda x: x.astype(">f4"))), OURS),
    "npz in Fortran order": Row(npz(change_all(np.asfortranarray)), OURS),
    "npz float64": Row(npz(change_all(lambda x: x.astype("f8"))), OURS),
    "npz of two dtypes": Row(npz(float64_bias), "choose one with dtype="),
    "npz of two dtypes, with dtype=": Row(npz(float64_bias), OURS, options={"dtype": "float32"}),
    "npz with a pooling head": Row(npz(put_array("img/MAPHead_0/probe", np.ones((1, 1, 32), "f4"))), OURS),
    "npz of integers": Row(npz(put_array("img/head/bias", np.zeros(24, "i4"))), "img/head/bias has dtype <i4"),
    "npz of objects": Row(npz(put_array("img/head/bias", np.array([{}]))), r"img/head/bias has dtype \|O"),
    "npz, one of several": Row(in_turn(npz(), other_file("other.npz")), "model.npz, other.npz; give the path of one"),
}  # fmt: skip


def use_processor_config(folder: Path, stale: bool = False) -> None:
    """Move the image processor's settings to processor_config.json, with another filter; `stale` keeps the old file."""
    path = folder / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": raw | {"resample": 2}, "processor_class": "PaliGemmaProcessor"})
    )
    if not stale:
        path.unlink()


# --- adapters: a row changes a folder that PEFT saved, given the wrapped model in it ----------------------------------


def save_adapter(**options: Any) -> FolderChange:
    """Save an adapter by PEFT with other options of LoRA; options that begin with `_` are save_pretrained's."""
    save_options = {key.removeprefix("_"): options.pop(key) for key in [*options] if key.startswith("_")}

    def change_folder(folder: Path, wrapped: Any) -> None:
        with_lora(wrapped.unload(), **options).save_pretrained(folder, **save_options)

    return change_folder


def change_pairs(change: Callable[[dict[str, Tensor]], object]) -> FolderChange:
    """Change the arrays in the adapter's file."""
    return lambda folder, wrapped: edit_arrays(folder / lora.WEIGHTS, change)


def rename_pairs(old: str, new: str) -> FolderChange:
    return change_pairs(lambda arrays: [arrays.update({key.replace(old, new): arrays.pop(key)}) for key in [*arrays]])


def save_state_with_name(folder: Path, wrapped: Any) -> None:
    """Save the adapter's part of the state_dict, whose keys contain the adapter's name."""
    save_file({key: x for key, x in wrapped.state_dict().items() if "lora_" in key}, folder / lora.WEIGHTS)


def add_embedding(name: str, factor: float = 1.0) -> FolderChange:
    """Save the embedding beside the pairs, multiplied by a factor."""

    def change_folder(folder: Path, wrapped: Any) -> None:
        embed = factor * wrapped.get_input_embeddings().weight.detach()
        edit_arrays(folder / lora.WEIGHTS, lambda arrays: arrays.update({name: embed}))

    return change_folder


def pickle_pairs(folder: Path, wrapped: Any) -> None:
    torch.save({}, folder / "adapter_model.bin")
    (folder / lora.WEIGHTS).unlink()


def bfloat16_a(arrays: dict[str, Tensor]) -> None:
    arrays.update({key: x.bfloat16() for key, x in arrays.items() if "lora_A" in key})


PEFT, PLAIN = "base_model.model.", {"target_modules": ["q_proj", "v_proj"]}
EMBEDDING = PEFT + "model.language_model.embed_tokens.weight"
OLD = in_turn(
    rename_pairs("model.language_model.", "language_model.model."),
    rename_pairs("model.vision_tower.", "vision_tower.vision_model."),
)

ADAPTERS: dict[str, Row] = {
    "PEFT": Row(unchanged),
    "attention alone": Row(save_adapter(**PLAIN)),
    "attention, bfloat16": Row(change_pairs(lambda a: a.update({key: x.bfloat16() for key, x in a.items()}))),
    "two dtypes": Row(change_pairs(bfloat16_a)),
    "names of transformers 4": Row(OLD, OURS),
    "state_dict": Row(save_state_with_name, OURS),
    "torch.compile": Row(rename_pairs(PEFT, "_orig_mod." + PEFT), OURS),
    "torch.compile inside": Row(rename_pairs(PEFT, PEFT + "_orig_mod."), OURS),
    "DDP": Row(rename_pairs(PEFT, "module." + PEFT), OURS),
    "bare names": Row(rename_pairs(PEFT, ""), OURS),
    "bare names of the inner model": Row(rename_pairs(PEFT + "model.", ""), OURS),
    "embeddings beside, the base's": Row(save_adapter(**PLAIN, _save_embedding_layers=True)),
    "embeddings beside, trained": Row(add_embedding(EMBEDDING, 2.0), "embed_tokens.weight beside.*merge_and_unload"),
    "head beside, the base's": Row(add_embedding(PEFT + "lm_head.weight"), OURS),
    "head beside, trained": Row(add_embedding(PEFT + "lm_head.weight", 2.0), "lm_head.weight beside.*merge_and_unload"),
    "projector beside, the base's": Row(save_adapter(**PLAIN, modules_to_save=["multi_modal_projector"])),
    "rslora": Row(save_adapter(**PLAIN, use_rslora=True), "use_rslora is True; only plain LoRA"),
    "dora": Row(save_adapter(**PLAIN, use_dora=True), "use_dora is True; only plain LoRA"),
    "ranks of a pattern": Row(save_adapter(**PLAIN, rank_pattern={"q_proj": 3}), "rank_pattern is .*; only plain LoRA"),
    "LoRA of the embedding": Row(rename_pairs("lora_", "lora_embedding_"), "lora_embedding_A.weight is not a linear"),
    "two in one file": Row(in_turn(save_state_with_name, change_pairs(lambda a: a.update(
        {key.replace(".default.", ".other."): x.clone() for key, x in a.items()}))), "holds several adapters"),
    "pickled": Row(pickle_pairs, "adapter_model.bin: is pickled.*writes safetensors"),
    "no weights": Row(delete(lora.WEIGHTS), "adapter_model.safetensors: missing"),
    "no settings": Row(delete("adapter_config.json"), "adapter_config.json: missing"),
}  # fmt: skip
