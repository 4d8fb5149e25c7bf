"""Where the model looked: the attention over the picture of the token that wrote a token of an answer."""

from io import BytesIO

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import pgfunc as pg
from pgfunc import lab
from pgfunc.demo.actions import Checkpoint, Request, full_prefix
from pgfunc.lab.pictures import shown
from pgfunc.prompt import text_ids, tokenizer_of

MOST_TOKENS = 64  # of an answer that can be chosen


def tokens(checkpoint: Checkpoint, text: str) -> list[str]:
    """The first tokens of an answer, as people read them."""
    model, vocabulary = checkpoint.model, tokenizer_of(checkpoint.model)
    return [shown(pg.tokenizer.decode(vocabulary, [id])) for id in text_ids(model, text)[:MOST_TOKENS]]


@torch.no_grad()
def attention(checkpoint: Checkpoint, request: Request, text: str, token: int, layer: int) -> Float[Tensor, "p"]:
    """The attention over the image tokens, averaged over the heads of a layer, at the position that predicts a token.

    The answer is read again, as a whole. The values of the image and of the text that is read sum to 1.
    """
    model, name = checkpoint.model, f"language.{layer}.pattern"
    ids = text_ids(model, text)
    prompt = pg.prepare(model, [[request.picture]], [full_prefix(request)], [ids])
    _, seen = lab.capture(pg.forward, name)(model.params, prompt, model.cfg)
    pattern = seen[name][0]  # n t s; its last rows are those of the answer and of <eos>
    return pattern[:, token - len(ids) - 2, : model.cfg.vision.tokens].float().mean(0)


def heat(checkpoint: Checkpoint, request: Request, text: str, token: int, layer: int) -> Image.Image:
    """The picture, and the same picture under the attention; the title says what it is the mean of."""
    model = checkpoint.model
    values = attention(checkpoint, request, text, token, layer)
    pixels = pg.prepare(model, [[request.picture]], "").pixels[0, 0]
    title = f"layer {layer}, mean of its {model.cfg.text.heads} heads: {values.sum():.0%} on the picture"
    return Image.open(BytesIO(lab.heat(pixels, values, title)._repr_png_()))
