"""How the kernels divide their work: which tile, chunk or share for which sizes (measured on an H100).

Benchmarks and tests replace `tile`, `chunk` and `share`. This module knows only sizes, and nothing about tensors.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """What one program computes at a time: so many rows, a block of so many columns of each, with so many warps.

    The rows are one axis of a tensor, shared among the warps; or, if `apart`, each row is a tensor of its own. Then a
    value computed from x is used for all rows, which pays off if weights must be converted. A warp reads 16 bytes per
    lane: 256 columns of bf16, 512 of int8 and fp8 (which share a tile), 1024 of int4. If a warp has fewer columns, each
    lane reads fewer than 16 bytes. The loop over the columns is unrolled and has no `num_stages`: it loads weights one
    block ahead (`device`).
    """

    rows: int
    block: int
    warps: int
    apart: bool = False


class Chunk(NamedTuple):
    """What one program of `decode_attention` computes: so many keys, so many columns of values, with so many warps.

    The last program to finish combines the results of all programs with its columns, `parts` at a time.
    """

    keys: int
    columns: int
    warps: int
    parts: int


class Share(NamedTuple):
    """What one program of `prefill_attention` computes: so many queries, over so many keys at a time.

    It has so many warps, and the keys and values of so many `stages` are in flight.
    """

    queries: int
    keys: int
    warps: int
    stages: int


# for each kernel, and for fewer bits: the least number of inputs, and the tile; the first row that fits is used (H100)
TILES: dict[str, tuple[tuple[int, Tile], ...]] = {
    "matvec": ((8192, Tile(1, 1024, 4)), (0, Tile(2, 1024, 1))),
    "norm_matvec": ((0, Tile(2, 2048, 4)),),
    "norm_qkv_rope": ((2049, Tile(2, 1024, 1)), (0, Tile(1, 1024, 1))),
    "norm_geglu": ((2049, Tile(2, 2048, 4)), (0, Tile(2, 1024, 2))),
    "int8 matvec": ((8192, Tile(2, 1024, 2, True)), (0, Tile(2, 2048, 4, True))),
    "int8 norm_matvec": ((0, Tile(4, 1024, 2, True)),),
    "int8 norm_qkv_rope": ((0, Tile(1, 2048, 1, True)),),
    "int8 norm_geglu": ((0, Tile(2, 2048, 2, True)),),
    "int4 matvec": ((0, Tile(2, 2048, 2, True)),),
    "int4 norm_matvec": ((0, Tile(4, 1024, 1, True)),),
    "int4 norm_qkv_rope": ((0, Tile(1, 2048, 1, True)),),
    "int4 norm_geglu": ((0, Tile(2, 2048, 1, True)),),
}
# the least number of slots, and the chunk
CHUNKS: tuple[tuple[int, Chunk], ...] = ((768, Chunk(64, 64, 4, 16)), (0, Chunk(32, 64, 4, 16)))
# for `prefill_attention`: the least number of queries, and the share
SHARES: tuple[tuple[int, Share], ...] = (
    (65536, Share(64, 32, 4, 2)), (8192, Share(128, 64, 8, 2)), (8192, Share(64, 32, 4, 2)),
    (0, Share(32, 64, 4, 3)), (0, Share(32, 32, 4, 2)), (0, Share(16, 16, 4, 1)),
)  # fmt: skip


def tile(kernel: str, inputs: int, bits: int = 16) -> Tile:
    """The tile of a kernel for a matrix with so many bits per weight."""
    kind = f"int{bits} " if bits < 16 else ""
    return next(tile for least, tile in TILES[kind + kernel] if inputs >= least)


def chunk(slots: int, size: int) -> Chunk:
    """The chunk for a cache with so many slots, and `size` bytes per element."""
    chunk = next(chunk for least, chunk in CHUNKS if slots >= least)
    return chunk._replace(keys=max(16, chunk.keys * 2 // size))  # float32 takes twice the shared memory


def share(queries: int, row: int, memory: float) -> Share:
    """The first share for so many queries that fits into `memory` bytes of shared memory; a key takes `row` bytes."""
    candidates = (each for least, each in SHARES if queries >= least)
    fitting = (each for each in candidates if (each.queries + 2 * each.stages * each.keys) * row <= memory)
    return next(fitting, SHARES[-1][1])


def next_power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least `size` and `least`; a tensor core multiplies at least 16."""
    return max(least, 1 << (size - 1).bit_length())


def warps(size: int) -> int:
    """The number of warps, 1 to 16: as many as give each lane 8 elements."""
    return min(16, max(1, size // 256))
