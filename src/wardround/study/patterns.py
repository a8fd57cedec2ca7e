"""Names that patterns of a study choose: `*` stands for any text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase

from wardround.errors import StudyError


def matched(patterns: Sequence[str], names: Collection[str], missing: Callable[[str], str]) -> tuple[str, ...]:
    """The names that any of the patterns matches, in their order.

    Raises `StudyError` with what `missing` says of the first pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise StudyError(missing(pattern))
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
