"""SigLIP's prompts and functions: text and pictures are encoded as in training; the functions are pure."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
import transformers
from cases import CONFIGS, seeds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_siglip import CFG, CLOSE, VISION, inputs, model, params, words
from tokenizers import AddedToken

import pgfunc as pg
from pgfunc import ops, siglip, siglip_dual
from pgfunc.errors import ImageError, PromptError
from pgfunc.siglip_dual import prompt as dual_prompt
from pgfunc.siglip_dual.prompt import canonical
from pgfunc.taps import COSTLY

# --- text and pictures


@pytest.mark.parametrize(
    ("text", "siglip1", "siglip2"),
    [
        ("A Red  Star!", "a red star", "a red  star!"),
        (" it's\ta\nstar. ", "its a star", " it's\ta\nstar. "),
        ("x▁y", "x y", "x▁y"),
        ("!?", "", "!?"),
        ("ÉTOILE…", "étoile…", "étoile…"),  # only ASCII punctuation is removed
    ],
)
def test_text_is_normalized_as_in_training(text, siglip1, siglip2):
    assert canonical(text, drop_punctuation=True) == siglip1
    assert canonical(text, drop_punctuation=False) == siglip2


@given(st.text(st.sampled_from("aBÉ .,'!▁\t\n<>/")), st.booleans())
def test_canonical_text_is_not_changed_again(text, drop_punctuation):
    once = canonical(text, drop_punctuation)
    assert canonical(once, drop_punctuation) == once


def test_texts_get_an_end_token_and_padding():
    """SigLIP 2 has <eos> and <pad>. SigLIP has </s> for both, and removes punctuation."""
    ids = dual_prompt.text_ids(model(), ["a Red star!", "it's"])
    assert ids.tolist() == [[3, 4, 5, 6, 1, 0, 0, 0], [7, 10, 8, 1, 0, 0, 0, 0]]
    siglip1_ids = dual_prompt.text_ids(model(control=("<pad>", "</s>")), ["a Red star!", "it's"])
    assert siglip1_ids.tolist() == [[3, 4, 5, 1, 1, 1, 1, 1], [9, 1, 1, 1, 1, 1, 1, 1]]
    assert dual_prompt.text_ids(model(control=("<pad>", "<eos>", "</s>")), ["a"]).tolist() == [[4, 1, *[0] * 6]]


@pytest.fixture(scope="module", params=[("<pad>", "<eos>"), ("</s>",)], ids=["siglip2", "siglip"])
def saved(request, tmp_path_factory):
    """A model with either text rule, its folder, and the tokenizer that transformers loads from it."""
    folder, before = tmp_path_factory.mktemp("saved"), model(control=request.param)
    pg.save_siglip(before, folder)
    return before, folder, transformers.AutoTokenizer.from_pretrained(folder)


@given(
    st.lists(
        st.sampled_from(["A", "red", " Star", "  ", "it's", "!", "<eos>", "\t\n", "É", "▁", "]", "</s>"]), max_size=2
    )
)
def test_transformers_encodes_text_to_the_same_ids(saved, parts):
    before, _, theirs = saved
    text = "".join(parts)
    assert theirs(text, padding="max_length").input_ids == dual_prompt.text_ids(before, [text])[0].tolist()


def test_the_processor_of_transformers_gives_the_same_pixels_and_ids(saved):
    before, folder, _ = saved
    picture = Image.new("RGB", (28, 28), (200, 100, 0))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    expected = processor(text=["A star!", "it"], images=[picture], padding="max_length", return_tensors="pt")
    assert set(expected) == {"input_ids", "pixel_values"}
    assert torch.equal(expected["input_ids"], dual_prompt.text_ids(before, ["A star!", "it"]))
    torch.testing.assert_close(dual_prompt.pixels(before, [picture]), expected["pixel_values"], **CLOSE)


def test_a_tokenizer_saved_twice_is_the_same_file(saved, tmp_path):
    before, folder, _ = saved
    pg.save_siglip(pg.load_siglip(folder, device="cpu"), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    again = pg.load_siglip(tmp_path, device="cpu")
    assert torch.equal(dual_prompt.text_ids(again, ["A star!"]), dual_prompt.text_ids(before, ["A star!"]))


def test_additional_tokens_are_one_id_here_and_in_transformers(tmp_path):
    """Whether special or not. A control token next to them is encoded as text."""
    backend = words("<pad>", "<eos>")
    backend.add_tokens([AddedToken("<task>", special=True), AddedToken("<part>", normalized=False)])
    before = model()._replace(tokenizer=dual_prompt.wrap(backend, "the tests' tokenizer"))
    task, part = (backend.token_to_id(name) for name in ("<task>", "<part>"))
    assert dual_prompt.encode(before.tokenizer, "a <task>star<part>") == [3, task, 5, part]
    assert dual_prompt.encode(before.tokenizer, "<task><eos>") == [task, 11, 14, 12]
    pg.save_siglip(before, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = pg.load_siglip(tmp_path, device="cpu")
    for text in ("a <task>star<part>", "<task><eos>"):
        ids = dual_prompt.text_ids(before, [text])[0].tolist()
        assert theirs(text, padding="max_length").input_ids == ids
        assert dual_prompt.text_ids(again, [text])[0].tolist() == ids


@pytest.mark.parametrize("control", [("<pad>", "<eos>"), ("</s>",)])
def test_a_copy_encodes_like_the_original(control):
    before, file = model(control=control), io.BytesIO()
    texts = ["a red star", "<eos>", "a<pad></s>", "<unk> it's"]
    expected = [dual_prompt.text_ids(before, [text]) for text in texts]
    torch.save(before, file)
    file.seek(0)
    stored = torch.load(file, weights_only=False)
    for copied in (copy.deepcopy(before), pickle.loads(pickle.dumps(before)), stored):
        assert copied.cfg == before.cfg
        assert all(map(torch.equal, [dual_prompt.text_ids(copied, [text]) for text in texts], expected))


def test_a_backend_is_copied_and_not_shared():
    backend = words("<pad>", "<eos>")
    tokenizer = dual_prompt.wrap(backend, "the tests' tokenizer")
    backend.add_tokens(["<later>"])
    backend.enable_padding(length=20)
    assert dual_prompt.encode(tokenizer, "<later>") == dual_prompt.encode(model().tokenizer, "<later>")


def test_user_text_contains_no_control_token():
    assert dual_prompt.text_ids(model(), ["<eos>"]).tolist()[0] == [11, 14, 12, 1, 0, 0, 0, 0]


def test_a_text_that_cannot_be_encoded_is_refused():
    full = model()
    assert dual_prompt.text_ids(full, ["a " * 7]).tolist()[0] == [3] * 7 + [1]
    with pytest.raises(PromptError, match="is 8 tokens, this model reads up to 7"):
        dual_prompt.text_ids(full, ["a " * 8])
    with pytest.raises(PromptError, match="not text that can be encoded"):
        dual_prompt.text_ids(full, ["\ud800"])
    with pytest.raises(PromptError, match=r"without a tokenizer\.json"):
        dual_prompt.text_ids(full._replace(tokenizer=None), ["a"])
    few = full._replace(cfg=replace(CFG, text=replace(CFG.text, vocab=4)))
    with pytest.raises(PromptError, match=r"token id 5 is outside 0\.\.3"):
        dual_prompt.text_ids(few, ["star"])


def test_pixels_equal_those_of_paligemma():
    picture = Image.new("RGB", (9, 6), (200, 100, 0))
    pixels = dual_prompt.pixels(model(), [picture, picture])
    torch.testing.assert_close(pixels[1], pg.image.pixels(picture, CONFIGS["gemma"]))
    assert dual_prompt.pixels(model(), []).shape == (0, 3, 28, 28)
    with pytest.raises(ImageError, match="no such file"):
        dual_prompt.pixels(model(), ["absent.png"])


# --- laws of the functions


@given(seeds)
def test_vectors_have_length_one_and_rows_do_not_mix(seed):
    pixels, ids = inputs(seed=seed)
    for embed, x in ((siglip_dual.embed_images, pixels), (siglip_dual.embed_texts, ids)):
        vectors = embed(params(), x, CFG)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(x)))
        torch.testing.assert_close(embed(params(), x[1:], CFG), vectors[1:], **CLOSE)


def test_rope2d_rotates_the_first_half_of_a_head_by_the_row_and_the_second_by_the_column():
    cfg = replace(VISION, position="rope2d", image_size=42)  # 3 x 3 patches, heads of 12
    x = torch.randn(2, 9, 2, 12)
    rotated = siglip.rotate_grid(x, *siglip.grid_rotations(cfg, torch.device("cpu")))
    for patch in range(9):
        for half, position in ((slice(0, 6), patch // 3), (slice(6, 12), patch % 3)):
            rotation = ops.rotation(ops.angles(torch.tensor([[position]]), 6, cfg.theta))
            expected = ops.rotate(x[:, patch : patch + 1, :, half], rotation)
            torch.testing.assert_close(rotated[:, patch : patch + 1, :, half], expected)
    assert all(part.is_meta for each in siglip.grid_rotations(cfg, torch.device("meta")) for part in each)


@given(st.permutations(range(VISION.tokens)), seeds)
def test_pooling_does_not_depend_on_the_order_of_the_patches(order, seed):
    x = torch.randn(2, VISION.tokens, VISION.width, generator=torch.Generator().manual_seed(seed))
    head = params().pool
    torch.testing.assert_close(siglip.pool(head, x[:, order], VISION), siglip.pool(head, x, VISION), **CLOSE)


def test_the_vector_of_a_text_depends_on_every_token_including_padding():
    ids = torch.zeros(1, 8, dtype=torch.int64)
    vector = siglip_dual.embed_texts(params(), ids, CFG)
    for position in range(8):
        changed = ids.clone()
        changed[0, position] = 1
        assert (siglip_dual.embed_texts(params(), changed, CFG) - vector).abs().max() > 1e-3


PIXELS, IDS = inputs()


def objective(p: siglip_dual.DualParams) -> torch.Tensor:
    return (
        siglip_dual.logits(p, siglip_dual.embed_images(p, PIXELS, CFG), siglip_dual.embed_texts(p, IDS, CFG))
        .square()
        .mean()
    )


def test_every_parameter_has_a_gradient_and_jvp_agrees():
    p, along = params(), params(seed=1)
    grads = torch.func.grad(objective)(p)
    # a key's bias adds the same number to all scores of a query, so its exact gradient is zero
    without_gradient = [path for path, leaf in pg.tree.flatten(grads).items() if not leaf.abs().max() > 1e-9]
    assert all(path.endswith("k_bias") for path in without_gradient)
    _, slope = torch.func.jvp(objective, (p,), (along,))
    dots = pg.tree.map(lambda a, b: (a * b).sum(), grads, along)
    expected = sum(torch.utils._pytree.tree_leaves(dots))
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-4)  # float32, a sum over all parameters


def test_vmap_maps_over_an_ensemble():
    ensemble = [params(seed=seed) for seed in range(3)]
    values = torch.func.vmap(objective)(pg.tree.stack(ensemble))
    torch.testing.assert_close(values, torch.stack([objective(p) for p in ensemble]), **CLOSE)


def test_taps_read_and_replace_activations():
    names, (pixels, ids) = [], inputs()

    def tap(name, x):
        names.append(name)
        return torch.zeros_like(x) if name.endswith("vector") else x

    assert not siglip_dual.embed_images(params(), pixels, CFG, tap).any()
    assert not siglip_dual.embed_texts(params(), ids, CFG, tap).any()
    block = siglip.TAPS.keys() - {*COSTLY, "rot_q", "rot_k"}
    blocks = ["vision.0", "vision.1", "vision.pool", "text.0", "text.1", "text.2"]
    between = {f"{tower}.{value}" for tower in ("vision", "text") for value in ("embed", "out", "vector")}
    inside = {f"{prefix}.{value}" for prefix in blocks for value in block}
    assert set(names) == inside - {"vision.pool.resid_pre", "vision.pool.attn_in"} | between
    assert len(names) == len(set(names))


def test_half_precision_weights_give_vectors_in_float32():
    pixels, ids = inputs()
    half = pg.tree.map(lambda leaf: leaf.bfloat16(), params())
    for embed, x in ((siglip_dual.embed_images, pixels), (siglip_dual.embed_texts, ids)):
        vectors = embed(half, x, CFG)
        assert vectors.dtype == torch.float32
        assert (vectors * embed(params(), x, CFG)).sum(-1).min() > 0.99  # bf16
    assert siglip_dual.logits(half, vectors, vectors).dtype == torch.float32


def test_training_starts_at_factor_10_and_bias_minus_10():
    start = siglip_dual.init(CFG)
    torch.testing.assert_close(siglip_dual.logits(start, torch.eye(24)[:2], torch.eye(24)[:2]), torch.eye(2) * 10 - 10)
    assert torch.equal(start.text.layers[0].norm1_scale, torch.ones(16))
    assert start.pool.probe.abs().max() > 0
