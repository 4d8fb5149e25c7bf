"""`pgfunc train`: a run from the command line, interrupted and continued; every mistake is one line."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import text_model
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

import pgfunc as pg
from pgfunc import cli, paligemma, tree
from pgfunc.cli import train as command
from pgfunc.config import PUBLISHED
from pgfunc.errors import CheckpointError, DataError, NumericalError, PgfuncError, SettingError
from pgfunc.evaluation import tasks
from pgfunc.train import fit, lora

GOOD = {"image": "a.png", "prefix": "caption en", "suffix": "ab"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model, two pictures, five lines to train on and two to validate on."""
    model = text_model()
    pg.save(model, tmp_path / "model")
    for name, colour in {"a.png": "red", "b.png": "blue"}.items():
        Image.new("RGB", (20, 20), colour).save(tmp_path / name)
    rows = [GOOD, GOOD | {"image": "b.png", "suffix": "xyz"}] * 3
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    return ["train", str(folder / "data.jsonl"), "--out", str(folder / "out"), "--model", str(folder / "model"),
            "--device", "cpu", "--batch-size", "2", *more]  # fmt: skip


def run(folder: Path, *more: str):
    return CliRunner().invoke(cli.app, arguments(folder, *more), catch_exceptions=False)


def test_a_run_leaves_a_model_a_log_and_a_curve(folder):
    more = ("--valid", str(folder / "valid.jsonl"), "--valid-lines", "0")
    result = run(folder, "--epochs", "20", "--learning-rate", "0.02", *more)
    assert result.exit_code == 0, result.output
    out = folder / "out"
    assert re.search(r"out: 60 steps, loss \d\.\d{4} -> 0\.\d{4}, validation 0\.\d{4}$", result.stdout.strip())
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "log.jsonl", "loss.png", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    log = fit.read_log(out)
    assert [entry["step"] for entry in log] == list(range(1, 61))
    assert [entry["step"] for entry in log if "valid" in entry] == list(range(3, 61, 3))
    with Image.open(out / "loss.png") as curve:
        assert curve.size == (840, 480)
        assert len(curve.convert("RGB").getcolors(1 << 20) or []) > 20  # the curve is not blank
    model = pg.load(out, device="cpu")
    answers = pg.generate(model, [str(folder / "a.png"), str(folder / "b.png")], "caption en", 8)
    assert [answer.text for answer in answers] == ["ab", "xyz"]


@pytest.mark.parametrize(("more", "loading"), [
    ((), ["--model", "out"]), (("--lora-rank", "2"), ["--model", "model", "--adapter", "out"]),
])  # fmt: skip
def test_metrics_in_the_log_are_those_of_evaluate_on_the_saved_model(more, loading, folder):
    """The number of edits would be another one with other weights, or on other lines."""
    prefixes = ("ocr", "answer en ?", "ocr", "answer en !", "other", "ocr")
    valid = [GOOD | {"prefix": prefix, "suffix": "x" * i} for i, prefix in enumerate(prefixes, 1)]
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in valid))
    paths = ("--valid", str(folder / "valid.jsonl"), "--valid-lines", "2")
    result = run(folder, "--steps", "3", "--learning-rate", "0.02", *paths, *more)
    assert result.exit_code == 0, result.output
    last = fit.read_log(folder / "out")[-1]
    names = {name for name in last if name.startswith(fit.VALID)}
    assert names == {f"valid/{name}" for name in ("ocr/cer", "ocr/exact", "answer/exact", "answer/anls")}
    folders = [str(folder / word) if word in ("model", "out") else word for word in loading]
    command_line = ["evaluate", str(folder / "valid.jsonl"), "--task", "ocr", "--limit", "2", "--json"]
    done = CliRunner().invoke(cli.app, [*command_line, "--device", "cpu", *folders], catch_exceptions=False)
    metrics = {name: metric["value"] for name, metric in json.loads(done.stdout)["metrics"].items()}
    assert {f"valid/ocr/{name}": value for name, value in metrics.items()}.items() <= last.items()
    assert f"ocr/cer {last['valid/ocr/cer']:.3f}" in result.stdout
    assert last["valid/ocr/cer"] not in (0, 1)


