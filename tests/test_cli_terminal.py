"""Output on a terminal, in a pipe and in a script: hints, escapes, outputs that cannot be written, long names."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import one_by_one
import pytest
from cases import text_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import pgfunc as pg
from pgfunc import cli
from pgfunc.errors import escape_controls

SHIPPED = "pgfunc: the shipped checkpoint knows drawn scenes of 201 things and colored shapes, but no photographs; "


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder with a random checkpoint and a picture."""
    folder = tmp_path_factory.mktemp("terminal")
    pg.save(text_model(), folder / "model")
    Image.new("RGB", (9, 6), "red").save(folder / "red.png")
    return folder


@pytest.fixture
def run(workdir, monkeypatch, capsys):
    """Run the command in that folder; returns exit status, standard output and standard error."""

    def call(*arguments: str, terminal: bool = False) -> tuple[int, str, str]:
        monkeypatch.chdir(workdir)
        monkeypatch.setattr(sys, "argv", ["pgfunc", *arguments])
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code, out.out, out.err

    return call


HERE = "--model", "model", "--device", "cpu", "--max-new-tokens", "3"

# --- hints


@pytest.mark.parametrize("options", [("--top-p", "0.5"), ("--top-k", "3", "--seed", "1"), ("--min-p", "0.1")], ids=str)
def test_sampling_options_without_a_temperature_get_a_hint(run, options):
    status, out, err = run("caption", "red.png", "--json", *HERE, *options)
    names = ", ".join(word for word in options if word.startswith("--"))
    assert (status, err) == (
        0,
        f"pgfunc: {names}: no effect, because decoding is greedy; add --temperature 1 to sample\n",
    )
    assert run("caption", "red.png", "--json", *HERE, *options, "--quiet") == (0, out, "")
    assert run("caption", "red.png", "--json", *HERE, *options, "--temperature", "1")[2] == ""


@pytest.mark.parametrize("command", [("caption", "red.png", "--json"), ("classify", "red.png", "--label", "a")])
def test_on_a_terminal_a_hint_describes_the_shipped_checkpoint(run, command):
    options = *command, "--device", "cpu"
    status, out, err = run(*options, terminal=True)
    option = "--model" if command[0] == "classify" else "--model or PGFUNC_MODEL"
    assert (status, err) == (0, f"{SHIPPED}choose another with {option}, or hide this hint with --quiet\n")
    assert run(*options, "--quiet", terminal=True) == run(*options) == (0, out, "")


def test_an_environment_variable_can_choose_the_checkpoint(run, monkeypatch):
    named = run("caption", "red.png", *HERE)
    monkeypatch.setenv("PGFUNC_MODEL", "model")
    assert run("caption", "red.png", *HERE[2:], terminal=True) == named
    assert run("caption", "red.png", "--model", "nowhere")[2].startswith("pgfunc: nowhere: no such file")
    assert run("inspect", "model")[0] == 0, "the argument wins"


# --- characters

FORGED = "a\nblue.png: a cat\x1b[31m\u202e\u2028\x9b\x07.png"


def test_a_file_name_cannot_forge_a_line_or_control_the_terminal(run, workdir):
    shutil.copy(workdir / "red.png", workdir / FORGED)
    shown = "a\\nblue.png: a cat\\x1b[31m\\u202e\\u2028\\x9b\\x07.png: "
    for command in (
        ("caption", "red.png", FORGED),
        ("score", FORGED, "--prompt", "x", "--candidate", "y"),
        ("detect", FORGED, "x"),
    ):
        here = HERE if command[0] != "score" else HERE[:4]
        status, out, err = run(*command, *here)
        assert status == 0
        assert out.splitlines()[-1].startswith(shown)
        assert all(
            line.startswith(("pgfunc: red.png: stopped", "pgfunc: a\\nblue.png: a cat\\x1b"))
            for line in err.splitlines()
        )
        (line,) = run(*command, *here, "--json")[1].splitlines()[-1:]
        assert json.loads(line)["image"] == FORGED, "exact"
        assert line.isprintable()


