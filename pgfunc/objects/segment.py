"""Masks as text: read them, write them, and load or save the VQ-VAE that turns a mask into codes and back.

    <loc0102><loc0204><loc0511><loc0767><seg011>...<seg097> cat ; ...

`grammar` defines the text. An object gives a mask if it gives a box and has exactly 16 codes, each at most 127;
`malformed` lists all other pieces. The codes describe the part of the mask inside the box, scaled to 64 x 64.
"""

from collections.abc import Iterable, Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from pgfunc.checkpoint.vqvae import load as load
from pgfunc.checkpoint.vqvae import save as save
from pgfunc.errors import SettingError
from pgfunc.generate import Completion, generate
from pgfunc.image import Source, open_image
from pgfunc.names import TASKS
from pgfunc.objects import detect, vqvae
from pgfunc.objects.detect import Box, Detection, Malformed, WellFormed
from pgfunc.objects.masks import Segment as Segment
from pgfunc.objects.masks import bounds as bounds
from pgfunc.objects.masks import check_mask as check_mask
from pgfunc.objects.masks import check_tensor as check_tensor
from pgfunc.objects.result import Result as Result
from pgfunc.objects.result import result
from pgfunc.prompt import Model, tokenizer_of
from pgfunc.tokenizer import Tokenizer

CODES_PER_MASK = vqvae.GRID**2


def find(
    model: Model,
    picture: Source,
    labels: str | Sequence[str],
    vq: vqvae.Params,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    min_confidence: float = 0.0,
) -> Result:
    """`detect.find` with masks, which `vq` decodes: `load()` is the mask decoder of the shipped checkpoint.

    A decoder that does not belong to the model gives wrong masks. 512 tokens hold some 20 masks.
    """
    detect.check_confidence(min_confidence)
    check_vqvae(vq)
    prompt, opened = detect.ask("segment", labels), open_image(picture, model.cfg.vision.image_size)
    (answer,) = generate(model, opened, prompt, max_new_tokens, temperature, top_k, top_p, min_p, seed)
    objects = with_confidence(answer, tokenizer_of(model), *opened.size, vq)
    return result(objects, malformed(answer.text), prompt, answer, opened, min_confidence)


def parse(text: str, width: int, height: int, vq: vqvae.Params) -> list[Segment]:
    """The masks in a text, on the device of `vq`; `malformed` lists the pieces that are left out."""
    return _decode([(item, None) for item in detect.unique(well_formed(text))], width, height, vq)


def with_confidence(
    completion: Completion, tokenizer: Tokenizer, width: int, height: int, vq: vqvae.Params
) -> list[Segment]:
    """`parse`, with the confidence of each box as `detect.with_confidence` defines it."""
    logprobs = detect.location_logprobs(completion, tokenizer)
    items = detect.unique(well_formed(completion.text))
    return _decode([(item, detect.confidence(item, logprobs)) for item in items], width, height, vq)


def objects_in(
    completion: Completion, tokenizer: Tokenizer, width: int, height: int, vq: vqvae.Params | None
) -> Sequence[Detection | Segment]:
    """The objects in an answer, with their confidence; with masks if there is a mask decoder."""
    if vq is None:
        return detect.with_confidence(completion, tokenizer, width, height)
    return with_confidence(completion, tokenizer, width, height, vq)


def malformed(text: str) -> list[Malformed]:
    """The pieces of a text that give no mask, with the reason; empty if the whole text is well formed."""
    return [item for item in read(text) if isinstance(item, Malformed)]


def well_formed(text: str) -> list[WellFormed]:
    """The objects in a text that have a box and a mask."""
    return [item for item in read(text) if isinstance(item, WellFormed)]


def read(text: str) -> list[WellFormed | Malformed]:
    """All pieces of a text, in order; see `detect.read`. An object without a valid mask is malformed."""
    return [item if isinstance(item, Malformed) else _check_codes(item) for item in detect.read(text)]


def _check_codes(item: WellFormed) -> WellFormed | Malformed:
    if len(item.codes) != CODES_PER_MASK:
        return Malformed(item.piece, f"{len(item.codes)} mask codes, expected {CODES_PER_MASK}")
    if max(item.codes) >= vqvae.CODES:
        return Malformed(item.piece, f"mask code {max(item.codes)} is above {vqvae.CODES - 1}")
    return item


@torch.no_grad()
def _decode(
    items: Sequence[tuple[WellFormed, float | None]], width: int, height: int, vq: vqvae.Params
) -> list[Segment]:
    """The masks of these pairs of an object and its confidence."""
    detect.check_size(width, height)
    check_vqvae(vq)
    codes = torch.tensor([item.codes for item, _ in items], device=vq.codebook.device).reshape(-1, CODES_PER_MASK)
    maps = vqvae.decode(vq, vqvae.lookup(vq.codebook, codes.long()))
    boxes = [detect.to_box(item.locations, width, height) for item, _ in items]
    return [
        Segment(item.label, box, paste(map, box, width, height), confidence)
        for (item, confidence), box, map in zip(items, boxes, maps, strict=True)
    ]


