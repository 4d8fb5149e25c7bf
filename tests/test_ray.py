"""Rows that are completed on a Ray cluster have the results of one process, each once, if a worker is killed too."""

import json
import os
import sys
from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
import pytest
from cases import text_model
from PIL import Image

import pgfunc as pg
from pgfunc import cli
from pgfunc.cli import machines
from pgfunc.errors import SettingError
from pgfunc.many.distributed import Loading, generate_many, share

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`use_:DeprecationWarning"),  # Ray Data's own default settings
    pytest.mark.filterwarnings("ignore:`ray_remote_args:DeprecationWarning"),
]
PICTURES = [np.full((4 + i, 9 - i, 3), 40 * i, np.uint8) for i in range(5)]


class KillsOnce:
    """A picture that kills the process which unpickles it, the first time."""

    def __init__(self, marker, picture):
        self.marker, self.picture = str(marker), str(picture)

    def __reduce__(self):
        kill = f"__import__('os').mkdir({self.marker!r}) or __import__('os').kill(__import__('os').getpid(), 9)"
        return eval, (f"__import__('os').path.exists({self.marker!r}) and {self.picture!r} or {kill}",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a random checkpoint and two pictures."""
    folder = tmp_path_factory.mktemp("ray")
    pg.save(text_model(), folder / "model")
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (9, 6), colour).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster on this machine, for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in machines.QUIET.items():
            patch.setenv(name, value)
        with machines.connected("local"):
            yield


@needs_ray
def test_a_killed_worker_loses_no_row_and_repeats_none(cluster, folder):
    stream = [(PICTURES[i % 5], f"caption {i}") for i in range(24)]
    stream[5], stream[7], stream[13] = (str(folder / "none.png"), "ocr"), ("red.png",), (str(folder / "red.png"), "ocr")
    options = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3, "batch": 2}
    model = pg.load(folder / "model", device="cpu")
    expected = {result.number: result for result in pg.generate_many(model, stream, **options, workers=0)}
    marker = folder / "killed"
    sent = [*stream[:13], (KillsOnce(marker, folder / "red.png"), "ocr"), *stream[14:]]
    got = list(generate_many(Loading(str(folder / "model"), device="cpu"), sent, **options, actors=2))
    assert marker.exists()
    assert sorted(result.number for result in got) == list(range(len(stream)))
    for result in got:
        one = expected[result.number]
        assert result.row is sent[result.number]
        assert (type(result.error), str(result.error), result.sizes) == (type(one.error), str(one.error), one.sizes)
        assert (result.completion is None) == (one.completion is None)
        if result.completion and one.completion:
            assert result.completion.tokens == one.completion.tokens
            assert result.completion.logprobs == pytest.approx(one.completion.logprobs, abs=1e-5)  # float32


@needs_ray
def test_the_command_prints_the_same_with_ray_as_without(cluster, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(machines, "connected", lambda address: nullcontext())
    (folder / "broken.png").write_bytes(b"no picture")

    def run(*more: str) -> tuple[int, list[dict], str]:
        arguments = ["detect", "red.png", "broken.png", "blue.png", "cat", "--model", "model", "--json"]
        monkeypatch.setattr(sys, "argv", ["pgfunc", *arguments, "--device", "cpu", "--max-new-tokens", "8", *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code, [json.loads(line) for line in out.out.splitlines()], out.err

    assert run("--ray", "local", "--ray-workers", "1") == run()


@needs_ray
def test_more_workers_than_the_cluster_has_cpus_are_refused(cluster):
    with pytest.raises(SettingError, match=r"ray-workers is 100000, and the cluster has \d+ CPUs"):
        share(100_000, "cpu")
    cpus = os.cpu_count() or 1
    assert share(None, "cpu").actors * share(None, "cpu").cpus <= cpus


@needs_ray
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--ray", "127.0.0.1:1"], "pgfunc: --ray 127.0.0.1:1: no cluster answers there"),
        (["--ray", "local", "--model", "none"], "pgfunc: none"),
        (["--ray-workers", "2"], "pgfunc: --ray-workers needs --ray"),
    ],
)
def test_a_mistake_is_one_line_before_a_cluster_starts(options, line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["pgfunc", "caption", "red.png", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n"), error[: len(line)]) == (2, 1, line)


def test_without_ray_the_command_says_how_to_install_it(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(machines, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["pgfunc", "caption", "red.png", "--ray", "local"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "python -m pip install 'pgfunc[ray]'" in capsys.readouterr().err
