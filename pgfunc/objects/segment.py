"""Masks in text, the way PaliGemma writes them: read, write, and the files of the VQ-VAE that codes need.

    <loc0102><loc0204><loc0511><loc0767><seg011>...<seg097> cat ; ...

Between the box (`detect` says how it is read) and the label stand 16 codes: the part of the mask inside the box, scaled
to 64 x 64 and encoded by `vqvae`. What gives no box gives no mask, and neither does an object with fewer or more than
16 codes, or one above 127; `malformed` names them all.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from pgfunc.checkpoint.vqvae import load as load
from pgfunc.checkpoint.vqvae import save as save
from pgfunc.errors import SettingError
from pgfunc.generate import Completion
from pgfunc.objects import detect, vqvae
from pgfunc.objects.detect import Box, Malformed, Written
from pgfunc.prompt import TASKS
from pgfunc.tokenizer import Tokenizer

PLACES = vqvae.GRID**2


class Segment(NamedTuple):
    """An object, where it is, and which pixels are its own."""

    label: str
    box: Box
    mask: Bool[Tensor, "y x"]  # of the whole picture; False outside the box
    confidence: float | None = None  # of the box, see `detect.with_confidence`


def parse(text: str, width: int, height: int, vq: vqvae.Params) -> list[Segment]:
    """The masks in a text, on the decoder's device; `malformed` has what was left out."""
    return _segments([(item, None) for item in detect.unique(written(text))], width, height, vq)


def with_confidence(
    completion: Completion, tokenizer: Tokenizer, width: int, height: int, vq: vqvae.Params
) -> list[Segment]:
    """`parse`, with the confidence of each box, as `detect.with_confidence` defines it."""
    logprobs = detect.place_logprobs(completion, tokenizer)
    found = [(item, detect.confidence(item, logprobs)) for item in detect.unique(written(completion.text))]
    return _segments(found, width, height, vq)


def malformed(text: str) -> list[Malformed]:
    """The pieces of a text that give no mask, with the reason; empty for a text that is well formed."""
    return [item for item in read(text) if isinstance(item, Malformed)]


def written(text: str) -> list[Written]:
    """The objects in a text that have a box and a mask."""
    return [item for item in read(text) if isinstance(item, Written)]


def read(text: str) -> list[Written | Malformed]:
    """The pieces of a text, in order: what each is, or why it is nothing."""
    return [item if isinstance(item, Malformed) else _with_codes(item) for item in detect.read(text)]


def _with_codes(item: Written) -> Written | Malformed:
    if len(item.codes) != PLACES:
        return Malformed(item.piece, f"{len(item.codes)} mask codes, expected {PLACES}")
    if max(item.codes) >= vqvae.CODES:
        return Malformed(item.piece, f"mask code {max(item.codes)} is above {vqvae.CODES - 1}")
    return item


@torch.no_grad()
def _segments(
    found: Sequence[tuple[Written, float | None]], width: int, height: int, vq: vqvae.Params
) -> list[Segment]:
    detect.check_size(width, height)
    check_coder(vq)
    codes = torch.tensor([item.codes for item, _ in found], device=vq.codebook.device).reshape(-1, PLACES).long()
    maps = vqvae.decode(vq, vqvae.lookup(vq.codebook, codes))
    boxes = [detect.to_box(item.places, width, height) for item, _ in found]
    return [
        Segment(item.label, box, paste(map, box, width, height), confidence)
        for (item, confidence), box, map in zip(found, boxes, maps, strict=True)
    ]


def render(segments: Sequence[Segment], vq: vqvae.Params) -> str:
    """The text of some masks: the inverse of `parse`, up to half a step at each edge and what 16 codes can say.

    Raises PromptError for a label that could not be read back.
    """
    segments = detect.checked_objects(segments)
    codes = encode([segment.mask for segment in segments], [segment.box for segment in segments], vq)
    return " ; ".join(
        detect.write(detect.to_places(box, *reversed(mask.shape)), label, line)
        for (label, box, mask, _), line in zip(segments, codes, strict=True)
    )


