"""When certificates end, and how long ahead that is said."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, Protocol

#: Days before a certificate's end from which on it is said, from early to urgent.
WARNED = (30, 7, 1)
_DAY = 86400.0
Urgency = Literal["none", "soon", "urgent", "over"]


class Dated(Protocol):
    """What has an end: a certificate."""

    @property
    def not_before(self) -> datetime:
        """The first moment at which it holds."""

    @property
    def not_after(self) -> datetime:
        """The last moment at which it holds."""


def days_left(certificate: Dated, now: datetime) -> float:
    """Days until a certificate's end; negative after it."""
    return (certificate.not_after - now).total_seconds() / _DAY


def urgency(certificate: Dated, now: datetime) -> Urgency:
    """`soon` from 30 days before the end on, `urgent` from 7 days on, `over` after it."""
    left = days_left(certificate, now)
    if left < 0:
        return "over"
    return "urgent" if left <= WARNED[1] else "soon" if left <= WARNED[0] else "none"


def warning(certificate: Dated, now: datetime) -> str | None:
    """What to say of a certificate that ends within 30, 7 or 1 days, or has ended; nothing before.

    The text changes at each of these steps, so a log that says a text once says it at each.
    """
    left = days_left(certificate, now)
    if left < 0:
        return f"the certificate ended on {certificate.not_after:%Y-%m-%d}: nothing connects until it is renewed"
    step = next((days for days in reversed(WARNED) if left <= days), None)
    if step is None:
        return None
    within = "one day" if step == 1 else f"{step} days"
    return f"the certificate ends within {within}, on {certificate.not_after:%Y-%m-%d %H:%M} UTC: renew it"
