"""A file is there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from wardround.wire.files import write_text, written


def _fail(path: Path, error: BaseException) -> None:
    with written(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError(), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "new" / "file.json"
    for old in (None, "whole"):
        if old is not None:
            write_text(path, old)
        with pytest.raises(type(error)):
            _fail(path, error)
        assert [p.read_text() for p in path.parent.iterdir()] == ([] if old is None else [old])
    write_text(path, "neü")
    assert path.read_bytes() == "neü".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_draft_that_cannot_be_opened_is_said_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file.draft").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "file", "text")
    assert not (tmp_path / "file").exists()


def test_a_durable_file_is_on_disk_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts: list[tuple[int, bool]] = []
    path, sync = tmp_path / "file", os.fsync

    def fsync(handle: int) -> None:
        acts.append((os.fstat(handle).st_ino, path.exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "text")
    assert acts == []
    path.unlink()
    write_text(path, "text", durable=True)
    assert acts == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]