@torch.no_grad()
def encode(masks: Iterable[Tensor], boxes: Iterable[Box], vq: vqvae.Params) -> list[list[int]]:
    """The 16 codes of each mask [height width], Boolean or soft in [0, 1], inside its box."""
    check_coder(vq)
    crops = [crop(mask, box).to(vq.codebook.device) for mask, box in zip(masks, boxes, strict=True)]
    features = [vqvae.encode(vq, torch.stack(crops))] if crops else []
    return [line for found in features for line in vqvae.quantize(vq.codebook, found).tolist()]


def from_mask(label: str, mask: Bool[Tensor, "y x"]) -> Segment:
    """A mask in the tightest box. Raises SettingError for a mask without pixels, which has none."""
    check_mask(mask)
    if not mask.any():
        raise SettingError(f"the mask of {label!r} has no pixels; leave the object out")
    return Segment(label, Box(*map(float, extent(mask))), mask)


def check_coder(vq: vqvae.Params) -> None:
    """Raise SettingError for what is no mask encoder and decoder."""
    if not isinstance(vq, vqvae.Params):
        raise SettingError(f"the mask decoder is a {type(vq).__name__}, expected what `segment.load` reads from a file")


def check_tensor(mask: Tensor) -> None:
    """Raise SettingError for a mask of another library."""
    if not isinstance(mask, Tensor):
        raise SettingError(f"a mask is a {type(mask).__name__}, expected a tensor; torch.as_tensor makes one")


def check_mask(mask: Bool[Tensor, "y x"]) -> None:
    """Raise SettingError for what is no mask of a picture."""
    check_tensor(mask)
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise SettingError(f"a mask is {str(mask.dtype)[6:]}{list(mask.shape)}, expected bool[height, width]")


def extent(mask: Bool[Tensor, "y x"]) -> tuple[int, int, int, int]:
    """The first row and column of a mask, and those behind its last."""
    (top, bottom), (left, right) = (_ends(mask.any(axis)) for axis in (1, 0))
    return top, left, bottom, right


def _ends(present: Bool[Tensor, "n"]) -> tuple[int, int]:
    places = present.nonzero()
    return int(places.min()), int(places.max()) + 1


def crop(mask: Tensor, box: Box) -> Float[Tensor, "64 64"]:
    """The part of a mask [height width] inside a box, scaled to 64 x 64: bilinear, antialiased, values in [0, 1]."""
    check_tensor(mask)
    part = mask[pixels(box.ymin, box.ymax, mask.shape[0]), pixels(box.xmin, box.xmax, mask.shape[1])]
    return resize(part.float(), vqvae.SIDE, vqvae.SIDE)


def paste(map: Float[Tensor, "64 64"], box: Box, width: int, height: int) -> Bool[Tensor, "y x"]:
    """The mask of a whole picture: where the map, scaled to the box, is above 0; False outside the box."""
    rows, columns = pixels(box.ymin, box.ymax, height), pixels(box.xmin, box.xmax, width)
    mask = torch.zeros(height, width, dtype=torch.bool, device=map.device)
    mask[rows, columns] = resize(map, rows.stop - rows.start, columns.stop - columns.start) > 0
    return mask


def pixels(low: float | int, high: float | int, side: int) -> slice:
    """The pixels between two edges, which are moved to the nearest between pixels; one at least.

    big_vision's encoder rounds edges, too; its evaluation of masks cuts off their fraction instead.
    """
    first = min(max(round(low), 0), side - 1)
    return slice(first, min(max(round(high), first + 1), side))


def resize(values: Float[Tensor, "y x"], height: int, width: int) -> Float[Tensor, "h w"]:
    """Bilinear, antialiased where it shrinks, as Pillow and TensorFlow do it."""
    # written out: F.interpolate with antialias=True is wrong where the result is one pixel wide (PyTorch 2.13)
    rows, columns = (triangle(*sizes).to(values) for sizes in zip(values.shape, (height, width), strict=True))
    return einsum(rows, values, columns, "h y, y x, w x -> h w")


def triangle(before: int, after: int) -> Float[Tensor, "after before"]:
    """What each of `before` pixels in a row gives to each of `after` pixels: a triangle around its place, sum 1."""
    scale = before / after
    centres, places = (torch.arange(size, dtype=torch.float32, device="cpu") + 0.5 for size in (after, before))
    weights = (1 - (places - rearrange(centres * scale, "a -> a 1")).abs() / max(scale, 1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def prefix(label: str) -> str:
    """The prompt that asks for a mask: `segment cat`."""
    return TASKS["segment"].format(detect.wanted([label]))
