"""The lab beside hooks on transformers: the same weights in memory once, the same prompt, one process, in turns.

    python examples/benchmarks/lab.py --config paligemma-3b-224          # random weights, on a GPU
    python examples/benchmarks/lab.py --model weights/tiny --dtype float32 --device cpu

Jobs: a forward pass; one activation; the residual stream of all layers; the patterns of all layers; a sweep that
patches 60 sites of the residual stream, one at a time; and a steered answer. transformers does each with forward hooks,
which is how it is done there (the patterns: `output_attentions`, with eager attention). If nnsight is installed, it
does them too, on the same transformers model. The last lines are the time of a token in a compiled loop: without a tap,
with one layer captured, and with one layer steered by an argument.

The script prints the median of each job in milliseconds, its ratio to that of pgfunc, and on a GPU the peak memory
above that of the weights. It first checks that all return the same activations.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
import vs_transformers
from torch import Tensor

import pgfunc as pg
from pgfunc import bench, lab
from pgfunc.errors import PgfuncError, first_line
from pgfunc.generate import complete

try:
    import nnsight  # pyright: ignore[reportMissingImports]  optional
except ModuleNotFoundError as error:
    if error.name != "nnsight":
        raise
    nnsight = None

SITES = 60


def patched_rows(prompt: pg.Prompt, count: int) -> pg.Prompt:
    """The prompt of one row, repeated."""
    return pg.tree.map(lambda x: x.expand(count, *x.shape[1:]), prompt)


def sites_of(layers: int, length: int) -> list[tuple[int, list[int]]]:
    """For each layer, the positions that are patched: `SITES` in all, spread evenly."""
    each = [SITES // layers + (i < SITES % layers) for i in range(layers)]
    return [(i, [(length - 1) * j // max(1, count - 1) for j in range(count)]) for i, count in enumerate(each) if count]


class Ours:
    """The jobs by pgfunc."""

    def __init__(self, model: pg.Model, prompt: pg.Prompt, other: pg.Prompt):
        self.params, self.cfg, self.prompt, self.other = model.params, model.cfg, prompt, other
        self.layer = model.cfg.text.layers // 2

    def forward(self) -> Tensor:
        return pg.forward(self.params, self.prompt, self.cfg)[:, -1]

    def capture(self, *names: str) -> dict[str, Tensor]:
        return lab.capture(pg.forward, *names)(self.params, self.prompt, self.cfg)[1]

    def one(self) -> list[Tensor]:
        return [*self.capture(f"language.{self.layer}.resid_post").values()]

    def residuals(self) -> list[Tensor]:
        return [*self.capture("language.*.resid_post").values()]

    def patterns(self) -> list[Tensor]:
        return [*self.capture("language.*.pattern").values()]

    def sweep(self) -> Tensor:
        """The last logits after each patch, layer by layer; the sites of a layer are rows of one batch."""
        run = lab.capture(pg.forward, "language.*.resid_pre")
        own, other = (run(self.params, each, self.cfg)[1] for each in (self.prompt, self.other))
        results = []
        for layer, positions in sites_of(self.cfg.text.layers, own["language.0.resid_pre"].shape[1]):
            name = f"language.{layer}.resid_pre"
            length = own[name].shape[1]
            masks = torch.stack([lab.tokens(position, n=length) for position in positions])
            patched = lab.put(other[name], masks)(own[name].expand(len(masks), -1, -1))
            rows = patched_rows(self.prompt, len(masks))
            last = torch.tensor([[length - 1]], device=patched.device).expand(len(masks), 1)
            results.append(lab.resume(self.params, rows, self.cfg, layer, patched, queries=last)[:, -1])
        return torch.cat(results)

    def steer(self, vector: Tensor, tokens: int) -> list[int]:
        model = pg.Model(self.cfg, self.params, None)
        tap = lab.edits({f"language.{self.layer}.resid_post": lab.add(vector)})
        u = torch.zeros(1, tokens, dtype=torch.float64)
        (done,) = complete(model, self.prompt, bench.GREEDY, u, True, tap)
        return done.tokens


class Theirs:
    """The jobs by transformers with forward hooks."""

    def __init__(self, model: pg.Model, other: Any, prompt: pg.Prompt, second: pg.Prompt):
        self.model, self.layers = other, other.model.language_model.layers
        self.inputs, self.second = (vs_transformers.inputs_of(model, each) for each in (prompt, second))
        self.layer, self.sdpa = model.cfg.text.layers // 2, other.config.text_config._attn_implementation

    def run(self, inputs: dict[str, Tensor] | None = None, **options: Any) -> Any:
        return self.model(**(inputs or self.inputs), use_cache=False, **options)

    def forward(self) -> Tensor:
        return self.run().logits[:, -1].float()

    def hooked(self, hooks: dict[int, Callable[..., Any]], run: Callable[[], Any]) -> Any:
        handles = [self.layers[i].register_forward_hook(hook) for i, hook in hooks.items()]
        try:
            return run()
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, layers: list[int], inputs: dict[str, Tensor] | None = None) -> list[Tensor]:
        seen: dict[int, Tensor] = {}

        def hook(i: int) -> Callable[..., None]:
            return lambda module, args, out: seen.update({i: out[0] if isinstance(out, tuple) else out})

        self.hooked({i: hook(i) for i in layers}, partial(self.run, inputs))
        return [seen[i] for i in layers]

    def one(self) -> list[Tensor]:
        return self.keep([self.layer])

    def residuals(self) -> list[Tensor]:
        return self.keep([*range(len(self.layers))])

    def patterns(self) -> list[Tensor]:
        self.model.set_attn_implementation({"text_config": "eager"})
        try:
            return [*self.run(output_attentions=True).attentions]
        finally:
            self.model.set_attn_implementation({"text_config": self.sdpa})

    def sweep(self) -> Tensor:
        """A whole run for each site: the patch of a layer's input is a patch of the output of the layer before it."""
        other, results = self.keep([*range(len(self.layers))], self.second), []
        embedded: dict[str, Tensor] = {}

        def keep_input(module: Any, args: Any, kwargs: Any) -> None:
            embedded.update(x=args[0] if args else kwargs["hidden_states"])

        first = self.layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
        self.run(self.second)
        first.remove()
        for layer, positions in sites_of(len(self.layers), other[0].shape[1]):
            source = embedded["x"] if layer == 0 else other[layer - 1]
            for position in positions:

                def patch(x: Tensor, source: Tensor = source, position: int = position) -> Tensor:
                    x = x.clone()
                    x[:, position] = source[:, position]
                    return x

                def before(module: Any, args: Any, kwargs: Any, patch: Any = patch) -> Any:
                    if args:
                        return (patch(args[0]), *args[1:]), kwargs
                    return args, kwargs | {"hidden_states": patch(kwargs["hidden_states"])}

                handle = self.layers[layer].register_forward_pre_hook(before, with_kwargs=True)
                results.append(self.run().logits[:, -1].float())
                handle.remove()
        return torch.cat(results)

    def steer(self, vector: Tensor, tokens: int) -> list[int]:
        def hook(module: Any, args: Any, out: Any) -> Any:
            return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

        def run() -> Tensor:
            return self.model.generate(**self.inputs, max_new_tokens=tokens, do_sample=False)

        return self.hooked({self.layer: hook}, run)[0, -tokens:].tolist()


