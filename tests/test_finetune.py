"""Loss and gradient against transformers, batches in parts, freezing, memory, and runs that resume bitwise equal."""

import re
import weakref
from contextlib import contextmanager
from dataclasses import replace
from math import cos, pi

import pytest
import reference
import torch
from cases import CONFIGS, configs, made, params, prompt, seeds, text_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import pgfunc as pg
from pgfunc import gemma, paligemma, siglip, tree
from pgfunc.checkpoint import hf
from pgfunc.checkpoint.tables import to_arrays
from pgfunc.errors import CheckpointError, NumericalError, SettingError
from pgfunc.laws import ragged
from pgfunc.train import data, finetune, fit, run

CFG = CONFIGS["gemma2"]


def rows(batch: pg.Prompt, index) -> pg.Prompt:
    return tree.map(lambda leaf: leaf[index], batch)


def assert_trees(actual, expected, **tolerance) -> None:
    actual, expected = tree.flatten(actual), tree.flatten(expected)
    assert actual.keys() == expected.keys()
    for path in expected:
        torch.testing.assert_close(
            actual[path], expected[path], msg=lambda text, path=path: f"{path}: {text}", **tolerance
        )


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", reference.VARIANTS)
@pytest.mark.parametrize("images", [1, 2])
def test_loss_and_gradient_equal_transformers(variant, images, tmp_path, monkeypatch):
    # without rows after the vocabulary, which transformers includes in the softmax
    text = reference.VARIANTS[variant] | {"vocab_size": reference.VOCAB}
    monkeypatch.setitem(reference.VARIANTS, variant, text)
    reference.save_random(tmp_path, variant)
    model, other = pg.load(tmp_path, device="cpu"), reference.load(tmp_path)
    batch = prompt(model.cfg, [2, 5, 3], [9, 1, 4], images=images, padding=2)
    theirs = reference.inputs(batch, model.cfg)
    labels = theirs["input_ids"].masked_fill(theirs["token_type_ids"] == 0, -100)
    expected = other(**theirs, labels=labels).loss
    expected.backward()
    grads, value = torch.func.grad_and_value(finetune.loss)(model.params, batch, model.cfg)
    torch.testing.assert_close(value, expected.detach(), atol=1e-5, rtol=0)  # float32, losses near 5
    table = hf.table(model.cfg, {"vision": "vision_tower.", "projector": "", "language": "language_model."})
    actual = {name.removeprefix("model."): weight.grad for name, weight in other.named_parameters()}
    assert_trees(to_arrays(table, grads), actual, atol=1e-4, rtol=0)  # float32; the largest error measured was 1e-6


@given(st.data())
def test_loss_is_the_mean_negative_logprob_of_the_suffix(data):
    cfg = data.draw(configs)
    batch = made(data.draw(ragged().filter(lambda rows: min(rows.suffix) > 0)), cfg)
    values = params(cfg, data.draw(seeds))
    logprobs = pg.forward(values, batch, cfg).log_softmax(-1)
    terms = [
        -logprobs[row, index - 1, batch.tokens[row, index]]
        for row, index in (batch.causal & batch.valid).nonzero().tolist()
    ]
    total, count = finetune.loss_terms(values, batch, cfg)
    assert count == len(terms)
    torch.testing.assert_close(total, torch.stack(terms).sum(), atol=1e-4, rtol=1e-5)  # float32, another order
    torch.testing.assert_close(finetune.loss(values, batch, cfg), total / len(terms))


def test_the_first_token_after_the_pictures_is_predicted_from_the_last_image_token():
    batch = prompt(CFG, [0], [3])  # without bos, as a prompt built by hand may be
    total, count = finetune.loss_terms(params(CFG), batch, CFG)
    shorter = batch._replace(causal=batch.causal & (torch.arange(3) != 0))
    assert count == 3
    assert total > 0
    assert finetune.loss_terms(params(CFG), shorter, CFG)[1] == 2


