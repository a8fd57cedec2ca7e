"""What a site keeps of its private part, round by round."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wardround.storage.store import Memory, SiteStore
from wardround.wire.message import Header, Message


def test_a_site_that_missed_a_round_keeps_what_it_had_before_a_void_one(tmp_path: Path) -> None:
    """Round 3 is aborted, round 4 goes on without the site, round 5 is aborted as well: round 2 is what counts."""
    store = SiteStore(tmp_path)

    def finish(number: int, keep: set[int], aborted: set[int]) -> None:
        request = Message(Header("train", "s", "A", number))
        memory = Memory({"kept": np.full(1, number, np.float32)}, {})
        store.finish(request.reply("update"), memory, keep, aborted=aborted)

    finish(2, {1}, set())
    finish(3, {2}, set())
    finish(5, {4}, {3})
    assert store.memory(5, without={3, 5}).tensors["kept"].tolist() == [2.0]
    finish(6, {4}, {3, 5})
    assert store.memory(6).tensors["kept"].tolist() == [6.0]
    assert store.memory(5, without={3, 5}).tensors["kept"].tolist() == [2.0]
    assert len(list((tmp_path / "blobs").iterdir())) == 2
    store.close()
