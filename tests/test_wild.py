"""What transformers loads and runs loads here and writes the same text, however it was saved; or one line refuses it.

The table of folders is in `wild.py`.
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
PICTURE = Path(__file__).parent.parent / "examples/images/scene.png"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("base")
    return folder, wild.base(folder)


def run(model: nn.Module, folder: Path) -> tuple[Tensor, str]:
    """Logits and greedy text, by transformers and its processor."""
    cfg = pg.load(folder, "float32", "meta").cfg
    processor = AutoProcessor.from_pretrained(folder)
    given = processor(images=Image.open(PICTURE), text="<image>caption en", return_tensors="np")
    given = {name: torch.from_numpy(array) for name, array in given.items()}
    forbidden = [[row] for row in range(reference.VOCAB, reference.VOCAB + 32)]
    ids = model.generate(**given, max_new_tokens=6, do_sample=False, bad_words_ids=forbidden, pad_token_id=0)
    text = processor.tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    given = sample(cfg)
    return reference.logits(model, given, cfg)[given.valid], text


def ours(model: pg.Model) -> tuple[Tensor, str]:
    """The same by pgfunc, in float32; no text where there is no tokenizer."""
    model = model._replace(params=pg.tree.map(lambda leaf: leaf.float(), model.params))
    done = pg.generate(model, PICTURE, "caption en", max_new_tokens=6) if model.tokenizer else None
    given = sample(model.cfg)
    return pg.forward(model.params, given, model.cfg)[given.valid], done[0].text if done else ""


def sample(cfg: pg.Config) -> pg.Prompt:
    return prompt(cfg, [2, 5, 3], [9, 1, 4])


@pytest.fixture(scope="module")
def saved(base) -> tuple[Tensor, str]:
    """What the model in the folder says that the rows start from."""
    folder, model = base
    return run(model, folder)


@pytest.mark.parametrize("name", wild.ROWS)
def test_a_checkpoint_as_people_make_it(name, base, saved, tmp_path):
    row, folder = wild.ROWS[name], tmp_path / "model"
    shutil.copytree(base[0], folder)
    row.make(folder, copy.deepcopy(base[1]))
    source = f"{folder}/{row.source}" if row.source else folder
    options = {key: folder / value if key == "config" else value for key, value in row.options.items()}
    if row.expected not in (wild.SAME, wild.OURS):
        with pytest.raises(row.error, match=row.expected) as caught:
            pg.load(source, device="cpu", **options)
        assert len(str(caught.value).splitlines()) == 1
        return
    logits, text = ours(pg.load(source, device="cpu", **options))
    expected = run(reference.load(Path(source), "float32"), Path(source)) if row.expected == wild.SAME else saved
    torch.testing.assert_close(logits, expected[0], atol=ATOL, rtol=0)
    assert text in (expected[1], "")


@pytest.mark.parametrize("name", wild.ADAPTERS)
def test_an_adapter_as_people_make_it(name, base, tmp_path):
    row, (folder, model) = wild.ADAPTERS[name], base
    wrapped = wild.tuned(copy.deepcopy(model))
    wrapped.save_pretrained(tmp_path)
    row.make(tmp_path, copy.deepcopy(wrapped))
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
