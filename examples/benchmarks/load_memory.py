"""The memory that loading takes: peak resident memory over the size of a sharded bf16 checkpoint of 1 GB.

    python examples/benchmarks/load_memory.py

Makes a random PaliGemma of about 0.5 billion parameters in a temporary folder, in shards of 300 MB, and loads it in a
process of its own. Prints how far the process's peak rises above its memory before `pg.load`: once loaded (the files
are mapped), and once every weight has been read. Linux only: the peak is the kernel's VmHWM.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import pgfunc as pg
from pgfunc import paligemma


def peak() -> int:
    """The largest number of bytes that this process has ever had in memory."""
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def measure(folder: str) -> None:
    """Load, then read every weight; print the peaks divided by the size."""
    before = peak()
    model = pg.load(folder, device="cpu")
    size, loaded = pg.tree.nbytes(model.params), peak() - before
    total = sum(float(leaf.sum()) for leaf in pg.tree.flatten(model.params).values())
    assert total == total, "every weight was read, and none is NaN"
    print(json.dumps({"bytes": size, "loaded": loaded / size, "read": (peak() - before) / size}))


def make(folder: str) -> None:
    """Write a checkpoint of 1 GB in shards."""
    cfg = pg.PUBLISHED["paligemma-3b-224"]
    text = replace(cfg.text, vocab=65_536, layers=3)
    cfg = replace(cfg, vision=replace(cfg.vision, layers=4), text=text, image=text.vocab)
    generator = torch.Generator().manual_seed(0)
    params = pg.tree.map(
        lambda leaf: torch.empty(leaf.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator),
        paligemma.abstract(cfg),
    )
    pg.save(pg.Model(cfg, params, None), folder, shard_bytes=300 * 10**6)


def main() -> None:
    if len(sys.argv) > 1:
        return measure(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        make(folder)
        shards = len(list(Path(folder).glob("*.safetensors")))
        done = subprocess.run([sys.executable, __file__, folder], check=True, capture_output=True, text=True)
        print(json.dumps({"shards": shards} | json.loads(done.stdout)))


if __name__ == "__main__":
    main()
