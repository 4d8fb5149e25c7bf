"""Small configs, random prompts and a byte-level model that the tests share. The configs cover every block variant."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

import pgfunc as pg
from pgfunc import laws, tokenizer
from pgfunc.config import Config, TextConfig, VisionConfig
from pgfunc.laws import Rows
from pgfunc.laws import parameters as params

VISION = VisionConfig(width=24, layers=2, heads=2, hidden=32, image_size=28, patch=14)
GEMMA = TextConfig(
    vocab=64, padding=3, width=16, layers=3, heads=4, kv_heads=1, head_dim=8, hidden=24, query_scale=8**-0.5
)
GEMMA2 = replace(GEMMA, kv_heads=2, attention_softcap=2.0, final_softcap=3.0, window=5, post_norms=True)

CONFIGS = {
    "gemma": Config(VISION, GEMMA, image=64),
    "gemma-mha": Config(VISION, replace(GEMMA, kv_heads=4), image=64),
    "gemma2": Config(VISION, GEMMA2, image=64),
    "rope2d": Config(replace(VISION, position="rope2d"), GEMMA, image=64),
}

configs = st.sampled_from(sorted(CONFIGS)).map(CONFIGS.__getitem__)
seeds = laws.Strategies().seeds


def prompt(
    cfg: Config, prefix: list[int], suffix: list[int], images: int = 1, seed: int = 0, padding: int = 0
) -> pg.Prompt:
    """A random prompt with these lengths in each row, padded with random tokens, which must not change any result."""
    return made(Rows(tuple(prefix), tuple(suffix), images, padding, seed), cfg)


def made(rows: Rows, cfg: Config) -> pg.Prompt:
    """The prompt of a batch of rows, which a test draws with `laws.ragged`."""
    return laws.prompt(rows, cfg.text.vocab, cfg.vision.image_size)


def text_model(seed: int = 0) -> pg.Model:
    """A random model with a byte-level tokenizer: one token per byte, then location tokens and mask codes."""
    control = {name: id for id, name in enumerate(("<pad>", "<eos>", "<bos>", "<unk>"))}
    vocab = control | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in control])
    words = [f"<loc{i:04d}>" for i in range(4)] + [f"<seg{i:03d}>" for i in range(4)]
    backend.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    count = backend.get_vocab_size()
    cfg = Config(VISION, replace(GEMMA2, vocab=count - 1, padding=1, positions=120), image=count - 1)
    return pg.Model(cfg, params(cfg, seed), tokenizer.wrap(backend, "the tests' tokenizer"))


def bits(params: Any) -> dict[str, bytes]:
    """Path -> the bytes of the leaf, for comparing trees bit for bit."""
    leaves = pg.tree.flatten(params).items()
    return {path: leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for path, leaf in leaves}


def edit_arrays(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the arrays of a safetensors file in place."""
    arrays = {key: value.clone() for key, value in load_file(path).items()}
    change(arrays)
    save_file(arrays, path, metadata={"format": "pt"})
