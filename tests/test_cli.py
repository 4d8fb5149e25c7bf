"""The command line prints what the package computes; a user's mistake is one line and status 2."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from cases import edit_arrays, text_model
from PIL import Image

import pgfunc as pg
from pgfunc import cli
from pgfunc.cli.compiled import MADE_FOR, MAKER, makers, platform_of
from pgfunc.errors import escape_controls
from pgfunc.train import lora

MODEL = text_model()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder with a random checkpoint and two pictures."""
    folder = tmp_path_factory.mktemp("cli")
    pg.save(MODEL, folder / "model")
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (9, 6), colour).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def run(workdir, monkeypatch, capsys):
    """Run the command in that folder; returns exit status, standard output and standard error."""

    def call(*arguments: str, model: str | None = "model") -> tuple[int, str, str]:
        monkeypatch.chdir(workdir)
        chosen = ["--model", model] if model else []
        chosen += ["--device", "cpu"] if model and not {"--device", "inspect"} & set(arguments) else []
        monkeypatch.setattr(sys, "argv", ["pgfunc", *arguments, *chosen])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code, out.out, out.err

    return call


PREFIXES = {
    ("caption",): "caption en",
    ("caption", "--prompt", "cap en"): "cap en",
    ("ocr",): "ocr",
    ("ask", "--prompt", "what is it?"): "answer en what is it?",
    ("generate", "--prompt", "Hello"): "Hello",
    ("generate", "--prompt", "<image>Hello"): "Hello",
    ("caption", "--prompt", "<image><bos>cap en"): "cap en",
    ("ask", "--prompt", "<image>what is it?"): "answer en what is it?",
}


@pytest.mark.parametrize("command", PREFIXES, ids=" ".join)
def test_each_command_completes_its_prefix(run, workdir, command):
    expected = pg.generate(MODEL, str(workdir / "red.png"), PREFIXES[command], max_new_tokens=6)[0]
    status, out, _ = run(command[0], "red.png", *command[1:], "--max-new-tokens", "6", "--json")
    value = json.loads(out)
    assert status == 0
    assert value["prompt"] == PREFIXES[command]
    assert (value["text"], value["tokens"], value["finish"]) == (expected.text, expected.tokens, expected.finish)
    np.testing.assert_allclose(value["logprobs"], expected.logprobs, atol=1e-4)
    assert run(command[0], "red.png", *command[1:], "--max-new-tokens", "6")[1] == expected.text + "\n"


def test_an_answer_cut_off_by_the_limit_gets_a_note_except_in_json(run):
    message = "stopped at 3 tokens, perhaps too early; --max-new-tokens allows more"
    assert run("caption", "red.png", "--max-new-tokens", "3")[2] == f"pgfunc: red.png: {message}\n"
    lines = run("ocr", "red.png", "blue.png", "--max-new-tokens", "3")[2].splitlines()
    assert lines == [f"pgfunc: {name}.png: {message}" for name in ("red", "blue")]
    assert run("caption", "red.png", "--max-new-tokens", "3", "--json")[2] == ""


def test_pictures_must_exist_before_anything_is_loaded(run, monkeypatch):
    monkeypatch.setattr(pg, "load", lambda *args: pytest.fail("loaded"))
    for command in (["caption"], ["ocr"], ["score", "--prompt", "what?", "--candidate", "a"]):
        assert run(*command, "red.png", "no.png") == (2, "", "pgfunc: no.png: no such file\n")


def test_several_pictures_give_one_line_each_in_order(run):
    status, out, _ = run("caption", "red.png", "blue.png", "--max-new-tokens", "3", "--json")
    assert status == 0
    assert [json.loads(line)["image"] for line in out.splitlines()] == ["red.png", "blue.png"]
    assert "blue.png: " in run("caption", "red.png", "blue.png", "--max-new-tokens", "3")[1]


def test_a_file_name_that_is_not_valid_unicode_is_printed_escaped(workdir):
    name = os.fsdecode(b"\xff.png")
    shutil.copy(workdir / "red.png", workdir / name)
    command = [sys.executable, "-m", "pgfunc.cli", "caption", "red.png", name, "--model", "model", "--device", "cpu"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*command, "--max-new-tokens", "2"], cwd=workdir, env=strict, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(b"\\udcff.png: ")


def test_sampling_options_reach_the_sampler(run, workdir):
    options = ["--temperature", "1.2", "--top-k", "30", "--top-p", "0.9", "--min-p", "0.01", "--seed", "5"]
    expected = pg.generate(MODEL, str(workdir / "red.png"), "ocr", 6, 1.2, 30, 0.9, 0.01, 5)[0]
    _, out, _ = run("ocr", "red.png", "--max-new-tokens", "6", "--json", *options)
    assert json.loads(out)["tokens"] == expected.tokens


