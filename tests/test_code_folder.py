"""A folder of compiled code is undamaged, private and the only one of its process; others are repaired or refused."""

import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import pgfunc as pg
from pgfunc.cli.compiled import compiled_files
from pgfunc.errors import SettingError
from pgfunc.jit.code_folder import REGISTER, VARIABLES, present_digests

CODE = {"torchinductor/ab/one.so": b"machine code", "torchinductor/fx/two": b"a pickle", "triton/three.cubin": b"more"}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in present_digests(folder)}


@pytest.fixture
def folder(tmp_path):
    """A folder that contains code."""
    with pg.compiled_in(tmp_path / "code"):
        write(tmp_path / "code", CODE)
    return tmp_path / "code"


def test_code_written_inside_is_found_again_also_if_the_folder_moves(folder, tmp_path):
    with pg.compiled_in(folder):
        assert read(folder) == CODE
    folder.rename(tmp_path / "moved")
    with pg.compiled_in(tmp_path / "moved"):
        assert read(tmp_path / "moved") == CODE


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("damage", ["truncated", "changed", "removed"])
def test_if_a_file_is_damaged_all_code_is_deleted(folder, name, damage):
    path = folder / name
    content = {"truncated": CODE[name][:3], "changed": CODE[name][::-1]}.get(damage)
    path.unlink() if content is None else path.write_bytes(content)
    with pg.compiled_in(folder):
        assert read(folder) == {}
        write(folder, CODE)
    with pg.compiled_in(folder):
        assert read(folder) == CODE


@given(st.integers(0, 300), st.binary(max_size=20))
def test_with_a_damaged_register_only_registered_code_is_kept(tmp_path_factory, cut, extra):
    folder = tmp_path_factory.mktemp("code") / "code"
    with pg.compiled_in(folder):
        write(folder, CODE)
    (folder / REGISTER).write_bytes((folder / REGISTER).read_bytes()[:cut] + extra)
    with pg.compiled_in(folder):
        assert read(folder).items() <= CODE.items()


def test_files_of_a_killed_process_are_deleted_unless_another_process_uses_the_folder(folder):
    write(folder, unfinished := {"torchinductor/ab/half.so": b"mach"})
    with pg.compiled_in(folder):
        assert read(folder) == CODE
        write(folder, unfinished)
        with pg.compiled_in(folder):
            assert read(folder) == CODE | unfinished
    with suppress(KeyError), pg.compiled_in(folder):
        write(folder, {"torchinductor/ab/other.so": b""})
        raise KeyError
    with pg.compiled_in(folder):
        assert read(folder) == CODE | unfinished


def test_unfinished_files_and_folders_are_deleted_unless_another_process_uses_the_folder(folder):
    """A lock stays: it is empty, and not code."""
    unfinished = {
        "torchinductor/ab/.1.2.tmp": b"mach",
        "triton/tmp.pid_1_ab/kernel.cubin": b"",
        "triton/x/tmp.pid_2": b"",
    }
    lock = {"torchinductor/locks/one.lock": b""}
    write(folder, unfinished | lock)
    with pg.compiled_in(folder):
        assert not [name for name in unfinished if (folder / name).exists()]
        assert not (folder / "triton/tmp.pid_1_ab").exists()
        assert (folder / "torchinductor/locks/one.lock").exists()
        write(folder, unfinished)
        with pg.compiled_in(folder):
            assert all((folder / name).exists() for name in unfinished)
        assert read(folder) == CODE


def test_folders_may_disappear_while_they_are_listed(folder):
    """As the build folders of PyTorch's compile workers do. The many files make each listing take longer."""
    worker = """
import os, shutil, sys
os.chdir(sys.argv[1])
print("started", flush=True)
while True:
    for i in range(35):
        os.makedirs(f"{i % 7}_CxxBuild/{i}/inner", exist_ok=True)
    for i in range(7):
        shutil.rmtree(f"{i}_CxxBuild")
"""
    with pg.compiled_in(folder):
        write(folder, {f"torchinductor/{i}/{j}.py": b"" for i in range(60) for j in range(6)})
    command = [sys.executable, "-c", worker, str(folder / "torchinductor")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            for _ in range(30):
                with pg.compiled_in(folder):
                    assert len(compiled_files(folder)) == 362
            assert process.poll() is None
        finally:
            process.kill()


# --- other users


def test_a_new_folder_is_accessible_only_to_its_user(folder):
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o702, 0o720, 0o777])
def test_a_folder_in_which_others_can_write_is_refused(folder, mode):
    folder.chmod(mode)
    message = "others can write it, and its content is run; chmod -R go-w"
    with (
        pytest.raises(SettingError, match=message),
        pg.compiled_in(folder),
    ):
        pass


def test_a_file_that_others_can_write_is_refused_if_they_can_enter_the_folder(folder):
    next(iter(folder.rglob("*.so"))).chmod(0o666)
    with pg.compiled_in(folder):
        pass
    folder.chmod(0o755)
    with pytest.raises(SettingError, match=r"one\.so: others can write it"), pg.compiled_in(folder):
        pass


def test_a_symbolic_link_is_refused_if_others_can_enter_the_folder(folder):
    (folder / "torchinductor/link.so").symlink_to(folder / "torchinductor/ab/one.so")
    folder.chmod(0o755)
    message = r"link\.so: is a symbolic link, .*; replace it by a copy"
    with pytest.raises(SettingError, match=message), pg.compiled_in(folder):
        pass


def test_a_folder_of_another_user_is_refused(folder, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    if folder.stat().st_uid == 0:  # a folder of root would be accepted
        os.chown(folder, 7, 7)
    with pytest.raises(SettingError, match="belongs to another user"), pg.compiled_in(folder):
        pass


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/deeper", "x" * 300):
        with (
            pytest.raises(SettingError, match="cannot be a folder for compiled code"),
            pg.compiled_in(tmp_path / name),
        ):
            pass


# --- one folder for a process


def variables() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in VARIABLES}


@example(["a", "b", "a", None])
@given(st.lists(st.sampled_from(["a", "b", None]), max_size=8))
def test_the_environment_is_restored_when_all_users_have_left(tmp_path_factory, steps):
    """In one thread folders can be nested; the innermost is used."""
    root, before = tmp_path_factory.mktemp("code"), variables()
    folders: list[Path | None] = []
    with ExitStack() as outside:
        stacks = [outside]
        for step in steps:
            if step:
                stacks.append(ExitStack())
                stacks[-1].enter_context(pg.compiled_in(root / step))
                folders.append(root / step)
            elif folders:
                stacks.pop().close()
                folders.pop()
            expected = before if not folders else {name: f"{folders[-1]}/{sub}" for name, sub in VARIABLES.items()}
            assert variables() == expected
        while len(stacks) > 1:
            stacks.pop().close()
    assert variables() == before


def test_a_thread_with_another_folder_is_refused_and_one_with_the_same_folder_is_not(tmp_path):
    before, results = variables(), []

    def enter(name: str) -> None:
        try:
            with pg.compiled_in(tmp_path / name):
                results.append(os.environ["TRITON_CACHE_DIR"])
        except SettingError as error:
            results.append(str(error))

    with ExitStack() as stack:
        stack.enter_context(pg.compiled_in(tmp_path / "a"))
        for name in ("b", "a"):
            thread = Thread(target=enter, args=(name,))
            thread.start()
            thread.join()
        assert results[0].startswith(f"{tmp_path}/b: another thread has its compiled code in {tmp_path}/a")
        assert results[1] == os.environ["TRITON_CACHE_DIR"] == f"{tmp_path}/a/triton"
    assert variables() == before
