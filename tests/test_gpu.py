"""The same functions on a CUDA device: equal to the CPU, and at full size equal to themselves. Skipped without one."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from cases import CONFIGS, params, prompt, text_model

import pgfunc as pg
from pgfunc import bench, laws, ops, paligemma, tokenizer
from pgfunc.checkpoint import shipped
from pgfunc.objects import vqvae

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def to(tree, device: str):
    return pg.tree.map(lambda leaf: leaf.to(device), tree)


@pytest.mark.parametrize("name", CONFIGS)
def test_cuda_equals_cpu(name):
    cfg, tree, given = CONFIGS[name], params(CONFIGS[name]), prompt(CONFIGS[name], [2, 5], [4, 3])
    expected = pg.forward(tree, given, cfg)
    on_gpu, given_gpu = to(tree, "cuda"), to(given, "cuda")
    found = pg.forward(on_gpu, given_gpu, cfg).cpu()
    torch.testing.assert_close(found[given.valid], expected[given.valid], atol=1e-4, rtol=0)  # float32, no tf32
    logits, cache = pg.prefill(on_gpu, given_gpu, cfg, 2)
    token = torch.tensor([1, 2])
    again, _ = pg.decode(on_gpu, token.cuda(), cache, cfg)
    plain_logits, plain = pg.prefill(tree, given, cfg, 2)
    torch.testing.assert_close(logits.cpu(), plain_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(again.cpu(), pg.decode(tree, token, plain, cfg)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 4])
def test_gradients_of_padded_rows_are_numbers(dtype, heads):
    # cuDNN's own are nan where a query may see no key
    q, k, v = (torch.randn(2, 64, n, 64, device="cuda", dtype=dtype).requires_grad_() for n in (4, heads, heads))
    mask = (torch.arange(64) < torch.tensor([[50], [64]])).cuda()
    mask = mask[:, None, :] & mask[:, :, None]
    grads = torch.autograd.grad(ops.attend(q, k, v, mask, 0.125).float().sum(), (q, k, v))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(ops.attend_explicit(*wide, mask, 0.125).sum(), wide)
    for found, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(found.float(), exact, atol=0.1 if dtype is torch.bfloat16 else 1e-3, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_laws_hold_on_a_gpu(name):
    cfg, words = CONFIGS[name], tokenizer.load(shipped() / "tokenizer.json")
    system = laws.eager(to(params(cfg), "cuda"), cfg, "pgfunc", words, to(vqvae.init(3), "cuda"))
    results = laws.check(system, examples=5, derandomize=True)
    assert [(each.law.name, each.counterexample, each.why) for each in results if each.verdict == "broken"] == []
    absent = ["logits-are-those-of-the-reference", "compiled-edits-equal-edits"]
    assert [each.law.name for each in results if each.verdict == "absent"] == absent


def test_a_seed_draws_the_same_tokens_on_both_devices(tmp_path):
    pg.save(text_model(), tmp_path)
    picture = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8).numpy()
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.95, "seed": 4}
    drawn = [pg.generate(pg.load(tmp_path, device=device), picture, "a", **options)[0] for device in ("cpu", "cuda")]
    assert drawn[0].tokens == drawn[1].tokens


@pytest.mark.parametrize("compile", [False, True])
def test_a_stream_of_rows_equals_generate(compile):
    model = text_model()
    model = model._replace(params=to(model.params, "cuda"))
    pictures = [np.full((4 + i, 9 - i, 3), 40 * i, np.uint8) for i in range(5)]
    rows = [(pictures[i % 5], "what is this?"[: 3 + i % 9]) for i in range(61)]
    many = sorted(pg.generate_many(model, rows, 9, compile=compile, batch=8, workers=0), key=lambda one: one.number)
    expected = pg.generate(model, *([*column] for column in zip(*rows, strict=True)), max_new_tokens=9)
    assert len(many) == len(rows)
    for found, one in zip([result.completion for result in many], expected, strict=True):
        assert found
        assert (found.tokens, found.finish) == (one.tokens, one.finish)
        assert found.logprobs == pytest.approx(one.logprobs, abs=1e-4)  # float32, no tf32


FULL_SIZE = ["paligemma-3b-224", "paligemma2-3b-224"]


def random(cfg: pg.Config) -> pg.Params:
    """Full-size parameters in bf16, drawn on the device; vectors are not zero either, so that every leaf matters."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(path: str, leaf: torch.Tensor) -> torch.Tensor:
        out = torch.empty(leaf.shape, dtype=torch.bfloat16, device="cuda")
        out.normal_(std=0.2 if leaf.dim() == 1 else leaf[0].numel() ** -0.5, generator=generator)
        return out + 1 if path.endswith("_scale") else out

    return pg.tree.map_with_path(draw, paligemma.abstract(cfg))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_at_full_size_logits_equal_transformers(name, tmp_path):
    cfg = pg.PUBLISHED[name]
    # some versions of transformers 5 leave out PaliGemma 2's final softcap: compare what goes into it
    cfg = replace(cfg, text=replace(cfg.text, final_softcap=0.0))
    pg.save(pg.Model(cfg, random(cfg), None), tmp_path)
    model = pg.load(tmp_path, "float32", "cuda")
    assert model.cfg == cfg
    other = reference.load(tmp_path, "float32").cuda()
    given = to(prompt(cfg, [6, 9], [7, 5]), "cuda")
    ours = pg.forward(model.params, given, cfg)[given.valid]
    error = ours - reference.logits(other, given, cfg)[given.valid]
    print(f"{name}: relative error {error.norm() / ours.norm():.1e}, worst {error.abs().max():.1e} of {ours.std():.2f}")
    assert error.norm() < 1e-5 * ours.norm()  # float32, up to 53 layers


