"""An independent implementation to compare with: transformers' PaliGemma on random tiny checkpoints.

`save_random` writes a checkpoint with transformers. Its weights are scaled so that every part of the network affects
the logits, not only the embedding. `logits` and `greedy` run transformers on a `Prompt`.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from cases import prompt
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

import pgfunc as pg

VOCAB, IMAGE = 96, 96  # `<image>` is the first id after the vocabulary; 32 padding rows follow
SIDE, PATCH = 28, 14

TEXT = {"vocab_size": VOCAB + 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "head_dim": 8, "max_position_embeddings": 128}  # fmt: skip
VARIANTS = {
    "gemma-1kv": TEXT | {"model_type": "gemma", "num_key_value_heads": 1},
    "gemma-2kv": TEXT | {"model_type": "gemma", "num_key_value_heads": 2},
    "gemma-4kv": TEXT | {"model_type": "gemma", "num_key_value_heads": 4},
    # caps and window are small enough to matter: scores exceed the caps, and sequences exceed the window
    "gemma2": TEXT | {"model_type": "gemma2", "num_key_value_heads": 2, "sliding_window": 6, "query_pre_attn_scalar": 6,
                      "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
}  # fmt: skip

LAYOUTS = {
    "hub": {"vision_tower.": "vision_tower.vision_model."},
    "4.52": {"vision_tower.": "model.vision_tower.vision_model.", "language_model.model.": "model.language_model.",
             "multi_modal_projector.": "model.multi_modal_projector."},
    "5.x": {"vision_tower.": "model.vision_tower.", "language_model.model.": "model.language_model.",
            "multi_modal_projector.": "model.multi_modal_projector."},
    "fresh": {},
}  # fmt: skip


def save_random(folder: Path, variant: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """A random checkpoint, saved by transformers."""
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH, "vision_use_head": False}  # fmt: skip
    cfg = PaliGemmaConfig(
        vision_config=vision, text_config=VARIANTS[variant], projection_dim=24, image_token_id=IMAGE, vocab_size=VOCAB
    )
    model = PaliGemmaForConditionalGeneration(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if weight.dim() == 1 else weight[0].numel() ** -0.5
            offset = 1.0 if "layer_norm" in name and name.endswith("weight") else 0.0
            weight.copy_(offset + scale * torch.randn(weight.shape, generator=generator))
    model.to(dtype).save_pretrained(folder)


def relayout(folder: Path, layout: str) -> None:
    """Rename the keys of a saved checkpoint to another key layout; that of 4.52 also contains the tied head."""
    path = folder / "model.safetensors"
    arrays = load_file(path)
    for old, new in LAYOUTS[layout].items():
        arrays = {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in arrays.items()}
    if layout == "4.52":
        arrays["lm_head.weight"] = arrays["model.language_model.embed_tokens.weight"].clone()
    save_file(arrays, path, metadata={"format": "pt"})


def load(folder: Path, dtype: str = "auto") -> PaliGemmaForConditionalGeneration:
    """The checkpoint loaded by transformers, with the attention that implements Gemma 2's softcap.

    `dtype` is passed to transformers, because it rounds the factor of the embeddings to the dtype of the new model.
    """
    model, report = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def inputs(prompt: pg.Prompt, cfg: pg.Config) -> dict[str, Tensor]:
    """The arguments of transformers for a prompt: `<image>` tokens precede the text, and type 1 marks the suffix."""
    batch, images = prompt.pixels.shape[:2]
    image_ids = torch.full((batch, images * cfg.vision.tokens), cfg.image, device=prompt.tokens.device)
    return {
        "input_ids": torch.cat([image_ids, prompt.tokens], 1),
        "attention_mask": torch.cat([torch.ones_like(image_ids), prompt.valid.long()], 1),
        "token_type_ids": torch.cat([torch.zeros_like(image_ids), prompt.causal.long()], 1),
        "pixel_values": prompt.pixels.flatten(0, 1),
    }


@torch.no_grad()
def logits(model: PaliGemmaForConditionalGeneration, prompt: pg.Prompt, cfg: pg.Config) -> Tensor:
    """The logits at the text positions, without the padding rows of the vocabulary."""
    return model(**inputs(prompt, cfg)).logits[:, -prompt.tokens.shape[1] :, : cfg.text.vocab].float()


@torch.no_grad()
def greedy(model: PaliGemmaForConditionalGeneration, prompt: pg.Prompt, cfg: pg.Config, tokens: int) -> Tensor:
    """Greedy tokens after one unpadded row, with a cache, never a padding row of the vocabulary."""
    arguments = inputs(prompt, cfg)
    padding_rows = [[row] for row in range(VOCAB, VOCAB + 32)]
    ids = model.generate(**arguments, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None,
                         bad_words_ids=padding_rows)  # fmt: skip
    return ids[:, arguments["input_ids"].shape[1] :]


def main() -> None:
    """Print the largest difference between our logits and transformers', for prompts like those in the tests."""
    print(f"{'':12}worst |difference|   standard deviation of the logits")
    for variant in VARIANTS:
        with TemporaryDirectory() as folder:
            save_random(Path(folder), variant)
            model, other = pg.load(folder, device="cpu"), load(Path(folder))
        worst, spread = 0.0, 0.0
        for seed in range(20):
            batch = prompt(model.cfg, [2, 5, 3], [9, 1, 4], images=1 + seed % 2, seed=seed, padding=2)
            ours = pg.forward(model.params, batch, model.cfg)[batch.valid]
            theirs = logits(other, batch, model.cfg)[batch.valid]
            worst, spread = max(worst, float((ours - theirs).abs().max())), float(theirs.std())
        print(f"{variant:12}{worst:.1e}              {spread:.2f}")


if __name__ == "__main__":
    main()
