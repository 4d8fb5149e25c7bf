"""pgfunc beside transformers: the same weights in memory once, the same prompt, one process, in turns.

    python examples/benchmarks/vs_transformers.py --config paligemma-3b-224 --batch 64
    python examples/benchmarks/vs_transformers.py --config paligemma-3b-224 --dtype float32 --layers 2 --tokens 16

Four competitors generate the same number of greedy tokens after a random prompt of one picture and 16 tokens a row:
transformers with its dynamic cache, transformers with its static cache (whose step it compiles), eager pgfunc and
compiled pgfunc. The script prints medians of the time to the first token, of one more token and of the whole answer,
and their ratios to those of compiled pgfunc; then the share of tokens that equal those of eager pgfunc. The margin says
how far apart the logits are where a row first differs: in bfloat16, rounding decides between near ties, and the rest of
the row differs. In float32 the exit status is 1 if rounding does not explain the margin.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CompileConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

import pgfunc as pg
from pgfunc import bench
from pgfunc.checkpoint import as_device, as_dtype, hf
from pgfunc.checkpoint.hf_config import render
from pgfunc.checkpoint.tables import to_arrays
from pgfunc.errors import PgfuncError, SettingError, first_line
from pgfunc.generate import complete

TEXT_TOKENS = 16
HEAD = """{model}, {layers[0]} + {layers[1]} layers, {dtype}, {tokens} tokens, {repeat} turns
{hardware}, {threads} threads, torch {torch}, transformers {transformers}

