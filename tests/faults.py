"""One fault for each law, which the law must find: a change of a system that gives wrong numbers without raising."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C._functorch import is_batchedtensor
from torch.utils import _pytree as pytree

import pgfunc as pg
from pgfunc import taps
from pgfunc.laws import System


def boxed(system: System) -> System:
    """A system that overwrites its cache, so that every handle is the newest."""

    def prefill(prompt, size):
        logits, cache = system.prefill(prompt, size)
        return logits, [cache]

    def decode(token, box):
        logits, box[0] = system.decode(token, box[0])
        return logits, box

    return system._replace(prefill=prefill, decode=decode)


def overwriting(system: System) -> System:
    """A system whose step writes the newest keys into the first slot of its argument."""

    def decode(token, cache):
        logits, new = system.decode(token, cache)
        cache.k[0][:, 0] = new.k[0][torch.arange(len(token)), cache.length]
        return logits, new

    return system._replace(decode=decode)


def counting(system: System) -> System:
    """A system whose logits grow with each call."""
    calls: list[int] = []

    def forward(prompt):
        calls.append(1)
        return system.forward(prompt) + 1e-6 * len(calls)

    return system._replace(forward=forward)


class Doubled(torch.autograd.Function):
    """The identity, whose gradient is twice too large in reverse mode and correct in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 1.0 * tangent


def swapped(params: Any) -> Any:
    """The parameters with the two matrices of the first layer's MLP exchanged."""
    first = params.language.layers[0]
    layers = (first._replace(gate=first.up, up=first.gate), *params.language.layers[1:])
    return params._replace(language=params.language._replace(layers=layers))


def in_steps_of_1024(read: Callable[..., Any]) -> Callable[..., Any]:
    """A reader of boxes that divides by 1024 instead of 1023."""
    return lambda *args: [(label, tuple(edge * 1023 / 1024 for edge in box)) for label, box in read(*args)]


