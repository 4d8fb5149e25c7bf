"""The model: sizes, padding, transforms, taps, shared pictures, allowed tokens; what any must keep is in `laws`."""

import hashlib
import weakref
from dataclasses import replace

import pytest
import torch
from cases import CONFIGS, VISION, configs, params, prompt, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from watched import Watched

import pgfunc as pg
from pgfunc import gemma, ops, paligemma, siglip
from pgfunc.errors import SettingError

ATOL = 1e-4  # float32, few layers, logits of order 1

COUNTS = {  # Beyer et al. 2024, Steiner et al. 2024; published files at 224 px
    "paligemma-3b-224": 2_923_335_408,
    "paligemma2-3b-224": 3_032_094_960,
    "paligemma2-10b-224": 9_662_409_456,
    "paligemma2-28b-224": 27_650_192_112,
}
VISION_224 = 412_442_352


@pytest.mark.parametrize("name", pg.PUBLISHED)
def test_published_checkpoints_have_their_published_size_and_allocate_nothing(name):
    tree = paligemma.abstract(pg.PUBLISHED[name])
    base, size = name.rsplit("-", 1)
    more = ((int(size) // 14) ** 2 - 256) * 1152  # only the position embedding grows with the picture
    assert pg.tree.count(tree) == COUNTS[f"{base}-224"] + more
    assert pg.tree.count(tree.vision) == VISION_224 + more
    assert {leaf.device.type for leaf in pg.tree.flatten(tree).values()} == {"meta"}


@given(configs, seeds)
def test_prefill_accepts_padding_anywhere(cfg, seed):
    tree, whole = params(cfg, seed), prompt(cfg, [3, 3], [2, 2], seed=seed)
    holes = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 1]], dtype=torch.bool)
    spread = {name: torch.zeros(2, 7, dtype=leaf.dtype).masked_scatter(holes, leaf)
              for name, leaf in zip(("tokens", "valid", "causal"), whole[1:], strict=True)}  # fmt: skip
    expected, cache = pg.prefill(tree, whole, cfg, 1)
    found, padded = pg.prefill(tree, pg.Prompt(whole.pixels, **spread), cfg, 1)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    token = torch.tensor([1, 2])
    torch.testing.assert_close(
        pg.decode(tree, token, padded, cfg)[0], pg.decode(tree, token, cache, cfg)[0], atol=ATOL, rtol=0
    )


def test_without_positions_the_encoder_cannot_tell_patches_apart_and_rope2d_gives_it_positions():
    for name, position_matters in (("rope2d", True), ("gemma", False)):
        cfg = CONFIGS[name].vision
        tree = params(CONFIGS[name]).vision
        if name == "gemma":
            tree = tree._replace(position=torch.zeros_like(tree.position))
        pixels = torch.rand(1, 3, 28, 28)
        mirrored = pixels.roll(14, dims=-1)  # exchanges the two columns of patches
        one, two = (pg.paligemma.siglip.encode_image(tree, x, cfg) for x in (pixels, mirrored))
        exchanged = two[:, [1, 0, 3, 2]]
        assert torch.allclose(one, exchanged, atol=1e-5) != position_matters


def loss(tree: pg.Params, given: pg.Prompt, cfg: pg.Config) -> torch.Tensor:
    return pg.forward(tree, given, cfg).log_softmax(-1)[..., 0][given.valid].mean()


@pytest.mark.parametrize("name", CONFIGS)
def test_grad_equals_autograd(name):
    cfg, tree = CONFIGS[name], params(CONFIGS[name])
    given = prompt(cfg, [2, 4], [3, 2])
    found = pg.tree.flatten(grad(loss)(tree, given, cfg))
    leaves = pg.tree.map(lambda leaf: leaf.clone().requires_grad_(), tree)
    loss(leaves, given, cfg).backward()
    for path, leaf in pg.tree.flatten(leaves).items():
        torch.testing.assert_close(found[path], leaf.grad, atol=1e-5, rtol=1e-4)  # float32, fused against written out


