"""The coordinator's end of a line: in NVFlare's server job, between the Hub's socket and messages to one site.

It holds nothing that is not held elsewhere too: the Hub hands out again what was lost with it.
"""

from __future__ import annotations

import os
import queue
import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from wardround.engines.frames import PROGRESS, SharedBodies
from wardround.errors import WardroundError, WireError
from wardround.hospitals.nvflare.bodies import Offers, Spool, header_of
from wardround.hospitals.nvflare.lines import ask_part, bad, good, send
from wardround.hospitals.nvflare.names import (
    ALIVE,
    BEAT,
    HELLO,
    HUB,
    LARGEST,
    LOST,
    PART,
    PATIENCE,
    REPLY,
    REQUEST,
    SPOOL,
    TAKEN,
    instance_of,
)
from wardround.hospitals.socket_server import connect
from wardround.wire.message import Header, Message

_STARTING = 45.0  # seconds that a site's job may take until its first sign of life
_SITE = re.compile(r"\w[\w-]{0,63}")


class Relay(Controller):  # type: ignore[misc]
    """One site's line. It ends, and with it the job, when the site is silent: another job waits for it to return."""

    def __init__(self, site: str) -> None:
        if not isinstance(site, str) or not _SITE.fullmatch(site):
            raise ValueError("a relay needs the name of a site")
        # NVFlare's tasks are not used: their receiver polls. Auxiliary messages arrive at once.
        super().__init__(task_check_period=1.0)
        self._site = site
        self._frames, self._offers = SharedBodies(), Offers()
        self._stream: BinaryIO | None = None
        self._instance = ""
        self._writing, self._fetching = threading.Lock(), threading.Lock()
        self._under_way: set[str] = set()

    def start_controller(self, fl_ctx: FLContext) -> None:
        """NVFlare calls this before `control_flow`."""
        self._engine, self._job = fl_ctx.get_engine(), fl_ctx.get_job_id()
        self._hub, self._parent = Path(os.environ[HUB]), os.getppid()
        self._spool = Spool(Path(os.environ[SPOOL]), self._site, int(os.environ[LARGEST]))
        self._seen = time.monotonic() + _STARTING - PATIENCE
        for topic, handler in ((BEAT, self._beat), (REPLY, self._reply), (PART, self._part)):
            self._engine.register_aux_message_handler(topic, handler)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """NVFlare calls this at the end: there is nothing to keep."""

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """There are no tasks."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Serve the Hub until the job is aborted or the site is silent."""
        while not self._over(abort_signal):
            with suppress(OSError, WireError), connect(self._hub) as hub:
                try:
                    self._serve(hub, abort_signal)
                finally:
                    self._stream = None
                    # Its streams would keep the connection open.
                    hub.shutdown(socket.SHUT_RDWR)
            time.sleep(0.2)

    def _over(self, abort: Signal) -> bool:
        if os.getppid() != self._parent:
            os._exit(1)  # NVFlare's server was killed: nothing reaches this process any more, and no event ends it
        return bool(abort.triggered) or time.monotonic() - self._seen > PATIENCE

    def _serve(self, hub: socket.socket, abort: Signal) -> None:
        arrived: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        incoming = hub.makefile("rb")
        self._stream = hub.makefile("wb")
        self._say_hello()

        def read() -> None:
            with suppress(OSError, ValueError, WardroundError):
                while (message := self._frames.read(incoming)) is not None:
                    arrived.put(message)
            arrived.put(None)

        threading.Thread(target=read, daemon=True).start()
        while not self._over(abort):
            with suppress(queue.Empty):
                message = arrived.get(timeout=1.0)
                if message is None:
                    return
                self._hand_out(message)

    def _hand_out(self, message: Message) -> None:
        try:
            send(self._engine, self._site, REQUEST, self._offers.packed(message), 10.0)
        except (OSError, WardroundError):
            time.sleep(0.5)
            self._say(LOST)

    def _say_hello(self) -> None:
        self._say(HELLO, {"job": self._job, "instance": self._instance})

    def _say(self, kind: str, meta: dict[str, Any] | None = None) -> None:
        with suppress(OSError, ValueError):
            self._tell(Message(Header(kind, "", self._site, meta=meta or {})))

    def _tell(self, message: Message) -> None:
        with self._writing:
            stream = self._stream
            if stream is None:
                raise OSError("the coordinator is away")
            self._frames.write(stream, message)

    def _beat(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        self._seen = time.monotonic()
        instance = instance_of(request.get("instance"))
        if instance != self._instance:
            self._instance = instance
            if not instance:
                self._say(LOST)
            # The Hub decides whether another instance is the same site started anew, or a twin.
            self._say_hello()
        elif instance:
            self._say(ALIVE)
        steps = request.get("progress")
        for data in steps[:16] if isinstance(steps, list) else ():
            header = Header.from_bytes(data)
            if header.kind == PROGRESS and header.site == self._site:
                with suppress(OSError, ValueError):
                    self._tell(Message(header))
        return good()

    def _reply(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        if self._stream is None:
            return bad()  # the site keeps it and tries again
        header = header_of(request)
        if header.site != self._site:
            raise WireError("a site answers for another")
        with self._writing:
            if header.reply_to in self._under_way:
                return good()
            self._under_way.add(header.reply_to)
        if "key" in request:
            # The parts come over the connection on which this request waits for its answer.
            threading.Thread(target=self._take, args=(header, dict(request)), daemon=True).start()
            return good({"later": True})
        return good() if self._take(header, dict(request)) else bad()

    def _take(self, header: Header, data: dict[str, Any]) -> bool:
        try:
            # One transfer at a time on a line bounds the memory; the file is the Hub's from here on.
            with self._fetching:
                message = self._spool.received(data, lambda key, at: ask_part(self._engine, self._site, key, at))
            self._tell(message)
            if "key" in data:
                with suppress(OSError):
                    send(self._engine, self._site, TAKEN, {"reply_to": header.reply_to}, 10.0)
            return True
        except Exception as error:
            self.logger.warning(f"a reply was not received: {type(error).__name__}")
            self._say(LOST)
            return False
        finally:
            with self._writing:
                self._under_way.discard(header.reply_to)

    def _part(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        return good({"part": self._offers.part(request.get("key"), request.get("offset"))})
