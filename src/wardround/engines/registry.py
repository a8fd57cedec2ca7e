"""The engines that carry a run on one machine, by the name that `--engine` gives.

A package outside adds one by an entry point of the group `wardround.engines`: a callable from `Sites` to `Carried`. An
engine is named by who starts a run and never by a study, so naming it is all it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from wardround.errors import StudyError
from wardround.federation.exchange import Engine, Party
from wardround.study.base import at
from wardround.wire.message import Header

GROUP = "wardround.engines"
BUILTIN: Mapping[str, str] = {
    "local": "wardround.engines.local:carried",
    "workers": "wardround.engines.workers:carried",
}


@dataclass(frozen=True)
class Sites:
    """How an engine reaches the sites of a run.

    `find` gives what answers a message in this process. Another process calls `factory` ("module:callable") with the
    content of the file that `spec` writes and gets the like. `processes` is how many there may be; `progress` is called
    with arm, site, round, step and steps.
    """

    find: Callable[[Header], Party]
    factory: str
    spec: Callable[[], Path]
    processes: int
    progress: Callable[[str, str, int, int, int], None]


@dataclass(frozen=True)
class Carried:
    """An engine, and how many arms may be in training at once."""

    engine: Engine
    parallel: int


def engine_of(name: str) -> Callable[[Sites], Carried]:
    """What makes the engine of a name. Raises `StudyError` for an unknown one, and one that cannot be imported."""
    if name in BUILTIN:
        builtin: Callable[[Sites], Carried] = at(BUILTIN[name])
        return builtin
    points = {point.value: point for point in entry_points(group=GROUP, name=name)}
    if len(points) != 1:
        known = ", ".join(sorted({*BUILTIN, *entry_points(group=GROUP).names}))
        why = "several installed packages have one of that name" if points else "there is none of that name"
        raise StudyError(f"--engine {name}: {why}; known are {known}", detail=", ".join(sorted(points)))
    try:
        found: Callable[[Sites], Carried] = next(iter(points.values())).load()
    except (ImportError, AttributeError) as error:
        why = f"--engine {name}: its package cannot be imported; mend or remove it"
        raise StudyError(why, detail=str(error)) from error
    return found
