"""Turn the results of the training stages into the folder that is shipped.

python -m examples.tiny.export --run runs/tiny --out weights/tiny

model.safetensors, config.json, ...   the PaliGemma, in bf16
masks.safetensors                     the VQ-VAE of masks, in bf16
siglip/                               pooling head and text encoder, in bf16; the vision encoder is the PaliGemma's
"""

import argparse
from pathlib import Path

import torch

import pgfunc as pg
from examples.tiny import fit, recipe, tokenizer, world
from pgfunc import paligemma, siglip_dual, tree
from pgfunc.checkpoint.siglip import save_siglip
from pgfunc.objects import segment, vqvae
from pgfunc.siglip_dual import prompt as dual_prompt


def export(at: recipe.Recipe, names: tuple[str, ...], run: Path, out: Path) -> None:
    def narrow(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.bfloat16()

    words = tokenizer.of_run(run, names)
    params = tree.map(narrow, fit.read(run / "speak.safetensors", paligemma.init(at.model)))
    pg.save(pg.Model(at.model, params, pg.tokenizer.wrap(words, "the tokenizer")), out)
    segment.save(out / "masks.safetensors", tree.map(narrow, fit.read(run / "masks.safetensors", vqvae.init())))
    text_half = fit.read(run / "align.safetensors", siglip_dual.init(at.siglip)._replace(vision=()))
    both = tree.map(narrow, text_half)._replace(vision=params.vision)
    siglip = dual_prompt.SiglipModel(at.siglip, both, dual_prompt.wrap(words, "the tokenizer"))
    save_siglip(siglip, out / "siglip", vision=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--out", type=Path, default=Path("weights/tiny"))
    parser.add_argument("--position", choices=["learned", "rope2d"], default="learned")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    chosen = (recipe.small if args.small else recipe.full)(args.position)
    source = world.small() if args.small else world.load(args.data)
    export(chosen, source.catalog.names, args.run, args.out)


if __name__ == "__main__":
    main()
