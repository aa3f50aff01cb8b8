"""Files and directories that are replaced whole: whose they are to read, and links in their place."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoms.errors import StorageError
from atoms.storage import new_directory, replaced_file, write_bytes


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_and_directories_have_what_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    write_bytes(tmp_path / "file", b"x")
    with new_directory(tmp_path / "directory"):
        pass
    assert mode(tmp_path / "file") == 0o666 & ~umask
    assert mode(tmp_path / "directory") == 0o777 & ~umask


@pytest.mark.parametrize("before", [0o600, 0o640, 0o666], ids=oct)
def test_a_replaced_file_keeps_its_mode_while_it_is_written_too(tmp_path: Path, umask: int, before: int) -> None:
    path = tmp_path / "keys.json"
    path.touch()
    path.chmod(before)
    with replaced_file(path) as file:
        assert mode(Path(os.fsdecode(file.name))) == before
        file.write(b"x")
    assert (mode(path), path.read_bytes()) == (before, b"x")
    assert list(tmp_path.iterdir()) == [path]


def test_a_replaced_directory_keeps_its_mode(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "package"
    path.mkdir(mode=0o700)
    with new_directory(path, replace=True) as temporary:
        assert mode(temporary) == 0o700
        (temporary / "new").touch()
    assert mode(path) == 0o700 and list(path.iterdir()) == [path / "new"]


def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    target, link, away = tmp_path / "data" / "v1", tmp_path / "link", tmp_path / "away"
    target.write_bytes(b"old")
    link.symlink_to("data/v1")
    away.symlink_to("data/absent")
    for name in (link, away):
        write_bytes(name, b"new")
        assert name.is_symlink() and name.read_bytes() == b"new"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["absent", "v1"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(StorageError, match="No space left"), replaced_file(path) as file:
        file.write(b"half")
        raise OSError(28, os.strerror(28))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
