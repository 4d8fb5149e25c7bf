"""The vocabulary is the tokens that both tokenizer and embedding have, also in fine-tunes with additional tokens."""

import copy
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import transformers
from cases import CONFIGS
from cases import params as parameters
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor, PreTrainedTokenizerFast

import pgfunc as pg
from pgfunc import config, laws
from pgfunc.errors import CheckpointError, PromptError
from pgfunc.train import finetune

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
WORDS = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]
PICTURE = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
NEW = ["<task>", "grüße", "<point>"]


def byte_backend() -> Backend:
    """A byte tokenizer with PaliGemma's special tokens; `<image>` is the last."""
    vocab = {name: id for id, name in enumerate([*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), "<unused0>"])}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in CONTROL])
    backend.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    return backend


IMAGE = byte_backend().token_to_id("<image>")


def processor(tokenizer: Backend | None = None) -> PaliGemmaProcessor:
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    own = {"image_token": "<image>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer or byte_backend(), extra_special_tokens=own, **names)
    pictures = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    pictures.image_seq_length = 4
    return PaliGemmaProcessor(pictures, fast)


def network(rows: int) -> PaliGemmaForConditionalGeneration:
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False}  # fmt: skip
    text = reference.VARIANTS["gemma-1kv"] | {"vocab_size": rows, "num_hidden_layers": 2}
    cfg = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=24, image_token_id=IMAGE, vocab_size=rows
    )
    torch.manual_seed(0)
    return PaliGemmaForConditionalGeneration(cfg).eval()


def save_fine_tune(folder: Path, rows: int = IMAGE + 20, resize: dict | None = None, special: bool = False) -> None:
    """Save a fine-tune as people make it: add tokens, resize the embedding, train, save."""
    pictures_and_text, model = processor(), network(rows)
    if special:
        pictures_and_text.tokenizer.add_special_tokens({"additional_special_tokens": NEW})
    else:
        pictures_and_text.tokenizer.add_tokens(NEW)
    if resize is not None:
        model.resize_token_embeddings(len(pictures_and_text.tokenizer), **resize)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            scale = 0.3 if weight.dim() == 1 else weight[0].numel() ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            if name.endswith("embed_tokens.weight"):
                weight[IMAGE:] *= 9  # large rows have large logits, so these tokens would be drawn often
    model.save_pretrained(folder)
    pictures_and_text.save_pretrained(folder)


FINE_TUNES = {
    "resized": {"resize": {}},
    "resized to a multiple": {"resize": {"pad_to_multiple_of": 64}},
    "within the padding": {"resize": None},
    "special": {"resize": {}, "special": True},
}


@pytest.fixture(scope="module", params=FINE_TUNES)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tuned")
    save_fine_tune(path, **FINE_TUNES[request.param])
    return path


def theirs(folder: Path) -> tuple[PaliGemmaForConditionalGeneration, PaliGemmaProcessor]:
    return reference.load(folder), PaliGemmaProcessor.from_pretrained(folder)


def processed(processor: PaliGemmaProcessor, text: str) -> dict[str, Tensor]:
    """The inputs that transformers' processor makes from the picture and a text."""
    inputs = processor(images=PICTURE, text="<image>" + text)
    return {name: torch.tensor(np.array(value)) for name, value in inputs.items() if name != "labels"}


@torch.no_grad()
def ids_and_logits(
    model: PaliGemmaForConditionalGeneration, processor: PaliGemmaProcessor, text: str
) -> tuple[list[int], Tensor]:
    """The token ids of the text in transformers, without the image tokens, and the logits at these positions."""
    inputs = processed(processor, text)
    return inputs["input_ids"][0, 4:].tolist(), model(**inputs).logits[0, 4:].float()