class Traced(Theirs):
    """The jobs by nnsight, which rewrites the body of each `with` block to run inside of the model's modules."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.traced = nnsight.NNsight(self.model)  # pyright: ignore[reportOptionalMemberAccess]
        self.blocks = self.traced.model.language_model.layers

    def forward(self) -> Tensor:
        with self.traced.trace(**self.inputs, use_cache=False):
            logits = self.traced.output.logits[:, -1].save()
        return logits.float()

    def keep(self, layers: list[int], inputs: dict[str, Tensor] | None = None) -> list[Tensor]:
        with self.traced.trace(**(inputs or self.inputs), use_cache=False):
            seen = [self.blocks[i].output for i in layers].save()  # pyright: ignore  nnsight adds `save` to lists
        return seen

    def patterns(self) -> list[Tensor]:
        self.model.set_attn_implementation({"text_config": "eager"})
        try:
            with self.traced.trace(**self.inputs, use_cache=False, output_attentions=True):
                seen = self.traced.output.attentions.save()
        finally:
            self.model.set_attn_implementation({"text_config": self.sdpa})
        return [*seen]

    def sweep(self) -> Tensor:
        results = []
        with self.traced.trace(**self.second, use_cache=False):
            other = [block.input for block in self.blocks].save()  # pyright: ignore
        for layer, positions in sites_of(len(self.layers), other[0].shape[1]):
            for position in positions:
                with self.traced.trace(**self.inputs, use_cache=False):
                    self.blocks[layer].input[:, position] = other[layer][:, position]
                    logits = self.traced.output.logits[:, -1].save()
                results.append(logits.float())
        return torch.cat(results)

    def steer(self, vector: Tensor, tokens: int) -> list[int]:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        with self.traced.trace(**self.inputs, **options, fn=self.model.generate) as tracer:
            for _ in tracer.iter[0:tokens]:
                self.blocks[self.layer].output = self.blocks[self.layer].output + vector
            ids = tracer.result.save()
        return ids[0, -tokens:].tolist()


def measured(fn: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Milliseconds, and on a GPU the peak MiB above what was allocated before."""
    if device.type != "cuda":
        return 1e3 * bench.timed(fn, device), float("nan")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    milliseconds = 1e3 * bench.timed(fn, device)
    return milliseconds, (torch.cuda.max_memory_allocated() - before) / 2**20


