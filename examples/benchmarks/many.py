"""Captions of many picture files: `pgfunc.generate_many`, its own bound, and a loop over transformers' `generate`.

    python examples/benchmarks/many.py --config paligemma-3b-224 --pictures 4096 --compile
    python examples/benchmarks/many.py --model weights/tiny --dtype float32 --pictures 128

Makes JPEG files of 640 x 480, and captions them all. Everything from the file to the tokens is timed. A warm-up with
fewer pictures, which compiles, comes before. The bound is the time of the prefill of full groups, from pixels on the
device, and of decode steps of full batches for the same number of tokens; it leaves out reading, waiting, and places
without a row. The last column is the share of captions that are equal to those of pgfunc.

Random weights never end a caption, and with --endless a checkpoint does not either: each row then stops at a length
between 20 and 40 tokens, and transformers writes 40 for each batch, as its longest row would.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from operator import eq
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

import pgfunc as pg
from examples.benchmarks import vs_transformers
from pgfunc import bench, paligemma
from pgfunc.errors import PgfuncError, first_line
from pgfunc.generate import compiled_decode_step, decode_step, encoded_prefill_step
from pgfunc.many import decoding, prefilling, scheduling
from pgfunc.many.reading import Picture, Request
from pgfunc.prompt import prefix_ids

SHORTEST, LONGEST = 20, 40  # tokens of a caption of random weights
PREFIX = "caption en"
SCENES = sorted((Path(__file__).parents[1] / "tiny" / "heldout").glob("*.webp"))
HEAD = """{model}, {dtype}, {pictures} pictures, {tokens:.1f} tokens each, batch {batch}, {repeat} turns
{hardware}, {threads} threads, torch {torch}, transformers {transformers}
bound: {bound_pictures_per_s:.1f} pictures/s; {bound_s[prefill]:.2f} s of prefill, {bound_s[decode]:.2f} s of decode

