"""Engines carry messages: frames between processes, one reply for each message, and an end that changes nothing."""

from __future__ import annotations

import io
import json
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.engines.frames import read_frame, write_frame
from wardround.engines.local import LocalEngine
from wardround.engines.workers import ATTEMPTS, WorkersEngine
from wardround.errors import Interrupted, WireError
from wardround.federation.exchange import ERROR
from wardround.wire.message import EMPTY, FileBody, Header, Message

QUESTION = Header("question", "study", "A")


def frame(message: Message) -> bytes:
    stream = io.BytesIO()
    write_frame(stream, message)
    return stream.getvalue()


def test_frames_round_trip_and_bodies_stay_in_their_files(tmp_path: Path) -> None:
    path = tmp_path / "body"
    path.write_bytes(b"x" * 100_000)
    header = Header("train", "study", "A", body_nbytes=100_000)
    data = frame(Message(header, FileBody(path, 100_000))) + frame(Message(QUESTION))
    assert len(data) < 2000
    stream = io.BytesIO(data)
    first, second = read_frame(stream), read_frame(stream)
    assert first == Message(header, FileBody(path, 100_000))
    assert second is not None
    assert second.header == QUESTION
    assert second.body == EMPTY
    assert read_frame(stream) is None


@given(cut=st.integers(1, 200))
def test_a_frame_that_ends_too_early_is_refused(cut: int) -> None:
    data = frame(Message(QUESTION))
    with pytest.raises(WireError):
        read_frame(io.BytesIO(data[: -min(cut, len(data) - 1)]))


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    for lengths in ((1 << 31, 0), (10, 1 << 20)):
        with pytest.raises(WireError, match="oversized"):
            read_frame(io.BytesIO(struct.pack("<II", *lengths)))


def test_a_site_that_cannot_be_built_is_an_error_reply_without_its_reason() -> None:
    def find(header: Header) -> Any:
        raise OSError("/data/DOE^JANE is gone")

    (reply,) = LocalEngine(find).exchange([Message(QUESTION)])
    assert reply.header.kind == ERROR
    assert reply.header.meta == {"reason": "OSError"}
    assert reply.header.reply_to == Message(QUESTION).id


def test_a_closed_local_engine_asks_nobody_else(tmp_path: Path) -> None:
    rig = Rig(toy_study(), tmp_path)
    asked: list[str] = []

    def find(header: Header) -> Any:
        asked.append(header.site)
        return rig.sites[header.site]

    engine = LocalEngine(find)
    replies = engine.exchange([Message(Header("question", "study", s)) for s in "ABC"])
    next(replies)
    engine.close()
    with pytest.raises(Interrupted, match="run the same command again"):
        next(replies)
    assert asked == ["A"]


# Workers with toy sites ----------------------------------------------------------------------------------------------


def workers(tmp_path: Path, deaths: int, processes: int = 1, progress: Any = None) -> WorkersEngine:
    (tmp_path / "deaths").write_text(str(deaths))
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"deaths": str(tmp_path / "deaths")}))
    return WorkersEngine(processes, "tests.engines.echo:finder", spec, progress)


def ask(site: str, order: str = "") -> Message:
    return Message(Header("question", "study", site, meta={"order": order}))


@pytest.mark.slow
def test_workers_answer_every_message_once_and_survive_their_deaths(tmp_path: Path) -> None:
    steps: list[tuple[str, str, int, int, int]] = []
    engine = workers(tmp_path, ATTEMPTS - 1, progress=lambda *step: steps.append(step))
    try:
        questions = [ask("A"), ask("B", "die"), ask("C")]
        replies = list(engine.exchange(questions))
        assert {r.header.reply_to for r in replies} == {q.id for q in questions}
        assert {r.header.kind for r in replies} == {"echo"}
        assert len({r.header.meta["pid"] for r in replies}) == 2
        assert ("study", "A", 0, 1, 1) in steps

        (tmp_path / "deaths").write_text("100")
        (lost,) = engine.exchange([ask("B", "die")])
        assert lost.header.kind == ERROR
        assert f"died {ATTEMPTS} times" in lost.header.meta["reason"]
        (well,) = engine.exchange([ask("A")])
        assert well.header.kind == "echo"

        # Whoever waits when the engine is closed is told that the run was stopped, not that a site is missing.
        threading.Timer(0.3, engine.close).start()
        with pytest.raises(Interrupted):
            list(engine.exchange([ask("A", "sleep"), ask("B")]))
        with pytest.raises(Interrupted):
            list(engine.exchange([ask("A")]))
    finally:
        engine.close()
    assert engine.pids == ()
