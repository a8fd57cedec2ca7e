"""How many examples a law gets: few in `make test`, many in `make test-all`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings

FULL = 50


def examples(full: int) -> int:
    """The number of examples of a law that has `full` of them in `make test-all`, under the profile in force."""
    return max(5, full * settings.default.max_examples // FULL)


def quickly(cases: Iterable[Any], *quick: int) -> list[Any]:
    """Parameters of a test of which `make test` takes those at the places `quick`, and `make test-all` every one."""
    return [
        case
        if place in quick
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for place, case in enumerate(cases)
    ]
