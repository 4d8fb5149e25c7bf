"""Sparse autoencoders: activations as sums of few directions out of many.

    cfg = Config(latents=4096, k=32)
    p = train(partial(stored.batches, name, 512), cfg, steps=10_000)  # `stored` is a collection, see `lab.collect`
    logits = lab.edit(pg.forward, {name: Reconstruct(p, cfg)})(params, prompt, model.cfg)

Training is that of Gao et al. 2024 (arXiv 2406.04093): the k largest latents are kept, the columns of the decoder have
length 1, and latents that were not active for long learn from what the others leave over. `load` also reads SAEs with
ReLU and JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435). Files are those of SAELens: `cfg.json` and
`sae_weights.safetensors`. Axes: d width, m latents.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pgfunc import ops, tree
from pgfunc.checkpoint.writing import write_safetensors
from pgfunc.errors import SettingError, first_line
from pgfunc.files.atomic import changing
from pgfunc.files.outputs import check_folder, write_errors
from pgfunc.lab.edits import as_mask

WEIGHTS, SETTINGS = "sae_weights.safetensors", "cfg.json"
NAMES = {"encoder": "W_enc", "encoder_bias": "b_enc", "decoder": "W_dec", "bias": "b_dec", "threshold": "threshold"}
ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec")
KINDS = {"topk": (*ARRAYS, "k"), "standard": ARRAYS, "jumprelu": (*ARRAYS, "threshold")}  # and what each has
PLAIN = {  # settings of SAELens, and their values that change nothing
    "normalize_activations": ("none", None), "reshape_activations": ("none", None),
    "rescale_acts_by_decoder_norm": (False, None), "activation_fn_str": ("relu", None),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The number of latents, and how many of them are active at once; 0: as many as are positive.

    A latent that was not active in the last `dead_after` batches learns from the error of the others: `revived` of them
    at a time, with the weight `revival` of that loss.
    """

    latents: int
    k: int = 32
    dead_after: int = 200
    revived: int = 128
    revival: float = 1 / 32
    subtract_bias: bool = True  # from the input of the encoder


class Sae(NamedTuple):
    """The parameters."""

    encoder: Float[Tensor, "d m"]
    encoder_bias: Float[Tensor, "m"]
    decoder: Float[Tensor, "m d"]
    bias: Float[Tensor, "d"]
    threshold: Float[Tensor, "m"] | tuple[()] = ()  # of JumpReLU; () in the others


class Quality(NamedTuple):
    """How well an SAE describes activations."""

    explained: float  # the share of the variance
    active: float  # the mean number of active latents
    dead: float  # the share of latents that are never active


def hidden(p: Sae, x: Float[Tensor, "*b d"], cfg: Config) -> Float[Tensor, "*b m"]:
    """The latents before their nonlinearity, in float32."""
    x = ops.upcast(x) - p.bias if cfg.subtract_bias else ops.upcast(x)
    return einsum(x, p.encoder, "... d, d m -> ... m") + p.encoder_bias


def encode(p: Sae, x: Float[Tensor, "*b d"], cfg: Config) -> Float[Tensor, "*b m"]:
    """Activations -> latents, none of which is negative."""
    latents = hidden(p, x, cfg)
    if isinstance(p.threshold, Tensor):
        return torch.where(latents > p.threshold, latents.relu(), 0.0)
    return largest(latents, cfg.k) if cfg.k else latents.relu()


def largest(latents: Float[Tensor, "*b m"], k: int) -> Float[Tensor, "*b m"]:
    """The k largest latents, if they are positive; the others are 0."""
    values, where = latents.topk(k, dim=-1)
    return torch.zeros_like(latents).scatter(-1, where, values.relu())


def decode(p: Sae, latents: Float[Tensor, "*b m"]) -> Float[Tensor, "*b d"]:
    """Latents -> activations."""
    return einsum(latents, p.decoder, "... m, m d -> ... d") + p.bias


class Reconstruct(NamedTuple):
    """The edit that replaces an activation by its reconstruction."""

    p: Sae
    cfg: Config

    def __call__(self, x: Tensor) -> Tensor:
        p = on_device(self.p, x)
        return decode(p, encode(p, x, self.cfg)).to(x.dtype)


