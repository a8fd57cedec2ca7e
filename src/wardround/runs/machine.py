"""A study on one machine: its coordinator and the agents of all its sites, in whichever process they live."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from wardround.errors import StudyError, WardroundError
from wardround.federation.exchange import Party
from wardround.learning.device import free_memory
from wardround.learning.training import Learner
from wardround.plan.arm_specs import ArmSpec
from wardround.plan.arms import POOLED
from wardround.protection.rounding import study_root
from wardround.runs.asking import data_changed
from wardround.runs.context import Context
from wardround.runs.watching import OPERATORS, READING, Phase
from wardround.site.agent import Agent
from wardround.site.arms import Progress
from wardround.site.datasets import Datasets
from wardround.site.egress import EgressRules
from wardround.site.groups import labels_of
from wardround.site.holdings import Holdings
from wardround.site.memory import GIGABYTE, check_memory, footprint_of, processes_that_fit
from wardround.site.renewed import check_some
from wardround.site.shelf import Shelf, check_disk
from wardround.study.hashes import written
from wardround.study.places import NO_PLACES, Places
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.tasks.task import Dataset, Named
from wardround.wire.message import Header

log = logging.getLogger(__name__)
# The folder of a process that only looks: nothing can be made in it.
NOWHERE = Path(os.devnull)


class Machine(Context):
    """The context of a run, and its sites' agents, each made when it is first needed.

    Agents of one process share data sets and one model. `progress` is called with arm, site, round, step and steps.
    Nothing measured on fewer than `floor` patients leaves a site.
    """

    def __init__(
        self,
        study: Study,
        sites: SitesFile,
        out: Path,
        compare: tuple[str, ...],
        progress: Progress | None = None,
        without: Collection[str] = (),
        places: Places = NO_PLACES,
        *,
        floor: int = 1,
    ) -> None:
        embeddings = {name: site.embeddings for name, site in sites.sites.items() if site.embeddings is not None}
        super().__init__(study, out, compare, without, Plugins.of(study, sites), embeddings, places)
        self.sites = sites
        self.datasets = Datasets(self, sites, floor, out)
        self._progress = progress
        self._compare = compare
        self._agents: dict[str, Agent] = {}

    def agent(self, site: str) -> Agent:
        """The agent of a site of the study, or of all of them together (`POOLED`)."""
        if site not in self._agents:
            if site != POOLED and site not in self.study.sites:
                raise StudyError(f"the study has no site {site[:40]!r}")
            held = Holdings(site, self, self.sites, self.out, self.datasets, rounding_root=self.rounding_root)
            self._agents[site] = Agent(held, self._progress)
        return self._agents[site]

    def find(self, header: Header) -> Party:
        """What answers a message."""
        return self.agent(header.site).find(header)

    def dataset(self, site: str) -> Dataset:
        """A site's data set, shared by all arms of this process."""
        return self.datasets.of(site)

    def egress(self, site: str) -> EgressRules:
        """What a site lets out."""
        return self.datasets.egress(site)

    def learner(self, arm_spec: ArmSpec, site: str) -> Learner:
        """What trains and evaluates at a site in an arm."""
        return self.agent(site).arms.learner(arm_spec)

    @property
    def rounding_root(self) -> bytes:
        """What all sites of this machine round from: the study's seed, so that a run gives the same bits again."""
        return study_root(self.study.seed)

    def preflight(self, phase: Phase = lambda *_: None) -> None:
        """Build every arm and open every site's data; raises what would stop a run, before it has written anything.

        Across hospitals a round goes on without a site that fails. On one machine that would hide a mistake in the
        study or the data; whatever else goes wrong at a site is left to the round.
        """
        for name in self.arms:
            self.pull(self.arm_spec(name))
        self.check_teacher()
        sites = self.remaining(self.study.sites)
        for number, site in enumerate(sites):
            phase(READING, number, len(sites))
            try:
                _ = self.agent(site).held.compute
                self.agent(site).arms.check_continued()
                dataset, budgets = self.dataset(site), self.agent(site).held.budgets
                if site in self.study.training_sites:
                    check_some(site, len(dataset), self.study.update)
                entry = self.sites.sites.get(site)
                if entry is not None and entry.groups is not None and isinstance(dataset, Named):
                    labels_of(entry.groups, dataset.names("test"), site)
                if entry is not None and entry.memory is not None and site in self.study.training_sites:
                    check_memory({site: (footprint_of(self, dataset, self.agent(site).held.compute), entry.memory)})
                if budgets.rules is not None and site in self.study.training_sites:
                    budgets.terms(site, dataset)
            except WardroundError:
                raise
            except Exception:
                log.debug("a site's data could not be opened", exc_info=True)
        phase(READING, len(sites), len(sites))
        pooled = (POOLED,) if POOLED in self.arms else ()
        with suppress(OSError):
            check_disk([shelf for site in (*sites, *pooled) if (shelf := self._shelf(site)) is not None])

    def processes(self, most: int) -> int:
        """How many processes train here at once: `most`, or fewer where a GPU lacks the memory.

        A GPU has what is free, or what its sites' `memory` says where that is less.
        """
        needed: dict[str, int] = {}
        free: dict[str, int] = {}
        for site in self.remaining(self.study.training_sites) if most > 1 else ():
            compute = self.agent(site).held.compute
            left, room = free_memory(compute), self.sites.of(site).memory
            if left is None:
                continue
            device = str(compute.device)
            try:
                taken = footprint_of(self, self.dataset(site), compute).total
            except WardroundError:
                raise
            except Exception:
                # As in `preflight`: what goes wrong at a site is left to the round.
                log.debug("a site's data could not be opened", exc_info=True)
                continue
            needed[device] = max(needed.get(device, 0), taken)
            free[device] = min(free.get(device, left), left if room is None else int(room * GIGABYTE))
        count = processes_that_fit(most, {device: (needed[device], free[device]) for device in needed})
        if count < most:
            log.warning(
                "a GPU has room for %d processes that train at once, of %d: --processes sets another number",
                count,
                most,
            )
        return count

    def _shelf(self, site: str) -> Shelf | None:
        """Where a site keeps what a frozen encoder gives; nothing for one whose data could not be opened."""
        try:
            return self.agent(site).held.shelf
        except Exception:
            log.debug("a site has no shelf", exc_info=True)
            return None

    def build_operators(self, phase: Phase, *, keep: bool) -> None:
        """Build what scanners of the study are slow to make before the first round, instead of in it.

        Without `keep`, for other processes: where they find it on the disk, and nowhere else.
        """
        slow = list(self.datasets.slow())
        for number, dataset in enumerate(slow):
            phase(OPERATORS, number, len(slow))
            dataset.prepare(keep=keep)
        if slow:
            phase(OPERATORS, len(slow), len(slow))

    def open_stores(self) -> None:
        """Open what sites kept of an earlier run in the folder: another key is an error of the whole run.

        So are other data than the run began with: raises `DataError`, which names every site that has them.
        """
        changed: list[str] = []
        for site in (POOLED, *self.remaining(self.study.sites)):
            agent = self.agent(site)
            known = agent.arms.earlier_fingerprints()
            found = self.datasets.fingerprint(site) if known and site != POOLED else None
            if found is not None and any(
                one != found and not self.agent(site).held.follows(one, found) for one in known
            ):
                changed.append(site)
        if changed:
            raise data_changed(changed)

    def close(self) -> None:
        """Close what the sites of this process keep open; a site that is asked again opens it again."""
        for agent in self._agents.values():
            agent.close()

    def spec(self) -> dict[str, Any]:
        """What another process needs to build the same machine."""
        return {
            "study": written(self.study),
            "sites": self.sites.model_dump(mode="json"),
            "allow_code": self.sites.allows_code,
            "out": str(self.out),
            "compare": list(self._compare),
            "without": sorted(self.without),
            "places": self.places.to_json(),
        }

    @staticmethod
    def from_spec(spec: dict[str, Any], progress: Progress | None = None) -> Machine:
        """The machine of a worker process."""
        sites = SitesFile.model_validate(spec["sites"])
        return Machine(
            Study.model_validate(spec["study"]),
            sites.with_code() if spec["allow_code"] else sites,
            Path(spec["out"]),
            tuple(spec["compare"]),
            progress,
            spec["without"],
            Places.from_json(spec["places"]),
        )


def site_finder(spec: dict[str, Any], progress: Progress | None = None) -> Callable[[Header], Party]:
    """The entry of worker processes (see `wardround.engines.worker`)."""
    return Machine.from_spec(spec, progress).find