def darker_at_the_edge(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels as if the picture were padded with black before it was resized."""
    return torch.cat([pixels[:, :1] * 0.9 - 0.1, pixels[:, 1:]], 1)


def full_chunks_only(contrast: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A loss that leaves out the rows of the last chunk if it is not full."""

    def loss(kind, x, y, scale, bias, chunk):
        rows = len(x) // chunk * chunk if chunk else len(x)
        return contrast(kind, x[:rows], y[:rows], scale, bias, chunk)

    return loss


def change(**changes: Callable[[System], Any]) -> Callable[[System], System]:
    """A function that replaces functions of a system, each by one made from the system."""
    return lambda system: system._replace(**{name: make(system) for name, make in changes.items()})


def on_prompt(edit: Callable[[pg.Prompt], pg.Prompt]) -> Callable[[System], System]:
    """A function that makes a system edit each prompt before forward."""
    return change(forward=lambda system: lambda prompt: system.forward(edit(prompt)))


class Twisted(NamedTuple):
    """A tap that scales the activations of one kind, before another tap gets them."""

    last: str
    factor: float
    tap: taps.Tap

    def asks(self, name):
        return taps.asks(self.tap, name)

    def __call__(self, name, x):
        return self.tap(name, x * self.factor if name.endswith(self.last) else x)


def twisted(last: str, factor: float) -> Callable[[System], System]:
    """A function that makes a system show wrong activations of one kind."""
    return change(tapped=lambda s: lambda prompt, tap=taps.identity: s.tapped(prompt, Twisted(last, factor, tap)))


def with_captured_logits(fault: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[System], System]:
    """A function that makes a system change the logits when it captures."""

    def make(system: System):
        def capture(fn, *patterns):
            def captured(*args, **kwargs):
                logits, seen = system.capture(fn, *patterns)(*args, **kwargs)
                return fault(logits), seen

            return captured

        return capture

    return change(capture=make)


def with_edits(fault: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[System], System]:
    """A function that makes a system change what an edit does."""
    return change(edit=lambda s: lambda fn, changes: s.edit(fn, fault(changes)))


def first_value_only(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A compiler that keeps the value of the last argument of the first call."""
    values: list[Any] = []

    def compiled(*args):
        values.append(args[-1])
        return fn(*args[:-1], values[0])

    return compiled


FAULTS: dict[str, Callable[[System], System]] = {
    "decode-equals-longer-prefill": change(
        decode=lambda s: lambda token, cache: s.decode(token, cache._replace(length=cache.length - 1))
    ),
    "prefill-equals-forward": change(prefill=lambda s: lambda p, size: (s.forward(p)[:, -1], s.prefill(p, size)[1])),
    "chunks-equal-whole": change(extend=lambda s: lambda tokens, cache: s.extend(tokens.sort(-1).values, cache)),
    "an-old-handle-stays-valid": boxed,
    "forks-are-apart": boxed,
    "a-suffix-is-causal": on_prompt(lambda p: p._replace(causal=torch.zeros_like(p.causal))),
    "a-prefix-sees-itself": on_prompt(lambda p: p._replace(causal=p.valid)),
    "padding-is-not-read": on_prompt(lambda p: p._replace(valid=torch.ones_like(p.valid))),
    "a-row-is-alone": change(forward=lambda s: lambda p: (x := s.forward(p)) + x[:1, :1]),
    "the-order-of-rows-does-not-matter": change(forward=lambda s: lambda p: (x := s.forward(p)) + 0.1 * x[:1, :1]),
    "the-order-of-pictures-matters": change(  # the order of the pictures changes nothing but rounding
        forward=lambda s: lambda p: s.forward(p) + s.forward(p._replace(pixels=p.pixels.flip(1)))
    ),
    "forward-is-pure": counting,
    "a-step-is-pure": overwriting,
    "logits-are-those-of-the-reference": change(reference=lambda s: lambda p: s.forward(p) * 1.001),
    "a-window-over-everything-is-none": change(
        windowed=lambda s: lambda prompt, size: s.windowed(prompt, max(0, size - 1))
    ),
    "vmap-equals-a-loop": change(
        apply=lambda s: lambda params, p: s.apply(params, p) * (1.1 if is_batchedtensor(params.projector) else 1)
    ),
    "jvp-equals-the-gradient-along-it": change(apply=lambda s: lambda params, p: Doubled.apply(s.apply(params, p))),
    "the-gradient-equals-finite-differences": change(
        apply=lambda s: lambda params, p: Doubled.apply(s.apply(params, p))
    ),
    "the-head-is-the-embedding": change(  # a bias on the logits
        apply=lambda s: lambda params, p: s.apply(params, p) + torch.linspace(0, 1, s.vocab)
    ),
    "capturing-changes-nothing": with_captured_logits(lambda logits: logits + 1e-6),
    "capturing-patterns-changes-only-the-rounding": with_captured_logits(lambda logits: 1.001 * logits),
    "writing-back-changes-nothing": with_edits(  # in bfloat16
        lambda changes: {name: lambda x, fn=fn: fn(x).bfloat16().to(x.dtype) for name, fn in changes.items()}
    ),
    "what-is-captured-depends-on-the-order": with_edits(  # edits twice
        lambda changes: {name: lambda x, fn=fn: fn(fn(x)) for name, fn in changes.items()}
    ),
    "vmapped-edits-equal-a-loop": change(
        tapped=lambda s: lambda *args, **kwargs: (x := s.tapped(*args, **kwargs)) * (1.1 if is_batchedtensor(x) else 1)
    ),
    "compiled-edits-equal-edits": change(compile=lambda s: first_value_only),
    "rows-of-a-pattern-sum-to-1": twisted("pattern", 1.001),
    "patterns-times-values-are-z": twisted(".z", 1.001),
    "an-attribution-adds-up": change(
        attribution=lambda s: lambda *args: (x := s.attribution(*args))._replace(mlps=1.001 * x.mlps)
    ),
    "resumed-runs-equal-whole-ones": change(
        resume=lambda s: lambda prompt, layer, resid: s.resume(prompt, max(0, layer - 1), resid)
    ),
    "an-edit-changes-nothing-before-it": with_edits(lambda changes: changes | {"*.resid_pre": lambda x: 1.001 * x}),
    "blind-heads-give-zero": with_edits(lambda changes: {}),
    "the-gap-of-integrated-gradients-closes": change(
        integrated=lambda s: lambda fn, x, baseline, nodes: s.integrated(fn, x, baseline, 1)
    ),
    "rms-norm-is-scale-invariant": change(rms_norm=lambda s: lambda x, scale: s.rms_norm(x, scale) * x.abs().amax()),
    "rms-norm-gives-unit-mean-square": change(rms_norm=lambda s: lambda x, scale: s.rms_norm(x, scale - 1)),
    "rope-depends-on-differences": change(rotate=lambda s: lambda x, positions: s.rotate(x, positions**2)),
    "rope-keeps-lengths": change(rotate=lambda s: lambda x, positions: s.rotate(x, positions + 1)),
    "softcap-is-bounded-and-monotone": change(softcap=lambda s: lambda x, cap: torch.tanh(x / cap)),
    "grouped-queries-equal-repeated-keys": change(
        attend=lambda s: (
            lambda q, k, v, mask: s.attend(q, *(x.repeat(1, 1, q.shape[2] // x.shape[2], 1) for x in (k, v)), mask)
        )
    ),
    "attention-is-a-mean": change(attend=lambda s: lambda *args: 1.001 * s.attend(*args)),
    "hidden-keys-are-not-read": change(  # every query sees what any query sees
        attend=lambda s: lambda q, k, v, mask: s.attend(q, k, v, mask.any(1, keepdim=True).expand_as(mask))
    ),
    "a-window-that-covers-all-is-none": change(
        mask=lambda s: lambda valid, causal, window: s.mask(valid, causal, max(1, window - 1) if window else 0)
    ),
    "masks-are-their-rule": change(
        mask=lambda s: lambda valid, causal, window: s.mask(torch.ones_like(valid), causal, window)
    ),
    "top-k-keeps-the-k-largest": change(top_k=lambda s: lambda logits, k: s.top_k(logits, k + 1)),
    "top-p-keeps-the-fewest-of-that-probability": change(top_p=lambda s: lambda logits, p: s.top_p(logits, p / 2)),
    "min-p-keeps-what-is-near-the-best": change(min_p=lambda s: lambda logits, p: s.min_p(logits, p / 2)),
    "filters-commute": change(
        top_k=lambda s: lambda logits, k: s.top_k(logits, k) if logits.isfinite().all() else logits
    ),
    "drawing-is-monotone": change(draw=lambda s: lambda logits, u: s.draw(logits, 1 - u)),
    "drawing-inverts-the-distribution": change(draw=lambda s: lambda logits, u: s.draw(logits, u**2)),
    "cold-is-greedy": change(choose=lambda s: lambda logits, u, t: s.choose(logits, u, max(t, 1.0))),
    "heat-is-uniform": change(choose=lambda s: lambda logits, u, t: s.choose(logits, u, min(t, 10.0))),
    "frequencies-fit-probabilities": change(draw=lambda s: lambda logits, u: s.draw(logits, u**1.2)),
    "what-is-loaded-is-what-was-saved": change(  # files that hold bfloat16
        reload=lambda s: lambda params: pytree.tree_map(lambda x: x.bfloat16().to(x.dtype), s.reload(params))
    ),
    "a-conversion-and-back-changes-nothing": change(convert=lambda s: lambda params: swapped(s.convert(params))),
    "quantized-within-half-a-step": change(  # groups twice as large
        quantize=lambda s: lambda w, bits, group: s.quantize(w, bits, min(2 * group, 128))
    ),
    "text-comes-back": change(to_text=lambda s: lambda ids: s.to_text(ids).strip()),
    "places-and-codes-are-one-token": change(to_ids=lambda s: lambda text: s.to_ids(text.replace("<seg", "<Seg"))),
    "a-box-comes-back-within-half-a-step": change(read_boxes=lambda s: in_steps_of_1024(s.read_boxes)),
    "text-of-boxes-comes-back": change(read_boxes=lambda s: in_steps_of_1024(s.read_boxes)),
    "a-mask-comes-back-inside-its-box": change(
        read_masks=lambda s: lambda *args: [(label, box, mask.roll(1, 0)) for label, box, mask in s.read_masks(*args)]
    ),
    "mask-codes-come-back": change(features=lambda s: lambda codes: s.features(codes.flip(1))),
    "pixels-lie-between-black-and-white": change(pixels=lambda s: lambda picture: s.pixels(picture) * 1.001),
    "one-colour-stays-what-it-is": change(pixels=lambda s: lambda picture: darker_at_the_edge(s.pixels(picture))),
    "a-loss-is-its-formula-at-any-logits": change(  # overflows for extreme logits
        contrast=lambda s: lambda *args: s.contrast(*args).exp().log()
    ),
    "chunks-of-a-loss-equal-the-whole": change(contrast=lambda s: full_chunks_only(s.contrast)),
    "the-order-of-pairs-does-not-matter": change(
        contrast=lambda s: lambda *args: s.contrast(*args) + 1e-3 * args[1][0, 0]
    ),
    "the-gradient-of-a-loss-equals-finite-differences": change(
        contrast=lambda s: lambda *args: Doubled.apply(s.contrast(*args))
    ),
}