@pytest.mark.parametrize("name", FULL_SIZE)
def test_at_full_size_decode_equals_longer_prefill(name):
    cfg = pg.PUBLISHED[name]
    tree = random(cfg)
    whole = to(prompt(cfg, [6, 9], [5, 5]), "cuda")
    expected = pg.forward(tree, whole, cfg)
    length = whole.valid.sum(1)
    first = whole._replace(valid=whole.valid & ~whole.causal, causal=whole.causal & False)
    rows = torch.arange(2, device="cuda")
    with torch.inference_mode():
        logits, cache = pg.prefill(tree, first, cfg, 5)
        for step in range(6):
            here = length - 6 + step
            error = (logits - expected[rows, here]).norm() / expected[rows, here].norm()
            assert error < 0.03  # bf16, up to 53 layers
            if step < 5:
                logits, cache = pg.decode(tree, whole.tokens[rows, here + 1], cache, cfg)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_at_full_size_the_laws_of_the_model_hold(name):
    cfg = pg.PUBLISHED[name]
    tree = pg.tree.map(torch.Tensor.float, random(cfg))
    results = laws.check(laws.eager(tree, cfg), laws.MODEL, examples=5, derandomize=True)
    for result in results:
        print(f"{name} {result.law.name} {result.verdict} {result.examples} {result.worst:.1e} {result.why}")
    assert [(each.law.name, each.counterexample, each.why) for each in results if each.verdict == "broken"] == []
    assert [each.law.name for each in results if each.verdict == "absent"] == ["logits-are-those-of-the-reference"]


def test_a_benchmark_at_full_size_takes_the_weights_own_memory_and_stays_above_the_floor():
    cfg, device = pg.PUBLISHED["paligemma-3b-224"], torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tree = bench.random_params(cfg, torch.bfloat16, device)
    assert torch.cuda.max_memory_allocated() - before < 1.01 * pg.tree.nbytes(tree)  # no second copy, even of a leaf
    machine = bench.measure(device, torch.bfloat16)
    case = bench.Case(tokens=8, repeat=2, compile=False)
    for stage in bench.stages(pg.Model(cfg, tree, None), case, machine):
        print(f"{stage.name}: {1e3 * min(stage.seconds):.2f} ms, floor {1e3 * stage.floor:.2f} ms")
        assert stage.floor < 1.05 * min(stage.seconds)