batch  who                                  first, ms (x)  a token, ms (x) whole, ms (x)  equal tokens"""
Writer = Callable[[int], Tensor]  # number of tokens -> the tokens of each row


def chosen(options: argparse.Namespace) -> pg.Model:
    """The checkpoint, or random weights of a published configuration, with fewer layers if asked."""
    device, dtype = as_device(options.device), as_dtype(options.dtype)
    case = bench.Case(options.batch, TEXT_TOKENS, options.tokens, repeat=options.repeat)
    if options.model and options.layers:
        raise SettingError("--layers is for random weights; a checkpoint keeps all of its layers")
    if options.layers is not None and options.layers < 1:
        raise SettingError(f"layers is {options.layers}, expected 1 or more")
    if options.model:
        model = pg.load(options.model, dtype, device)
        case.check(model.cfg)
        return model
    cfg = pg.PUBLISHED[options.config]
    case.check(cfg)
    if options.layers:
        cfg = replace(cfg, text=replace(cfg.text, layers=min(options.layers, cfg.text.layers)))
        cfg = replace(cfg, vision=replace(cfg.vision, layers=min(options.layers, cfg.vision.layers)))
    return pg.Model(cfg, bench.random_params(cfg, dtype or torch.bfloat16, device), None)


def bare(model: pg.Model) -> pg.Model:
    """The model without embedding rows that have no token, which transformers might generate; it never stops at eos."""
    cfg, params = model.cfg, model.params
    embed = params.language.embed[: cfg.text.vocab]
    cfg = replace(cfg, eos=-1, text=replace(cfg.text, padding=0))
    return pg.Model(cfg, params._replace(language=params.language._replace(embed=embed)), None)


def peer(model: pg.Model) -> PaliGemmaForConditionalGeneration:
    """The model in transformers, on the same tensors."""
    cfg, params = replace(model.cfg, eos=1), model.params
    dtype = pg.tree.dtype_name(params.projector)
    with torch.device("meta"):
        other = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(render(cfg, dtype)))
    prefixes = {part: key.removesuffix(anchor) for part, anchor in hf.ANCHORS.items()
                for key in other.state_dict() if key.endswith(anchor)}  # fmt: skip
    arrays = to_arrays(hf.table(cfg, prefixes), params) | {"lm_head.weight": params.language.embed}
    other.load_state_dict(arrays, assign=True)
    # buffers that its constructor computes, such as frequencies: take them from a small model, not from the meta device
    small = replace(cfg, text=replace(cfg.text, vocab=8, layers=1, hidden=8), vision=replace(cfg.vision, layers=1))
    twin = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(render(small, dtype)))
    for name, buffer in twin.named_buffers():
        path, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(path), leaf, buffer.to(params.projector.device))
    if cfg.text.attention_softcap:  # sdpa does not support it, and some versions leave it out silently
        other.set_attn_implementation({"text_config": "eager"})
    assert other.generation_config is not None
    other.generation_config.eos_token_id = None
    return other.eval()


def inputs_of(model: pg.Model, prompt: pg.Prompt) -> dict[str, Tensor]:
    """The prompt as transformers takes it."""
    marks = torch.full((len(prompt.tokens), model.cfg.vision.tokens), model.cfg.image, device=prompt.tokens.device)
    ids = torch.cat([marks, prompt.tokens], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids),
            "pixel_values": prompt.pixels.flatten(0, 1).to(model.params.projector.dtype)}  # fmt: skip


def writers(model: pg.Model, other: Any, prompt: pg.Prompt, compile: bool) -> dict[str, Writer]:
    """The competitors by name."""
    batch, device = len(prompt.tokens), prompt.tokens.device
    inputs = inputs_of(model, prompt)
    everywhere = CompileConfig()
    setattr(everywhere, "_compile_all_devices", True)  # noqa: B010  without it, it compiles on accelerators only
    compiling = {"compile_config": everywhere} if device.type == "cpu" and compile else {"disable_compile": not compile}

    def ours(compile: bool) -> Writer:
        def write(tokens: int) -> Tensor:
            u = torch.zeros(batch, tokens, dtype=torch.float64)
            return torch.tensor([done.tokens for done in complete(model, prompt, bench.GREEDY, u, compile)])

        return write

    def theirs(**settings: Any) -> Writer:
        def write(tokens: int) -> Tensor:
            out = other.generate(**inputs, max_new_tokens=tokens, do_sample=False, **settings)
            assert out.shape[1] == inputs["input_ids"].shape[1] + tokens, "it stopped early"
            return out[:, -tokens:].cpu()

        return write

    result = {"transformers, dynamic cache": theirs(), "pgfunc": ours(False)}
    mode = "compiled" if compile else "eager"
    result[f"transformers, static cache, {mode}"] = theirs(cache_implementation="static", **compiling)
    return result | ({"pgfunc, compiled": ours(True)} if compile else {})


def contest(
    competitors: dict[str, Writer], device: torch.device, tokens: int, repeat: int
) -> dict[str, dict[str, Any]]:
    """The tokens of each competitor and its times in milliseconds, one for each turn.

    The time of one more token is the time of the whole answer minus that of the first token, over the number of tokens
    after the first. If transformers raises an error, it drops out, and its entry has the error instead.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, write in competitors.items():
        try:
            results[name] = {"tokens": write(tokens), "first": [], "token": [], "whole": []}
            for n in (1, tokens, 1):  # twice each: the first call compiles, the second may capture a graph
                write(n)
        except Exception as error:
            if name.startswith("pgfunc"):
                raise
            results[name] = {"raises": f"{type(error).__name__}: {first_line(error)}"}
    for _ in range(repeat):
        for name in [name for name, one in results.items() if "raises" not in one]:
            first, whole = (1e3 * bench.timed(lambda n=n, name=name: competitors[name](n), device) for n in (1, tokens))
            for key, value in {"first": first, "token": (whole - first) / (tokens - 1), "whole": whole}.items():
                results[name][key].append(value)
    return results


def agreement(tokens: Tensor, expected: Tensor, model: pg.Model, prompt: pg.Prompt) -> dict[str, Any]:
    """The share of equal tokens, the first position where a row differs, and the largest margin of these positions.

    The margin is the difference of pgfunc's logits between the two tokens, in standard deviations of the logits.
    """
    equal = tokens == expected
    positions = {row: int((~same).nonzero()[0]) for row, same in enumerate(equal) if not same.all()}
    margins = [margin(model, prompt, row, expected[row, :i], tokens[row, i], expected[row, i])
               for row, i in positions.items()]  # fmt: skip
    return {"agree": equal.float().mean().item(), "differs_at": min(positions.values(), default=None),
            "margin": max(margins, default=None)}  # fmt: skip


