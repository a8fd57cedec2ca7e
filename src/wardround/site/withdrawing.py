"""`wardround site withdraw`: patients of a site withdraw, and what the site keeps of them goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wardround.errors import DataError, StudyError
from wardround.site.agent import Agent
from wardround.site.datasets import patients_of
from wardround.site.drift import Reference
from wardround.site.lineage import Lineage, Use
from wardround.site.splits import KnownParts
from wardround.site.withdrawn import Withdrawn
from wardround.study.sites import SiteData

log = logging.getLogger(__name__)
Knows = Callable[[str], bool]


@dataclass(frozen=True)
class Withdrew:
    """What came of it: how many patients were not on record yet, and which runs cannot go on without them.

    `uses` are the releases that they were in, by their names: for eyes at the site alone.
    """

    new: int
    stuck: tuple[Path, ...]
    uses: Mapping[str, tuple[Use, ...]]


def withdraw(
    site: str, names: Sequence[str], entry: SiteData, histories: Sequence[Path], runs: Sequence[tuple[Path, Agent]]
) -> Withdrew:
    """Take patients out of all that a site keeps of them, and put on record that they withdrew.

    `histories` are the folders in which the site remembers over its studies, `runs` its agents by the folder of a run.
    Done again it does what a crash left undone, and what a process that was at work meanwhile wrote. Raises
    `StudyError` where nothing is named, and `DataError`, before anything changes, for a name that the site does not
    know: it says that and no more, for a list of patients with names like it would be one of patients.
    """
    names = tuple(dict.fromkeys(names))
    if not names:
        raise StudyError("withdraw: name a patient, or give a file of names that is not empty")
    if not histories:
        raise StudyError(
            f"sites.{site}.history is not set, so each run keeps its own record of patients: give the run with --out"
        )
    unknown = set(names)
    for known in (_on_record(histories), _in_folders(entry, site), *(_in_run(agent) for _, agent in runs)):
        unknown -= {name for name in unknown if known(name)}
    if unknown:
        some = "a name is" if len(unknown) == 1 else f"{len(unknown)} of {len(names)} names are"
        raise DataError(
            f"site {site}: {some} of no patient here, and nothing was changed. Give names as the site's data have "
            "them; names from a table need a run's folder too (--out)"
        )
    new = {name for folder in histories for name in names if KnownParts(folder).withdraw(name)}
    for folder in histories:
        Reference(folder).clear()
    stuck = [out for out, agent in runs if not agent.withdraw(names)]
    return Withdrew(len(new), tuple(stuck), {name: _uses(histories, name) for name in names})


def _uses(histories: Sequence[Path], name: str) -> tuple[Use, ...]:
    return tuple(use for folder in histories for use in Lineage(folder).uses_of(name))


def _on_record(histories: Sequence[Path]) -> Knows:
    """Who is in a record of the site's history."""

    def known(name: str) -> bool:
        return any(
            KnownParts(folder).holds(name) or Withdrawn(folder).of((name,)) or Lineage(folder).uses_of(name)
            for folder in histories
        )

    return known


def _in_folders(entry: SiteData, site: str) -> Knows:
    """Who has a folder or a file of that name in the site's data, or is in its list of patients."""
    listed = frozenset() if entry.patients is None else patients_of(entry.patients, site)

    def known(name: str) -> bool:
        plain = Path(name).name == name and name not in ("", ".", "..")
        return name in listed or (plain and any((folder / name).exists() for folder in entry.data))

    return known


def _in_run(agent: Agent) -> Knows:
    """Whom the task of a run's study finds; nobody where the data cannot be opened."""
    try:
        names = agent.names()
    except Exception:
        log.debug("the data of a run cannot be opened", exc_info=True)
        names = frozenset()
    return lambda name: name in names
