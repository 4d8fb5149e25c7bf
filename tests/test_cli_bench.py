"""`pgfunc bench` prints its measurements as a table, or the same as JSON; a mistake is one line."""

import json
import sys

import pytest
import torch
from cases import CONFIGS, params
from torch._dynamo.exc import TorchDynamoException

import pgfunc as pg
from pgfunc import bench, cli
from pgfunc.bench.roofline import Machine

MACHINE = Machine(bandwidth=2e9, rate=3e10)
FEW = ("--tokens", "4", "--repeat", "2", "--prompt-tokens", "3", "--no-compile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "model"
    pg.save(pg.Model(CONFIGS["gemma"], params(CONFIGS["gemma"]), None), folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command on the CPU, with a fixed speed of the machine; returns exit status, output and errors."""
    monkeypatch.setattr(bench, "measure", lambda device, dtype: MACHINE)

    def call(*arguments: str) -> tuple[int, str, str]:
        device = [] if "--device" in arguments else ["--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["pgfunc", "bench", *arguments, *device])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code or 0, out.out, out.err

    return call


def test_json_has_every_figure_and_the_figures_agree(run, folder):
    status, out, _ = run("--model", str(folder), "--batch", "2", "--slots", "20", "--json", *FEW)
    assert status == 0
    report = json.loads(out)
    stages = report.pop("stages")
    hardware, torch_version = report.pop("hardware"), report.pop("torch")
    assert hardware
    assert torch_version == torch.__version__
    assert report == {
        "model": str(folder), "dtype": "float32", "quantize": None, "device": "cpu", "threads": torch.get_num_threads(),
        "image_tokens": 4, "batch": 2, "prompt_tokens": 3, "tokens": 4, "slots": 20, "repeat": 2, "compile": False,
        "bandwidth": 2e9, "rate": 3e10,
    }  # fmt: skip
    assert [stage["stage"] for stage in stages] == ["load", "vision", "prefill", "decode", "generate"]
    for stage in stages:
        assert 0 < stage["fastest"] <= stage["seconds"] <= stage["slowest"]
        assert stage["bytes_per_second"] == pytest.approx(stage["bytes"] / stage["seconds"])
        assert stage["floor_over_time"] == pytest.approx(stage["floor"] / stage["seconds"])
        assert not stage["compiled"]
        assert stage["compilations"] == stage["first_seconds"] == 0
    for stage in stages[:3]:  # each of these is one piece of work
        assert stage["floor"] == pytest.approx(max(stage["bytes"] / 2e9, stage["flops"] / 3e10))


def test_the_table_has_one_line_per_stage_below_the_conditions(run, folder):
    status, out, _ = run("--model", str(folder), *FEW)
    assert status == 0
    assert out.startswith(f"{folder}, float32, batch 1: a picture of 4 tokens, 3 of text, 4 generated, 11 cache slots")
    assert "2.0 GB/s read, 0.03 TFLOP/s" in out
    for label in ("load, read once", "vision", "prefill, with vision", "decode, a token", "generate"):
        assert sum(line.strip().startswith(label) for line in out.splitlines()) == 1


def test_a_published_name_is_measured_with_random_weights(run, monkeypatch):
    monkeypatch.setitem(pg.PUBLISHED, "paligemma-3b-224", CONFIGS["gemma2"])
    status, out, _ = run("--config", "paligemma-3b-224", "--json", *FEW)
    assert status == 0
    report = json.loads(out)
    assert (report["model"], report["dtype"]) == ("paligemma-3b-224, random weights", "bfloat16")
    assert report["stages"][0]["stage"] == "draw"
    assert (
        json.loads(run("--config", "paligemma-3b-224", "--json", "--dtype", "float32", *FEW)[1])["dtype"] == "float32"
    )


@pytest.mark.parametrize(("source", "method"), [("--config", "int8"), ("--model", "int8"), ("--model", "fp8")])
def test_quantized_weights_have_fewer_bytes_to_read(run, folder, monkeypatch, source, method):
    monkeypatch.setitem(pg.PUBLISHED, "paligemma-3b-224", CONFIGS["gemma"])
    name = "paligemma-3b-224" if source == "--config" else str(folder)
    read = []
    for more in ((), ("--quantize", method)):
        status, out, _ = run(source, name, "--dtype", "bfloat16", "--json", *more, *FEW)
        assert status == 0
        read.append({stage["stage"]: stage["bytes"] for stage in json.loads(out)["stages"]})
    plain, small = read
    assert small["vision"] == plain["vision"]
    assert small["decode"] < plain["decode"]
    assert f", {method} in bfloat16, batch 1" in run(source, name, "--dtype", "bfloat16", *more, *FEW)[1]


def test_threads_sets_the_threads_of_pytorch(run, folder, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    assert run("--model", str(folder), "--threads", "1", *FEW)[0] == 0
    assert calls == [1]


def test_only_the_chosen_stages_are_measured(run, folder):
    for named in (["decode"], ["vision", "generate"]):
        status, out, _ = run("--model", str(folder), "--json", *(f"--stage={name}" for name in named), *FEW)
        assert status == 0
        assert [stage["stage"] for stage in json.loads(out)["stages"]] == ["load", *named]


MISTAKES = {
    ("--stage", "prefil"): "stage is prefil, expected vision, prefill, decode, generate",
    ("--batch", "0"): "batch is 0",
    ("--tokens", "1"): "tokens is 1",
    ("--repeat", "0"): "repeat is 0",
    ("--threads", "0"): "threads is 0",
    ("--threads", "1000000"): "threads is 1000000, expected 1 to 1024",
    ("--batch", "1000000000"): "batch 1,000,000,000 with ",
    ("--batch", str(10**30)): f"batch {10**30:,} with ",
    ("--config", "paligemma-3b-224", "--batch", "100000"): "batch 100,000 with ",
    ("--prompt-tokens", "9000"): "1 x 256 image tokens and 9128 of text do not fit",
    ("--slots", "5"): "slots is 5",
    ("--config", "paligemma-3b"): "config paligemma-3b is not one of paligemma-3b-224, ",
    ("--device", "cuda:99"): "device cuda:99 is not available",
    ("--device", "meta"): "device meta has shapes",
    ("--dtype", "int8"): "dtype is int8",
    ("--quantize", "int3"): "quantize is 'int3'",
    ("--config", "paligemma-3b-224", "--quantize", "int3"): "quantize is 'int3'",
    ("--model", "nowhere"): "nowhere: no such file",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_before_anything_is_measured(run, arguments, monkeypatch):
    monkeypatch.delattr(bench, "measure")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"pgfunc: {MISTAKES[arguments]}")
    assert err.count("\n") == 1


FAILURES = {
    "not enough memory on the device: lower --batch": torch.OutOfMemoryError("CUDA out of memory. Tried\nto"),
    "not enough memory on the device: lower --batch or": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you"
    ),
    "not enough memory on the device: lower --batch or --slots": MemoryError(),
    "torch.compile fails here (no C++ compiler): give --no-compile": TorchDynamoException("no C++ compiler\n\nmore"),
}


@pytest.mark.parametrize("message", FAILURES)
def test_missing_memory_or_a_missing_compiler_is_one_line(run, folder, message, monkeypatch):
    def fail(*args):
        raise FAILURES[message]

    monkeypatch.setattr(bench.pipeline, "decode_stage", fail)
    status, out, err = run("--model", str(folder), *FEW)
    assert (status, out) == (2, "")
    assert err.startswith(f"pgfunc: {message}")
    assert err.count("\n") == 1
