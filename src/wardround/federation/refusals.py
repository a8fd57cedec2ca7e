"""What a site, or the engine in its place, answers where a request was not fulfilled."""

from __future__ import annotations

from wardround.deidentify import describe_error
from wardround.errors import WardroundError, Withheld
from wardround.federation.exchange import ERROR
from wardround.wire.message import Message

KIND = "kind"


def refusal(request: Message, error: Exception) -> Message:
    """The `error` reply: a reason that may leave the site, and the error's kind."""
    return request.reply(ERROR, meta={"reason": describe_error(error), KIND: kind_of(error)})


def kind_of(error: Exception) -> str:
    """The class of an error of Wardround's own, or the one that it extends; `error` for any other."""
    if isinstance(error, WardroundError):
        for ours in type(error).__mro__:
            if ours.__module__.startswith("wardround."):
                return ours.__name__
    return "error"


def is_withheld(reply: Message) -> bool:
    """Whether a site's own rules keep the answer; otherwise something went wrong."""
    return reply.header.meta.get(KIND) == Withheld.__name__