def same_as_transformers(model: pg.Model, folder: Path, text: str) -> None:
    ids, expected = ids_and_logits(*theirs(folder), text)
    prompt = pg.prepare(model, PICTURE, text)
    assert prompt.tokens.tolist() == [ids]
    logits = pg.forward(model.params, prompt, model.cfg)[0]
    finite = logits.isfinite()
    torch.testing.assert_close(logits[finite], expected[:, : logits.shape[-1]][finite], atol=1e-4, rtol=1e-4)
    assert (~finite).nonzero()[:, 1].unique().tolist() == [IMAGE], "only <image> is masked"
    assert (logits[:, IMAGE] == -torch.inf).all()


def test_prompts_with_tokens_after_image_have_the_ids_and_logits_of_transformers(folder):
    model = pg.load(folder, device="cpu")
    assert model.cfg.text.vocab == IMAGE + 4
    assert model.cfg.text.masked == ((IMAGE, IMAGE + 1),)
    same_as_transformers(model, folder, "<task>what<point> grüße <loc0007>")


def test_tokens_after_image_are_generated_as_in_transformers(folder):
    model = pg.load(folder, device="cpu")
    other, their_processor = theirs(folder)
    inputs = processed(their_processor, "<task>what")
    rows = other.get_input_embeddings().weight.shape[0]
    masked = [[id] for id in (IMAGE, *range(IMAGE + 4, rows))]
    out = other.generate(**inputs, max_new_tokens=12, do_sample=False, bad_words_ids=masked)[0]
    (done,) = pg.generate(model, PICTURE, "<task>what", max_new_tokens=12)
    assert done.tokens == [id for id in out[inputs["input_ids"].shape[1] :].tolist() if id != model.cfg.eos]
    assert {IMAGE + 1, IMAGE + 2, IMAGE + 3} & set(done.tokens), "this test needs a new token in the answer"
    assert done.text == their_processor.tokenizer.decode([id for id in done.tokens if id > 3])
    assert "".join(pg.stream(model, PICTURE, "<task>what", max_new_tokens=12)) == done.text


def test_image_is_never_drawn_and_new_tokens_can_be_scored(folder):
    model = pg.load(folder, device="cpu")
    (done,) = pg.generate(model, PICTURE, "a", max_new_tokens=40, temperature=1.0, seed=1)
    assert IMAGE not in done.tokens
    assert max(done.tokens) > IMAGE
    scores = pg.score(model, PICTURE, "a", ["<task>", [IMAGE + 3], "<point>"])
    assert scores.isfinite().all()
    torch.testing.assert_close(scores[0, 1], scores[0, 2])


def test_only_allowed_tokens_have_logits_and_image_has_minus_infinity(folder):
    model = pg.load(folder, device="cpu")
    prompt = pg.prepare(model, PICTURE, "a")
    logits, _ = pg.prefill(model.params, prompt, model.cfg, 1)
    for allowed in (range(IMAGE - 2, IMAGE + 4), torch.tensor([IMAGE + 2, IMAGE, 5])):
        some, _ = pg.prefill(model.params, prompt, model.cfg, 1, allowed=allowed)
        torch.testing.assert_close(some, logits[:, list(allowed)])
    assert logits[0, IMAGE] == -torch.inf


def test_training_changes_the_rows_of_the_new_tokens(folder):
    model = pg.load(folder, device="cpu")
    prompt = pg.prepare(model, PICTURE, "a", "<task><point>")
    assert prompt.tokens[0, -3:].tolist() == [IMAGE + 1, IMAGE + 3, model.cfg.eos]
    embed = model.params.language.embed.clone().requires_grad_()
    params = model.params._replace(language=model.params.language._replace(embed=embed))
    loss = finetune.loss(params, prompt, model.cfg)
    (grad,) = torch.autograd.grad(loss, embed)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert (grad[IMAGE] == 0).all(), "<image> is neither an input nor a target"
    assert (grad[IMAGE + 1 : IMAGE + 4].norm(dim=1) > 0).all()