def test_score_ranks_candidates(run, workdir):
    answers = ["--candidate", "yes", "--candidate", "no", "--candidate", "red"]
    _, out, _ = run("score", "red.png", "--prompt", "what?", *answers, "--json")
    actual = json.loads(out)["scores"]
    expected = pg.score(MODEL, str(workdir / "red.png"), "what?", ["yes", "no", "red"])[0].tolist()
    np.testing.assert_allclose([actual[name] for name in ("yes", "no", "red")], expected, atol=1e-4)
    assert list(actual.values()) == sorted(actual.values(), reverse=True)
    assert run("score", "red.png", "--prompt", "what?", *answers)[1].startswith(f"red.png: {next(iter(actual))}\t")


def test_inspect_lists_every_parameter(run):
    status, out, _ = run("inspect", "model", model=None)
    leaves = pg.tree.flatten(MODEL.params)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[:-1]] == list(leaves)
    assert out.splitlines()[-1] == f"{pg.tree.count(MODEL.params):,} parameters, {pg.tree.nbytes(MODEL.params):,} bytes"
    rows = json.loads(run("inspect", "model", "--json", model=None)[1])
    assert {row["path"]: tuple(row["shape"]) for row in rows} == {path: tuple(x.shape) for path, x in leaves.items()}


def test_converting_to_npz_and_back_gives_the_same_file(run, workdir):
    assert run("convert", "model", "x.npz", model=None)[0] == 0
    npz = ["--config", "model/config.json", "--tokenizer", "model/tokenizer.json"]
    assert run("convert", "x.npz", "back", *npz, model=None)[0] == 0
    assert (workdir / "back/model.safetensors").read_bytes() == (workdir / "model/model.safetensors").read_bytes()
    direct = run("caption", "red.png", "--max-new-tokens", "5", model="back")[1]
    assert run("caption", "red.png", "--max-new-tokens", "5", *npz, model="x.npz")[1] == direct


def test_quantize_works_when_a_model_runs_and_when_it_is_converted(run, workdir):
    small = MODEL._replace(params=pg.quant.quantize(MODEL.params, "int8"))
    (expected,) = pg.generate(small, str(workdir / "red.png"), "caption en", max_new_tokens=6)
    options = ["--max-new-tokens", "6", "--json"]
    actual = json.loads(run("caption", "red.png", "--quantize", "int8", *options)[1])
    assert (actual["tokens"], actual["logprobs"]) == (expected.tokens, pytest.approx(expected.logprobs, abs=1e-5))
    score = ["score", "red.png", "--prompt", "what?", "--candidate", "one", "--json", "--quantize", "int8"]
    (logprob,) = pg.score(small, str(workdir / "red.png"), "what?", ["one"])[0].tolist()
    assert json.loads(run(*score)[1])["scores"]["one"] == pytest.approx(logprob, abs=1e-4)
    assert run("convert", "model", "small", "--quantize", "int8", model=None)[0] == 0
    assert json.loads(run("caption", "red.png", *options, model="small")[1]) == actual
    lines = run("inspect", "small", model=None)[1].splitlines()
    rows = {line.split()[0]: line for line in lines[:-1]}
    assert rows["language.layers.0.q.values"].split()[1:] == ["32", "x", "16", "int8", "512"]
    assert rows["language.layers.0.q.scale"].split()[1:] == ["32", "float32", "128"]
    assert lines[-1] == f"{pg.tree.count(MODEL.params):,} parameters, {pg.tree.nbytes(small.params):,} bytes"
    assert run("convert", "small", "x.npz", model=None)[0] == 2


@pytest.mark.parametrize("options", [[], ["--compile"], ["--compiled", "code"]], ids=str)
def test_compile_and_compiled_both_compile_and_compiled_uses_its_folder(run, workdir, monkeypatch, options):
    calls = []

    def stream(*model, compile, **settings):
        calls.append((compile, os.environ.get("TORCHINDUCTOR_CACHE_DIR")))
        return ["answer"]

    monkeypatch.setattr(pg, "stream", stream)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
    (workdir / "code").mkdir(mode=0o700, exist_ok=True)
    (workdir / "code" / MADE_FOR).write_text(json.dumps(platform_of(torch.device("cpu"))))
    assert run("caption", "red.png", *options)[:2] == (0, "answer\n")
    assert calls == [(bool(options), str(workdir / "code" / "torchinductor") if "--compiled" in options else None)]
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_folder_of_foreign_code_gets_a_note_once(run, workdir, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pg, "stream", lambda *model, **settings: ["answer"])
    folder, kind = workdir / "theirs", platform_of(torch.device("cpu"))
    folder.mkdir(mode=0o700)
    message = "pgfunc: theirs was made elsewhere, and its code is run: trust its author, or compile it here\n"
    cases = {makers()[0]: ("", ""), "7" * 32: (message, ""), None: (message, message), "a\x1b[31m": (message, message)}
    for maker, remarks in cases.items():
        (folder / MADE_FOR).write_text(json.dumps(kind | ({} if maker is None else {MAKER: maker})))
        for remark in remarks:
            assert run("caption", "red.png", "--compiled", "theirs") == (0, "answer\n", remark)
    folder.chmod(0o777)
    assert run("caption", "red.png", "--compiled", "theirs")[0] == 2


