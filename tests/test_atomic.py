"""Files and folders change at once: from the old to the new, whoever reads, writes or was stopped meanwhile."""

import fcntl
import json
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgfunc.checkpoint.writing import DTYPE_NAMES, write_safetensors
from pgfunc.errors import CheckpointError
from pgfunc.files import atomic
from pgfunc.files.atomic import changing, replacing, write_text
from pgfunc.files.journal import JOURNAL, reading


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture
def pair(tmp_path) -> Path:
    """A folder of two files that belong together."""
    with changing(tmp_path) as change:
        change.write("a", "old")
        change.write("b", "old")
    return tmp_path


def replace_pair(folder: Path, value: str) -> None:
    with changing(folder) as change:
        change.write("a", value)
        change.write("b", value)


def stop_within_the_commit(folder: Path, monkeypatch) -> None:
    """A writer that is stopped when its journal is in place and nothing else is."""
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "settle", lambda folder: None)
        replace_pair(folder, "new")


# a file


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, ".hidden", "a b", "x.tmp"])
def test_a_file_may_have_any_name(tmp_path, name):
    for text in ("old", "new"):
        write_text(tmp_path / name, text)
        assert content(tmp_path) == {name: text}


def test_a_name_that_is_too_long_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="too long"):
        write_text(tmp_path / ("a" * 256), "new")
    assert content(tmp_path) == {}