def test_saving_and_converting_keep_the_new_tokens(folder, tmp_path):
    model = pg.load(folder, device="cpu")
    pg.save(model, tmp_path / "saved")
    pg.convert(folder, tmp_path / "model.npz")
    again = pg.load(tmp_path / "saved", device="cpu")
    path = folder / "tokenizer.json"
    npz = pg.load(tmp_path / "model.npz", device="cpu", config=folder, tokenizer=path)
    prompt = pg.prepare(model, PICTURE, "<task> a")
    expected = pg.forward(model.params, prompt, model.cfg)
    for other in (again, npz):
        assert other.cfg == model.cfg
        assert torch.equal(pg.prepare(other, PICTURE, "<task> a").tokens, prompt.tokens)
        assert torch.equal(pg.forward(other.params, prompt, other.cfg), expected)
    same_as_transformers(again, tmp_path / "saved", "<task>what<point> grüße")


def test_without_a_tokenizer_image_and_all_later_rows_are_padding(folder, tmp_path):
    model = pg.load(folder, device="cpu")
    pg.save(model._replace(tokenizer=None), tmp_path)
    mute = pg.load(tmp_path, device="cpu")
    assert (mute.cfg.text.vocab, mute.cfg.text.masked) == (IMAGE, ())
    with pytest.raises(PromptError, match=rf"token id {IMAGE + 1} is outside 0\.\.{IMAGE - 1}"):
        pg.prepare(mute, PICTURE, [2, IMAGE + 1])
    again = pg.load(tmp_path, device="cpu", tokenizer=folder / "tokenizer.json")
    assert again.cfg == model.cfg


def test_a_copy_of_a_model_gives_the_same_answer(folder):
    """By deepcopy, pickle or torch.save."""
    model = pg.load(folder, device="cpu")
    text = "<task>what<eos> grüße<image>"
    (expected,) = pg.generate(model, PICTURE, text, max_new_tokens=6)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    stored = torch.load(file, weights_only=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), stored):
        assert pg.generate(copied, PICTURE, text, max_new_tokens=6) == [expected]
        assert copied.cfg == model.cfg


def test_image_as_an_id_is_refused_with_the_advice_to_leave_it_out(folder):
    model = pg.load(folder, device="cpu")
    with pytest.raises(PromptError, match=f"token id {IMAGE} is no token; it is <image>: leave it out"):
        pg.prepare(model, PICTURE, [IMAGE, 2, 5])
    with pytest.raises(PromptError, match=f"token id {IMAGE} is no token"):
        pg.score(model, PICTURE, "a", [[IMAGE]])


# --- other differences between tokenizer and embedding


def edit(path: Path, change) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def save_plain(folder: Path, rows: int = IMAGE + 20) -> Path:
    """Save a checkpoint without additional tokens."""
    network(rows).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def test_a_checkpoint_without_new_tokens_has_the_published_vocabulary(tmp_path):
    model = pg.load(save_plain(tmp_path), device="cpu")
    assert model.cfg == pg.load(tmp_path, device="cpu", tokenizer=tmp_path / "tokenizer.json").cfg
    assert (model.cfg.text.vocab, model.cfg.text.padding, model.cfg.text.masked) == (IMAGE, 20, ())


def test_tokens_without_a_row_are_named_when_they_are_used(tmp_path):
    save_plain(tmp_path, IMAGE + 2)
    pictures_and_text = processor()
    pictures_and_text.tokenizer.add_tokens(NEW)
    pictures_and_text.save_pretrained(tmp_path)
    model = pg.load(tmp_path, device="cpu")
    assert pg.prepare(model, PICTURE, "<task>").tokens.tolist() == [[2, IMAGE + 1, 4 + 10]]
    with pytest.raises(PromptError, match=rf"token id {IMAGE + 3} is outside .* the embedding has no rows for"):
        pg.prepare(model, PICTURE, "<point>")


def test_an_embedding_may_have_fewer_rows_than_the_id_of_image(tmp_path):
    model = pg.load(save_plain(tmp_path, 300), device="cpu")
    assert (model.cfg.text.vocab, model.cfg.text.padding) == (300, 0)
    pg.save(model, tmp_path / "again")
    assert pg.load(tmp_path / "again", device="cpu").cfg == model.cfg
    with pytest.raises(PromptError, match="is outside"):
        pg.prepare(model, PICTURE, "<loc1023>")


