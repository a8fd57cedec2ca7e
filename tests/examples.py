"""How many examples a law gets: few in `make test`, many in `make test-all`."""

from __future__ import annotations

from hypothesis import settings

FULL = 50


def examples(full: int) -> int:
    """The number of examples of a law that has `full` of them in `make test-all`, under the profile in force."""
    return max(5, full * settings.default.max_examples // FULL)