def test_padding_and_prefix_tokens_do_not_change_the_loss():
    batch, values = prompt(CFG, [3, 4], [2, 5], padding=2), params(CFG)
    ended = batch.tokens.clone()
    ended[~batch.valid] = 7
    assert torch.equal(finetune.loss(values, batch._replace(tokens=ended), CFG), finetune.loss(values, batch, CFG))
    turned = batch._replace(valid=batch.causal.clone() | batch.valid)
    assert torch.equal(finetune.loss(values, turned, CFG), finetune.loss(values, batch, CFG))


def test_the_tied_embedding_gets_gradients_as_input_and_as_output():
    batch, values = prompt(CFG, [3], [4]), params(CFG)
    embed = torch.func.grad(finetune.loss)(values, batch, CFG).language.embed
    read = batch.tokens.unique()
    never_read = [id for id in range(CFG.text.vocab) if id not in read]
    assert (embed[: CFG.text.vocab].norm(dim=1) > 0).all(), "every row is scored as a possible answer"
    assert (embed[CFG.text.vocab :] == 0).all(), "rows after the vocabulary are neither read nor scored"
    scored = embed[never_read].norm(dim=1).max()
    assert (embed[batch.tokens[0, 0]].norm() > scored).all(), "a row that is read also gets the gradient of the input"


# --- the gradient ----------------------------------------------------------------------------------------------------


def test_the_gradient_equals_torch_funcs():
    batch, values = prompt(CFG, [2, 4], [5, 1]), params(CFG)
    expected, value = torch.func.grad_and_value(finetune.loss)(values, batch, CFG)
    grads, actual = finetune.gradient(lambda p: p, values, [batch], CFG)
    torch.testing.assert_close(actual, value)
    assert_trees(grads, expected, atol=1e-6, rtol=1e-4)  # float32, another order of sums
    assert not any(leaf.requires_grad for leaf in tree.flatten((grads, values, actual)).values())


def test_without_pictures_the_gradient_of_the_encoder_is_zero():
    grads, _ = finetune.gradient(lambda p: p, params(CFG), [prompt(CFG, [2], [3], images=0)], CFG)
    assert all((leaf == 0).all() for leaf in tree.flatten(grads.vision).values())


@given(st.data())
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(data):
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=2, max_size=5))
    batch = prompt(CFG, [p for p, _ in lengths], [s for _, s in lengths], seed=data.draw(seeds))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1))))
    parts = [rows(batch, slice(a, b)) for a, b in zip([0, *cuts], [*cuts, len(lengths)], strict=True)]
    values = params(CFG, dtype=torch.float64)
    parts, batch = [tree.map(_double, part) for part in parts], tree.map(_double, batch)
    full, cut = (finetune.gradient(lambda p: p, values, each, CFG) for each in ([batch], parts))
    torch.testing.assert_close(cut[1].double(), full[1].double(), rtol=1e-5, atol=1e-5)
    assert_trees(cut[0], full[0], atol=1e-6, rtol=1e-5)  # some rotations and logits are float32


def test_leaves_that_enter_as_a_sum_have_one_gradient():
    """Autograd returns the same tensor for both leaves, so adding parts in place would count it twice."""
    values = params(CFG)
    half = {"one": values.projector / 2, "other": values.projector / 2}
    parts = [prompt(CFG, [2], [5]), prompt(CFG, [4], [1], seed=1)]
    expected, _ = finetune.gradient(lambda p: values._replace(projector=p), values.projector, parts, CFG)
    grads, _ = finetune.gradient(lambda p: values._replace(projector=p["one"] + p["other"]), half, parts, CFG)
    for grad in grads.values():
        torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-4)  # float32


def _double(leaf):
    return leaf.double() if leaf.is_floating_point() else leaf