def test_tasks_without_metrics_are_named(folder, monkeypatch):
    rows = [GOOD | {"prefix": "detect cat", "suffix": "cat"}, GOOD | {"prefix": "segment cat", "suffix": ""}]
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(folder, "--steps", "1", "--valid", str(folder / "valid.jsonl"))
    assert result.exit_code == 0
    assert "pgfunc: no metrics of detect: " in result.stderr
    assert "valid.jsonl:1: suffix has 'cat': 0 location tokens" in result.stderr
    assert "pgfunc: no metrics of segment: the model's folder has no mask decoder" in result.stderr
    assert not fit.headline(fit.read_log(folder / "out")[-1])
    shutil.rmtree(folder / "out")
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    result = run(folder, "--steps", "1", "--valid", str(folder / "valid.jsonl"))
    assert "no metrics of answers: sacrebleu is not installed" in result.stderr
    assert result.exit_code == 0


def test_lora_leaves_an_adapter(folder):
    result = run(folder, "--steps", "2", "--lora-rank", "2", "--lora-target", "language.*.q", "--lora-alpha", "6")
    assert result.exit_code == 0, result.output
    actual = lora.load(folder / "out", pg.load(folder / "model", device="cpu").cfg)
    assert actual.scale == 3
    assert actual.pairs.keys() == {f"language.layers.{i}.q" for i in range(3)}
    assert any(pair.b.any() for pair in actual.pairs.values())
    with pytest.raises(CheckpointError, match="a LoRA adapter, not a model; load its base model with adapter="):
        pg.load(folder / "out")
    merged = ["merge", str(folder / "out"), str(folder / "merged"), "--model", str(folder / "model")]
    assert CliRunner().invoke(cli.app, merged, catch_exceptions=False).exit_code == 0
    base = pg.load(folder / "model", device="cpu").params
    for path, leaf in tree.flatten(pg.load(folder / "merged", device="cpu").params).items():
        pair, before = actual.pairs.get(path), tree.flatten(base)[path]
        torch.testing.assert_close(leaf, before + 3 * pair.b @ pair.a if pair else before)
    assert json.loads((folder / "out" / lora.ADAPTER).read_text())["base_model_name_or_path"] == str(folder / "model")
    assert not (folder / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("more", "rate"), [
    ((), 3e-4), (("--lora-rank", "2"), 3e-3), (("--learning-rate", "0.5"), 0.5),
])  # fmt: skip
def test_the_default_learning_rate_depends_on_lora(more, rate, folder):
    assert run(folder, "--steps", "60", *more).exit_code == 0
    rates = [entry["rate"] for entry in fit.read_log(folder / "out")]
    assert rates[:4] == pytest.approx([rate / 4, rate / 2, rate * 3 / 4, rate])  # it rises over 5% of 60 steps
    assert max(rates) == rates[3]


def test_the_default_rate_of_a_published_model_is_that_of_big_vision():
    abstract = paligemma.abstract(PUBLISHED["paligemma-3b-224"])
    assert [command.default_rate(abstract, rank) for rank in (0, 8)] == pytest.approx([1e-5, 1e-4])