class SetLatent(NamedTuple):
    """The edit that sets one latent where a mask is True, and leaves what the SAE does not describe as it is."""

    p: Sae
    cfg: Config
    latent: int
    value: Any  # a number, or a tensor that broadcasts to `*b 1`, where the activation is `*b d`
    where: Any = True

    def __call__(self, x: Tensor) -> Tensor:
        p = on_device(self.p, x)
        change = self.value - encode(p, x, self.cfg)[..., self.latent, None]
        return torch.where(as_mask(self.where, x), x + (change * p.decoder[self.latent]).to(x.dtype), x)


def on_device(p: Sae, x: Tensor) -> Sae:
    """The parameters on the device of an activation, as `lab.put` moves its value."""
    return tree.map(lambda leaf: leaf.to(x.device), p)


def quality(p: Sae, x: Float[Tensor, "n d"], cfg: Config) -> Quality:
    """How well an SAE describes these activations, which are not all equal."""
    latents, x = encode(p, x, cfg), ops.upcast(x)
    error, variance = (x - decode(p, latents)).square().sum(), (x - x.mean(0)).square().sum()
    active = latents > 0
    dead = (~active.any(0)).float().mean()
    return Quality(float(1 - error / variance), float(active.sum(-1).float().mean()), float(dead))


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    batches: Callable[[int], Iterable[Float[Tensor, "b d"]]], cfg: Config, steps: int, rate: float = 1e-3, seed: int = 0
) -> Sae:
    """An SAE after so many steps of Adam, on the device of the batches. `batches(epoch)` gives those of one pass.

    Activations are scaled by one number while training, so that the settings do not depend on their size. The rate
    falls to 0 in the last fifth of the steps. Raises SettingError if there are no batches, if the first one is all
    zeros, and if k is not a number of latents.
    """
    if not 0 < cfg.k <= cfg.latents:
        raise SettingError(f"k is {cfg.k}, expected 1 to {cfg.latents} latents")
    with torch.inference_mode(False), torch.enable_grad():
        stream = endless(batches)
        first = next(stream).detach().float()
        scale = first.square().mean().rsqrt()
        if not scale.isfinite():
            raise SettingError("the first batch of activations is all zeros")
        p = tree.map(Tensor.requires_grad_, init(first * scale, cfg, seed))
        optimizer = torch.optim.Adam([*tree.flatten(p).values()], rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * (steps - step) / steps))
        idle = torch.zeros(cfg.latents, dtype=torch.long, device=first.device)
        for x in chain([first], islice(stream, steps - 1)):
            active = learn(p, x.detach().float() * scale, cfg, idle >= cfg.dead_after, optimizer)
            idle = torch.where(active, 0, idle + 1)
            schedule.step()
        p = tree.map(Tensor.detach, p)
        return p._replace(encoder_bias=p.encoder_bias / scale, bias=p.bias / scale)


def learn(
    p: Sae, x: Float[Tensor, "b d"], cfg: Config, dead: Bool[Tensor, "m"], optimizer: torch.optim.Optimizer
) -> Bool[Tensor, "m"]:
    """Change the parameters by one step. Returns which latents were active."""
    error, active = loss(p, x, cfg, dead)
    leaves = [*tree.flatten(p).values()]
    for leaf, gradient in zip(leaves, torch.autograd.grad(error, leaves), strict=True):
        leaf.grad = gradient - along(gradient, p.decoder) if leaf is p.decoder else gradient
    optimizer.step()
    with torch.no_grad():
        p.decoder.div_(p.decoder.norm(dim=-1, keepdim=True))
    return active


def endless(batches: Callable[[int], Iterable[Tensor]]) -> Iterator[Tensor]:
    """The batches of one epoch after the other. Raises SettingError if an epoch has none."""
    epoch = 0
    while True:
        count = 0
        for count, x in enumerate(batches(epoch), start=1):  # noqa: B007
            yield x
        if not count:
            raise SettingError("there are no batches to train on: fewer activations than a batch has")
        epoch += 1


