"""A result depends only on the arguments: PyTorch's global defaults and random generators do not change it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pgfunc as pg
from pgfunc import image, paligemma
from pgfunc.checkpoint import shipped
from pgfunc.objects import draw, vqvae
from pgfunc.train import contrastive, finetune, lora, optim

SCENE = Path(__file__).parent.parent / "examples/images/scene.png"
WRITTEN = "<loc0102><loc0204><loc0511><loc0767>" + "".join(f"<seg{code:03d}>" for code in range(16)) + " cat"


def results() -> dict[str, Any]:
    """Results of many functions of the package, from a picture, a text and checkpoint files."""
    model, dual = pg.load(dtype="float32", device="cpu"), pg.load_siglip(dtype="float32", device="cpu")
    params, cfg = model.params, model.cfg
    prompt = pg.prepare(model, SCENE, "caption en", "a moon")
    trained = finetune.select(params, ["vision.*", "language.layers.*"])
    grads, loss = finetune.gradient(lambda new: pg.tree.replace(params, new), trained, [prompt], cfg)
    masks = pg.segment.load(shipped() / "masks.safetensors")
    segments = pg.segment.parse(WRITTEN, 224, 224, masks)
    pictures = pg.dual.embed_images(dual.params, pg.dual_prompt.pixels(dual, [SCENE]), dual.cfg)
    texts = pg.dual.embed_texts(dual.params, pg.dual_prompt.text_ids(dual, ["a cat"]), dual.cfg)
    sampled = pg.generate(model, SCENE, "caption en", 6, temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, seed=3)
    drawing = draw.objects(image.open_image(SCENE), segments)
    results_by_name = {
        "prompt": prompt, "logits": pg.forward(params, prompt, cfg), "completions": sampled,
        "streamed": list(pg.stream(model, SCENE, "caption en", 4)),
        "scores": pg.score(model, SCENE, "caption en", ["a moon", "two cats"]),
        "reordered": pg.reorder(pg.prefill(params, prompt, cfg, 2)[1], torch.tensor([0, 0], device="cpu")),
        "pictures": pictures, "texts": texts, "pairs": pg.dual.logits(dual.params, pictures, texts),
        "contrastive": contrastive.sigmoid_loss(pictures, texts, dual.params.scale, dual.params.bias),
        "masks": [segment.mask for segment in segments], "drawing": drawing.tobytes(),
        "codes": pg.segment.render(segments, masks), "grads": grads, "loss": loss,
        "updated": optim.update(grads, optim.init(trained), trained, 1e-3),
        "lora": lora.init(params, ["language.layers.0.q"], 2, 4.0), "fresh masks": vqvae.init(),
        "fresh": paligemma.init(cfg).projector, "fresh dual": pg.dual.init(dual.cfg).pool,
        "int8": pg.quant.quantize(params, "int8").language.layers[0].q,
        "int4": pg.forward(pg.quant.quantize(params, "int4"), prompt, cfg),
    }  # fmt: skip
    return pg.tree.flatten(results_by_name)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return results()


@contextmanager
def default(setter: Callable[[Any], None], value: Any, usual: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(usual)


@contextmanager
def seeded() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state()
    torch.manual_seed(5)
    np.random.seed(5)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])


AMBIENT = {
    "float64 by default": partial(default, torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16 by default": partial(default, torch.set_default_dtype, torch.bfloat16, torch.float32),
    "meta by default": partial(default, torch.set_default_device, "meta", None),
    "within a device": lambda: torch.device("meta"),
    "without gradients": torch.no_grad,
    "seeded": seeded,
}


@pytest.mark.parametrize("ambient", AMBIENT.values(), ids=AMBIENT)
def test_global_defaults_of_pytorch_do_not_change_results(expected, ambient):
    with ambient():
        actual = results()
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert (actual[path].dtype, actual[path].device) == (value.dtype, value.device), path
            assert torch.equal(actual[path], value), path
        else:
            assert actual[path] == value, path