def token_times(model: pg.Model, prompt: pg.Prompt, tokens: int, repeat: int) -> dict[str, float]:
    """The milliseconds of a token in a compiled loop, untapped and tapped, in turns."""
    layer, device = model.cfg.text.layers // 2, model.params.projector.device
    name = f"language.{layer}.resid_post"

    def captured(params: Any, token: Tensor, cache: pg.Cache, cfg: pg.Config) -> Any:
        (logits, cache), seen = lab.capture(pg.decode, name)(params, token, cache, cfg)
        return pg.sample.greedy(logits), cache, seen[name]

    def steered(params: Any, token: Tensor, cache: pg.Cache, cfg: pg.Config, vector: Tensor) -> Any:
        logits, cache = lab.edit(pg.decode, {name: lab.add(vector)})(params, token, cache, cfg)
        return pg.sample.greedy(logits), cache

    def plain(params: Any, token: Tensor, cache: pg.Cache, cfg: pg.Config) -> Any:
        logits, cache = pg.decode(params, token, cache, cfg)
        return pg.sample.greedy(logits), cache

    logits, cache = pg.prefill(model.params, prompt, model.cfg, tokens)
    vector = torch.zeros(model.cfg.text.width, dtype=model.params.projector.dtype, device=device)
    steps = {"no tap": (plain, ()), "one layer captured": (captured, ()), "one layer steered": (steered, (vector,))}
    compiled = {kind: (pg.jit(step, donate="cache"), more) for kind, (step, more) in steps.items()}

    def loop(kind: str, count: int) -> None:
        step, more = compiled[kind]
        token, last = pg.sample.greedy(logits), cache
        for _ in range(count):
            token, last, *_ = step(model.params, token, last, model.cfg, *more)

    times: dict[str, list[float]] = {kind: [] for kind in compiled}
    for kind in compiled:
        for _ in range(2):
            loop(kind, 3)
    for _ in range(repeat):
        for kind in compiled:
            times[kind].append(1e3 * bench.timed(partial(loop, kind, tokens), device) / tokens)
    return {kind: median(each) for kind, each in times.items()}


