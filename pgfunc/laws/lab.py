"""The laws of the lab: captured and edited activations, and what readings say about the logits.

They need a forward pass with a tap (`tapped`), and the two transformers of functions (`capture`, `edit`). The names of
activations are pgfunc's.
"""

from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.func import vmap

from pgfunc.laws.law import law
from pgfunc.laws.model import REORDERED, Position, any_rows, difference, positions, prompt_for
from pgfunc.laws.strategies import Rows
from pgfunc.laws.system import System

CHEAP = ("*.resid_*", "*.q", "*.k", "*.v", "*.z", "*.mlp_*", "logits")  # made without a tap too
ENTRIES = ("language.*.resid_pre", "language.*.resid_post")
EXPLICIT = "the weights of attention are made explicitly, in another order of sums"


def run(system: System, rows: Rows, *patterns: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of prompts, and some activations."""
    return system.capture(system.tapped, *patterns)(prompt_for(system, rows))


def noise(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)


def chosen(names: Any, position: Position) -> str:
    """One of these names, chosen by the example."""
    return sorted(names)[position.between(0, len(names) - 1)]


@law("Capturing activations changes no bit of the logits.",
     needs="tapped capture", domain=any_rows)  # fmt: skip
def capturing_changes_nothing(system: System, rows: Rows) -> float:
    plain = system.tapped(prompt_for(system, rows))
    return float(not torch.equal(run(system, rows, *CHEAP)[0], plain))


@law("Capturing the weights of attention changes the logits by rounding only.",
     needs="tapped capture", domain=any_rows, roundings=1.0, reason=EXPLICIT)  # fmt: skip
def capturing_patterns_changes_only_the_rounding(system: System, rows: Rows) -> float:
    prompt = prompt_for(system, rows)
    actual, expected = run(system, rows, "*.pattern", "*.attn_scores")[0], system.tapped(prompt)
    return difference(actual[prompt.valid], expected[prompt.valid])


@law("Writing every activation back changes nothing but the rounding.",
     needs="tapped capture edit", domain=any_rows, roundings=1.0, reason=EXPLICIT)  # fmt: skip
def writing_back_changes_nothing(system: System, rows: Rows) -> float:
    prompt, (_, seen) = prompt_for(system, rows), run(system, rows, "*")
    actual = system.edit(system.tapped, {name: lambda x, name=name: seen[name].clone() for name in seen})(prompt)
    return difference(actual[prompt.valid], system.tapped(prompt)[prompt.valid])


@law("capture(edit(f)) captures edited values; edit(capture(f)) captures the values before the edit.",
     needs="tapped capture edit", domain=positions)  # fmt: skip
def what_is_captured_depends_on_the_order(system: System, example: Position) -> float:
    prompt, (_, seen) = prompt_for(system, example.rows), run(system, example.rows, "language.*")
    name = chosen([name for name in seen if seen[name].is_floating_point()], example)
    changes = {name: lambda x: 2 * x}
    after = system.capture(system.edit(system.tapped, changes), name)(prompt)[1][name]
    before = system.edit(system.capture(system.tapped, name), changes)(prompt)[1][name]
    original = run(system, example.rows, name)[1][name]
    return float(not (torch.equal(after, 2 * original) and torch.equal(before, original)))


@law("vmap over masks of an edit equals a loop over them.",
     needs="tapped capture edit", domain=positions, roundings=1.0, reason=REORDERED)  # fmt: skip
def vmapped_edits_equal_a_loop(system: System, example: Position) -> float:
    prompt, (_, seen) = prompt_for(system, example.rows), run(system, example.rows, "*.resid_mid", "*.resid_post")
    name = chosen(seen, example)
    length = seen[name].shape[1]
    masks = rearrange(torch.eye(length, dtype=torch.bool)[: min(3, length)], "m t -> m t 1")

    def ablated(mask: Tensor) -> Tensor:
        return system.edit(system.tapped, {name: lambda x: torch.where(mask, 0.0, x)})(prompt)

    batched = vmap(ablated)(masks)
    return max(
        difference(one[prompt.valid], ablated(mask)[prompt.valid]) for one, mask in zip(batched, masks, strict=True)
    )


@law("Compiled, an edit gives the same logits, also with another value of its argument.",
     needs="tapped edit compile", domain=any_rows, roundings=1.0, reason=REORDERED)  # fmt: skip
def compiled_edits_equal_edits(system: System, rows: Rows) -> float:
    prompt = prompt_for(system, rows)

    def steered(prompt: Any, amount: Tensor) -> Tensor:
        return system.edit(system.tapped, {"language.0.resid_post": lambda x: x * amount})(prompt)

    fast = system.compile(steered)
    return max(
        difference(fast(prompt, amount)[prompt.valid], steered(prompt, amount)[prompt.valid])
        for amount in (torch.tensor(0.5), torch.tensor(-2.0))
    )


@law("The weights of each query sum to 1, or are all 0 if it sees no key; keys that it does not see have weight 0.",
     needs="tapped capture", domain=any_rows, within=1e-5, reason="sums of float32")  # fmt: skip
def rows_of_a_pattern_sum_to_1(system: System, rows: Rows) -> float:
    _, seen = run(system, rows, "*.pattern", "*.mask")
    errors = [0.0]
    for name in [name for name in seen if name.endswith(".pattern")]:
        pattern, mask = seen[name].double(), rearrange(seen[name.replace("pattern", "mask")], "b t s -> b 1 t s")
        sums = pattern.sum(-1) - mask.any(-1).double()
        errors += [x.abs().max().item() for x in (sums, torch.where(mask, 0.0, pattern)) if x.numel()]
    return max(errors)


@law("The result of each head is its weights times its values.",
     needs="tapped capture", domain=any_rows, roundings=1.0, reason=REORDERED)  # fmt: skip
def patterns_times_values_are_z(system: System, rows: Rows) -> float:
    _, seen = run(system, rows, "*.pattern", "*.v", "*.z")
    errors = [0.0]
    for name in [name for name in seen if name.endswith(".z")]:
        pattern, v = (seen[name[:-1] + last] for last in ("pattern", "v"))
        v = repeat(v, "b s k h -> b s (k g) h", g=pattern.shape[1] // v.shape[2])
        errors.append(difference(einsum(pattern.to(v.dtype), v, "b n t s, b s n h -> b t n h"), seen[name]))
    return max(errors)


@law("The parts of a direct logit attribution sum to the logits.",
     needs="tapped capture attribution parts", domain=any_rows, roundings=2.0, reason=REORDERED)  # fmt: skip
def an_attribution_adds_up(system: System, rows: Rows) -> float:
    prompt, (logits, seen) = prompt_for(system, rows), run(system, rows, *system.parts)
    text_at = (prompt.valid.long() * torch.arange(prompt.valid.shape[1])).amax(-1)  # each row's last valid token
    pictures = seen["language.embed"].shape[1] - prompt.valid.shape[1]
    tokens = torch.arange(system.vocab).expand(len(text_at), -1)
    parts = system.attribution(seen, tokens, pictures + prompt.valid.sum(-1) - 1)
    return difference(parts.total(), logits[torch.arange(len(text_at)), text_at])


@law("A run that is resumed at any layer, from its input, gives the logits of the whole run.",
     needs="tapped capture resume", domain=any_rows, roundings=1.0, reason=REORDERED)  # fmt: skip
def resumed_runs_equal_whole_ones(system: System, rows: Rows) -> float:
    prompt, (logits, seen) = prompt_for(system, rows), run(system, rows, *ENTRIES)
    layers = len(seen) // 2
    entries = [*(seen[f"language.{i}.resid_pre"] for i in range(layers)), seen[f"language.{layers - 1}.resid_post"]]
    return max(
        difference(system.resume(prompt, i, resid)[prompt.valid], logits[prompt.valid])
        for i, resid in enumerate(entries)
    )


@law("An edit changes no activation that is computed before it.",
     needs="tapped capture edit", domain=positions)  # fmt: skip
def an_edit_changes_nothing_before_it(system: System, example: Position) -> float:
    prompt, (_, seen) = prompt_for(system, example.rows), run(system, example.rows, *CHEAP)
    names = [*seen]
    at = example.between(0, len(names) - 1)
    changes = {names[at]: lambda x: x + noise(x, example.rows.seed)}
    _, after = system.edit(system.capture(system.tapped, *names), changes)(prompt)
    return float(not all(torch.equal(after[name], seen[name]) for name in names[: at + 1]))


@law("If no query sees any key, the result of every head is 0.",
     needs="tapped capture edit", domain=any_rows)  # fmt: skip
def blind_heads_give_zero(system: System, rows: Rows) -> float:
    blind = system.edit(system.tapped, {"*.mask": lambda mask: mask & False})
    _, seen = system.capture(blind, "*.z")(prompt_for(system, rows))
    return max(z.abs().max().item() if z.numel() else 0.0 for z in seen.values())


@law("The gap of integrated gradients is 0 for enough nodes.",
     needs="tapped capture edit integrated", domain=any_rows, within=5e-3, roundings=1.0,
     reason="16 nodes; as a share of the parts' absolute sum")  # fmt: skip
def the_gap_of_integrated_gradients_closes(system: System, rows: Rows) -> float:
    prompt = prompt_for(system, rows)
    embedded = run(system, rows, "language.embed")[1]["language.embed"]

    def score(x: Tensor) -> Tensor:
        logits = system.edit(system.tapped, {"language.embed": lambda _: x})(prompt)
        return logits[prompt.valid].log_softmax(-1)[:, 0].mean()

    parts, gap = system.integrated(score, embedded, embedded + embedded.std() * noise(embedded, rows.seed), 16)
    return float(gap.abs() / parts.abs().sum().clamp(min=1e-6))


LAB = (
    capturing_changes_nothing,
    capturing_patterns_changes_only_the_rounding,
    writing_back_changes_nothing,
    what_is_captured_depends_on_the_order,
    vmapped_edits_equal_a_loop,
    compiled_edits_equal_edits,
    rows_of_a_pattern_sum_to_1,
    patterns_times_values_are_z,
    an_attribution_adds_up,
    resumed_runs_equal_whole_ones,
    an_edit_changes_nothing_before_it,
    blind_heads_give_zero,
    the_gap_of_integrated_gradients_closes,
)
