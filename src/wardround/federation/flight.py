"""Messages that are with sites while their coordinator does something else: their replies come in one line."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

from wardround.federation.exchange import Engine
from wardround.wire.message import Message

# Seconds between two looks at whether the engine was closed.
_LOOK = 0.25


class Flight:
    """Hands messages to an engine in threads of its own, one for those that are sent together.

    An exchange of an engine ends when all of its messages are answered, so that one with a site that is slow outlives
    rounds. Who sends to a site again must have its reply first.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._replies: queue.SimpleQueue[Message | BaseException] = queue.SimpleQueue()

    def send(self, messages: Sequence[Message]) -> None:
        """Hand out messages; returns at once."""
        if messages:
            threading.Thread(target=self._carry, args=(tuple(messages),), daemon=True).start()

    def next(self) -> Message:
        """The next reply, whichever message it is to; raises what the engine raised, `Interrupted` once it is closed.

        Waits for it: there must be a message without one.
        """
        while True:
            try:
                found = self._replies.get(timeout=_LOOK)
            except queue.Empty:
                # Asked nothing, an engine that is closed says so, whatever became of the messages that it had.
                for _ in self._engine.exchange(()):
                    pass
                continue
            if isinstance(found, BaseException):
                raise found
            return found

    def _carry(self, messages: tuple[Message, ...]) -> None:
        try:
            for reply in self._engine.exchange(messages):
                self._replies.put(reply)
        except BaseException as error:
            # It is the coordinator's to handle; a thread of its own would only print it.
            self._replies.put(error)
