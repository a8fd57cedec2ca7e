"""What a site is given: how its updates leave, and how it may evaluate other than with the model of a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from wardround.federation.exchange import TRAIN, UPDATE
from wardround.learning.training import Learner
from wardround.storage.store import Memory
from wardround.tasks.task import Split
from wardround.wire.message import Message
from wardround.wire.tensors import TensorFile

if TYPE_CHECKING:
    from wardround.site.site import Site

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SiteReply:
    """A reply, and the private state that is written together with it."""

    reply: Message
    memory: Memory | None = None
    keep: frozenset[int] = frozenset()


class SiteProtocol(Protocol):
    """How an update leaves a site: in the clear, or masked over several phases."""

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of message it answers."""
        ...

    @property
    def replies(self) -> frozenset[str]:
        """The kinds of its answers, beside updates."""
        ...

    def admit(self, request: Message, site: Site) -> None:
        """Raise for a message that must have no answer, not even one from the store."""
        ...

    def answer(self, request: Message, site: Site) -> SiteReply:
        """Answer one message of those kinds."""
        ...


class ClearUpload:
    """The plain sum: a training request is answered with the update itself."""

    kinds = frozenset({TRAIN})
    replies = frozenset[str]()

    def admit(self, request: Message, site: Site) -> None:
        """Whatever the site answers, it may answer again."""

    def answer(self, request: Message, site: Site) -> SiteReply:
        """Train and send."""
        chunks, memory, keep = site.work(request)
        rules = site.rules
        body = rules.codec.form.pack(rules.layout, chunks)
        return SiteReply(site.reply_with(request, UPDATE, body, rules.layout), memory, keep)


class Evaluator(Protocol):
    """Another way to evaluate than with the model of a round: what every patient adds to each metric, (n, *shape)."""

    def __call__(
        self, learner: Learner, tensors: TensorFile | None, meta: Mapping[str, Any], split: Split
    ) -> dict[str, Array]:
        """`tensors` is what the request carried; `meta` its parameters."""
        ...