def test_bfloat16_computation_trains_float32_weights():
    batch, values = prompt(CFG, [2, 4], [5, 3]), tree.flatten(params(CFG))
    like = params(CFG)

    def low(trained):
        return tree.replace(like, {path: leaf.bfloat16() for path, leaf in trained.items()})

    grads, loss = finetune.gradient(low, values, [batch], CFG)
    exact, expected = finetune.gradient(lambda trained: tree.replace(like, trained), values, [batch], CFG)
    assert {leaf.dtype for leaf in grads.values()} == {torch.float32}
    assert loss != expected
    torch.testing.assert_close(loss, expected, atol=0.05, rtol=0)  # bf16: eight bits
    for path in ("language.embed", "projector"):
        assert torch.cosine_similarity(grads[path].flatten(), exact[path].flatten(), 0) > 0.99


# --- freezing --------------------------------------------------------------------------------------------------------


def test_select_leaves_out_paths_that_match():
    values = params(CFG)
    chosen = finetune.select(values, ["vision.*", "*norm"])
    assert chosen.keys() == {
        path for path in tree.flatten(values) if not path.startswith("vision.") and not path.endswith("norm")
    }
    assert finetune.select(values).keys() == tree.flatten(values).keys()


@pytest.mark.parametrize(("freeze", "differentiated"), [(["vision.*"], True), (["vision.*", "projector*"], False)])
def test_frozen_parameters_are_not_differentiated(freeze, differentiated, monkeypatch):
    required = {}

    def encode(params, pixels, cfg, wrap):
        required["patches"] = siglip.encode_image(params.vision, pixels[:, 0], cfg.vision, wrap=wrap).requires_grad
        image = paligemma.encode_images(params, pixels, cfg, wrap=wrap)
        required["tokens"] = image.requires_grad
        return image

    monkeypatch.setattr(finetune, "encode_images", encode)
    values = params(CFG)
    finetune.gradient(lambda p: tree.replace(values, p), finetune.select(values, freeze), [prompt(CFG, [2], [3])], CFG)
    assert required == {"patches": False, "tokens": differentiated}


@pytest.mark.parametrize("freeze", [["visoin.*"], ["vision.*", "language.layer.*"], ["*"]])
def test_a_pattern_that_matches_nothing_or_everything_is_an_error(freeze):
    with pytest.raises(SettingError, match=r"matches none of \d+ paths|leaves nothing to train"):
        finetune.select(params(CFG), freeze)


# --- memory ----------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of live storages that operations have created."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage()) not in self.known:
                size = storage.nbytes()
                self.known.add(storage)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, size)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


@contextmanager
def measured():
    with Live() as live:
        yield live


def peak(fn) -> int:
    with measured() as live:
        fn()
    return live.peak


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_recomputing_gives_equal_gradients_with_less_memory(name):
    cfg = CONFIGS[name]
    cfg = replace(cfg, text=replace(cfg.text, layers=7), vision=replace(cfg.vision, layers=2))
    batch, values = prompt(cfg, [6] * 8, [10] * 8), params(cfg)
    plain = finetune.gradient(lambda p: p, values, [batch], cfg)
    recomputing = finetune.gradient(lambda p: p, values, [batch], cfg, recompute=True)
    assert_trees(recomputing, plain, atol=0, rtol=0)
    without, recomputed = (
        peak(lambda r=r: finetune.gradient(lambda p: p, values, [batch], cfg, recompute=r)) for r in (False, True)
    )
    assert recomputed < 0.6 * without, (recomputed, without)


def test_every_block_of_both_towers_is_recomputed(monkeypatch):
    wrapped, recomputed = [], finetune.recomputed
    monkeypatch.setattr(finetune, "recomputed", lambda block: wrapped.append(block) or recomputed(block))
    finetune.loss(params(CFG), prompt(CFG, [2], [3]), CFG, recompute=True)
    assert wrapped == [siglip.block] * CFG.vision.layers + [gemma.block] * CFG.text.layers


def test_a_trained_weight_takes_28_bytes_at_the_peak_of_a_step(examples):
    """In float32: weights, gradient and AdamW's two means, and new copies of all but the gradient: 7 x 4 bytes."""
    job = run.Job(pg.load(dtype="bfloat16", device="cpu"), examples[:2], run.Settings(steps=2, dtype="bfloat16"))

    def two_steps():
        advanced(job, run.start(job), 2)

    assert peak(two_steps) == pytest.approx(28 * tree.count(job.model.params), rel=0.01)


