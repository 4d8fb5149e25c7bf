"""pgfunc beside transformers: the same weights in memory once, the same prompt, one process, taking turns.

    python examples/benchmarks/vs_transformers.py --config paligemma-3b-224 --batch 64
    python examples/benchmarks/vs_transformers.py --config paligemma-3b-224 --dtype float32 --layers 2 --tokens 16

Everyone writes the same number of greedy tokens after a random prompt of one picture and 16 tokens a row: transformers
with its dynamic cache, and with its static one, whose step it compiles; pgfunc as it is, and compiled. Printed are
medians of the time to the first token, of one token more (the whole less the first, over the tokens after it) and of
the whole; each over those of compiled pgfunc; and how many tokens are those of pgfunc as it is. In float32 all must be,
or the exit status is 1; in bfloat16 rounding decides between near ties, and a row goes its own way from the first one.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CompileConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

import pgfunc as pg
from pgfunc import bench
from pgfunc.checkpoint import as_device, as_dtype, hf
from pgfunc.checkpoint.files import arrange
from pgfunc.checkpoint.hf_config import render
from pgfunc.errors import PgfuncError, SettingError, first_line
from pgfunc.generate import complete

TEXT_TOKENS = 16
HEAD = """{model}, {layers[0]} + {layers[1]} layers, {dtype}, {tokens} tokens, {repeat} turns
{hardware}, {threads} threads, torch {torch}, transformers {transformers}

batch  who                                   first, ms (x)  a token, ms (x)  whole, ms (x)  equal tokens"""
Writer = Callable[[int], Tensor]  # how many tokens -> those of each row


def chosen(options: argparse.Namespace) -> pg.Model:
    """A checkpoint, or random weights of a published configuration, of fewer layers if so asked."""
    device, dtype = as_device(options.device), as_dtype(options.dtype)
    case = bench.Case(options.batch, TEXT_TOKENS, options.tokens, repeat=options.repeat)
    if options.model and options.layers:
        raise SettingError("--layers is for random weights; a checkpoint has all of its own")
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
    """The model without rows that are no tokens, which transformers might say, and never at an end."""
    cfg, params = model.cfg, model.params
    embed = params.language.embed[: cfg.text.vocab]
    cfg = replace(cfg, eos=-1, text=replace(cfg.text, padding=0))
    return pg.Model(cfg, params._replace(language=params.language._replace(embed=embed)), None)


def peer(model: pg.Model) -> PaliGemmaForConditionalGeneration:
    """The model in transformers, on the very tensors."""
    cfg, params = replace(model.cfg, eos=1), model.params
    dtype = str(params.projector.dtype).removeprefix("torch.")
    with torch.device("meta"):
        other = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(render(cfg, dtype)))
    prefixes = {part: key.removesuffix(anchor) for part, anchor in hf.ANCHORS.items()
                for key in other.state_dict() if key.endswith(anchor)}  # fmt: skip
    arrays = arrange(hf.table(cfg, prefixes), params) | {"lm_head.weight": params.language.embed}
    other.load_state_dict(arrays, assign=True)
    # what it computes when it is made, such as frequencies: a small one has the same, and not on the meta device
    small = replace(cfg, text=replace(cfg.text, vocab=8, layers=1, hidden=8), vision=replace(cfg.vision, layers=1))
    twin = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(render(small, dtype)))
    for name, buffer in twin.named_buffers():
        place, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(place), leaf, buffer.to(params.projector.device))
    if cfg.text.attention_softcap:  # which its other attention does not know, and some versions leave out unsaid
        other.set_attn_implementation({"text_config": "eager"})
    assert other.generation_config is not None
    other.generation_config.eos_token_id = None
    return other.eval()


def writers(model: pg.Model, other: Any, prompt: pg.Prompt, compile: bool) -> dict[str, Writer]:
    """Everyone who takes part, by name."""
    batch, device = len(prompt.tokens), prompt.tokens.device
    marks = torch.full((batch, model.cfg.vision.tokens), model.cfg.image, device=device)
    ids = torch.cat([marks, prompt.tokens], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids),
             "pixel_values": prompt.pixels.flatten(0, 1).to(model.params.projector.dtype)}  # fmt: skip
    everywhere = CompileConfig()
    setattr(everywhere, "_compile_all_devices", True)  # noqa: B010  else it compiles on accelerators alone
    compiling = {"compile_config": everywhere} if device.type == "cpu" and compile else {"disable_compile": not compile}

    def ours(compile: bool) -> Writer:
        def write(tokens: int) -> Tensor:
            u = torch.zeros(batch, tokens, dtype=torch.float64)
            return torch.tensor([done.tokens for done in complete(model, prompt, bench.GREEDY, u, compile)])

        return write

    def theirs(**settings: Any) -> Writer:
        def write(tokens: int) -> Tensor:
            out = other.generate(**given, max_new_tokens=tokens, do_sample=False, **settings)
            return out[:, ids.shape[1] :].cpu()

        return write

    found = {"transformers, dynamic cache": theirs(), "pgfunc": ours(False)}
    kind = "compiled" if compile else "eager"
    found[f"transformers, static cache, {kind}"] = theirs(cache_implementation="static", **compiling)
    return found | ({"pgfunc, compiled": ours(True)} if compile else {})


def contest(everyone: dict[str, Writer], device: torch.device, tokens: int, repeat: int) -> dict[str, dict[str, Any]]:
    """What each one's tokens and times are: milliseconds, a list of all turns. Who raises is out, and it is said."""
    found: dict[str, dict[str, Any]] = {}
    for name, write in everyone.items():
        try:
            said = write(tokens)  # warms up, and compiles
            write(1)
            found[name] = {"said": said, "first": [], "token": [], "whole": []}
        except Exception as error:
            found[name] = {"raises": f"{type(error).__name__}: {first_line(error)}"}
    for _ in range(repeat):
        for name in [name for name, one in found.items() if "raises" not in one]:
            first, whole = (1e3 * bench.timed(lambda n=n, name=name: everyone[name](n), device) for n in (1, tokens))
            for key, value in {"first": first, "token": (whole - first) / (tokens - 1), "whole": whole}.items():
                found[name][key].append(value)
    return found