@pytest.mark.parametrize("name", CONFIGS)
def test_vmap_of_decode_equals_a_loop(name):
    cfg, given = CONFIGS[name], prompt(CONFIGS[name], [2, 4], [0, 0])
    trees = [params(cfg, seed) for seed in range(2)]
    token = torch.tensor([1, 2])

    def two_steps(tree: pg.Params) -> torch.Tensor:
        _, cache = pg.prefill(tree, given, cfg, 1)
        return pg.decode(tree, token, cache, cfg)[0]

    together = vmap(two_steps)(pg.tree.stack(trees))
    for tree, row in zip(trees, together, strict=True):
        torch.testing.assert_close(row, two_steps(tree), atol=ATOL, rtol=0)


def test_forward_mode_ad_works_outside_torch_func_too():
    cfg, given = CONFIGS["gemma"], prompt(CONFIGS["gemma"], [2, 4], [3, 2])
    tree, tangent = params(cfg), params(cfg, 1)
    _, expected = jvp(lambda tree: loss(tree, given, cfg), (tree,), (tangent,))
    with forward_ad.dual_level():
        dual = pg.tree.map(forward_ad.make_dual, tree, tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual, given, cfg)).tangent, expected)


def fingerprint(*trees) -> str:
    digest = hashlib.sha256()
    for leaf in pg.tree.flatten(trees).values():
        digest.update(leaf.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_and_a_gradient_change_nothing_that_goes_in_and_agree_bitwise(name):
    cfg, tree = CONFIGS[name], params(CONFIGS[name])
    whole = prompt(cfg, [2, 4], [3, 1], images=2, padding=1)
    before = fingerprint(tree, whole)
    for fn in (lambda: pg.prefill(tree, whole, cfg, 2), lambda: grad(loss)(tree, whole, cfg)):
        assert fingerprint(fn()) == fingerprint(fn())
    assert fingerprint(tree, whole) == before


@given(configs, seeds)
def test_a_picture_that_all_rows_share_is_encoded_once_and_means_the_same(cfg, seed):
    tree, given = params(cfg, seed), prompt(cfg, [2, 4, 3], [1, 0, 2], seed=seed)
    shared = given._replace(pixels=given.pixels[:1].expand(3, -1, -1, -1, -1))
    encoded = []
    with pytest.MonkeyPatch.context() as patch:
        once = siglip.encode_image
        patch.setattr(siglip, "encode_image", lambda p, x, *rest: encoded.append(len(x)) or once(p, x, *rest))
        found = pg.forward(tree, shared, cfg)
    assert encoded == [1]
    apart = shared._replace(pixels=shared.pixels.contiguous())
    torch.testing.assert_close(found[given.valid], pg.forward(tree, apart, cfg)[given.valid], atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_blocks_that_read_a_shared_picture_are_wrapped_too(rows):
    cfg, read = CONFIGS["gemma"], []

    def wrap(part):
        return lambda p, x, *rest: read.append(len(x)) or part(p, x, *rest)

    pixels = torch.rand(1, 1, 3, 28, 28).expand(rows, -1, -1, -1, -1)
    assert paligemma.encode_images(params(cfg), pixels, cfg, wrap=wrap).shape == (rows, 4, cfg.text.width)
    assert read == [1] * cfg.vision.layers


@given(configs, seeds)
def test_each_row_has_its_own_gradient_of_a_picture_that_all_rows_share(cfg, seed):
    tree, given = params(cfg, seed), prompt(cfg, [2, 4, 3], [1, 0, 2], seed=seed)
    shared = given.pixels[:1].expand(3, -1, -1, -1, -1)

    def second(pixels):
        return pg.forward(tree, given._replace(pixels=pixels), cfg)[1, 0].sum()

    expected = grad(second)(shared.contiguous())
    assert expected[1].any()
    assert not expected[0].any()
    found = shared.detach().requires_grad_()
    for mine in (grad(second)(shared), torch.autograd.grad(second(found), found)[0]):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-3)  # float32


@given(configs, seeds, st.data())
def test_logits_of_allowed_tokens_are_those_of_all_tokens_at_their_places(cfg, seed, data):
    tree, given = params(cfg, seed), prompt(cfg, [2, 4], [1, 0], seed=seed)
    ids = st.integers(0, cfg.text.vocab - 1)
    if data.draw(st.booleans()):
        allowed = torch.tensor(data.draw(st.lists(ids, min_size=1, max_size=5)))
        places = allowed
    else:
        first, last = sorted([data.draw(ids), data.draw(ids)])
        allowed, places = range(first, last + 1), torch.arange(first, last + 1)
    token = torch.tensor([3, 5])
    full, cache = pg.prefill(tree, given, cfg, 2)
    found, _ = pg.prefill(tree, given, cfg, 2, allowed=allowed)
    torch.testing.assert_close(found, full[:, places], atol=1e-5, rtol=0)  # float32, products of other widths
    full, _ = pg.decode(tree, token, cache, cfg)
    found, _ = pg.decode(tree, token, cache, cfg, allowed=allowed)
    torch.testing.assert_close(found, full[:, places], atol=1e-5, rtol=0)
    best = pg.sample.among(allowed, pg.sample.greedy(found))
    torch.testing.assert_close(full[torch.arange(2), best], full[:, places].amax(-1), atol=1e-5, rtol=0)


def test_a_range_of_allowed_tokens_copies_nothing_of_the_head_and_must_be_of_consecutive_tokens():
    cfg = CONFIGS["gemma"]
    tree = params(cfg)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma, "linear", lambda x, w: seen.append(w) or ops.linear(x, w))
        gemma.unembed(tree.language, torch.ones(2, cfg.text.width), cfg.text, allowed=range(7, 9))
    assert seen[0].shape[0] == 2
    assert seen[0].data_ptr() == tree.language.embed[7].data_ptr()
    assert gemma.head_rows(range(64), cfg.text) == slice(0, 64)
    for wrong in (range(5, 5), range(0, 9, 2), range(60, 65), range(-2, 3)):
        with pytest.raises(SettingError, match="expected one or more consecutive tokens of 0 to 63"):
            gemma.unembed(tree.language, torch.ones(2, cfg.text.width), cfg.text, allowed=wrong)


