"""A command on many pictures gives a row for each, in their order, however they are named, and also if it is killed."""

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cases import text_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import pgfunc as pg
from pgfunc import cli
from pgfunc.cli import inputs, results, running

MODEL = text_model()
NAMES = ["a.png", "b/c.jpg", "b/d.png", "b/e/f.webp", "g.png"]  # in the order of a folder
BROKEN = "b/d.png"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A random checkpoint, and a folder of pictures, one of which is broken, with files that are no pictures."""
    folder = tmp_path_factory.mktemp("folders")
    pg.save(MODEL, folder / "model")
    for i, name in enumerate(NAMES):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9 + i, 6), (40 * i, 100, 200 - 40 * i)).save(path)
    (folder / "photos" / BROKEN).write_bytes(b"no picture")
    (folder / "photos" / "notes.txt").write_text("not a picture")
    (folder / "photos" / ".hidden.png").write_bytes(b"")
    (folder / "photos" / ".cache").mkdir()
    shutil.copy(folder / "photos" / "a.png", folder / "photos" / ".cache" / "a.png")
    return folder


@pytest.fixture
def run(workdir, tmp_path, monkeypatch, capsys):
    """Run a command in that folder; returns exit status, standard output and standard error. `--out` is elsewhere."""

    def call(*arguments: str, model: str = "model") -> tuple[int, str, str]:
        monkeypatch.chdir(workdir)
        few = ["--max-new-tokens", "5"] if arguments[0] in ("caption", "ask", "generate", "detect") else []
        monkeypatch.setattr(sys, "argv", ["pgfunc", *arguments, *few, "--model", model, "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code, out.out, out.err

    return call


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def whole(run, tmp_path) -> bytes:
    """The results of an undisturbed run over the folder."""
    out = tmp_path / "whole.jsonl"
    assert run("caption", "photos", "--out", str(out))[0] == 1
    return out.read_bytes()


def test_a_folder_gives_a_row_for_each_picture_in_order_and_an_error_for_a_broken_one(run, workdir, tmp_path):
    out = tmp_path / "rows.jsonl"
    status, printed, err = run("caption", "photos", "--out", str(out))
    assert (status, printed) == (1, "")
    got = rows(out)
    assert [row["image"] for row in got] == [f"photos/{name}" for name in NAMES]
    assert [set(row) for row in got if "error" in row] == [{"image", "prompt", "error"}]
    assert (
        got[NAMES.index(BROKEN)]["error"] == f"photos/{BROKEN}: not a picture, or in a format that Pillow does not read"
    )
    assert err.splitlines() == [f"pgfunc: {got[2]['error']}", f"pgfunc: {out}: 1 of 5 rows are errors"]
    for row in got:
        if "error" not in row:
            (alone,) = pg.generate(MODEL, str(workdir / row["image"]), "caption en", 5)
            assert (row["text"], row["tokens"], row["finish"]) == (alone.text, alone.tokens, alone.finish)
            np.testing.assert_allclose(row["logprobs"], alone.logprobs, atol=1e-4)  # float32, few layers


@pytest.mark.parametrize("named", [
    ["photos/a.png", "photos/b", "photos/g.png"], ["photos/a.png", "photos/**/[cdf].*", "photos/g.png"],
    ["a.jsonl"], ["a.csv"], ["-"],
], ids=" ".join)  # fmt: skip
def test_pictures_may_be_named_in_many_ways(run, workdir, whole, tmp_path, named, monkeypatch):
    names = [f"photos/{name}" for name in NAMES]
    (workdir / "a.jsonl").write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    (workdir / "a.csv").write_text("image\n" + "\n".join(names))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*names[:2], json.dumps({"image": names[2]}), *names[3:]])))
    out = tmp_path / "rows.jsonl"
    assert run("caption", *named, "--out", str(out))[0] == 1
    assert out.read_bytes() == whole


def test_a_table_has_questions_and_its_other_columns_pass_through(run, workdir, tmp_path):
    table = [
        {"image": "photos/a.png", "prompt": "what?", "id": 7, "tags": ["x", {"y": 1}]},
        {"image": "photos/a.png", "prompt": "who?", "id": 8},
        {"image": "photos/g.png", "prefix": "word for word", "id": 9},
    ]
    (workdir / "table.jsonl").write_text("\n".join(map(json.dumps, table)))
    out = tmp_path / "rows.jsonl"
    assert run("ask", "table.jsonl", "--out", str(out))[0] == 0
    got = rows(out)
    assert [row["prompt"] for row in got] == ["answer en what?", "answer en who?", "word for word"]
    assert [row["id"] for row in got] == [7, 8, 9]
    assert got[0]["tags"] == table[0]["tags"]


def test_names_in_a_table_are_relative_to_its_folder(run, workdir, tmp_path):
    (workdir / "photos" / "b" / "in.csv").write_text("image,place\nc.jpg,Aachen\n")
    try:
        out = tmp_path / "rows.jsonl"
        assert run("caption", "photos/b/in.csv", "--out", str(out))[0] == 0
        assert [(row["image"], row["place"]) for row in rows(out)] == [("c.jpg", "Aachen")]
    finally:
        (workdir / "photos" / "b" / "in.csv").unlink()


@pytest.mark.parametrize(("line", "message"), [
    ('{"prompt": "x"}', "t.jsonl:2: expected an image"), ("nonsense", "t.jsonl:2: expected an image"),
    ('{"image": 3}', "t.jsonl:2: expected an image"),
    ('{"image": "a", "prompt": 3}', "t.jsonl:2: prompt is 3, expected text"),
    ('{"image": "photos/a.png", "text": "mine"}', "the table has a column 'text', which results have too"),
])  # fmt: skip
def test_a_wrong_table_is_one_line_and_status_2(run, workdir, tmp_path, line, message):
    (workdir / "t.jsonl").write_text('{"image": "photos/a.png"}\n' + line + "\n")
    status, out, err = run("caption", "t.jsonl", "--out", str(tmp_path / "x.jsonl"))
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_table_without_questions_needs_a_prompt(run, workdir):
    (workdir / "t.jsonl").write_text('{"image": "photos/a.png"}\n')
    assert run("ask", "t.jsonl")[2].startswith("pgfunc: ask needs a question")


def test_csv_and_parquet_have_the_rows_of_json_lines(run, whole, tmp_path):
    expected = [json.loads(line) for line in whole.splitlines()]
    for suffix in ("csv", "parquet"):
        out = tmp_path / f"rows.{suffix}"
        assert run("caption", "photos", "--out", str(out))[0] == 1
        assert not list(tmp_path.glob(".*")), "the working file is gone"
        if suffix == "csv":
            with out.open(newline="") as file:
                got = list(csv.DictReader(file))
            columns = ("image", "prompt", "text", "finish", "error")
            assert [[row[name] for name in columns] for row in got] == [
                [row.get(name, "") for name in columns] for row in expected
            ]
            assert json.loads(got[0]["logprobs"]) == expected[0]["logprobs"]
        else:
            import pyarrow.parquet

            got = pyarrow.parquet.read_table(out).to_pylist()
            assert [{name: value for name, value in row.items() if value is not None} for row in got] == expected
        assert run("caption", "photos", "--out", str(out), "--resume")[0] == 0, "it is finished"


def test_coco_leaves_out_broken_pictures(run, tmp_path):
    status, _, _ = run("detect", "photos", "cat", "--out", str(tmp_path / "x.json"), "--coco", str(tmp_path / "y.json"))
    assert status == 1
    content = json.loads((tmp_path / "x.json").read_text())
    assert [entry["file_name"] for entry in content["images"]] == [f"photos/{n}" for n in NAMES if n != BROKEN]
    assert content == json.loads((tmp_path / "y.json").read_text())


@given(data=st.data())
def test_a_file_that_was_cut_anywhere_is_completed_to_the_same_bytes(data, tmp_path_factory):
    """As after SIGKILL: the system keeps a part of the file. What the model says stands for any result."""
    folder = tmp_path_factory.mktemp("cut")
    names = data.draw(st.lists(st.text('ab é\n"', min_size=1, max_size=5), max_size=6))
    items = [inputs.Item(i, name, name, name) for i, name in enumerate(names)]
    out, computed = folder / "x.jsonl", []

    def compute(items):
        for item in items:
            computed.append(item.number)
            yield running.Outcome(item, {"prompt": "p", "text": f"{item.number % 2} {item.image}"})

    def go(path: Path, resume: bool) -> None:
        everything = inputs.Inputs([], items, len(items), single=False)
        running.run(everything, lambda item: "p", compute, running.Output(False, path, resume))

    go(folder / "whole.jsonl", False)
    whole = (folder / "whole.jsonl").read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    out.write_bytes(whole[:cut])
    computed.clear()
    go(out, True)
    again = [json.loads(line) for line in out.read_bytes().splitlines()]
    expected = [json.loads(line) for line in whole.splitlines()]
    assert [row["image"] for row in again] == [row["image"] for row in expected]
    assert len(computed) == len(names) - whole[:cut].count(b"\n"), "what has a row is not computed again"


@given(order=st.permutations(range(7)))
def test_outcomes_are_put_in_the_order_of_their_inputs(order):
    items = [inputs.Item(i, str(i), str(i), str(i)) for i in range(7)]

    def compute(items):
        started = list(items)
        for i in order:
            yield running.Outcome(started[i], {})

    assert [x.item.number for x in running.in_order(items, lambda item: False, compute)] == list(range(7))


def test_a_run_that_is_killed_goes_on_with_resume(workdir, whole, tmp_path):
    """The whole process, its workers included, at moments while it computes."""
    for name in NAMES:  # more rows than are decoded at once
        assert (workdir / "photos" / name).exists()
    out = tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "pgfunc", "caption", *["photos"] * 40, "--out", str(out), "--resume",
               "--max-new-tokens", "5", "--model", "model", "--device", "cpu", "--batch", "4"]  # fmt: skip
    process = subprocess.Popen(command, cwd=workdir, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    begun = out.read_bytes().count(b"\n")
    assert 20 <= begun < 200
    assert subprocess.run(command, cwd=workdir, stderr=subprocess.DEVNULL, check=False).returncode == 1
    assert [row["image"] for row in rows(out)] == [f"photos/{name}" for name in NAMES] * 40
    texts = {row["image"]: row.get("text") for row in rows(out)}
    assert all(texts[row["image"]] == row.get("text") for row in map(json.loads, whole.splitlines()))


def test_a_file_of_results_is_neither_overwritten_nor_mixed(run, whole, tmp_path):
    out = tmp_path / "whole.jsonl"
    status, _, err = run("caption", "photos", "--out", str(out))
    assert (status, err) == (
        2,
        f"pgfunc: --out {out}: exists already; continue it with --resume, or give another name\n",
    )
    assert run("ask", "photos", "--prompt", "what?", "--out", str(out), "--resume")[0] == 1
    assert out.read_bytes().startswith(whole), "another question is another row"
    assert len(rows(out)) == 10
    out.write_text("[]\n")
    assert f"{out}:1: is not a row of results" in run("caption", "photos", "--out", str(out), "--resume")[2]


def test_only_one_process_writes_a_file(run, tmp_path):
    out = tmp_path / "x.jsonl"
    with results.opened(out, resume=False):
        status, _, err = run("caption", "photos", "--out", str(out), "--resume")
    assert (status, err) == (2, f"pgfunc: --out {out}: another process is writing it\n")


def test_an_error_stops_the_run_if_asked(run, tmp_path):
    out = tmp_path / "x.jsonl"
    status, _, err = run("caption", "photos", "--out", str(out), "--on-error", "stop")
    assert status == 2
    assert err == f"pgfunc: photos/{BROKEN}: not a picture, or in a format that Pillow does not read\n"
    assert [row["image"] for row in rows(out)] == [f"photos/{name}" for name in NAMES[:2]]


def test_drawings_keep_the_folders_of_their_pictures(run, tmp_path):
    assert run("detect", "photos", "cat", "--draw", str(tmp_path / "drawn"), "--json")[0] == 1
    drawn = sorted(str(path.relative_to(tmp_path / "drawn")) for path in (tmp_path / "drawn").rglob("*.*"))
    assert drawn == sorted(name for name in NAMES if name != BROKEN)


@pytest.mark.parametrize("command", [
    ("score", "--prompt", "what?", "--candidate", "a", "--candidate", "b"), ("generate", "--prompt", "x"),
], ids=lambda command: command[0])  # fmt: skip
def test_other_commands_have_rows_too(run, tmp_path, command):
    out = tmp_path / "x.jsonl"
    assert run(command[0], "photos", *command[1:], "--out", str(out))[0] == 1
    assert [row["image"] for row in rows(out)] == [f"photos/{name}" for name in NAMES]
    assert sum("error" in row for row in rows(out)) == 1
    before = out.read_bytes()
    assert run(command[0], "photos", *command[1:], "--out", str(out), "--resume")[0] == 1
    assert out.read_bytes() == before


@pytest.mark.parametrize(("arguments", "message"), [
    (["caption", "photos", "--resume"], "--resume needs --out"),
    (["caption", "photos", "--out", "x.txt"], "--out x.txt: expected a name that ends in .jsonl, .csv, .parquet"),
    (["caption", "model", "--out", "x.jsonl"], "model: has no pictures"),
    (["detect", "photos", "cat", "--out", "drawn", "--draw", "d"], "both say where drawings go"),
    (["detect", "photos", "cat", "--draw", "photos"], "--draw photos/a.png: would replace photos/a.png, which is read"),
    (["caption", "photos", "--batch", "0", "--json"], "batch is 0, expected 1 or more"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_without_a_terminal_the_progress_is_a_line_from_time_to_time(run, monkeypatch):
    monkeypatch.setattr(running, "LINE_EVERY", 0.0)
    err = run("caption", "photos", "--json")[2]
    assert "pgfunc: 5 of 5 pictures, " in err
    assert err.rstrip().endswith("0 s left, errors: 1")
