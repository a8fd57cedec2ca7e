"""One attempt of a round, as a sequence of phases.

The coordinator asks an exchange for messages, hands it the replies as they come, and gets a sum at the end. The plain
sum has one phase. A secure sum has several and another class; the coordinator does not know the difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from wardround.errors import JournalError, Rejected, WardroundError, WireError
from wardround.protection.gates import check_reply, check_update, held_reply
from wardround.wire.message import EMPTY, EMPTY_SHA256, Body, Header, Message
from wardround.wire.parts import Part
from wardround.wire.ring import ExactSum
from wardround.wire.sparse import DENSE, Encoding
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Aggregate, Layout, Scales

# Kinds of message.
TRAIN = "train"
EVALUATE = "evaluate"
RELEASE = "release"
# Train up to a round of an arm that never leaves the site; the answer is that it is done.
ALONE = "alone"
UPDATE = "update"
DONE = "done"
ERROR = "error"


class RoundAborted(WardroundError):
    """A round must be given up, and its number with it: repeating it could give away what a single site sent."""


class Party(Protocol):
    """What answers messages: a site in an arm, or a site's agent."""

    def handle(self, request: Message) -> Message:
        """One reply for each message; never raises."""
        ...


class Engine(Protocol):
    """Carries messages to sites and yields one reply for each, as they come."""

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Every message gets exactly one reply; a site that cannot answer gets an `error` reply.

        A reply's body can be read until its site answers in the same arm again. Raises `Interrupted` once the engine
        is closed, asked nothing too: whoever stops a run must not change who took part in a round.
        """
        ...

    def close(self) -> None:
        """Let go of processes and connections; an exchange under way raises `Interrupted`."""
        ...


@dataclass(frozen=True)
class Call:
    """What is asked of every site in a round: the kind of work, its parameters and the global state as body.

    `form` is how a clear update comes back.
    """

    kind: str
    study: str
    round: int
    sites: tuple[str, ...]
    layout: Layout
    scales: Scales
    attempt: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[TensorInfo, ...] = ()
    body: Body = EMPTY
    body_sha256: str = EMPTY_SHA256
    form: Encoding = DENSE
    absent: tuple[Part, ...] = ()

    def message(self, site: str) -> Message:
        """The request to one site: what is `absent` of the body, which is in a file then, is named and not sent."""
        header = Header(
            kind=self.kind,
            study=self.study,
            site=site,
            round=self.round,
            attempt=self.attempt,
            meta={**self.meta, "layout": self.layout.sha256, "scales": dict(self.scales)},
            tensors=self.tensors,
            body_nbytes=self.body.nbytes,
            body_sha256=self.body_sha256,
        )
        message = Message(header, self.body)
        return message.without(self.absent) if self.absent else message


class Exchange(ABC):
    """One attempt of a round."""

    attempt = 0

    @abstractmethod
    def open(self) -> list[Message]:
        """The messages of the first phase."""

    @abstractmethod
    def accept(self, reply: Message) -> None:
        """Take one reply; raises `WireError` when it is refused, and then nothing of it counts."""

    @abstractmethod
    def close(self) -> list[Message]:
        """End the phase with the replies that came; the messages of the next one, or none when all is done.

        Raises `NotEnoughSites` or `Aborted` when it cannot go on.
        """

    @property
    def present(self) -> Set[str]:
        """The sites that answered the phase under way; a round with fewer than `min_sites` of them stops."""
        return self.receipts.keys()

    @property
    @abstractmethod
    def receipts(self) -> Mapping[str, str]:
        """The sites whose updates are in the sum, with the hash of the bytes they sent; a gated one is not."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the round's report should say of it."""
        return ()

    @abstractmethod
    def aggregate(self) -> Aggregate:
        """The sum; only after the last phase."""


ExchangeFactory = Callable[[Call], Exchange]


class ClearExchange(Exchange):
    """Each site sends its update in the clear, in one phase."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._receipts: dict[str, str] = {}
        self._requests: dict[str, str] = {}

    def open(self) -> list[Message]:
        """One message a site."""
        messages = [self._call.message(site) for site in self._call.sites]
        self._requests = {m.header.site: m.id for m in messages}
        return messages

    def accept(self, reply: Message) -> None:
        """Take an update once: again the same is nothing new, and another one is refused."""
        site = reply.header.site
        check_reply(reply, UPDATE, self._requests)
        if site in self._receipts:
            if self._receipts[site] != reply.header.body_sha256:
                raise Rejected(f"site {site} answered twice, differently; the second answer is refused")
            return
        self._take(reply)
        self._receipts[site] = reply.header.body_sha256

    @abstractmethod
    def _take(self, reply: Message) -> None:
        """Verify an update, then keep what is needed of it; raises `WireError` when it is refused."""

    def close(self) -> list[Message]:
        """There is no second phase."""
        return []

    @property
    def receipts(self) -> Mapping[str, str]:
        """Site -> hash of its update."""
        return self._receipts


def add_body(total: ExactSum, body: Body) -> None:
    """Add an update that was verified; raises `JournalError` when it is no longer whole, for the sum is spoilt then."""
    offset = 0
    try:
        for chunk in body.chunks():
            total.add(chunk, offset)
            offset += len(chunk)
    except (OSError, WireError) as error:
        raise JournalError(
            "an update changed on the disk while it was added; run again with --resume: the round is repeated whole"
        ) from error


class PlainSum(ClearExchange):
    """An update is verified whole, then added, then forgotten."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._total = ExactSum(call.layout.segments)

    def _take(self, reply: Message) -> None:
        reply = held_reply(reply)
        check_update(self._call.layout, reply, self._call.form)
        add_body(self._total, self._call.form.unpack(self._call.layout, reply.body))

    def aggregate(self) -> Aggregate:
        """The sum of all accepted updates."""
        return Aggregate(self._call.layout, self._total, self._call.scales)


def ask_one(engine: Engine, call: Call) -> Aggregate | Message:
    """Ask the one site of a call for sums of its own; an `error` reply when it declines or its answer is refused.

    A sum over one site is that site's own release, which its egress policy decides on: there is nothing to mask.
    """
    exchange = PlainSum(call)
    (request,) = exchange.open()
    (reply,) = engine.exchange([request])
    if reply.header.kind == ERROR:
        return reply
    try:
        exchange.accept(reply)
    except WireError as error:
        return request.reply(ERROR, meta={"reason": str(error)})
    return exchange.aggregate()
