"""A folder of compiled code is whole, private and the only one of its process, or it is refused."""

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import pgfunc as pg
from pgfunc.errors import SettingError
from pgfunc.jit.code_folder import FILES, VARIABLES, contents

CODE = {"torchinductor/ab/one.so": b"machine code", "torchinductor/fx/two": b"a pickle", "triton/three.cubin": b"more"}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in contents(folder)}


@pytest.fixture
def folder(tmp_path):
    """A folder with code in it."""
    with pg.compiled_in(tmp_path / "code"):
        write(tmp_path / "code", CODE)
    return tmp_path / "code"


def test_what_was_made_inside_is_there_again(folder, tmp_path):
    with pg.compiled_in(folder):
        assert read(folder) == CODE
    folder.rename(tmp_path / "moved")
    with pg.compiled_in(tmp_path / "moved"):
        assert read(tmp_path / "moved") == CODE


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("damage", ["truncated", "changed", "removed"])
def test_code_that_is_not_as_it_was_written_is_thrown_away(folder, name, damage):
    path = folder / name
    content = {"truncated": CODE[name][:3], "changed": CODE[name][::-1]}.get(damage)
    path.unlink() if content is None else path.write_bytes(content)
    with pg.compiled_in(folder):
        assert read(folder) == {}
        write(folder, CODE)
    with pg.compiled_in(folder):
        assert read(folder) == CODE


@given(st.integers(0, 300), st.binary(max_size=20))
def test_a_register_that_is_damaged_keeps_no_code_that_it_does_not_know(tmp_path_factory, cut, more):
    folder = tmp_path_factory.mktemp("code") / "code"
    with pg.compiled_in(folder):
        write(folder, CODE)
    (folder / FILES).write_bytes((folder / FILES).read_bytes()[:cut] + more)
    with pg.compiled_in(folder):
        assert read(folder).items() <= CODE.items()


def test_what_a_killed_process_left_is_thrown_away_unless_another_is_inside(folder):
    write(folder, left := {"torchinductor/ab/half.so": b"mach"})
    with pg.compiled_in(folder):
        assert read(folder) == CODE
        write(folder, left)
        with pg.compiled_in(folder):
            assert read(folder) == CODE | left
    with suppress(KeyError), pg.compiled_in(folder):
        write(folder, {"torchinductor/ab/other.so": b""})
        raise KeyError
    with pg.compiled_in(folder):
        assert read(folder) == CODE | left


# --- who may write


def test_a_folder_is_made_for_its_user_alone(folder):
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o702, 0o720, 0o777])
def test_a_folder_in_which_others_can_write_is_refused(folder, mode):
    folder.chmod(mode)
    said = "others can write it, and what lies there is run; chmod -R go-w"
    with (
        pytest.raises(SettingError, match=said),
        pg.compiled_in(folder),
    ):
        pass


def test_a_file_that_others_can_write_is_refused_where_they_can_enter(folder):
    next(iter(folder.rglob("*.so"))).chmod(0o666)
    with pg.compiled_in(folder):
        pass
    folder.chmod(0o755)
    with pytest.raises(SettingError, match=r"one\.so: others can write it"), pg.compiled_in(folder):
        pass


def test_a_folder_of_another_user_is_refused(folder, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    if folder.stat().st_uid == 0:  # what belongs to root is anybody's to use
        os.chown(folder, 7, 7)
    with pytest.raises(SettingError, match="belongs to another user"), pg.compiled_in(folder):
        pass


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/deeper", "x" * 300):
        with (
            pytest.raises(SettingError, match="cannot be a folder for compiled code"),
            pg.compiled_in(tmp_path / place),
        ):
            pass


# --- one for a process


def variables() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in VARIABLES}


@example(["a", "b", "a", None])
@given(st.lists(st.sampled_from(["a", "b", None]), max_size=8))
def test_the_environment_is_as_it_was_when_all_have_left(tmp_path_factory, steps):
    """In one thread folders nest; the innermost counts."""
    root, before = tmp_path_factory.mktemp("code"), variables()
    places: list[Path | None] = []
    with ExitStack() as outside:
        stacks = [outside]
        for step in steps:
            if step:
                stacks.append(ExitStack())
                stacks[-1].enter_context(pg.compiled_in(root / step))
                places.append(root / step)
            elif places:
                stacks.pop().close()
                places.pop()
            expected = before if not places else {name: f"{places[-1]}/{sub}" for name, sub in VARIABLES.items()}
            assert variables() == expected
        while len(stacks) > 1:
            stacks.pop().close()
    assert variables() == before


def test_a_thread_with_another_folder_is_refused_and_one_with_the_same_may_stay_longer(tmp_path):
    before, said = variables(), []

    def enter(place: str) -> None:
        try:
            with pg.compiled_in(tmp_path / place):
                said.append(os.environ["TRITON_CACHE_DIR"])
        except SettingError as error:
            said.append(str(error))

    with ExitStack() as stack:
        stack.enter_context(pg.compiled_in(tmp_path / "a"))
        for place in ("b", "a"):
            thread = Thread(target=enter, args=(place,))
            thread.start()
            thread.join()
        assert said[0].startswith(f"{tmp_path}/b: another thread has its compiled code in {tmp_path}/a")
        assert said[1] == os.environ["TRITON_CACHE_DIR"] == f"{tmp_path}/a/triton"
    assert variables() == before