MISTAKES = {
    "missing picture": (["caption", "no.png"], "no.png: no such file"),
    "not a picture": (["caption", "notes.txt"], "notes.txt: not a picture"),
    "missing question": (["ask", "red.png"], "ask needs a question: --prompt"),
    "missing prefix": (["generate", "red.png"], "generate needs a prefix: --prompt"),
    "repeated candidate": (
        ["score", "red.png", "--prompt", "what?", "--candidate", "no", "--candidate", "yes", "--candidate", "no"],
        "--candidate 'no' is repeated; name it once",
    ),
    "temperature": (["caption", "red.png", "--temperature", "-1"], "temperature is -1.0, expected"),
    "top-p": (["caption", "red.png", "--top-p", "1.5"], "top-p is 1.5, expected"),
    "too long": (["caption", "red.png", "--max-new-tokens", "5000"], "do not fit 120 positions"),
    "dtype": (["caption", "red.png", "--dtype", "int3"], "dtype is int3, expected"),
    "bits": (["caption", "red.png", "--quantize", "int3"], "quantize is 'int3', expected one of int8, fp8, int4,"),
    "bits of detect": (["detect", "red.png", "car", "--quantize", "int3"], "quantize is 'int3', expected"),
    "sizes of int4": (["caption", "red.png", "--quantize", "int4"], "language.layers.0.q: int4 takes outputs in"),
    "decompression bomb": (["caption", "bomb.png"], "bomb.png: too many pixels"),
    "truncated picture": (["caption", "cut.png"], "cut.png: cannot be read as a picture"),
    "picture is a folder": (["caption", "model"], "model: has no pictures; those in it are recognized by"),
    "top-k": (["caption", "red.png", "--top-k", "0"], "top-k is 0, expected"),
    "two checkpoints": (["inspect", "model"], "inspect takes one checkpoint"),
    "no weights": (["caption", "red.png", "--device", "meta"], "meta device"),
    "seed": (["caption", "red.png", "--temperature", "1", "--seed", "-3"], "seed is -3"),
    "no code": (["caption", "red.png", "--compiled", "nowhere"], "--compiled nowhere: no code there; `pgfunc compile"),
    "code for another machine": (
        ["caption", "red.png", "--compiled", "elsewhere"],
        "--compiled elsewhere: was made for capability None, hardware another, threads None, torch None, and here is ",
    ),
    "no folder for code": (["compile", "red.png"], "red.png: cannot be a folder for compiled code (File exists)"),
    "tokens to compile for": (["compile", "code", "--max-new-tokens", "0"], "max-new-tokens is 0, expected 2 or more"),
    "long prompt": (["ask", "red.png", "--prompt", "x" * 500], "do not fit 120 positions"),
}


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data do not have."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0" * 100)]
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(run, workdir, mistake):
    (workdir / "notes.txt").write_text("not a picture")
    (workdir / "elsewhere").mkdir(exist_ok=True)
    (workdir / "elsewhere" / "made-for.json").write_text('{"hardware": "another"}')
    (workdir / "cut.png").write_bytes((workdir / "red.png").read_bytes()[:50])
    (workdir / "bomb.png").write_bytes(claiming(30_000, 30_000))
    arguments, message = MISTAKES[mistake]
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("pgfunc: ")
    assert message in err
    assert err.count("\n") == 1


def two_dtypes(folder):
    norm = "language_model.model.norm.weight"
    edit_arrays(folder / "model.safetensors", lambda arrays: arrays.update({norm: arrays[norm].bfloat16()}))