def test_a_cache_has_room_for_as_many_tokens_as_are_asked_for_and_not_for_fewer_than_none():
    cfg, given = CONFIGS["gemma"], prompt(CONFIGS["gemma"], [3], [2])
    length = VISION.tokens + 5
    for size in (0, 1, 4):
        _, cache = pg.prefill(params(cfg), given, cfg, size)
        assert cache.slots == length + size
    assert pg.decode(params(cfg), torch.tensor([1]), cache, cfg)[1].slots == cache.slots
    with pytest.raises(SettingError, match="size is -1, expected room for 0 or more tokens"):
        pg.prefill(params(cfg), given, cfg, -1)


def test_a_mistake_in_what_is_allowed_is_known_before_a_picture_is_read():
    cfg, given = CONFIGS["gemma"], prompt(CONFIGS["gemma"], [3], [2])
    with pytest.raises(SettingError, match="expected one or more consecutive tokens"):
        pg.prefill(params(cfg), given._replace(pixels=None), cfg, 1, allowed=range(5, 5))


@pytest.mark.parametrize("name", CONFIGS)
def test_whatever_is_made_is_made_where_the_parameters_are(name):
    cfg, tree = CONFIGS[name], paligemma.abstract(CONFIGS[name])
    for images in (0, 2):
        given = pg.tree.map(lambda leaf: leaf.to("meta"), prompt(cfg, [3, 1], [0, 2], images=images))
        with Watched() as watched:
            pg.forward(tree, given, cfg)
            logits, cache = pg.prefill(tree, given, cfg, 3)
            logits, _ = pg.decode(tree, pg.sample.greedy(logits), cache, cfg)
            pg.sample.draw(logits, logits[:, 0])
        assert watched.devices == {"meta"}


