"""A released model reaches every site of its study: one that is away when a run ends gets it later."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator

from wardround.errors import Interrupted
from wardround.federation.exchange import DONE, Engine
from wardround.federation.facts import DELIVER
from wardround.federation.release import CARD, model_path
from wardround.plan.arms import FEDERATED
from wardround.runs.asking import deliveries
from wardround.runs.context import Context
from wardround.wire.message import Message

# A site that was there and did not take the model is asked again after this long.
AGAIN_SECONDS = 60.0


class Delivering:
    """An engine that takes deliveries over: it answers for the sites at once, and remembers what is `owed` to whom.

    A run ends when its results are there, however long a site is away.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._owed: dict[str, None] = {}

    @property
    def owed(self) -> tuple[str, ...]:
        """The sites that are to get the released model."""
        return tuple(self._owed)

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield one reply for each message; raises as the engine does."""
        others, taken_over = [], False
        for message in messages:
            if message.header.kind == DELIVER:
                self._owed[message.header.site], taken_over = None, True
                yield message.reply(DONE)
            else:
                others.append(message)
        # Asked nothing, the engine says whether it was closed.
        if others or not taken_over:
            yield from self._engine.exchange(others)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


def deliver_all(
    context: Context,
    engine: Engine,
    owed: Collection[str],
    *,
    until: float,
    stop: threading.Event,
    reached: Callable[[str], None],
    again: float = AGAIN_SECONDS,
) -> None:
    """Send the released model of a run to the sites that it is `owed` to, each when it is there.

    `until`, in unix time, it is tried; `reached` is called for each site that took it. Closes the engine, and raises
    `Interrupted` where that was done from outside.
    """
    messages = {m.header.site: m for m in deliveries(context, model_path(context.out, FEDERATED), context.out / CARD)}
    late = threading.Timer(max(0.0, until - time.time()), engine.close)
    late.daemon = True
    late.start()
    try:
        left = [messages[site] for site in owed if site in messages]
        while left and time.time() < until:
            left = _sent(engine, left, reached)
            if left and stop.wait(again):
                break
    except Interrupted:
        if stop.is_set():
            raise
    finally:
        late.cancel()
        engine.close()


def _sent(engine: Engine, messages: Collection[Message], reached: Callable[[str], None]) -> list[Message]:
    """Send them all at once; those that did not arrive."""
    left = {message.id: message for message in messages}
    for reply in engine.exchange(messages):
        if reply.header.kind == DONE:
            del left[reply.header.reply_to]
            reached(reply.header.site)
    return list(left.values())