def quantized(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq"}}))


def one_npz(folder):
    pg.convert(folder, folder / "x.npz")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()


def only_adapter(folder):
    for path in folder.iterdir():
        path.unlink()
    lora.save(folder, PAIRS, MODEL.cfg, "base")


@pytest.mark.parametrize(("spoil", "message"), [
    (two_dtypes, "choose one with --dtype"),
    (quantized, "load the original weights, and quantize them with --quantize"),
    (one_npz, "a .npz needs --config, one of paligemma-3b-224,"),
    (lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"), "or load it with --tokenizer"),
    (only_adapter, "load its base model with --adapter, or merge"),
])  # fmt: skip
def test_a_message_names_options_of_the_command_line(run, workdir, spoil, message, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(workdir / "model", folder)
    spoil(folder)
    status, out, err = run("caption", "red.png", model=str(folder))
    assert (status, out) == (2, "")
    assert message in err
    assert not re.search(r"\w=", err), "no argument in Python's notation"
    assert err.count("\n") == 1


PAIRS = lora.init(MODEL.params, ["language.*.q", "language.*.down"], 2, 4.0)
PAIRS = PAIRS._replace(pairs={path: pair._replace(b=pair.b + 0.5) for path, pair in PAIRS.pairs.items()})


def test_an_adapter_runs_without_being_merged_into_a_saved_model(run, workdir):
    lora.save(workdir / "adapter", PAIRS, MODEL.cfg, "base")
    merged = MODEL._replace(params=lora.merge(MODEL.params, PAIRS))
    plain, expected = (pg.generate(each, str(workdir / "red.png"), "caption en", 6)[0].text for each in (MODEL, merged))
    assert plain != expected
    size = ("--max-new-tokens", "6")
    shown = escape_controls(expected, keep="\n\t") + "\n"
    assert run("caption", "red.png", *size, "--adapter", "adapter")[:2] == (0, shown)
    (score,) = pg.score(merged, str(workdir / "red.png"), "ocr", ["ab"]).tolist()
    assert run("score", "red.png", "--prompt", "ocr", "--candidate", "ab", "--adapter", "adapter")[1] == (
        f"red.png: ab\t{score[0]:.4f}\n"
    )
    status, out, _ = run("detect", "red.png", "cat", *size, "--adapter", "adapter", "--json")
    text = pg.generate(merged, str(workdir / "red.png"), "detect cat", max_new_tokens=6)[0].text
    assert (status, json.loads(out)["text"]) == (0, text)


def spoil_shard(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])


def spoil_index(folder):
    (folder / "model.safetensors").rename(folder / "shard")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../a.safetensors"}}')


def spoil_config(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))


def spoil_shape(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"intermediate_size": 24', '"intermediate_size": 23'))


SPOILED = {
    spoil_shard: "model.safetensors: not a complete safetensors file",
    spoil_index: "../../a.safetensors lies outside the folder",
    spoil_config: "language_model.model.layers.3.input_layernorm.weight (and 10 more) is missing, expected shape (16,)",
    spoil_shape: "layers.0.mlp.down_proj.weight: expected (16, 23), found (16, 24)",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_damaged_checkpoint_is_one_line_and_status_2(run, workdir, spoil):
    shutil.copytree(workdir / "model", workdir / spoil.__name__)
    spoil(workdir / spoil.__name__)
    status, out, err = run("caption", "red.png", model=spoil.__name__)
    assert (status, out) == (2, "")
    assert err.startswith("pgfunc: ")
    assert SPOILED[spoil] in err
    assert err.count("\n") == 1


def test_a_missing_device_and_a_missing_model_are_one_line(run):
    status, _, err = run("score", "red.png", "--prompt", "x", "--candidate", "y", "--device", "nowhere", model=None)
    assert status == 2
    assert err.startswith("pgfunc: device nowhere is not available (")
    assert err.count("\n") == 1
    status, _, err = run("caption", "red.png", model="missing/deep/folder")
    assert status == 2
    assert "missing/deep/folder: no such file or folder" in err


def test_an_unknown_option_is_a_usage_error(run):
    status, _, err = run("caption", "red.png", "--colour")
    assert status == 2
    assert "No such option" in err


@pytest.mark.parametrize(
    "command", [("caption",), ("score", "--prompt", "a", "--candidate", "yes")], ids=["caption", "score"]
)
def test_an_unreadable_picture_is_skipped_and_the_others_are_answered(run, workdir, command):
    (workdir / "torn.png").write_bytes((workdir / "red.png").read_bytes()[:40])
    name, *more = command
    status, out, err = run(name, "red.png", "torn.png", "blue.png", *more, "--json")
    assert status == 1
    assert [json.loads(line)["image"] for line in out.splitlines()] == ["red.png", "blue.png"]
    assert "torn.png: not a picture" in err
    assert run(name, "torn.png", *more)[0] == 2
