"""No function changes global state of the process: not while it runs, not in threads, and not when it fails.

This test is in this folder because the type-checking hook of `conftest.py` draws random numbers.
"""

import os
import random
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import text_model
from PIL import Image, ImageFile

import pgfunc as pg
from pgfunc.errors import PgfuncError

MODEL = text_model()


def global_state() -> dict[str, Any]:
    """The state that exists once in a process."""
    return {
        "environment": dict(os.environ),
        "warnings": ([*warnings.filters], warnings.showwarning, warnings.warn),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "settings": (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "exact": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "path": [*sys.path],
        "working directory": Path.cwd(),
        "errors": (np.geterr(), sys.excepthook, sys.getrecursionlimit()),
        "pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "streams": (sys.stdout, sys.stderr),
    }


def test_loading_generating_and_failing_in_threads_do_not_change_global_state(tmp_path):
    pg.save(MODEL, tmp_path / "model")
    tags = Image.Exif()
    tags[274] = 6
    damaged = tags.tobytes()[:-3]  # makes Pillow warn
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.jpg", exif=damaged)
    Image.new("P", (40, 30)).save(tmp_path / "clear.png", transparency=b"\0\7")
    (tmp_path / "cut.png").write_bytes((tmp_path / "clear.png").read_bytes()[:60])
    before, during = global_state(), []

    def work(index: int) -> None:
        names = ["red.jpg", "clear.png", "cut.png", "none.png"]
        with suppress(PgfuncError):
            model = pg.load(tmp_path / "model", "float32", "cpu") if index % 3 == 0 else MODEL
            name = tmp_path / names[index % 4]
            prompt = pg.prepare(model, name, "a", "b")
            pg.generate(model, name, "a", max_new_tokens=2, temperature=float(index % 2), seed=index)
            pg.score(model, name, "a", ["b", "c"])
            torch.func.grad(lambda params: pg.forward(params, prompt, model.cfg).sum())(model.params)
            list(pg.stream(model, name, "a", max_new_tokens=2))
            pg.detect.parse("<loc0001><loc0002><loc0100><loc0200> a", 9, 9)
            pg.save(model, tmp_path / f"saved{index}")
        state = global_state()
        del state["gradients"]  # each thread has its own
        during.append(state)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    assert global_state() == before
    del before["gradients"]
    for state in during:
        assert state == before