def agreement(said: Tensor, expected: Tensor) -> dict[str, Any]:
    """The share of tokens that are equal, and the first place where a row differs; none: null."""
    if said.shape != expected.shape:
        return {"agree": 0.0, "differs_at": 0}
    equal = said == expected
    columns = (~equal.all(0)).nonzero().flatten().tolist()
    return {"agree": equal.float().mean().item(), "differs_at": columns[0] if columns else None}


def rows(found: dict[str, dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """The result of each one as JSON: medians and ranges in milliseconds, ratios to the last pgfunc."""
    ours = [one for name, one in found.items() if name.startswith("pgfunc")]
    rendered = []
    for name, one in found.items():
        row: dict[str, Any] = {"batch": batch, "who": name}
        if "raises" in one:
            rendered.append(row | {"raises": one["raises"]})
            continue
        for key in ("first", "token", "whole"):
            row[f"{key}_ms"] = {"median": median(one[key]), "least": min(one[key]), "most": max(one[key])}
            if "raises" not in ours[-1]:
                row[f"{key}_ratio"] = median(one[key]) / median(ours[-1][key])
        rendered.append(row | (agreement(one["said"], ours[0]["said"]) if "raises" not in ours[0] else {}))
    return rendered


def line(row: dict[str, Any]) -> str:
    """A result as a line of text."""
    start = f"{row['batch']:>5}  {row['who']:<37}"
    if "raises" in row:
        return f"{start}raises {row['raises']}"
    for key in ("first", "token", "whole"):
        ratio = row.get(f"{key}_ratio")
        start += f"{row[f'{key}_ms']['median']:>11,.2f}" + ("" if ratio is None else f" ({ratio:.2f})")
    if "agree" not in row:
        return start
    return f"{start}   {row['agree']:.3f}" + ("" if row["differs_at"] is None else f", not token {row['differs_at']}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", choices=pg.PUBLISHED, default="paligemma-3b-224", help="random weights of this")
    source.add_argument("--model", help="a checkpoint, in their place")
    parser.add_argument("--layers", type=int, help="so many of each tower: for a small machine")
    parser.add_argument("--batch", type=int, default=1, help="rows, after a turn with one")
    parser.add_argument("--tokens", type=int, default=128, help="to write")
    parser.add_argument("--repeat", type=int, default=5, help="turns")
    parser.add_argument("--dtype", help="of the weights; else the checkpoint's, bfloat16 if random")
    parser.add_argument("--device", help="cpu, cuda; else CUDA where there is one")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="everyone as it is")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everyone's times and tokens, for one row and for the batch."""
    model = bare(chosen(options))
    other, device = peer(model), model.params.projector.device
    found = []
    for batch in sorted({1, options.batch}):
        torch.compiler.reset()  # or the second batch would be compiled for any, and the first is not
        prompt = bench.random_prompt(model.cfg, batch, TEXT_TOKENS, device)
        everyone = writers(model, other, prompt, options.compile)
        found += rows(contest(everyone, device, options.tokens, options.repeat), batch)
    return {
        "model": options.model or options.config, "layers": [model.cfg.vision.layers, model.cfg.text.layers],
        "dtype": str(model.params.projector.dtype).removeprefix("torch."), "hardware": bench.hardware(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
        "tokens": options.tokens, "repeat": options.repeat, "rows": found,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    try:
        found = run(options)
    except (PgfuncError, torch.OutOfMemoryError) as error:
        print(f"vs_transformers.py: {first_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(found) if options.json else "\n".join([HEAD.format(**found), *map(line, found["rows"])]))
    differ = [row for row in found["rows"] if row.get("agree", 1.0) < 1.0]
    return int(found["dtype"] == "float32" and bool(differ))


if __name__ == "__main__":
    sys.exit(main())
