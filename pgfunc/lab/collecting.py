"""Activations of a data set on disk: `collect` writes them to safetensors, `Collection` reads them back.

    stored = collect(model, rows, ["language.3.resid_post"], "runs/activations", tokens="last")
    x, origins = stored.load("language.3.resid_post"), stored.origins("language.3.resid_post")

The folder has shards, each with a tensor `n ...` for each name, and for each of the three kinds of token (`vision`,
`language`, `text`) the row and the position that its n entries come from. `index.json` is written last, so a folder
without it was not finished. Memory holds at most about two shards, whatever the number of rows. Axes: n stored
tokens of all rows.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from torch import Tensor

from pgfunc import paligemma
from pgfunc.checkpoint.writing import write_safetensors
from pgfunc.errors import SettingError
from pgfunc.files.atomic import replacing, write_text
from pgfunc.files.outputs import check_folder, write_errors
from pgfunc.lab.naming import check_known, matches_any
from pgfunc.prompt import Model, Prompt, prepare

INDEX = "index.json"
SHARD_BYTES = 2**28
Tokens = Literal["all", "image", "text", "last"]


class Origins(NamedTuple):
    """Where each stored token comes from. The position counts the image tokens of a row, then its text."""

    row: Int[Tensor, "n"]
    position: Int[Tensor, "n"]


class Collection(NamedTuple):
    """Collected activations in a folder."""

    folder: Path
    kinds: dict[str, str]  # the kind of token that each name belongs to
    shards: list[str]  # the names of the files
    rows: int

    def load(self, name: str) -> Float[Tensor, "n *d"]:
        """All stored activations of a name. Raises SettingError for another name."""
        self.check(name)
        return torch.cat([self.read(shard, name) for shard in self.shards])

    def origins(self, name: str) -> Origins:
        """The rows and positions of the stored activations of a name. Raises SettingError for another name."""
        kind = self.check(name)
        return Origins(*(torch.cat([self.read(s, f"{kind}.{part}") for s in self.shards]) for part in Origins._fields))

    def batches(self, name: str, size: int, seed: int) -> Iterator[Float[Tensor, "b *d"]]:
        """Batches of so many stored activations, each once, in random order: the shards, and the tokens in each.

        They are on the CPU. The last tokens are left out if they do not fill a batch. At most about two shards are in
        memory. Raises SettingError for another name, and for a size below 1.
        """
        self.check(name)
        if size < 1:
            raise SettingError(f"size is {size}, expected 1 or more")
        generator, rest = torch.Generator().manual_seed(seed), None
        for i in torch.randperm(len(self.shards), generator=generator, device="cpu").tolist():
            x = self.read(self.shards[i], name)
            x = x[torch.randperm(len(x), generator=generator, device="cpu")]
            x = x if rest is None else torch.cat([rest, x])
            whole = len(x) // size * size
            yield from x[:whole].split(size)
            rest = x[whole:].clone()  # not a view, which would keep the shard

    def check(self, name: str) -> str:
        """The kind of token of a name. Raises SettingError if the name was not collected."""
        if name not in self.kinds:
            raise SettingError(f"{self.folder}: has no {name!r}, only {', '.join(self.kinds)}")
        return self.kinds[name]

    def read(self, shard: str, key: str) -> Tensor:
        with safe_open(self.folder / shard, framework="pt") as file:
            return file.get_tensor(key)


def collection(folder: str | Path) -> Collection:
    """The activations that `collect` wrote into a folder. Raises SettingError if it has none, or was not finished."""
    path = Path(folder) / INDEX
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        raise SettingError(f"{path}: cannot be read, lab.collect did not finish; collect into a new folder") from None
    return Collection(Path(folder), content["kinds"], content["shards"], content["rows"])


@torch.no_grad()
def collect(
    model: Model,
    rows: Iterable[tuple[Any, ...]],
    patterns: Sequence[str],
    folder: str | Path,
    tokens: Tokens = "all",
    batch: int = 8,
    shard_bytes: int = SHARD_BYTES,
) -> Collection:
    """Write activations of many rows into a new folder, reading the rows one batch at a time.

    A row is (pictures, prefix) or (pictures, prefix, suffix), as for `pg.prepare`; all rows of a batch have the same
    number of pictures. `patterns` are names or patterns of `fnmatch`, see `lab.table`; nothing after the last of these
    names is computed. `tokens` chooses which tokens of a row are stored: its image tokens, its text tokens, its last
    token, or all; never padding. The dtype is the model's, and float32 for logits. Raises SettingError for a name that
    does not exist, that has no axis of tokens (`pattern`) or none of the chosen tokens, for a folder that is not empty,
    and if there are no rows.
    """
    folder, kinds = Path(folder), kinds_of(model, patterns, tokens)
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise SettingError(f"{folder}: is not empty; give another folder")
    if batch < 1:
        raise SettingError(f"batch is {batch}, expected 1 or more rows")
    stream, writer, count = iter(rows), Writer(folder, shard_bytes), 0
    while part := list(islice(stream, batch)):
        if len({len(row) for row in part}) > 1:
            raise SettingError(f"rows {count} to {count + len(part) - 1}: some have a suffix, others have none")
        writer.add(batch_arrays(model, part, kinds, tokens, count))
        count += len(part)
    if not count:
        raise SettingError("there are no rows")
    return writer.finish(kinds, count)


def batch_arrays(
    model: Model, rows: list[tuple[Any, ...]], kinds: dict[str, str], tokens: Tokens, first: int
) -> dict[str, Tensor]:
    """The arrays that are stored of some rows, the first of which has this number."""
    pictures, prefixes, *suffixes = zip(*rows, strict=True)
    prompt = prepare(model, list(pictures), list(prefixes), *map(list, suffixes))
    values = activations(model, prompt, tuple(kinds))
    if missing := kinds.keys() - values.keys():
        raise SettingError(f"row {first} has no picture, so it has no {sorted(missing)[0]}")
    chosen = {kind: selected(prompt, model, kind, tokens) for kind in {*kinds.values()}}
    arrays = {name: by_row(x, len(rows))[chosen[kinds[name]].to(x.device)] for name, x in values.items()}
    for kind, mask in chosen.items():
        row, position = mask.nonzero().unbind(1)
        before = image_tokens(prompt, model) if kind == "text" else 0
        arrays |= {f"{kind}.row": row + first, f"{kind}.position": position + before}
    return arrays


class Reached(Exception):
    """The last activation that was asked for."""


def activations(model: Model, prompt: Prompt, names: Sequence[str]) -> dict[str, Tensor]:
    """The activations with these names, which are in the order of the computation; the rest is not computed."""

    seen: dict[str, Tensor] = {}

    class Until:
        def asks(self, name: str) -> bool:
            return name in names

        def __call__(self, name: str, x: Tensor) -> Tensor:
            if name in names:
                seen[name] = x
            if name == names[-1]:
                raise Reached
            return x

    with suppress(Reached):
        paligemma.forward(model.params, prompt, model.cfg, Until())
    return seen


def kinds_of(model: Model, patterns: Sequence[str], tokens: Tokens) -> dict[str, str]:
    """The kind of token of each activation that is asked for, in the order of the computation."""
    known = paligemma.names(model.cfg)
    check_known(patterns, known, known)
    if not patterns or tokens not in get_args(Tokens):
        raise SettingError(f"patterns {patterns!r}, tokens {tokens!r}: expected names, and all, image, text or last")
    kinds = {name: kind_of(name) for name in known if matches_any(name, patterns)}
    for name, kind in kinds.items():
        if not kind:
            raise SettingError(f"{name} has no axis of tokens to store it by; use lab.capture")
        if (kind, tokens) in {("vision", "text"), ("vision", "last"), ("text", "image")}:
            raise SettingError(f"{name} has {'image' if kind == 'vision' else 'text'} tokens only, not {tokens!r}")
    return kinds


def kind_of(name: str) -> str:
    """`vision`: image tokens; `language`: image tokens, then text; `text`; or nothing."""
    if name.rpartition(".")[2] in ("mask", "attn_scores", "pattern"):
        return ""
    if name in ("language.out", "logits"):
        return "text"
    return "language" if name.startswith("language.") else "vision"


def selected(prompt: Prompt, model: Model, kind: str, tokens: Tokens) -> Bool[Tensor, "b s"]:
    """Which tokens are stored, on the CPU."""
    text = prompt.valid.cpu()
    if kind == "vision":
        return text.new_ones(len(text), image_tokens(prompt, model))
    image = text.new_zeros(len(text), 0 if kind == "text" else image_tokens(prompt, model))
    if tokens in ("all", "image"):
        image = ~image
    if tokens == "image":
        text = torch.zeros_like(text)
    if tokens == "last":
        text = torch.arange(text.shape[1], device="cpu") == text.sum(1, keepdim=True) - 1
    return torch.cat([image, text], 1)


def image_tokens(prompt: Prompt, model: Model) -> int:
    return prompt.pixels.shape[1] * model.cfg.vision.tokens


def by_row(x: Tensor, rows: int) -> Tensor:
    """Activations of pictures as those of rows: `(b i) p ...` becomes `b (i p) ...`."""
    return x.reshape(rows, -1, *x.shape[2:])


class Writer:
    """Writes arrays into shards; each but the last has at least `limit` bytes."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.shards: list[str] = []
        self.parts: list[dict[str, Tensor]] = []

    def add(self, arrays: dict[str, Tensor]) -> None:
        self.parts.append({key: x.cpu() for key, x in arrays.items()})
        if sum(x.nbytes for part in self.parts for x in part.values()) >= self.limit:
            self.flush()

    def flush(self) -> None:
        if not self.parts:
            return
        arrays = {key: torch.cat([part[key] for part in self.parts]) for key in self.parts[0]}
        self.parts = []
        self.shards.append(f"{len(self.shards):05d}.safetensors")
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / self.shards[-1]) as file:
                write_safetensors(file, arrays, {"format": "pt"})

    def finish(self, kinds: dict[str, str], rows: int) -> Collection:
        """Write what is left, and the index."""
        self.flush()
        content = {"kinds": kinds, "shards": self.shards, "rows": rows}
        with write_errors(self.folder):
            write_text(self.folder / INDEX, json.dumps(content, indent=1) + "\n")
        return collection(self.folder)