@torch.no_grad()
def margin(model: pg.Model, prompt: pg.Prompt, row: int, before: Tensor, one: Tensor, other: Tensor) -> float:
    """The distance of two tokens' logits after a row of the prompt and `before`, in standard deviations."""
    single = pg.tree.map(lambda leaf: leaf[row : row + 1], prompt)
    more = before[None].to(prompt.tokens.device)
    flags = torch.ones_like(more, dtype=torch.bool)
    longer = single._replace(tokens=torch.cat([single.tokens, more], 1), valid=torch.cat([single.valid, flags], 1),
                             causal=torch.cat([single.causal, flags], 1))  # fmt: skip
    logits, _ = pg.prefill(model.params, longer, model.cfg, 0)
    return ((logits[0, one] - logits[0, other]).abs() / logits.std()).item()


def rows(
    results: dict[str, dict[str, Any]], batch: int, judge: Callable[[Tensor, Tensor], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The results as JSON: medians and ranges in milliseconds, ratios to the last pgfunc, tokens against the first."""
    ours = [one for name, one in results.items() if name.startswith("pgfunc")]
    rendered = []
    for name, one in results.items():
        row: dict[str, Any] = {"batch": batch, "who": name}
        if "raises" in one:
            rendered.append(row | {"raises": one["raises"]})
            continue
        for key in ("first", "token", "whole"):
            row[f"{key}_ms"] = {"median": median(one[key]), "least": min(one[key]), "most": max(one[key])}
            row[f"{key}_ratio"] = median(one[key]) / median(ours[-1][key])
        rendered.append(row | judge(one["tokens"], ours[0]["tokens"]))
    return rendered


def line(row: dict[str, Any]) -> str:
    """One result as a line of text."""
    start = f"{row['batch']:>5}  {row['who']:<35}"
    if "raises" in row:
        return f"{start} raises {row['raises']}"
    times = [f"{row[f'{key}_ms']['median']:>10,.2f} ({row[f'{key}_ratio']:.2f})" for key in ("first", "token", "whole")]
    differs = "" if row["differs_at"] is None else f", not token {row['differs_at']}: margin {row['margin']:.1e}"
    return start + "".join(times) + f"   {row['agree']:.3f}{differs}"


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options of a contest with transformers: the model, where it runs, and how often it is measured."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config", choices=pg.PUBLISHED, default="paligemma-3b-224", help="random weights of this size"
    )
    source.add_argument("--model", help="use a checkpoint instead")
    parser.add_argument("--layers", type=int, help="keep so many layers of each tower, for a small machine")
    parser.add_argument("--repeat", type=int, default=5, help="number of turns")
    parser.add_argument("--dtype", help="dtype of the weights; default: the checkpoint's, bfloat16 if random")
    parser.add_argument("--device", help="cpu or cuda; default: CUDA if available")
    parser.add_argument("--json", action="store_true", help="print JSON")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_common_options(parser)
    parser.add_argument("--batch", type=int, default=1, help="rows; one row is measured first")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="compile nothing")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Times and tokens of all competitors, for one row and for the batch."""
    model = bare(chosen(options))
    other, device = peer(model), model.params.projector.device
    measured = []
    for batch in sorted({1, options.batch}):
        torch.compiler.reset()  # otherwise the second batch would be compiled for any size, and the first is not
        prompt = bench.random_prompt(model.cfg, batch, TEXT_TOKENS, device)
        competitors = writers(model, other, prompt, options.compile)
        measured += rows(
            contest(competitors, device, options.tokens, options.repeat), batch,
            partial(agreement, model=model, prompt=prompt),
        )  # fmt: skip
    return {
        "model": options.model or options.config, "layers": [model.cfg.vision.layers, model.cfg.text.layers],
        "dtype": pg.tree.dtype_name(model.params.projector), "hardware": bench.hardware(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
        "tokens": options.tokens, "repeat": options.repeat, "rows": measured,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    try:
        report = run(options)
    except (PgfuncError, torch.OutOfMemoryError) as error:
        print(f"vs_transformers.py: {first_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(report) if options.json else "\n".join([HEAD.format(**report), *map(line, report["rows"])]))
    # a larger difference than float32 rounding explains, after all layers
    wrong = [row for row in report["rows"] if (row.get("margin") or 0.0) > 1e-3]
    return int(report["dtype"] == "float32" and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