who                                     pictures/s                      of the bound   equal"""
Captions = list[list[int]]


def make_picture(path: Path) -> None:
    """A JPEG file of 640 x 480: a scene that the shipped checkpoint can describe, with noise, as photos have it."""
    number = int(path.stem)
    with Image.open(SCENES[number % len(SCENES)]) as scene:
        levels = np.asarray(scene.convert("RGB").resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = np.random.default_rng(number).integers(-12, 13, levels.shape, np.int16)
    Image.fromarray((levels + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def make_pictures(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{i:06}.jpg" for i in range(count)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(make_picture, paths))
    return paths


@contextmanager
def lengths(most: Sequence[int]) -> Iterator[None]:
    """In this context each row of a stream has its own largest number of tokens."""
    job = scheduling.Job
    scheduling.Job = lambda request, _: job(request, most[request.number])  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        scheduling.Job = job


def ours(model: pg.Model, ids: list[int], most: Sequence[int], options: argparse.Namespace) -> Callable[..., Captions]:
    """Captions of some files by `generate_many`."""

    def caption(paths: Sequence[Path]) -> Captions:
        captions: dict[int, list[int]] = {}
        rows = ((path, ids) for path in paths)
        with lengths(most):
            for done in pg.generate_many(model, rows, max(most), compile=options.compile, batch=options.batch,
                                         workers=options.workers):  # fmt: skip
                assert done.completion, done.error
                captions[done.number] = done.completion.tokens
        return [captions[i] for i in range(len(paths))]

    return caption


def theirs(
    model: pg.Model, other: Any, ids: list[int], most: Sequence[int], batch: int, **settings: Any
) -> Callable[..., Captions]:
    """Captions of some files by a loop over transformers' `generate`, with transformers' own reader of pictures."""
    processor, side = transformers.SiglipImageProcessor(), model.cfg.vision.image_size
    device, dtype = model.params.projector.device, model.params.projector.dtype
    row = torch.tensor([model.cfg.image] * model.cfg.vision.tokens + ids, device=device)

    def caption(paths: Sequence[Path]) -> Captions:
        captions: Captions = []
        for i in range(0, len(paths), batch):
            part: list[Any] = [Image.open(path) for path in paths[i : i + batch]]
            pixels = processor(images=part, size={"height": side, "width": side}, return_tensors="pt")["pixel_values"]
            tokens = row.expand(len(part), -1)
            out = other.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                                 token_type_ids=torch.zeros_like(tokens), max_new_tokens=LONGEST,
                                 pixel_values=pixels.to(device, dtype), **settings)  # fmt: skip
            captions += [until_end(written, model.cfg.eos) for written in out[:, tokens.shape[1] :].tolist()]
        return [tokens[:limit] for tokens, limit in zip(captions, most, strict=False)]

    return caption


def until_end(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


@torch.no_grad()
def bound(model: pg.Model, ids: list[int], captions: Captions, most: int, options: argparse.Namespace) -> dict:
    """The seconds of the prefill of full groups, and of the decode steps of full batches, for these captions."""
    device, cfg, side = model.params.projector.device, model.cfg, model.cfg.vision.image_size
    group = prefilling.group_for(options.batch, options.compile)
    shape = prefilling.shape_of(prefilling.Ready(Request(0, None, None, (Picture(),)), ids), most, group, cfg)
    encode = prefilling.compiled_encode if options.compile else paligemma.encode_images
    prefill = prefilling.compiled_prefill if options.compile else encoded_prefill_step
    step = compiled_decode_step if options.compile else decode_step
    pixels = torch.rand(group.size, 1, 3, side, side, device=device) * 2 - 1
    tokens = torch.tensor([ids + [cfg.pad] * (shape.tokens - len(ids))] * group.size, device=device)
    valid = torch.arange(shape.tokens, device=device).expand_as(tokens) < len(ids)
    text = pg.Prompt((), tokens, valid, torch.zeros_like(valid))  # pyright: ignore[reportArgumentType]
    u = torch.zeros(options.batch, dtype=torch.float64, device=device)

    def prefilled() -> Any:
        image = encode(model.params, pixels, cfg)
        return prefill(model.params, image, text, cfg, 0, bench.GREEDY, u[: group.size])

    token, _, cache = prefilled()
    rows = torch.arange(options.batch, device=device) % group.size
    first = decoding.Rows(token, cache, u[: group.size, None], torch.ones_like(token))
    full = decoding.empty(first, options.batch, shape.slots).cache
    state = [token[rows], pg.insert(full, pg.reorder(cache, rows), torch.arange(options.batch, device=device))]
    del full, cache, first

    def steps() -> None:
        for _ in range(SHORTEST):
            token, _, state[1] = step(model.params, state[0], state[1], cfg, bench.GREEDY, u)
            state[0] = token
        state[1] = pg.rewind(state[1], state[1].length - SHORTEST)

    prefills, decodes = len(captions) / group.size, sum(len(one) - 1 for one in captions) / options.batch
    a_prefill, a_step = median(bench.times(prefilled, device, 5, 4)), median(bench.times(steps, device, 5)) / SHORTEST
    return {"prefill": prefills * a_prefill, "decode": decodes * a_step}


def competitors(model: pg.Model, ids: list[int], most: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """The captioners by name."""
    other = vs_transformers.peer(model)
    other.generation_config.eos_token_id = None if model.cfg.eos < 0 else model.cfg.eos
    other.generation_config.pad_token_id = model.cfg.pad
    result = {"pgfunc": ours(model, ids, most, options)}
    for batch in options.peer_batches:
        result[f"transformers, batch {batch}"] = theirs(model, other, ids, most, batch)
        static = theirs(model, other, ids, most, batch, cache_implementation="static")  # compiles its step on a GPU
        result[f"transformers, batch {batch}, static cache"] = static
    return result


def contest(captioners: dict[str, Any], paths: list[Path], options: argparse.Namespace) -> tuple[dict, dict]:
    """The captions of each captioner, and its pictures/s in each turn. transformers reads fewer files, if asked."""
    captions, rates = {}, {name: [] for name in captioners}
    for name, caption in captioners.items():
        caption(paths[: 4 * options.batch] if name == "pgfunc" else paths[: 2 * max(options.peer_batches)])
    for _ in range(options.repeat):
        for name, caption in captioners.items():
            chosen = paths if name == "pgfunc" else paths[: options.peer_pictures]
            start = perf_counter()
            captions[name] = caption(chosen)
            rates[name].append(len(chosen) / (perf_counter() - start))
    return captions, rates


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    vs_transformers.add_common_options(parser)
    parser.add_argument("--pictures", type=int, default=256, help="number of files")
    parser.add_argument("--batch", type=int, default=64, help="rows that generate_many decodes together")
    parser.add_argument("--workers", type=int, help="processes that read pictures for generate_many")
    parser.add_argument("--compile", action="store_true", help="compile generate_many's steps")
    parser.add_argument("--endless", action="store_true", help="write 20 to 40 tokens, also after the end of a caption")
    parser.add_argument("--peer-batches", type=int, nargs="*", default=[16, 64], help="of transformers' generate")
    parser.add_argument("--peer-pictures", type=int, help="number of files for transformers, default: all")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Pictures per second of all captioners, and the share of the bound that pgfunc reaches."""
    options.tokens = LONGEST
    model = vs_transformers.chosen(options)
    endless, ids = (
        options.endless or not model.tokenizer,
        prefix_ids(model, PREFIX if model.tokenizer else [*range(8)], 1),
    )
    model = vs_transformers.bare(model) if endless else model
    shortest, device = SHORTEST if endless else LONGEST, model.params.projector.device
    most = [random.Random(i).randint(shortest, LONGEST) for i in range(options.pictures)]
    with TemporaryDirectory() as folder:
        paths = make_pictures(Path(folder), options.pictures)
        captions, rates = contest(competitors(model, ids, most, options), paths, options)
    expected = captions["pgfunc"]
    parts = bound(model, ids, expected, max(most), options)
    rows = [{"who": name, "pictures_per_s": {"median": median(rate), "least": min(rate), "most": max(rate)},
             "of_bound": median(rate) * sum(parts.values()) / options.pictures,
             "equal": sum(map(eq, captions[name], expected)) / len(captions[name])}
            for name, rate in rates.items()]  # fmt: skip
    return {
        "model": options.model or options.config, "dtype": pg.tree.dtype_name(model.params.projector),
        "pictures": options.pictures, "repeat": options.repeat, "batch": options.batch, "compile": options.compile,
        "tokens": sum(map(len, expected)) / len(expected), "bound_s": parts,
        "bound_pictures_per_s": options.pictures / sum(parts.values()),
        "hardware": bench.hardware(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": transformers.__version__, "rows": rows,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One result as a line of text."""
    rate = row["pictures_per_s"]
    spread = f"{rate['median']:9.1f} ({rate['least']:.1f} to {rate['most']:.1f})"
    return f"{row['who']:<40}{spread:<32}{row['of_bound']:6.2f}{row['equal']:8.2f}"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    try:
        report = run(options)
    except (PgfuncError, torch.OutOfMemoryError) as error:
        print(f"many.py: {first_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(report) if options.json else "\n".join([HEAD.format(**report), *map(line, report["rows"])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
