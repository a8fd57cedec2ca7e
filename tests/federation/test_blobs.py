"""The files of a store: written over where they are small, and nobody else's deleted, followed or changed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from wardround.errors import JournalError
from wardround.storage.blobs import Blobs
from wardround.storage.hash_log import LOG, HashLog
from wardround.storage.journal import Journal
from wardround.storage.store import Memory, SiteStore
from wardround.wire.files import write_text
from wardround.wire.message import Header, Message

HASH = "a" * 64


def outside(tmp_path: Path) -> Path:
    """A folder of somebody else's that holds files of such names as a store makes."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in (HASH, "b" * 64, "tmpabcdefgh.draft", "x.draft", "store.sqlite", "journal.sqlite", LOG):
        (folder / name).write_text("mine")
    return folder


def untouched(folder: Path) -> bool:
    return len(list(folder.iterdir())) == 7 and {path.read_text() for path in folder.iterdir()} == {"mine"}


def test_a_linked_folder_is_refused_and_nothing_of_it_deleted(tmp_path: Path) -> None:
    theirs = outside(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "blobs").symlink_to(theirs)
    (tmp_path / "linked").symlink_to(theirs)
    for act in (
        lambda: Blobs(tmp_path / "linked"),
        lambda: SiteStore(tmp_path / "store"),
        lambda: SiteStore(tmp_path / "linked"),
        lambda: Journal(tmp_path / "store", "s"),
        lambda: Journal(tmp_path / "linked", "s"),
    ):
        with pytest.raises(JournalError, match="symbolic link") as caught:
            act()
        assert str(tmp_path) not in str(caught.value)
        assert str(tmp_path) in caught.value.detail
    assert untouched(theirs)


@pytest.mark.parametrize("name", ["store.sqlite", "store.sqlite-wal", f"blobs/{HASH}", "blobs/tmpabcdefgh.draft"])
def test_linked_files_are_refused(tmp_path: Path, name: str) -> None:
    theirs = outside(tmp_path)
    SiteStore(tmp_path / "store").close()
    link = tmp_path / "store" / name
    link.unlink(missing_ok=True)
    link.symlink_to(theirs / HASH)
    with pytest.raises(JournalError, match="symbolic link"):
        SiteStore(tmp_path / "store")
    assert untouched(theirs)


def test_a_linked_log_is_refused_and_a_linked_draft_not_followed(tmp_path: Path) -> None:
    theirs = outside(tmp_path)
    (tmp_path / LOG).symlink_to(theirs / LOG)
    with pytest.raises(JournalError, match="symbolic link"):
        HashLog(tmp_path / LOG, "site A", {"study": "s"}).note("sent", {"round": 1})
    (tmp_path / "result.json.draft").symlink_to(theirs / HASH)
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "result.json", "{}")
    assert untouched(theirs)


def test_only_files_of_names_that_it_made_are_deleted(tmp_path: Path) -> None:
    store = SiteStore(tmp_path)
    store.close()
    for name in (HASH, "tmp0a_b1c2d.draft"):
        (tmp_path / "blobs" / name).write_text("left by a killed process")
    for name in ("x.draft", "a" * 63, "A" * 64, "notes.txt"):
        (tmp_path / "blobs" / name).write_text("mine")
    SiteStore(tmp_path).close()
    assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == sorted(
        ["x.draft", "a" * 63, "A" * 64, "notes.txt"]
    )


def put(blobs: Blobs, data: bytes, name: str) -> int:
    """Write a file; its inode says whether another was written over."""
    with blobs.draft(durable=False) as draft:
        draft.file.write(data)
        draft.name = name
    assert blobs.path(name).read_bytes() == data
    return blobs.path(name).stat().st_ino


def test_a_small_file_is_written_over_and_nothing_of_it_stays(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    first = put(blobs, b"long" * 1000, "a" * 64)
    blobs.drop("a" * 64, reuse=True)
    assert put(blobs, b"short", "b" * 64) == first
    blobs.drop("b" * 64)
    assert not list(tmp_path.iterdir())
    put(blobs, b"one", "c" * 64)
    put(blobs, b"two", "d" * 64)
    blobs.keep(set(), reuse=True)
    assert len(list(tmp_path.iterdir())) == 1
    blobs.close()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_needed_again_is_not_written_over(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    for _ in range(2):
        put(blobs, b"one", "a" * 64)
        blobs.drop("a" * 64, reuse=True)
    put(blobs, b"one", "a" * 64)
    put(blobs, b"two", "b" * 64)
    blobs.close()
    assert (tmp_path / ("a" * 64)).read_bytes() == b"one"


def test_a_file_that_has_another_name_too_is_not_written_over(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    for link in (os.link, os.symlink):
        put(blobs, b"old", "a" * 64)
        blobs.drop("a" * 64, reuse=True)
        (tmp_path / "theirs").write_bytes(b"mine")
        blobs.path("a" * 64).unlink()
        link(tmp_path / "theirs", blobs.path("a" * 64))
        put(blobs, b"new", "b" * 64)
        assert (tmp_path / "theirs").read_bytes() == b"mine"


def test_a_private_part_is_deleted_and_never_kept_to_be_written_over(tmp_path: Path) -> None:
    store = SiteStore(tmp_path)
    for number in (1, 2):
        request = Message(Header("train", "s", "A", number))
        store.finish(request.reply("update"), Memory({"kept": np.full(9, number, np.float32)}, {}), set())
    assert [p.read_bytes() for p in (tmp_path / "blobs").iterdir()] == [np.full(9, 2, np.float32).tobytes()]
    store.close()