def check(ours: Ours, other: Theirs) -> None:
    """Both return the same activations, patches and logits, up to rounding."""
    limit = 0.1 if other.model.dtype != torch.float32 else 1e-3
    for job in ("one", "residuals", "patterns"):
        pairs = list(zip(getattr(ours, job)(), getattr(other, job)(), strict=True))
        worst = max(((a.float() - b.float()).std() / b.float().std()).item() for a, b in pairs)
        assert worst < limit, (type(other), job, worst)
    for job in ("forward", "sweep"):
        a, b = getattr(ours, job)(), getattr(other, job)()
        width = min(a.shape[-1], b.shape[-1])
        a, b = a[:, :width], b[:, :width]
        finite = a.isfinite()
        worst = ((a - b)[finite].std() / b[finite].std()).item()
        assert worst < limit, (type(other), job, worst)


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    model = vs_transformers.bare(vs_transformers.chosen(options))
    other, device = vs_transformers.peer(model), model.params.projector.device
    prompts = [bench.random_prompt(model.cfg, 1, vs_transformers.TEXT_TOKENS, device, seed) for seed in (0, 1)]
    ways = {"pgfunc": Ours(model, *prompts), "hooks": Theirs(model, other, *prompts)}
    if nnsight:
        ways["nnsight"] = Traced(model, other, *prompts)
    for way in [*ways.values()][1:]:
        check(ways["pgfunc"], way)
    vector = torch.zeros(model.cfg.text.width, dtype=model.params.projector.dtype, device=device)
    jobs = {
        "forward": "forward", "one activation": "one", "all residuals": "residuals", "all patterns": "patterns",
        f"sweep of {SITES} sites": "sweep", f"{options.tokens} steered tokens": "steer",
    }  # fmt: skip
    rows = []
    for title, job in jobs.items():
        arguments = (vector, options.tokens) if job == "steer" else ()
        calls = {name: partial(getattr(way, job), *arguments) for name, way in ways.items()}
        for call in [*calls.values()] * 2:
            call()
        turns = [{name: measured(call, device) for name, call in calls.items()} for _ in range(options.repeat)]
        medians = {name: [median(turn[name][j] for turn in turns) for j in (0, 1)] for name in calls}
        rows.append({"job": title, "ms": {name: each[0] for name, each in medians.items()},
                     "mib": {name: each[1] for name, each in medians.items()}})  # fmt: skip
    return {"model": options.model or options.config, "dtype": pg.tree.dtype_name(model.params.projector),
            "hardware": bench.hardware(device), "torch": torch.__version__, "transformers": transformers.__version__,
            "nnsight": nnsight.__version__ if nnsight else "not installed", "rows": rows,
            "token_ms": token_times(model, prompts[0], 128, options.repeat)}  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    vs_transformers.add_common_options(parser)
    parser.add_argument("--tokens", type=int, default=1000, help="steered tokens")
    options = parser.parse_args(arguments)
    options.batch = 1
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    try:
        report = run(options)
    except (PgfuncError, torch.OutOfMemoryError) as error:
        print(f"lab.py: {first_line(error)}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report))
        return 0
    print(
        "{model}, {dtype}\n{hardware}, torch {torch}, transformers {transformers}, nnsight {nnsight}".format(**report)
    )
    ways = [*report["rows"][0]["ms"]]
    print(f"\n{'ms (ratio to pgfunc), MiB':<28}" + "".join(f"{way:>30}" for way in ways))
    for row in report["rows"]:
        ms, mib = row["ms"], row["mib"]
        cells = (f"{ms[way]:>12.2f} ({ms[way] / ms['pgfunc']:>5.2f}){mib[way]:>10.0f}" for way in ways)
        print(f"{row['job']:<28}" + "".join(cells))
    times = report["token_ms"]
    for kind, time in times.items():
        print(f"a compiled token, {kind}: {time:.3f} ms ({time / times['no tap']:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
