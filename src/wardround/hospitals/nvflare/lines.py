"""How the two ends of a line send NVFlare's auxiliary messages."""

from __future__ import annotations

from typing import Any

from nvflare.apis.shareable import ReturnCode, Shareable, make_reply

from wardround.hospitals.nvflare.names import PART


def send(engine: Any, target: str | None, topic: str, values: dict[str, Any], timeout: float) -> Shareable:
    """Send an auxiliary message to a site, or with None to the server, and wait for the answer.

    Raises `OSError` where none comes within `timeout` seconds, or one that is no success.
    """
    request = Shareable()
    request.update(values)
    with engine.new_context() as context:
        replies = engine.send_aux_request(
            targets=None if target is None else [target],
            topic=topic,
            request=request,
            timeout=timeout,
            fl_ctx=context,
            optional=True,
        )
    for reply in (replies or {}).values():
        if reply is not None and reply.get_return_code() == ReturnCode.OK:
            return reply
    raise OSError(f"no answer to {topic}")


def ask_part(engine: Any, target: str | None, key: str, offset: int) -> bytes:
    """A part of a body of the other side; raises `OSError` where it does not come."""
    part = send(engine, target, PART, {"key": key, "offset": offset}, 60.0).get("part")
    if not isinstance(part, bytes):
        raise OSError("no part came")
    return part


def good(values: dict[str, Any] | None = None) -> Shareable:
    """A success, with values."""
    reply = make_reply(ReturnCode.OK)
    reply.update(values or {})
    return reply


def bad() -> Shareable:
    """A failure: the sender tries again or gives up."""
    return make_reply(ReturnCode.EXECUTION_EXCEPTION)