def test_a_seed_decides_the_parameters_to_train_from_and_it_is_0_where_none_is_given():
    cfg = CONFIGS["gemma"]
    first, same, other = (pg.tree.flatten(paligemma.init(cfg, *seed)) for seed in ((), (0,), (1,)))
    assert all(torch.equal(first[path], same[path]) for path in first)
    assert not torch.equal(first["projector"], other["projector"])


def test_no_pictures_are_no_tokens_in_the_dtype_of_the_weights():
    cfg = CONFIGS["gemma"]
    tree = pg.tree.map(torch.Tensor.bfloat16, params(cfg))
    found = paligemma.encode_images(tree, torch.zeros(2, 0, 3, 28, 28), cfg)
    assert found.shape == (2, 0, cfg.text.width)
    assert found.dtype == torch.bfloat16


def test_the_factor_of_text_is_rounded_to_the_dtype_of_the_weights_first():
    cfg = replace(CONFIGS["gemma"].text, width=2048)
    table = torch.randn(4, 2048).bfloat16()
    found = gemma.embed(gemma.Params(table, (), table[0]), torch.tensor([[2, 1]]), cfg)
    assert torch.equal(found[0], (table[[2, 1]].double() * 45.25).bfloat16())  # the root is 45.2548


@pytest.mark.parametrize("allowed", [None, range(3, 9), torch.tensor([5, 2, 7])], ids=["all", "range", "ids"])
def test_ids_that_are_no_tokens_have_logits_of_minus_infinity(allowed):
    cfg, tree = CONFIGS["gemma"].text, params(CONFIGS["gemma"]).language
    x = torch.randn(2, 3, cfg.width)
    plain = gemma.unembed(tree, x, cfg, allowed=allowed)
    logits = gemma.unembed(tree, x, replace(cfg, masked=((4, 6), (7, 8))), allowed=allowed)
    ids = range(cfg.vocab) if allowed is None else [int(id) for id in allowed]
    masked = torch.tensor([id in (4, 5, 7) for id in ids])
    assert (logits[..., masked] == -torch.inf).all()
    assert torch.equal(logits[..., ~masked], plain[..., ~masked])


@pytest.mark.parametrize("rows", [slice(3), torch.tensor([2, 0, 1])], ids=["a range", "ids"])
def test_ids_that_are_no_tokens_are_masked_where_the_logits_are(rows):
    cfg = replace(CONFIGS["gemma"].text, masked=((1, 2),))
    logits = gemma.mask_non_tokens(torch.zeros(2, 3), rows, cfg)
    assert (logits[0] < 0).tolist() == ([False, True, False] if isinstance(rows, slice) else [False, False, True])
    with torch.device("meta"):  # the default device does not matter
        assert torch.equal(gemma.mask_non_tokens(torch.zeros(2, 3, device="cpu"), rows, cfg), logits)


def test_the_first_token_without_a_slot_has_logits_of_nan_if_no_length_can_be_read():
    cfg = CONFIGS["gemma"]
    tree = params(cfg)
    _, cache = pg.prefill(tree, prompt(cfg, [3], [2]), cfg, 1)
    tokens = torch.tensor([[[1, 2]]])
    (logits,) = vmap(lambda each: pg.extend(tree, each, cache, cfg)[0])(tokens)
    assert logits.isnan().any(-1).tolist() == [[False, True]]


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_frees_the_keys_and_values_of_a_layer_and_the_gate_of_an_mlp(name):
    cfg, freed = CONFIGS[name], {}
    of_first = {"language.0.k", "language.0.v", "language.0.rot_k", "language.0.gate"}

    def watch(name, x):
        if name in of_first:
            freed[name] = weakref.ref(x)
        if name == "language.0.mlp_hidden":
            assert freed["language.0.gate"]() is None
        if name == "language.2.resid_pre":
            assert [name for name, ref in freed.items() if ref() is not None] == []
        return x

    with torch.no_grad():
        pg.forward(params(cfg), prompt(cfg, [3, 2], [2, 0]), cfg, watch)
    assert freed.keys() == of_first