def test_what_fails_within_the_block_leaves_the_old(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as file:
        file.write(b"x" * (1 // 0))
    assert content(tmp_path) == {"a": "old"}


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    write_text(tmp_path / "target", "kept")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        write_text(tmp_path / name, "new")
        assert not (tmp_path / name).is_symlink()
    assert content(tmp_path) == {"target": "kept", "link": "new", "dangling": "new"}


def test_a_new_file_has_the_mode_of_the_umask_and_an_old_one_keeps_its_own(tmp_path, umask):
    write_text(tmp_path / "a", "new")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    (tmp_path / "a").chmod(0o604)
    write_text(tmp_path / "a", "newer")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o604


def test_what_is_mapped_or_open_does_not_change(tmp_path):
    write_text(tmp_path / "a", "old")
    with (tmp_path / "a").open() as file:
        write_text(tmp_path / "a", "new")
        assert file.read() == "old"


def test_a_pipe_is_written_and_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "new")
    reader.join()
    assert found == ["new"]
    assert (tmp_path / "pipe").is_fifo()


def test_no_folder_is_made_for_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "no" / "a", "new")


# what others left


def test_what_a_killed_writer_left_goes_with_the_next_write_and_what_lives_stays(tmp_path):
    dead, alive = ("0" * 16, "1" * 16)
    for token in (dead, alive):
        for end in ("", ".0", ".1"):
            (tmp_path / f".pgfunc-{token}{end}.tmp").write_text("large")
    (tmp_path / ".pgfunc-notes.tmp").write_text("somebody's own")
    with (tmp_path / f".pgfunc-{alive}.tmp").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_text(tmp_path / "a", "new")
        kept = {f".pgfunc-{alive}{end}.tmp" for end in ("", ".0", ".1")}
        assert content(tmp_path).keys() == {"a", ".pgfunc-notes.tmp", *kept}


def test_a_commit_that_was_stopped_is_finished_by_the_next_reader(pair, monkeypatch):
    stop_within_the_commit(pair, monkeypatch)
    assert (pair / JOURNAL).exists()
    with reading(pair):
        assert content(pair) == {"a": "new", "b": "new"}


def test_a_commit_that_was_stopped_is_finished_before_the_next_write(pair, monkeypatch):
    stop_within_the_commit(pair, monkeypatch)
    write_text(pair / "b", "newer")
    assert content(pair) == {"a": "new", "b": "newer"}


def test_a_folder_that_is_read_only_holds_an_incomplete_save_and_says_so(pair, monkeypatch):
    stop_within_the_commit(pair, monkeypatch)

    def refuse(*given):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(CheckpointError, match=r"an incomplete save, which cannot be finished here .*Permission denied"):
        reading(pair).__enter__()


TEMPORARY = ".pgfunc-0000000000000000.0.tmp"


def plan(rename: Any, supersede: Any = (), hidden: Any = ()) -> dict[str, Any]:
    return {"rename": rename, "supersede": supersede, "hidden": hidden}


@pytest.mark.parametrize("plan", [
    [], {}, plan({}), plan({TEMPORARY: "../b"}), plan({TEMPORARY: "b"}, [["/tmp", "x"]]), plan({"a": "b"}),
    plan({TEMPORARY: "inner/b"}), plan({TEMPORARY: "b"}, [["inner", "."]]), plan({TEMPORARY: "b"}, 5),
    plan({TEMPORARY: "b"}, [], ["../b"]), {"rename": {TEMPORARY: "b"}}, plan([TEMPORARY]),
], ids=json.dumps)  # fmt: skip
def test_a_journal_that_names_what_is_no_save_is_not_obeyed(pair, plan):
    (pair / "inner").symlink_to(pair.parent)
    (pair / JOURNAL).write_text(json.dumps(plan))
    with pytest.raises(CheckpointError, match=r"an incomplete save, whose list .* cannot be used"):
        reading(pair).__enter__()
    assert (pair / "a").read_text() == (pair / "b").read_text() == "old"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_journal_of_another_user_is_not_obeyed(pair, monkeypatch):
    stop_within_the_commit(pair, monkeypatch)
    os.chown(pair / JOURNAL, 12345, -1)
    with pytest.raises(CheckpointError, match="belongs to another user"):
        write_text(pair / "c", "new")
    assert (pair / "a").read_text() == (pair / "b").read_text() == "old"


def test_a_folder_in_the_place_of_a_file_is_an_error_before_anything_changes(pair):
    (pair / "b").unlink()
    (pair / "b").mkdir()
    with pytest.raises(OSError, match="is a folder"):
        replace_pair(pair, "new")
    assert content(pair) == {"a": "old"}


# at the same time


def test_readers_see_one_of_two_saves_and_never_parts_of_both(pair):
    stop, seen = threading.Event(), set()

    def write(value: str) -> None:
        while not stop.is_set():
            replace_pair(pair, value)

    writers = [threading.Thread(target=write, args=(value,)) for value in ("one", "two")]
    for writer in writers:
        writer.start()
    for _ in range(200):
        with reading(pair):
            seen.add(tuple((pair / name).read_text() for name in ("a", "b")))
    stop.set()
    for writer in writers:
        writer.join()
    assert seen <= {("old", "old"), ("one", "one"), ("two", "two")}
    assert len(content(pair)) == 2


def test_readers_do_not_keep_a_writer_waiting(pair):
    """However many of them overlap: those that come after the journal wait for it."""
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with reading(pair):
                time.sleep(0.02)

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    start = time.monotonic()
    for _ in range(5):
        replace_pair(pair, "new")
    took = time.monotonic() - start
    stop.set()
    for reader in readers:
        reader.join()
    assert took < 5  # it takes 0.2 s; without the journal's place in the queue it does not end


def test_without_hard_links_a_folder_still_changes_at_once(pair, monkeypatch):
    def refuse(*given):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    replace_pair(pair, "new")
    assert content(pair) == {"a": "new", "b": "new"}


def test_without_locks_each_file_still_changes_at_once(pair, monkeypatch):
    monkeypatch.setattr("pgfunc.files.locks.fcntl", None)
    (pair / f".pgfunc-{'0' * 16}.tmp").write_text("may be alive")
    replace_pair(pair, "new")
    with reading(pair):
        assert content(pair) == {"a": "new", "b": "new", f".pgfunc-{'0' * 16}.tmp": "may be alive"}


# the format

dtypes = st.sampled_from(sorted(DTYPE_NAMES, key=str))
shapes = st.lists(st.integers(0, 3), max_size=3)


@given(arrays=st.dictionaries(st.text(max_size=4), st.tuples(dtypes, shapes), max_size=5), key=st.text(max_size=4))
def test_safetensors_reads_what_is_written(arrays, key, tmp_path_factory):
    path = tmp_path_factory.mktemp("format") / "a.safetensors"
    made = {name: torch.randint(0, 100, shape).to(dtype) for name, (dtype, shape) in arrays.items()}
    with path.open("wb") as file:
        write_safetensors(file, made, {"key": key})
    found = safetensors.torch.load_file(path)
    assert found.keys() == made.keys()
    for name, array in made.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), array.reshape(-1).view(torch.uint8))
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"key": key}


def test_the_bytes_are_those_of_safetensors(tmp_path):
    made = {"b": torch.randn(3, 2).T, "a": torch.randn(5), "é": torch.randn(()).bfloat16()}
    with (tmp_path / "a").open("wb") as file:
        write_safetensors(file, made, {"format": "pt"})
    expected = {name: array.contiguous() for name, array in made.items()}
    assert (tmp_path / "a").read_bytes() == safetensors.torch.save(expected, {"format": "pt"})


def test_a_stream_of_a_process_is_written_as_it_is(tmp_path):
    with (tmp_path / "out").open("w+") as out:
        (tmp_path / "link").symlink_to(f"/proc/self/fd/{out.fileno()}")
        write_text(tmp_path / "link", "said")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out").read_text() == "said"