def init(x: Float[Tensor, "b d"], cfg: Config, seed: int) -> Sae:
    """Random directions of length 1; the encoder is the decoder's transpose, and the bias the mean of a batch."""
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(cfg.latents, x.shape[1], generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    decoder = decoder / decoder.norm(dim=-1, keepdim=True)
    return Sae(decoder.T.contiguous(), x.new_zeros(cfg.latents), decoder, x.mean(0))


def loss(
    p: Sae, x: Float[Tensor, "b d"], cfg: Config, dead: Bool[Tensor, "m"]
) -> tuple[Float[Tensor, ""], Bool[Tensor, "m"]]:
    """The unexplained share of the variance, plus `revival` times what the dead latents leave unexplained of the error.

    Also returns which latents were active.
    """
    before = hidden(p, x, cfg)
    latents = largest(before, cfg.k)
    error = x - decode(p, latents)
    variance = (x - x.mean(0)).square().sum()
    others = torch.where(dead, before, float("-inf"))
    values, where = others.topk(min(cfg.revived, cfg.latents), dim=-1)
    values = torch.where(values.isfinite(), values, 0.0)
    explained = einsum(torch.zeros_like(before).scatter(-1, where, values.relu()), p.decoder, "b m, m d -> b d")
    rest = (error.detach() - explained).square().sum() / error.detach().square().sum().clamp(min=1e-12)
    revival = torch.where(dead.any(), cfg.revival * rest, 0.0)
    return error.square().sum() / variance.clamp(min=1e-12) + revival, (latents > 0).any(0)


def along(x: Float[Tensor, "m d"], directions: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """The part of each row that is parallel to a direction of length 1."""
    return einsum(x, directions, "m d, m d -> m")[:, None] * directions


# --- files ------------------------------------------------------------------------------------------------------------


def save(p: Sae, cfg: Config, folder: str | Path) -> None:
    """Write an SAE into a folder, in the layout of SAELens; another one there is replaced.

    The settings of its training are not stored. Raises SettingError if it cannot be written.
    """
    folder = Path(folder)
    check_folder(folder)
    width, latents = p.encoder.shape
    kind = "jumprelu" if isinstance(p.threshold, Tensor) else "topk" if cfg.k else "standard"
    settings = {"architecture": kind, "d_in": width, "d_sae": latents, "dtype": "float32", "device": "cpu",
                "apply_b_dec_to_input": cfg.subtract_bias, "normalize_activations": "none",
                "reshape_activations": "none", "metadata": {}}  # fmt: skip
    settings |= {"k": cfg.k} if kind == "topk" else {}
    arrays = {NAMES[field]: x.float() for field, x in p._asdict().items() if isinstance(x, Tensor)}
    with write_errors(folder), changing(folder) as change:
        with change.new(WEIGHTS) as file:
            write_safetensors(file, arrays, {"format": "pt"})
        change.write(SETTINGS, json.dumps(settings, indent=1) + "\n")


def load(folder: str | Path, device: torch.device | str = "cpu") -> tuple[Sae, Config]:
    """An SAE in the layout of SAELens, in float32: `topk`, `standard` or `jumprelu`. Raises SettingError for others."""
    path = Path(folder) / SETTINGS
    try:
        settings, arrays = dict(json.loads(path.read_text())), load_file(Path(folder) / WEIGHTS, device=str(device))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise SettingError(f"{path.parent}: {SETTINGS} or {WEIGHTS} cannot be read ({first_line(error)})") from error
    kind = settings.get("architecture")
    if kind not in KINDS:
        raise SettingError(f"{path}: architecture is {kind}, expected topk, standard or jumprelu")
    for name, plain in PLAIN.items():
        if settings.get(name, plain[0]) not in (*plain, kind):
            raise SettingError(f"{path}: {name} is {settings[name]}, which is not supported")
    if missing := [name for name in KINDS[kind] if name not in arrays | settings]:
        raise SettingError(f"{path.parent}: has no {missing[0]}, which an SAE of kind {kind} has")
    p = Sae(**{field: arrays[name].float() for field, name in NAMES.items() if name in KINDS[kind]})
    k = settings["k"] if kind == "topk" else 0
    return p, Config(latents=len(p.encoder_bias), k=k, subtract_bias=settings.get("apply_b_dec_to_input", True))
