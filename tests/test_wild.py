"""A checkpoint that transformers loads gives the same text here, however it was saved, or is refused in one line.

The table of checkpoints is in `wild.py`.
"""

import copy
import shutil
from pathlib import Path

import pytest
import reference
import torch
import wild
from cases import prompt
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor

import pgfunc as pg

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ATOL = 1e-4  # float32, sums over at most 48 terms in another order; logits are of order 1
IMAGE = Path(__file__).parent.parent / "examples/images/scene.png"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("base")
    return folder, wild.base(folder)


def run(model: nn.Module, folder: Path) -> tuple[Tensor, str]:
    """Logits and greedy text of transformers, with its processor."""
    cfg = pg.load(folder, "float32", "meta").cfg
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.open(IMAGE), text="<image>caption en", return_tensors="np")
    inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
    padding_rows = [[row] for row in range(reference.VOCAB, reference.VOCAB + 32)]
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, bad_words_ids=padding_rows, pad_token_id=0)
    text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    batch = sample(cfg)
    return reference.logits(model, batch, cfg)[batch.valid], text


def ours(model: pg.Model) -> tuple[Tensor, str]:
    """Logits and greedy text of pgfunc, in float32; the text is "" without a tokenizer."""
    model = model._replace(params=pg.tree.map(lambda leaf: leaf.float(), model.params))
    completions = pg.generate(model, IMAGE, "caption en", max_new_tokens=6) if model.tokenizer else None
    batch = sample(model.cfg)
    return pg.forward(model.params, batch, model.cfg)[batch.valid], completions[0].text if completions else ""


def sample(cfg: pg.Config) -> pg.Prompt:
    return prompt(cfg, [2, 5, 3], [9, 1, 4])


@pytest.fixture(scope="module")
def saved(base) -> tuple[Tensor, str]:
    """Logits and text of the base model, which every row of the table starts from."""
    folder, model = base
    return run(model, folder)


@pytest.mark.parametrize("name", wild.ROWS)
def test_a_checkpoint_from_the_wild_loads_or_is_refused_in_one_line(name, base, saved, tmp_path):
    row, folder = wild.ROWS[name], tmp_path / "model"
    shutil.copytree(base[0], folder)
    row.change(folder, copy.deepcopy(base[1]))
    source = f"{folder}/{row.source}" if row.source else folder
    options = {key: folder / value if key == "config" else value for key, value in row.options.items()}
    if row.expected not in (wild.SAME, wild.OURS):
        with pytest.raises(row.error, match=row.expected) as raised:
            pg.load(source, device="cpu", **options)
        assert len(str(raised.value).splitlines()) == 1
        return
    logits, text = ours(pg.load(source, device="cpu", **options))
    expected = run(reference.load(Path(source), "float32"), Path(source)) if row.expected == wild.SAME else saved
    torch.testing.assert_close(logits, expected[0], atol=ATOL, rtol=0)
    assert text in (expected[1], "")


@pytest.mark.parametrize("name", wild.ADAPTERS)
def test_an_adapter_from_the_wild_loads_or_is_refused(name, base, tmp_path):
    row, (folder, model) = wild.ADAPTERS[name], base
    wrapped = wild.with_lora(copy.deepcopy(model))
    wrapped.save_pretrained(tmp_path)
    row.change(tmp_path, copy.deepcopy(wrapped))
    if row.expected not in (wild.SAME, wild.OURS):
        with pytest.raises(row.error, match=row.expected):
            pg.load(folder, device="cpu", adapter=tmp_path)
        return
    if row.expected == wild.SAME:
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    logits, text = ours(pg.load(folder, device="cpu", adapter=tmp_path))
    expected = run(wrapped.eval(), folder)
    torch.testing.assert_close(logits, expected[0], atol=ATOL, rtol=0)
    assert text == expected[1]
