"""Engines carry messages: frames between processes, one reply for each message, and an end that changes nothing."""

from __future__ import annotations

import errno
import io
import json
import logging
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.engines.apart import ApartEngine
from wardround.engines.frames import SharedBodies
from wardround.engines.local import LocalEngine
from wardround.engines.process import ATTEMPTS
from wardround.engines.workers import WorkersEngine
from wardround.errors import DataError, Interrupted, WireError, Withheld
from wardround.federation.exchange import ERROR
from wardround.federation.refusals import is_withheld, kind_of
from wardround.wire.message import EMPTY, FileBody, Header, Message

QUESTION = Header("question", "study", "A")


def frame(message: Message) -> bytes:
    stream = io.BytesIO()
    SharedBodies().write(stream, message)
    return stream.getvalue()


def test_frames_round_trip_and_bodies_stay_in_their_files(tmp_path: Path) -> None:
    path = tmp_path / "body"
    path.write_bytes(b"x" * 100_000)
    header = Header("train", "study", "A", body_nbytes=100_000)
    data = frame(Message(header, FileBody(path, 100_000))) + frame(Message(QUESTION))
    assert len(data) < 2000
    stream = io.BytesIO(data)
    first, second = SharedBodies().read(stream), SharedBodies().read(stream)
    assert first == Message(header, FileBody(path, 100_000))
    assert second is not None
    assert second.header == QUESTION
    assert second.body == EMPTY
    assert SharedBodies().read(stream) is None


@given(cut=st.integers(1, 200))
def test_a_frame_that_ends_too_early_is_refused(cut: int) -> None:
    data = frame(Message(QUESTION))
    with pytest.raises(WireError):
        SharedBodies().read(io.BytesIO(data[: -min(cut, len(data) - 1)]))


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    for lengths in ((1 << 31, 0), (10, 1 << 20)):
        with pytest.raises(WireError, match="oversized"):
            SharedBodies().read(io.BytesIO(struct.pack("<II", *lengths)))


def test_a_site_that_cannot_be_built_is_an_error_reply_without_its_reason() -> None:
    def find(header: Header) -> Any:
        raise OSError("/data/DOE^JANE is gone")

    (reply,) = LocalEngine(find).exchange([Message(QUESTION)])
    assert reply.header.kind == ERROR
    assert reply.header.meta == {"reason": "OSError", "kind": "error"}
    assert reply.header.reply_to == Message(QUESTION).id


def test_an_error_says_its_kind_by_a_name_of_ours_alone() -> None:
    class DoeJane(DataError):
        """A plug-in's own."""

    assert [kind_of(e) for e in (Withheld(""), DataError(""), DoeJane(""), OSError(), ValueError())] == [
        "Withheld", "DataError", "DataError", "error", "error",
    ]  # fmt: skip


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
    with pytest.raises(Interrupted):
        next(engine.exchange([]))
    assert asked == ["A"]


def test_a_closed_engine_of_parties_apart_says_so(tmp_path: Path) -> None:
    engine = ApartEngine("tests.engines.echo:finder", {"A": tmp_path / "spec.json"}, tmp_path / "spool")
    assert list(engine.exchange([])) == []
    engine.close()
    with pytest.raises(Interrupted):
        next(engine.exchange([]))


# Workers with toy sites ----------------------------------------------------------------------------------------------


def workers(
    tmp_path: Path, deaths: int, processes: int = 1, progress: Any = None, *, broken: bool = False
) -> WorkersEngine:
    (tmp_path / "deaths").write_text(str(deaths))
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"deaths": str(tmp_path / "deaths"), "broken": broken}))
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
        assert not is_withheld(lost)
        (well,) = engine.exchange([ask("A")])
        assert well.header.kind == "echo"

        # Whoever waits when the engine is closed is told that the run was stopped, not that a site is missing.
        threading.Timer(0.3, engine.close).start()
        with pytest.raises(Interrupted):
            list(engine.exchange([ask("A", "sleep"), ask("B")]))
        # Asked nothing, it says so too: a coordinator that waits before another attempt sees it.
        for messages in ([ask("A")], []):
            with pytest.raises(Interrupted):
                list(engine.exchange(messages))
    finally:
        engine.close()
    assert engine.pids == ()


def answered(engine: WorkersEngine, *messages: Message) -> list[Message]:
    """The replies; fails instead of waiting for ever."""
    replies: list[Message] = []
    asking = threading.Thread(target=lambda: replies.extend(engine.exchange(messages)), daemon=True)
    asking.start()
    asking.join(timeout=20)
    assert not asking.is_alive(), "somebody waits for a reply that will never come"
    return replies


def test_a_worker_that_cannot_be_started_is_an_error_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory", "/usr/bin/python")

    monkeypatch.setattr("wardround.engines.process.subprocess.Popen", full)
    engine = workers(tmp_path, 0)
    try:
        for question in (ask("A"), ask("B")):
            (lost,) = answered(engine, question)
            assert (lost.header.kind, lost.header.reply_to) == (ERROR, question.id)
            assert "no process could be started: Cannot allocate memory" in lost.header.meta["reason"]
            assert "python" not in lost.header.meta["reason"]
    finally:
        engine.close()


def test_a_progress_callback_that_raises_costs_one_answer_and_no_thread(tmp_path: Path) -> None:
    calls: list[str] = []

    def broken(arm: str, site: str, *_: int) -> None:
        calls.append(site)
        if len(calls) == 1:
            raise RuntimeError("/data/DOE^JANE is not drawn")

    engine = workers(tmp_path, 0, progress=broken)
    try:
        lost, well = answered(engine, ask("A"), ask("B"))
        assert (lost.header.site, lost.header.kind) == ("A", ERROR)
        assert lost.header.meta["reason"].endswith("its process could not be asked (RuntimeError)")
        assert (well.header.site, well.header.kind) == ("B", "echo")
        assert calls == ["A", "B"]
    finally:
        engine.close()


def test_what_workers_print_names_no_patient(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Their stderr is the parent's, which services and batch jobs keep."""
    for broken, order in ((False, "fail"), (False, "warn"), (True, "")):
        engine = workers(tmp_path, 0, broken=broken)
        try:
            list(engine.exchange([ask("A", order)]))
        finally:
            engine.close()
    said = capfd.readouterr().err
    assert "site A could not be opened: DataError: an image cannot be read" in said
    assert said.count("a worker process ends: ValueError") == ATTEMPTS
    assert "JANE" not in said
    assert "Traceback" not in said


def test_a_site_that_looks_for_a_bad_file_can_make_its_workers_name_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "wardround")
    engine = workers(tmp_path, 0)
    try:
        list(engine.exchange([ask("A", "fail")]))
    finally:
        engine.close()
    assert "detail: /data/DOE^JANE.nii" in capfd.readouterr().err
