"""`pgfunc segment --out` draws ten masks on a JPEG of 12 megapixels in under 10 CPU seconds and 1 GB of memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pgfunc.checkpoint import shipped
from pgfunc.objects import detect, draw, segment, vqvae
from pgfunc.objects.detect import Box
from pgfunc.objects.draw import Color
from pgfunc.objects.segment import Segment

WIDTH, HEIGHT = 4000, 3000
# ymin, xmin, ymax, xmax; four of the boxes are nearly as large as the picture
LOCATIONS = ((0, 0, 1023, 1023), (5, 5, 1000, 1010), (20, 3, 1020, 900), (0, 300, 900, 1023), (100, 100, 500, 600),
             (400, 500, 900, 1000), (50, 700, 300, 950), (800, 40, 1000, 200), (600, 600, 660, 660),
             (250, 30, 280, 60))  # fmt: skip

# the process measures itself; not by ru_maxrss, which is never below what its parent had used before exec
COMMAND = """
import json, resource, sys
from pathlib import Path
import pgfunc as pg
from pgfunc import cli

answer, _ = sys.stdin.read(), pg.generate  # imported before it is replaced
pg.generate = lambda model, image, prefix, **sampling: [pg.Completion(answer, [], [], "eos")]
try:
    cli.main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
usage = resource.getrusage(resource.RUSAGE_SELF)
figures = {"cpu_seconds": usage.ru_utime + usage.ru_stime}
if sys.platform == "linux":
    lines = Path("/proc/self/status").read_text().splitlines()
    figures["peak_bytes"] = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
print(json.dumps(figures))
"""


def write_photograph(path: Path) -> None:
    """A JPEG with smooth shapes and fine noise."""
    rng = np.random.default_rng(0)
    shapes = Image.fromarray(rng.integers(60, 200, (9, 12, 3), np.uint8)).resize((WIDTH, HEIGHT))
    noise = rng.integers(0, 6, (HEIGHT, WIDTH, 1), np.uint8)
    Image.fromarray(np.asarray(shapes) + noise).save(path, quality=90)


def answer(vq: vqvae.Params) -> str:
    """Ten objects; the mask of each is the ellipse that fills its box."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    (codes,) = segment.encode([x**2 + y**2 < 1], [Box(0, 0, 64, 64)], vq)
    return " ; ".join(detect.write(box, f"{number}", codes) for number, box in enumerate(LOCATIONS))


def blend(pixel: Color, layers: list[Color]) -> np.ndarray:
    """A pixel under these colours, each as opaque as a mask."""
    blended = np.array(pixel, float)
    for colour in layers:
        blended = blended * (1 - draw.OPACITY) + np.array(colour) * draw.OPACITY
    return blended


def test_ten_masks_on_12_megapixels_take_under_10_cpu_seconds_and_1_gb(tmp_path):
    write_photograph(tmp_path / "photo.jpg")
    vq = segment.load(shipped() / "masks.safetensors")
    text = answer(vq)
    arguments = ["segment", "photo.jpg", "--prompt", "thing", "--out", "out.png", "--device", "cpu"]
    command, env = [sys.executable, "-c", COMMAND, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    *lines, figures = done.stdout.splitlines()
    assert len(lines) == len(LOCATIONS), "one line per object"
    print(figures)
    assert json.loads(figures)["cpu_seconds"] < 10
    assert json.loads(figures).get("peak_bytes", 0) < 1e9  # measured on Linux
    check_masks(tmp_path, segment.parse(text, WIDTH // 10, HEIGHT // 10, vq))


def check_masks(folder: Path, segments: list[Segment]) -> None:
    """The pixel at the centre of each box has the colours of all masks that contain it; the masks are 1/10 as large."""
    with Image.open(folder / "photo.jpg") as photo, Image.open(folder / "out.png") as out:
        assert out.size == (WIDTH, HEIGHT)
        for number, (_, box, _, _) in enumerate(segments):
            y, x = int(5 * (box.ymin + box.ymax)), int(5 * (box.xmin + box.xmax))
            over = [other for other, item in enumerate(segments) if item.mask[y // 10, x // 10]]
            colours = draw.palette(len(segments))
            before, after = photo.getpixel((x, y)), out.getpixel((x, y))
            # 8 bits per layer, and an opacity of 114 / 255 instead of 0.45
            assert np.allclose(after, blend(before, [colours[other] for other in over]), rtol=0, atol=3)
            without = [colours[other] for other in over if other != number]
            assert not np.allclose(after, blend(before, without), rtol=0, atol=6), f"mask {number} is drawn"