def test_rows_without_a_token_are_never_drawn_in_any_position(tmp_path):
    save_plain(tmp_path)
    edit(tmp_path / "tokenizer.json", lambda raw: [raw["model"]["vocab"].pop(f"<0x{byte:02X}>") for byte in (65, 66)])
    model = pg.load(tmp_path, device="cpu")
    assert model.cfg.text.masked == ((4 + 65, 4 + 67),)
    logits = pg.forward(model.params, pg.prepare(model, PICTURE, "a"), model.cfg)
    assert (logits == -torch.inf).nonzero()[:, 2].unique().tolist() == [4 + 65, 4 + 66]
    with pytest.raises(PromptError, match="token id 69 is no token"):
        pg.prepare(model, PICTURE, [2, 69])
    pg.save(model, tmp_path / "again")
    assert pg.load(tmp_path / "again", device="cpu").cfg == model.cfg


def test_an_image_token_is_never_drawn_when_its_id_differs_from_the_config(tmp_path):
    save_plain(tmp_path)
    edit(tmp_path / "config.json", lambda raw: raw.update(image_token_index=260))
    model = pg.load(tmp_path, device="cpu")
    assert model.cfg.text.vocab == IMAGE
    assert model.cfg.text.masked == ((260, 261),)


def test_an_added_token_can_be_the_end_of_sequence(tmp_path):
    save_fine_tune(tmp_path, resize={})
    (before,) = pg.generate(pg.load(tmp_path, device="cpu"), PICTURE, "<task>what", max_new_tokens=12)
    end = next(id for id in before.tokens if id > IMAGE)
    edit(tmp_path / "config.json", lambda raw: raw.update(eos_token_id=end))
    (done,) = pg.generate(pg.load(tmp_path, device="cpu"), PICTURE, "<task>what", max_new_tokens=12)
    assert (done.finish, done.tokens) == ("eos", before.tokens[: before.tokens.index(end)])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    mute = pg.load(tmp_path, device="cpu")
    assert mute.cfg.text.has(mute.cfg.eos)
    assert mute.cfg.text.masked == ((IMAGE, end),)
    edit(tmp_path / "config.json", lambda raw: raw.update(eos_token_id=IMAGE))
    with pytest.raises(CheckpointError, match="pad, eos, bos are"):
        pg.load(tmp_path, device="cpu")


def test_the_laws_hold_for_a_vocabulary_with_image_in_the_middle():
    cfg = config.with_vocabulary(replace(CONFIGS["gemma2"], image=50), range(67))
    assert cfg.text.masked == ((50, 51),)
    system = laws.eager(parameters(cfg), cfg)
    results = laws.check(system, laws.MODEL[:4], examples=2, derandomize=True)
    assert [result.law.name for result in results if result.verdict == "broken"] == []


def test_a_tokenizer_with_many_gaps_is_refused(tmp_path):
    save_plain(tmp_path)
    edit(tmp_path / "tokenizer.json",
         lambda raw: raw.update(added_tokens=[], model=raw["model"] | {"vocab": {
             name: 3 * id for name, id in raw["model"]["vocab"].items()}}))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .* gaps"):
        pg.load(tmp_path, device="cpu")


CFG = replace(config.PUBLISHED["paligemma-3b-224"], image=30)


@given(st.sets(st.integers(0, 60), max_size=40), st.integers(0, 45))
def test_the_vocabulary_is_the_ids_that_have_rows_without_image(ids, image):
    cfg = replace(CFG, image=image if image > 2 else 30, text=replace(CFG.text, vocab=40, padding=10))
    text = config.with_vocabulary(cfg, ids).text
    expected = {id for id in ids | {0, 1, 2} if id < 50 and id != cfg.image}
    assert {id for id in range(-5, 70) if text.has(id)} == expected
    assert text.vocab + text.padding == 50
    assert text.has(text.vocab - 1)
    assert config.with_vocabulary(replace(cfg, text=text), ids).text == text
