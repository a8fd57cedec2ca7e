"""Networks whose values others publish under names of their own."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Published(Protocol):
    """A network that knows the names in files which its authors published."""

    def name_of(self, name: str) -> str | None:
        """The name in this network of a published value; None for one that it has no use for, such as a pooler."""
        ...