def test_too_little_memory_is_one_line(folder, monkeypatch):
    def advance(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    monkeypatch.setattr(fit.run, "advance", advance)
    with pytest.raises(SettingError, match="not enough memory on the device: raise --accumulate"):
        run(folder, "--steps", "1")


def test_frozen_parameters_do_not_change(folder):
    assert run(folder, "--steps", "1", "--freeze", "vision.*", "--freeze", "*.embed").exit_code == 0
    before, after = (tree.flatten(pg.load(folder / name, device="cpu").params) for name in ("model", "out"))
    for path, leaf in before.items():
        frozen = path.startswith("vision.") or path == "language.embed"
        assert torch.equal(leaf, after[path]) == frozen, path


def test_tensorboard_gets_every_number(folder):
    assert run(folder, "--steps", "3", "--tensorboard", "--valid", str(folder / "valid.jsonl")).exit_code == 0
    events = EventAccumulator(str(folder / "out" / "tensorboard"))
    events.Reload()
    metrics = [f"valid/caption/{name}" for name in ("bleu4", "cider", "exact")]
    assert sorted(events.Tags()["scalars"]) == ["loss", "norm", "rate", "valid", *metrics]
    log = fit.read_log(folder / "out")
    for name in ("loss", "norm", "rate", "valid", *metrics):
        expected = [(entry["step"], entry[name]) for entry in log if name in entry]
        actual = [(event.step, event.value) for event in events.Scalars(name)]
        assert torch.allclose(torch.tensor(actual), torch.tensor(expected))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_run_is_saved_and_the_same_command_continues_it(folder, number, status):
    """The signals of Ctrl-C, of a job scheduler, and of a closing terminal."""
    command_line = arguments(folder, "--steps", "40", "--learning-rate", "0.001")
    process = subprocess.Popen(
        [sys.executable, "-m", "pgfunc.cli", *command_line],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # a shell that runs the tests in the background makes them ignore this signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    log = folder / "out" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size > 0):
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert output.strip().endswith("out: stopped and saved; the same command continues the run")
    assert "Traceback" not in output
    done = len(fit.read_log(folder / "out"))
    assert 0 < done < 40
    assert (folder / "out" / "loss.png").exists()
    result = run(folder, "--steps", "40", "--learning-rate", "0.001")
    assert re.search(r"out: continuing after step \d+", result.output)
    assert [entry["step"] for entry in fit.read_log(folder / "out")] == list(range(1, 41))
    assert (folder / "out" / "model.safetensors").read_bytes() == uninterrupted_run(folder)


@pytest.mark.parametrize(("every", "saved", "message"), [
    (100, 0, "stopped; nothing was saved"),
    (2, 1, "stopped; the last save is that of step 2; the same command continues from there"),
    (2, 2, "stopped and saved; the same command continues the run"),
])  # fmt: skip
def test_the_message_after_an_interrupt_says_what_is_on_disk(every, saved, message, folder, monkeypatch):
    """The fifth step is interrupted, and so is every save after the first `saved`."""
    advance, save, saves = fit.run.advance, fit.run.save, []

    def advance_to_the_fifth(job, state, frozen):
        if int(state.optimizer.step) == 4:
            raise KeyboardInterrupt
        return advance(job, state, frozen)

    def save_the_first(path, job, state):
        saves.append(state)
        if len(saves) > saved:
            raise KeyboardInterrupt
        save(path, job, state)

    monkeypatch.setattr(fit.run, "advance", advance_to_the_fifth)
    monkeypatch.setattr(fit.run, "save", save_the_first)
    result = run(folder, "--steps", "6", "--checkpoint-every", str(every))
    assert (result.exit_code, result.stdout.strip()) == (130, f"{folder / 'out'}: {message}")


def test_the_signal_handler_is_restored(folder):
    before = signal.getsignal(signal.SIGTERM)
    assert run(folder, "--steps", "1").exit_code == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_curve_is_drawn_during_the_run(folder, monkeypatch):
    advance, curves = fit.run.advance, []

    def watched(job, state, frozen):
        curves.append((folder / "out" / "loss.png").exists())
        return advance(job, state, frozen)

    monkeypatch.setattr(fit.run, "advance", watched)
    assert run(folder, "--steps", "3", "--checkpoint-every", "1").exit_code == 0
    assert curves == [False, True, True]


@pytest.mark.parametrize(("every", "more", "message"), [
    (100, (), r"step \d: .*; nothing was saved$"),
    (1, (), r"step \d: .*; the state after step \d is in .*run\.safetensors$"),
    (100, ("--steps", "1"), r"step 1: trained\.\S+ is not finite after it; lower learning-rate.*; nothing was saved$"),
    (100, ("--lora-rank", "1"), r"step \d: .*; nothing was saved$"),
])  # fmt: skip
def test_a_run_that_diverges_is_not_saved(every, more, message, folder):
    rate = "1e38" if every == 100 else "1e18"
    with pytest.raises(NumericalError, match=message):
        run(folder, "--steps", "9", "--warmup", "0", "--learning-rate", rate, "--checkpoint-every", str(every), *more)
    assert not (folder / "out" / "config.json").exists()
    if (folder / "out" / "run.safetensors").exists():
        arrays = load_file(folder / "out" / "run.safetensors")
        assert all(array.isfinite().all() for array in arrays.values())


@pytest.mark.parametrize("input", ["data", "valid", "images", "picture", "model", "link"])
def test_the_output_folder_must_not_contain_an_input(folder, input):
    out = folder / "out"
    out.mkdir()
    command_line = arguments(folder, "--steps", "1")
    if input in ("data", "link"):
        shutil.copy(folder / "data.jsonl", out / "log.jsonl")
        (folder / "link.jsonl").symlink_to(out / "log.jsonl")
        command_line[1] = str(folder / "link.jsonl" if input == "link" else out / "log.jsonl")
        command_line += ["--images", str(folder)]
    elif input == "valid":
        shutil.copy(folder / "valid.jsonl", out)
        command_line += ["--valid", str(out / "valid.jsonl")]
    elif input == "images":
        command_line += ["--images", str(out)]
    elif input == "picture":
        shutil.copy(folder / "a.png", out / "loss.png")
        (folder / "data.jsonl").write_text(json.dumps(GOOD | {"image": "out/loss.png"}))
    else:
        shutil.copytree(folder / "model", out / "model")
        command_line[command_line.index("--model") + 1] = str(out / "model")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SettingError, match=r"--out .*, which is read"):
        CliRunner().invoke(cli.app, command_line, catch_exceptions=False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def uninterrupted_run(folder: Path) -> bytes:
    command_line = arguments(folder, "--steps", "40", "--learning-rate", "0.001")
    command_line[command_line.index("--out") + 1] = str(folder / "uninterrupted")
    assert CliRunner().invoke(cli.app, command_line).exit_code == 0
    return (folder / "uninterrupted" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("more", "message"), [
    (["--steps", "3", "--epochs", "2"], "give --epochs or --steps, not both"),
    (["--steps", "0"], "steps is 0"),
    (["--batch-size", "0"], "batch-size is 0"),
    (["--valid-lines", "-1"], "--valid-lines is -1"),
    (["--checkpoint-every", "0"], "checkpoint-every is 0"),
    (["--freeze", "visoin.*"], "'visoin.*' matches none"),
    (["--lora-rank", "2", "--lora-target", "language.*.query"], "'language.*.query' matches none"),
    (["--lora-target", "language.*.q"], "--lora-target and --lora-alpha need --lora-rank"),
    (["--lora-rank", "2", "--freeze", "vision.*"], "leave out freeze"),
    (["--dtype", "float16"], "dtype is float16, expected float32 or bfloat16"),
    (["--dtype", "int8"], "dtype is int8"),
    (["--seed", str(2**64)], f"seed is {2**64}, expected 0 or more, at most {2**31 - 1}"),
    (["--seed", "-1"], "seed is -1, expected 0 or more"),
    (["--steps", str(10**30)], f"steps is {10**30}, expected 1 or more, at most {2**31 - 1}"),
    (["--epochs", "1" + "0" * 400], "expected 1 or more, at most"),
    (["--lora-rank", str(10**9)], f"lora-rank is {10**9}, expected 1 or more, and at most 16"),
    (["--lora-rank", "1", "--lora-alpha", "inf"], "lora-alpha is inf"),
    (["--weight-decay", "inf"], "weight-decay is inf"),
    (["--weight-decay", "nan"], "weight-decay is nan"),
])  # fmt: skip
def test_invalid_settings_are_refused_before_anything_is_written(more, message, folder):
    with pytest.raises(SettingError, match=re.escape(message)):
        run(folder, *more)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["data.jsonl", "valid.jsonl"])
@pytest.mark.parametrize("line", ['{"image": "a.png"', '{"image": "none.png", "prefix": "p", "suffix": "s"}',
                                  json.dumps(GOOD | {"suffix": "long" * 40})])  # fmt: skip
def test_a_bad_line_is_named_before_training_starts(line, name, folder, monkeypatch):
    monkeypatch.setattr(fit, "fit", lambda *args: pytest.fail("training started"))
    with (folder / name).open("a") as file:
        file.write(line + "\n")
    number = len((folder / name).read_text().splitlines())
    with pytest.raises(DataError, match=rf"{name}:{number}: "):
        run(folder, "--steps", "1", "--valid", str(folder / "valid.jsonl"))
    assert not (folder / "out").exists()


def test_a_folder_that_holds_a_model_is_not_overwritten(folder):
    assert run(folder, "--steps", "1").exit_code == 0
    with pytest.raises(SettingError, match="holds a model already"):
        run(folder, "--steps", "1")


def test_an_output_folder_that_is_a_file_is_refused(folder):
    (folder / "out").write_text("")
    with pytest.raises(PgfuncError, match="out: cannot be written"):
        run(folder, "--steps", "1")


def test_a_missing_package_is_named_with_its_install_command(folder, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: name == "matplotlib" or None)
    with pytest.raises(SettingError, match=re.escape("python -m pip install 'pgfunc[train]'")):
        run(folder, "--tensorboard")
    assert not (folder / "out").exists()


def test_without_matplotlib_only_the_curve_is_missing(folder, monkeypatch):
    for module in (command, fit):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    result = run(folder, "--steps", "1")
    assert result.exit_code == 0
    assert "pgfunc: loss.png is not drawn without matplotlib: python -m pip install 'pgfunc[plot]'" in result.stderr
    assert (folder / "out" / "model.safetensors").exists()
    assert not (folder / "out" / "loss.png").exists()