def test_torch_func_needs_more_memory_than_grad_and_value():
    batch, values = prompt(CFG, [6] * 8, [10] * 8), params(CFG)
    ours = peak(lambda: finetune.grad_and_value(lambda p: finetune.loss_terms(p, batch, CFG), values))
    theirs = peak(lambda: torch.func.grad_and_value(finetune.loss_terms, has_aux=True)(values, batch, CFG))
    assert 1.5 * ours < theirs, "when this fails, use torch.func's"


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[data.Example]:
    """Seven rows: an epoch of three batches ends with a smaller one. One row has two pictures, one has none."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        Image.new("RGB", (20, 20), (80 * i, 40, 200 - 80 * i)).save(folder / f"{i}.png")
    images = [(0,), (1,), (2,), (0, 1), (), (1,), (0,)]
    return [
        data.Example(f"data:{i}", tuple(folder / f"{n}.png" for n in each), "ab" * (i % 3), "xyz"[: 1 + i % 3])
        for i, each in enumerate(images)
    ]


def make_job(examples, **settings) -> run.Job:
    values = {"steps": 6, "batch_size": 3, "learning_rate": 0.01, "warmup": 2, "weight_decay": 0.1} | settings
    return run.Job(text_model(), examples, run.Settings(**values))


def advanced(job: run.Job, state: run.State, steps: int) -> run.State:
    frozen = run.cast(job)
    for _ in range(steps):
        state, _ = run.advance(job, state, frozen)
    return state


KINDS = {
    "all": {},
    "frozen": {"freeze": ("vision.*",)},
    "lora": {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": ("language.*.q", "vision.*.up")},
    "bf16": {"dtype": "bfloat16", "accumulate": 2},
    "recompute": {"recompute": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_bitwise_equal_to_an_uninterrupted_one(kind, examples, tmp_path):
    """It stops after four of six steps: in the second epoch, whose order differs from that of the first."""
    job = make_job(examples, **KINDS[kind])
    uninterrupted = advanced(job, run.start(job), 6)
    run.save(tmp_path / "state.safetensors", job, advanced(job, run.start(job), 4))
    second = make_job(examples, **KINDS[kind])
    resumed = advanced(second, run.resume(tmp_path / "state.safetensors", second), 2)
    assert_trees(resumed, uninterrupted, atol=0, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_each_setting_changes_the_result(examples):
    """No run changes the parameters that it starts from."""
    before = tree.map(torch.clone, text_model().params)
    plain = make_job(examples)
    ends = {"all": advanced(plain, run.start(plain), 2)}
    for name, value in {"seed": 1, "batch_size": 2, "learning_rate": 0.02, "warmup": 0, "weight_decay": 0.0,
                        "clip": 0.1, "dtype": "bfloat16"}.items():  # fmt: skip
        other = make_job(examples, **{name: value})
        ends[name] = advanced(other, run.start(other), 2)
    embeds = {name: end.trained["language.embed"] for name, end in ends.items()}
    for name in ends.keys() - {"all"}:
        assert not torch.equal(embeds[name], embeds["all"]), name
    assert_trees(plain.model.params, before, atol=0, rtol=0)


def test_a_run_equals_a_plain_torch_loop(examples):
    """The loop uses only torch: backward, clip_grad_norm_, AdamW, and the schedule as a formula."""
    job = make_job(examples, clip=0.5)
    cfg, base = job.model.cfg, job.model.params
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), tree.flatten(base))
    groups = [{"params": [leaf for leaf in leaves.values() if (leaf.dim() > 1) == matrices], "weight_decay": decay}
              for matrices, decay in ((True, 0.1), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    state, frozen = run.start(job), run.cast(job)
    for step in range(6):
        chosen = [examples[row] for row in data.batch(0, step, 3, len(examples))]
        terms = [finetune.loss_terms(tree.replace(base, leaves), prompt, cfg)
                 for prompt in data.prompts(job.model, chosen)]  # fmt: skip
        optimizer.zero_grad()
        loss = sum(total for total, _ in terms) / sum(count for _, count in terms)
        loss.backward()
        for leaf in leaves.values():
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * ((step + 1) / 3 if step < 2 else 0.5 + 0.5 * cos(pi * (step - 2) / 4))
        optimizer.step()
        state, report = run.advance(job, state, frozen)
        assert report.loss == pytest.approx(float(loss.detach()), abs=1e-3)
        assert report.norm == pytest.approx(float(norm), rel=1e-2)
        assert (report.step, report.rate) == (step + 1, pytest.approx(optimizer.param_groups[0]["lr"]))
    for path, leaf in leaves.items():
        # a bias of the keys shifts all scores of a query equally, so its gradient is rounding, which Adam scales up
        if not path.endswith("k_bias"):
            assert (state.trained[path] - leaf.detach()).abs().mean() < 2e-4, path  # float32; the rates add up to 0.03


def test_the_parts_of_a_batch_do_not_matter(examples):
    ends = [advanced(each, run.start(each), 1) for each in (make_job(examples), make_job(examples, accumulate=3))]
    for path, mean in tree.flatten(ends[0].optimizer.first).items():
        torch.testing.assert_close(tree.flatten(ends[1].optimizer.first)[path], mean, atol=1e-6, rtol=1e-3)  # float32


def test_frozen_leaves_are_the_same_tensors_in_the_finished_model(examples):
    job = make_job(examples, **KINDS["frozen"])
    model = run.finished(job, advanced(job, run.start(job), 2))
    for path, leaf in tree.flatten(model.params).items():
        assert (leaf is tree.flatten(job.model.params)[path]) == path.startswith("vision."), path


def test_training_lowers_the_loss(examples):
    job = make_job(examples, steps=40, batch_size=7)
    frozen, state = run.cast(job), run.start(job)
    before = run.evaluate(job, state, frozen, examples)
    state, report = run.advance(job, state, frozen)
    assert report.loss == pytest.approx(before, rel=1e-5)  # the loss of the whole set, in one batch or row by row
    after = run.evaluate(job, advanced(job, state, 39), frozen, examples)
    assert after < 0.3 * before


@pytest.mark.parametrize(("changed", "named"), [
    ({"learning_rate": 0.02}, "learning-rate 0.01, not 0.02"),
    ({"freeze": ("vision.*",)}, r"freeze \[\], not"),
    ({"steps": 7}, "steps 6, not 7"),
])  # fmt: skip
def test_a_run_with_other_settings_is_not_resumed(changed, named, examples, tmp_path):
    job = make_job(examples)
    run.save(tmp_path / "state.safetensors", job, run.start(job))
    with pytest.raises(SettingError, match=named):
        run.resume(tmp_path / "state.safetensors", make_job(examples, **changed))


def test_a_run_on_other_data_is_not_resumed(examples, tmp_path):
    run.save(tmp_path / "state.safetensors", make_job(examples), run.start(make_job(examples)))
    with pytest.raises(SettingError, match="with data "):
        run.resume(tmp_path / "state.safetensors", make_job([*examples[:6], examples[6]._replace(suffix="z")]))


def test_a_run_on_another_model_is_not_resumed(examples, tmp_path):
    run.save(tmp_path / "state.safetensors", make_job(examples), run.start(make_job(examples)))
    with pytest.raises(SettingError, match="with model "):
        run.resume(tmp_path / "state.safetensors", make_job(examples)._replace(model=text_model(seed=1)))


def test_the_error_about_a_damaged_state_names_its_file(examples, tmp_path):
    path, job = tmp_path / "state.safetensors", make_job(examples)
    run.save(path, job, run.start(job))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        run.resume(path, job)


def test_a_loss_that_is_nan_stops_the_run(examples):
    job = make_job(examples)
    state = run.start(job)
    broken = state._replace(trained=state.trained | {"projector": state.trained["projector"] * float("nan")})
    with pytest.raises(NumericalError, match="step 1: loss nan"):
        run.advance(job, broken, run.cast(job))


@pytest.mark.parametrize("settings", [
    {"steps": 0}, {"batch_size": 0}, {"accumulate": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")},
    {"warmup": -1}, {"weight_decay": -0.1}, {"lora_rank": -1}, {"lora_rank": 2}, {"dtype": "float16"}, {"seed": -1},
], ids=repr)  # fmt: skip
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(SettingError):
        run.Settings(**({"steps": 1} | settings))


def test_lora_and_freezing_exclude_each_other(examples):
    with pytest.raises(SettingError, match="leave out freeze"):
        run.start(make_job(examples, **KINDS["lora"], freeze=("vision.*",)))


# --- a folder --------------------------------------------------------------------------------------------------------


def test_an_interrupted_fit_continues_to_the_same_files(examples, tmp_path):
    def stop(entry):
        if entry["step"] == 5:
            raise KeyboardInterrupt

    job, uninterrupted, interrupted = make_job(examples), tmp_path / "uninterrupted", tmp_path / "interrupted"
    fit.fit(job, uninterrupted, fit.begin(job, uninterrupted), examples[:2])
    with pytest.raises(KeyboardInterrupt):
        fit.fit(job, interrupted, fit.begin(job, interrupted), examples[:2], watch=stop)
    assert (interrupted / fit.STATE).exists()
    with (interrupted / fit.LOG).open("a") as log:
        log.write('{"step": 6, "loss": 1.0}\n')  # this step was not saved, so it is repeated
    state = fit.begin(job, interrupted)
    assert int(state.optimizer.step) == 4  # the interrupt came before the end of the fifth
    fit.fit(job, interrupted, state, examples[:2])
    for name in ("model.safetensors", fit.LOG):
        assert (interrupted / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert not (interrupted / fit.STATE).exists()
    assert [entry["step"] for entry in fit.read_log(interrupted) if "valid" in entry] == [3, 6]
    with pytest.raises(SettingError, match="holds a model already"):
        fit.begin(job, interrupted)


def test_an_interrupt_while_the_model_is_written_loses_nothing(examples, tmp_path, monkeypatch):
    job, uninterrupted, interrupted = make_job(examples), tmp_path / "uninterrupted", tmp_path / "interrupted"
    fit.fit(job, uninterrupted, fit.begin(job, uninterrupted))
    with monkeypatch.context() as patched:
        patched.setattr(fit, "draw", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit.fit(job, interrupted, fit.begin(job, interrupted))
    state = fit.begin(job, interrupted)
    assert int(state.optimizer.step) == 6
    fit.fit(job, interrupted, state)
    assert {path.name for path in interrupted.iterdir()} == {path.name for path in uninterrupted.iterdir()}
    for name in ("model.safetensors", fit.LOG):
        assert (interrupted / name).read_bytes() == (uninterrupted / name).read_bytes()


def interrupt(*args):
    raise KeyboardInterrupt


def test_a_truncated_last_line_of_the_log_is_dropped(examples, tmp_path):
    job = make_job(examples)
    fit.begin(job, tmp_path)
    run.save(tmp_path / fit.STATE, job, advanced(job, run.start(job), 1))
    (tmp_path / fit.LOG).write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    fit.begin(job, tmp_path)
    assert (tmp_path / fit.LOG).read_text() == '{"step": 1, "loss": 2.5}\n'
    (tmp_path / fit.LOG).write_text('{"step": 1, "lo\n{"step": 2, "loss": 2.5}\n')
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / fit.LOG}: not the log of a run")):
        fit.begin(job, tmp_path)


def test_the_state_is_saved_every_two_steps(examples, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(run, "save", lambda path, job, state: steps.append(int(state.optimizer.step)))
    fit.fit(make_job(examples), tmp_path, fit.begin(make_job(examples), tmp_path), every=2)
    assert steps == [2, 4, 6]