def test_an_answer_cannot_control_the_terminal(run, monkeypatch):
    monkeypatch.setattr(pg, "stream", lambda *args, **settings: ["two\nlines\tand ", "\x1b[31mred\x9b"])
    assert run("caption", "red.png", *HERE)[1] == "two\nlines\tand \\x1b[31mred\\x9b\n"
    done = pg.Completion(FORGED, [], [], "eos")
    monkeypatch.setattr(pg, "generate", lambda *args, **settings: [done])
    monkeypatch.setattr(pg, "generate_many", one_by_one.generate_many)
    lines = run("caption", "red.png", "red.png", *HERE)[1].splitlines()
    assert [line.startswith("red.png: a\\nblue.png: a cat\\x1b[31m") for line in lines] == [True, True]


@given(st.text(st.characters(codec=None)))
def test_escaped_text_is_one_line_and_printable_text_is_unchanged(text):
    assert len(escape_controls(text).splitlines()) <= 1
    assert escape_controls(escape_controls(text)) == escape_controls(text)
    if text.isprintable():
        assert escape_controls(text) == text


@pytest.mark.parametrize("text", ["naïve café", "日本\u3000語", "👩\u200d👩\u200d👧", "می\u200cخواهم", "a\xa0b"])
def test_letters_of_all_scripts_are_printed_unchanged(text):
    assert escape_controls(text) == text


# --- standard output

FULL = "pgfunc: standard output: cannot be written (No space left on device)\n"
PRINTING = {
    "text": ("caption", "red.png", *HERE),
    "lines": ("caption", "red.png", "red.png", *HERE, "--json"),
    "table": ("inspect", "model"),
    "help": ("--help",),
}


@pytest.mark.parametrize("name", PRINTING)
def test_a_full_disk_behind_standard_output_is_one_line_and_status_2(run, monkeypatch, name):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, err = run(*PRINTING[name])
    assert status == 2
    assert err.endswith(FULL)


@pytest.mark.parametrize("name", PRINTING)
def test_a_closed_pipe_prints_nothing(run, monkeypatch, name):
    reading, writing = os.pipe()
    os.close(reading)
    with suppress(BrokenPipeError), os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(*PRINTING[name])[::2] == (1, "")


def test_a_full_disk_is_reported_only_once_when_the_process_ends(workdir):
    command = [sys.executable, "-m", "pgfunc.cli", "inspect", "model"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=workdir, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, FULL)


def test_a_closed_standard_output_does_not_change_the_status(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run("caption", "red.png", *HERE)[0] == 0
    assert run("caption", "no.png", *HERE)[0] == 2


# --- names

LONG = "x" * 300
LONG_NAMES = {
    "picture": ("caption", LONG, *HERE),
    "model": ("caption", "red.png", "--model", LONG),
    "config": ("caption", "red.png", "--model", "model", "--config", LONG),
    "tokenizer": ("caption", "red.png", "--model", "model", "--tokenizer", LONG),
    "compiled": ("caption", "red.png", *HERE, "--compiled", LONG),
    "masks": ("segment", "red.png", "a", *HERE, "--masks", LONG),
    "siglip": ("embed", "red.png", "--model", LONG),
    "inspect": ("inspect", LONG),
    "convert": ("convert", LONG, "made"),
    "data": ("train", LONG, "--out", "made"),
    "valid": ("train", "red.png", "--valid", LONG, "--out", "made"),
    "adapter": ("merge", LONG, "made", "--model", "model"),
    "compile": ("compile", LONG),
    "bench": ("bench", "--model", LONG),
    "laws": ("laws", "--model", LONG),
    "adapter of laws": ("laws", "--adapter", f"{LONG}:a"),
}


@pytest.mark.parametrize("name", LONG_NAMES)
def test_a_name_of_300_characters_is_one_line_and_status_2(run, name):
    status, out, err = run(*LONG_NAMES[name])
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("pgfunc: ")
