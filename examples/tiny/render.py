"""Scenes -> pictures, visible masks and exact boxes, a batch at a time on any device.

Things are textures with premultiplied alpha, which an affine map places and which are painted one over the other. Owns
pixels; knows nothing about words. Axes: s scenes, k things of a scene, m things of all scenes, n textures, p
photographs, y and x pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from examples.tiny import plates
from examples.tiny.scenes import KNOTS, Scene

THINGS = 4  # at most, in one scene


class Bank(NamedTuple):
    """The textures and photographs to paint with, on the device that paints."""

    textures: UInt8[Tensor, "n 4 128 128"]  # premultiplied
    soft: UInt8[Tensor, "n 4 128 128"]  # the same without details that small copies cannot show
    photos: UInt8[Tensor, "p 3 z z"]


class Layout(NamedTuple):
    """Scenes as arrays."""

    texture: Int[Tensor, "m"]
    theta: Float[Tensor, "m 2 3"]
    warp: Float[Tensor, "m 2 k k"]
    tint: Float[Tensor, "m 3 3"]
    thing: Int[Tensor, "m"]  # its number, counting four for each scene
    tones: UInt8[Tensor, "s 3 16 16"]
    photo: Int[Tensor, "h"]
    crop: Float[Tensor, "h 2 3"]
    pictured: Int[Tensor, "h"]  # the scenes with a photograph as background
    grain: Float[Tensor, "s"]
    signs: UInt8[Tensor, "g h w 4"]  # zeros below and to the right of each sign
    corner: Int[Tensor, "g 2"]  # y, x in pixels
    signed: Int[Tensor, "g"]  # the scene of each sign


class Rendered(NamedTuple):
    pixels: UInt8[Tensor, "s 3 y x"]
    masks: Bool[Tensor, "s k y x"]  # the visible part of each thing
    boxes: Float[Tensor, "s k 4"]  # ymin, xmin, ymax, xmax of the visible part, as fractions of the picture


def bank(textures: UInt8[Tensor, "n 4 128 128"], photos: UInt8[Tensor, "p 3 z z"], device) -> Bank:
    half = F.avg_pool2d(textures.float(), 2)
    soft = F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False).round().to(torch.uint8)
    return Bank(textures.to(device), soft.to(device), photos.to(device))


def layout(scenes: Sequence[Scene]) -> Layout:
    """The arrays of a batch of scenes, on the CPU."""
    signs = {i: scene.sign for i, scene in enumerate(scenes) if scene.sign}
    grounds = [scene.background for scene in scenes]
    pictured = [i for i, ground in enumerate(grounds) if ground.photo >= 0]
    return Layout(
        *(torch.from_numpy(array) for array in _placed(scenes)),
        tones=torch.from_numpy(np.stack([ground.tones for ground in grounds])),
        photo=torch.tensor([grounds[i].photo for i in pictured], dtype=torch.long),
        crop=torch.from_numpy(np.array([grounds[i].crop for i in pictured], np.float32).reshape(-1, 2, 3)),
        pictured=torch.tensor(pictured, dtype=torch.long),
        grain=torch.tensor([ground.grain for ground in grounds]),
        signs=torch.from_numpy(_padded([sign.pixels for sign in signs.values()])),
        corner=torch.tensor([sign.corner for sign in signs.values()], dtype=torch.long).reshape(-1, 2),
        signed=torch.tensor(list(signs), dtype=torch.long),
    )


def _placed(scenes: Sequence[Scene]) -> tuple[np.ndarray, ...]:
    """Texture, theta, warp and tint of each thing, and its number, counting `THINGS` for each scene."""
    numbered = [(i * THINGS + j, thing) for i, scene in enumerate(scenes) for j, thing in enumerate(scene.things)]
    texture = np.array([thing.texture for _, thing in numbered], np.int64)
    theta = np.array([thing.theta for _, thing in numbered], np.float32).reshape(-1, 2, 3)
    warp = np.array([thing.warp for _, thing in numbered], np.float32).reshape(-1, 2, KNOTS, KNOTS)
    tint = np.array([thing.tint for _, thing in numbered], np.float32).reshape(-1, 3, 3)
    return texture, theta, warp, tint, np.array([number for number, _ in numbered], np.int64)


def _padded(signs: Sequence[np.ndarray]) -> UInt8[np.ndarray, "g h w 4"]:
    """Each sign in the top left corner of a plane of the largest size."""
    planes = np.zeros((len(signs), plates.HEIGHT, plates.WIDTH, 4), np.uint8)
    for plane, sign in zip(planes, signs, strict=True):
        plane[: sign.shape[0], : sign.shape[1]] = sign
    return planes


def render(bank: Bank, where: Layout, side: int, seed: int) -> Rendered:
    """Paint the scenes: backgrounds, things in their order, signs, grain. `seed` is the seed of the grain."""
    picture = backgrounds(bank, where, side)
    painted = things(bank, where, side)
    colour, alpha = painted[:, :, :3], painted[:, :, 3]
    visible = alpha.clone()
    for j in range(THINGS):
        picture = colour[:, j] + picture * (1 - alpha[:, j : j + 1])
        visible[:, :j] *= 1 - alpha[:, j : j + 1]
    signs = pasted(where, side)
    picture[where.signed] = signs[:, :3] + picture[where.signed] * (1 - signs[:, 3:])
    visible[where.signed] *= 1 - signs[:, 3:]
    masks = visible > 0.5
    return Rendered(grained(picture, where.grain, seed), masks, boxes(masks))


def things(bank: Bank, where: Layout, side: int) -> Float[Tensor, "s k 4 y x"]:
    """Each thing alone on a picture of its own: premultiplied colour and alpha, from 0 to 1."""
    dtype = torch.float16 if where.theta.is_cuda else torch.float32
    canvas = torch.zeros(len(where.grain) * THINGS, 4, side, side, device=where.theta.device)
    if not len(where.thing):
        return rearrange(canvas, "(s k) c y x -> s k c y x", k=THINGS)
    (a, b), (c, d) = where.theta[:, :, :2].permute(1, 2, 0)
    # the side of the texture on the picture, in pixels; below half of 128, a bilinear sample skips texels
    size = side * (a * d - b * c).abs().rsqrt()
    texture = torch.where(rearrange(size < 88, "m -> m 1 1 1"), bank.soft[where.texture], bank.textures[where.texture])
    grid = F.affine_grid(where.theta, [len(size), 4, side, side], align_corners=False)
    offset = F.grid_sample(where.warp, grid, mode="bicubic", padding_mode="border", align_corners=True)
    grid = grid + rearrange(offset, "m c y x -> m y x c")
    drawn = F.grid_sample(texture.to(dtype) / 255, grid.to(dtype), align_corners=False)
    colour, alpha = drawn[:, :3], drawn[:, 3:]
    colour = einsum(where.tint.to(dtype), colour, "m d c, m c y x -> m d y x")
    canvas[where.thing] = torch.cat([torch.minimum(colour.clamp(min=0), alpha), alpha], 1).float()
    return rearrange(canvas, "(s k) c y x -> s k c y x", k=THINGS)


def pasted(where: Layout, side: int) -> Float[Tensor, "g 4 y x"]:
    """Each sign alone on a picture of its own."""
    count, height, width, _ = where.signs.shape
    canvas = torch.zeros(count, side + height, side + width, 4, device=where.signs.device)
    number = rearrange(torch.arange(count, device=canvas.device), "g -> g 1 1")
    rows = rearrange(where.corner[:, :1] + torch.arange(height, device=canvas.device), "g h -> g h 1")
    columns = rearrange(where.corner[:, 1:] + torch.arange(width, device=canvas.device), "g w -> g 1 w")
    canvas[number, rows, columns] = where.signs.float() / 255
    return rearrange(canvas[:, :side, :side], "g y x c -> g c y x")


def backgrounds(bank: Bank, where: Layout, side: int) -> Float[Tensor, "s 3 y x"]:
    tones = F.interpolate(where.tones.float(), size=(side, side), mode="bicubic", align_corners=False)
    picture = tones.clamp(0, 255) / 255
    if not len(where.photo):
        return picture
    grid = F.affine_grid(where.crop, [len(where.crop), 3, side, side], align_corners=False)
    photos = bank.photos[where.photo].float() / 255
    picture[where.pictured] = F.grid_sample(photos, grid, align_corners=False, padding_mode="border")
    return picture


def grained(picture: Float[Tensor, "s 3 y x"], grain: Float[Tensor, "s"], seed: int) -> UInt8[Tensor, "s 3 y x"]:
    """Add noise, round and clip."""
    generator = torch.Generator(picture.device).manual_seed(seed)
    noise = torch.randn(picture.shape, generator=generator, device=picture.device)
    levels = 255 * picture + noise * rearrange(grain, "s -> s 1 1 1")
    return levels.round().clamp(0, 255).to(torch.uint8)


def boxes(masks: Bool[Tensor, "s k y x"]) -> Float[Tensor, "s k 4"]:
    """The box around each mask; zeros for an empty one."""
    rows, columns = reduce(masks, "s k y x -> s k y", "max"), reduce(masks, "s k y x -> s k x", "max")
    edges = []
    for line in (rows, columns):
        last = line.shape[-1] - line.flip(-1).int().argmax(-1)
        edges.append((line.int().argmax(-1), torch.where(line.any(-1), last, 0)))
    (ymin, ymax), (xmin, xmax) = edges
    return torch.stack([ymin, xmin, ymax, xmax], -1) / masks.shape[-1]
