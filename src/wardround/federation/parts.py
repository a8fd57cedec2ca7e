"""Which tensors of a broadcast sites keep, so that the next one names them by their hash and does not send them again.

Both follow from the study and the number of the round: what a method says of its own (`Method.lasting`), and what a
phase of the study holds still. A coordinator need not know who has what: a site that lacks a part answers `lacks`, and
is sent it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from wardround.errors import WireError
from wardround.federation.exchange import Engine
from wardround.federation.phases import held
from wardround.learning.methods.method import Method
from wardround.storage.journal import State
from wardround.tasks.stages import WHOLE, Curriculum
from wardround.wire.message import Excerpt, Message, span_sha256
from wardround.wire.parts import Part, spans
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Layout

# The answer of a site that does not hold a part of a request, and what of its header names them, by their places.
LACKS = "lacks"
# Naming a part takes some 70 bytes: smaller ones are sent.
LEAST = 512


@dataclass(frozen=True)
class Lasting:
    """The tensors of an arm's public state that its next rounds have as they are."""

    method: Method
    layout: Layout
    curriculum: Curriculum = WHOLE

    def kept(self, number: int, table: Sequence[TensorInfo]) -> frozenset[int]:
        """What a site keeps of the request to train in round `number`, by place in its table."""
        return self._places(table, self.method.lasting([info.name for info in table]), number)

    def absent(self, state: State) -> tuple[Part, ...]:
        """What sites have kept of a round's state, if they took part in the round before: all but what it added."""
        table, where = state.public.table, spans(state.public.table)
        older = self.method.lasting([info.name for info in table])[1:]
        # Before round 1 nothing was sent.
        places = self._places(table, older, state.round) if state.round else ()
        return tuple(Part(place, span_sha256(state.public.path, *where[place])) for place in sorted(places))

    def fits(self, table: Sequence[TensorInfo], known: Collection[str]) -> bool:
        """Whether a state has the tensors that are `known` of the study, in their order, and then what lasts."""
        names = [info.name for info in table]
        parts = [*self.method.lasting(names)]
        others = [name for name in names if name not in parts]
        begun, carried = {*self.method.lasting([*known])}, {*others}
        expected = [name for name in known if name in carried and name not in begun]
        return names == others + parts and (not known or others == expected)

    def _places(self, table: Sequence[TensorInfo], names: Iterable[str], number: int) -> frozenset[int]:
        lasting = {*names, *held(self.layout, self.curriculum.still(number))}
        return frozenset(i for i, info in enumerate(table) if info.name in lasting and info.nbytes >= LEAST)


class Filling:
    """An engine that sends a message once more, with what the site lacks of it; the second time all of it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """What the engine gives, but for answers of kind `lacks`: to a message that was sent whole it is an answer."""
        asked = {message.id: message for message in messages}
        partly = True
        while asked:
            lacking = {}
            for reply in self._engine.exchange(list(asked.values())):
                request = asked.get(reply.header.reply_to)
                if reply.header.kind == LACKS and request is not None and isinstance(request.body, Excerpt):
                    left = _held(request, reply) if partly else ()
                    lacking[request.id] = request.without(left)
                else:
                    yield reply
            asked, partly = lacking, False

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


def _held(request: Message, reply: Message) -> tuple[Part, ...]:
    """The parts of a request that its site does not say it lacks; none where it names none of them."""
    try:
        missing = lacked(reply)
    except WireError:
        return ()
    left = tuple(part for part in request.header.absent if part.index not in missing)
    return left if len(left) < len(request.header.absent) else ()


def lacked(reply: Message) -> frozenset[int]:
    """The places that an answer of kind `lacks` names; raises `WireError` where it names none, or anything else."""
    match dict(reply.header.meta):
        case {"lacks": [*places], **rest} if places and not rest and all(type(place) is int for place in places):
            return frozenset(places)
    raise WireError("a site says that it lacks parts, and not which")