def render(segments: Sequence[Segment], vq: vqvae.Params) -> str:
    """The text of these masks: the inverse of `parse`, up to half a step at each edge and what 16 codes can express.

    Raises PromptError if a label could not be read back.
    """
    segments = detect.check_objects(segments)
    codes = encode([segment.mask for segment in segments], [segment.box for segment in segments], vq)
    return " ; ".join(
        detect.write(detect.to_locations(box, *reversed(mask.shape)), label, mask_codes)
        for (label, box, mask, _), mask_codes in zip(segments, codes, strict=True)
    )


@torch.no_grad()
def encode(masks: Iterable[Tensor], boxes: Iterable[Box], vq: vqvae.Params) -> list[list[int]]:
    """The 16 codes of each mask inside its box; a mask is [height width], Boolean or soft in [0, 1]."""
    check_vqvae(vq)
    crops = [crop(mask, box).to(vq.codebook.device) for mask, box in zip(masks, boxes, strict=True)]
    return vqvae.quantize(vq.codebook, vqvae.encode(vq, torch.stack(crops))).tolist() if crops else []


def from_mask(label: str, mask: Bool[Tensor, "y x"]) -> Segment:
    """A segment with the tightest box around its mask. Raises SettingError if the mask has no pixels."""
    check_mask(mask)
    if not mask.any():
        raise SettingError(f"the mask of {label!r} has no pixels; leave the object out")
    return Segment(label, Box(*map(float, bounds(mask))), mask)


def check_vqvae(vq: vqvae.Params) -> None:
    """Raise SettingError unless `vq` is the parameters of a mask VQ-VAE."""
    if not isinstance(vq, vqvae.Params):
        raise SettingError(f"the mask decoder is a {type(vq).__name__}, expected the parameters from `segment.load`")


def crop(mask: Tensor, box: Box) -> Float[Tensor, "64 64"]:
    """The part of a mask [height width] inside a box, scaled to 64 x 64: bilinear, antialiased, values in [0, 1]."""
    check_tensor(mask)
    part = mask[pixels(box.ymin, box.ymax, mask.shape[0]), pixels(box.xmin, box.xmax, mask.shape[1])]
    return resize(part.float(), vqvae.SIDE, vqvae.SIDE)


def paste(map: Float[Tensor, "64 64"], box: Box, width: int, height: int) -> Bool[Tensor, "y x"]:
    """The mask of the whole picture: True where the map, scaled to the box, is above 0; False outside the box."""
    rows, columns = pixels(box.ymin, box.ymax, height), pixels(box.xmin, box.xmax, width)
    mask = torch.zeros(height, width, dtype=torch.bool, device=map.device)
    mask[rows, columns] = resize(map, rows.stop - rows.start, columns.stop - columns.start) > 0
    return mask


def pixels(low: float | int, high: float | int, side: int) -> slice:
    """The pixels of one side between two edges of a box, each rounded to a whole pixel; at least one pixel.

    big_vision's encoder also rounds the edges; its evaluation of masks drops their fraction instead.
    """
    first = min(max(round(low), 0), side - 1)
    return slice(first, min(max(round(high), first + 1), side))


def resize(values: Float[Tensor, "y x"], height: int, width: int) -> Float[Tensor, "h w"]:
    """Resize bilinearly, with antialiasing where it shrinks, as Pillow and TensorFlow do."""
    # as two products, because F.interpolate with antialias=True is wrong for a result one pixel wide (PyTorch 2.13)
    rows, columns = (triangle(*sizes).to(values) for sizes in zip(values.shape, (height, width), strict=True))
    return einsum(rows, values, columns, "h y, y x, w x -> h w")


def triangle(before: int, after: int) -> Float[Tensor, "after before"]:
    """The weight of each of `before` input pixels in each of `after` output pixels; each row sums to 1.

    The weights are a triangle around the center of the output pixel, as wide as the scale, and at least 1 pixel.
    """
    scale = before / after
    outputs, inputs = (torch.arange(size, dtype=torch.float32, device="cpu") + 0.5 for size in (after, before))
    weights = (1 - (inputs - rearrange(outputs * scale, "a -> a 1")).abs() / max(scale, 1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def prefix(label: str) -> str:
    """The prompt that asks for a mask: `segment cat`."""
    return TASKS["segment"].format(detect.join_labels([label]))


written = well_formed  # a former name, which stays for callers outside
