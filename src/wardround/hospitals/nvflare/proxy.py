"""The site's end of a line: in NVFlare's job at the site, between auxiliary messages and the resident process's socket.

It reads no data, runs nothing, takes no settings from a job, and holds nothing: the Hub hands out again what was lost.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from wardround.engines.frames import PROGRESS, SharedBodies
from wardround.errors import WardroundError, WireError
from wardround.hospitals.nvflare.bodies import Offers, Spool, header_of
from wardround.hospitals.nvflare.lines import ask_part, bad, good, send
from wardround.hospitals.nvflare.names import (
    AGENT,
    BEAT,
    HELLO,
    LARGEST,
    PART,
    PULSE,
    REPLY,
    REQUEST,
    SPOOL,
    TAKEN,
    instance_of,
)
from wardround.hospitals.socket_server import connect
from wardround.wire.message import Header, Message

_TRIES = 5  # transfers of one body without a part in between, until the Hub has to hand the message out again
_MOST = 64  # messages at once


class Proxy(Executor):  # type: ignore[misc]
    """Hands requests to the site's resident process, and its replies to the coordinator, each until it is taken."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """NVFlare calls this when the job starts and ends."""
        if event_type == EventType.START_RUN:
            self._start(fl_ctx)
        elif event_type == EventType.END_RUN:
            self._ended.set()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """There are no tasks."""
        return make_reply(ReturnCode.TASK_UNKNOWN)

    def _start(self, fl_ctx: FLContext) -> None:
        self._engine, self._site = fl_ctx.get_engine(), fl_ctx.get_identity_name()
        self._abort = fl_ctx.get_prop(FLContextKey.RUN_ABORT_SIGNAL) or fl_ctx.get_run_abort_signal()
        self._agent, self._parent = Path(os.environ[AGENT]), os.getppid()
        self._spool = Spool(Path(os.environ[SPOOL]), "in", int(os.environ[LARGEST]))
        self._frames, self._offers, self._ended = SharedBodies(), Offers(), threading.Event()
        self._instance, self._left = "", False
        self._lock, self._fetching = threading.Lock(), threading.Lock()
        self._under_way: dict[str, threading.Event] = {}
        self._steps: dict[str, bytes] = {}
        for topic, handler in ((REQUEST, self._request), (TAKEN, self._taken), (PART, self._part)):
            self._engine.register_aux_message_handler(topic, handler)
        for work in (self._watch, self._pulse):
            threading.Thread(target=work, daemon=True).start()

    def _over(self) -> bool:
        if os.getppid() != self._parent:
            os._exit(1)  # NVFlare's client was killed: no other would end this process
        return self._ended.is_set() or (self._abort is not None and bool(self._abort.triggered))

    # Signs of life ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Know the instance of the resident process: a connection stays open for as long as that lives."""
        while not self._over():
            with suppress(OSError, WardroundError, ValueError), self._resident() as (incoming, outgoing):
                self._frames.write(outgoing, Message(Header(HELLO, "", self._site)))
                while (frame := self._frames.read(incoming)) is not None:
                    if frame.header.kind == HELLO:
                        self._instance = instance_of(frame.header.meta.get("instance"))
            self._left = self._left or bool(self._instance)
            self._instance = ""
            self._ended.wait(0.5)

    def _pulse(self) -> None:
        said = None
        while not self._over():
            # That an instance ended is always said: another one that follows at once would pass for a twin.
            instance, self._left = "" if self._left else self._instance, False
            with self._lock:
                steps, self._steps = list(self._steps.values()), {}
            with suppress(OSError):
                send(self._engine, None, BEAT, {"instance": instance, "progress": steps}, 5.0)
                said = instance
            # At the start, and when the resident process was started anew, a request waits for this.
            for _ in range(1 if said is None or said != self._instance else int(PULSE / 0.5)):
                if self._ended.wait(0.5) or said != self._instance:
                    break

    # Messages ---------------------------------------------------------------------------------------------------------

    def _request(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        header = header_of(request)
        if header.site != self._site:
            raise WireError("a request to another site")
        with self._lock:
            if header.id in self._under_way:
                return good()
            if len(self._under_way) >= _MOST:
                return bad()
            self._under_way[header.id] = threading.Event()
        threading.Thread(target=self._work, args=(header.id, dict(request)), daemon=True).start()
        return good()

    def _work(self, request_id: str, data: dict[str, Any]) -> None:
        try:
            request = self._received(data)
            try:
                while not self._over() and not self._answered(request):
                    self._ended.wait(0.5)  # the resident process is being started, or was killed at work
            finally:
                self._spool.forget(request)
        except Exception as error:
            self.logger.warning(f"a request was not answered: {type(error).__name__}")
        finally:
            with self._lock:
                self._under_way.pop(request_id, None)

    def _received(self, data: dict[str, Any]) -> Message:
        for left in reversed(range(_TRIES)):
            try:
                # One transfer at a time bounds the memory.
                with self._fetching:
                    return self._spool.received(data, lambda key, at: ask_part(self._engine, None, key, at))
            except OSError:
                if not left or self._over():
                    raise
                self._ended.wait(1.0)
        raise AssertionError

    def _answered(self, request: Message) -> bool:
        """Ask the resident process, and hand its reply over while the connection, and so the reply's body, is there."""
        with suppress(OSError, WireError, ValueError), self._resident() as (incoming, outgoing):
            self._frames.write(outgoing, request)
            while (reply := self._frames.read(incoming)) is not None:
                if reply.header.kind != PROGRESS:
                    self._hand_over(reply)
                    return True
                with self._lock:
                    self._steps[reply.header.study] = reply.header.to_bytes()
        return False

    @contextmanager
    def _resident(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """A connection to the resident process: what it says, and what it is asked."""
        with connect(self._agent) as agent, agent.makefile("rb") as incoming, agent.makefile("wb") as outgoing:
            yield incoming, outgoing

    def _hand_over(self, reply: Message) -> None:
        packed, taken = self._offers.packed(reply), self._under_way[reply.header.reply_to]
        while not self._over() and not taken.is_set():
            try:
                answer = send(self._engine, None, REPLY, packed, 30.0)
            except OSError:
                self._ended.wait(1.0)  # the coordinator is away
                continue
            if not answer.get("later"):
                return
            while not self._over() and not taken.wait(1.0):
                ...

    def _taken(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        with self._lock:
            event = self._under_way.get(str(request.get("reply_to")))
        if event is not None:
            event.set()
        return good()

    def _part(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        return good({"part": self._offers.part(request.get("key"), request.get("offset"))})
