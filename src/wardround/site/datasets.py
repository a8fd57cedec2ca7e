"""The data sets that a process may open: those of the sites in its part of the sites file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from wardround.errors import DataError, StudyError, WardroundError
from wardround.imaging.datasets.split import Parts, Role, by_seed
from wardround.imaging.readers.aside import Aside
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.arms import POOLED
from wardround.site.egress import EgressRules, strictest
from wardround.site.identifiers import check_identifiers
from wardround.site.lineage import Lineage
from wardround.site.quarantine import check_share
from wardround.site.renewed import renewed
from wardround.site.splits import KnownParts
from wardround.site.withdrawn import Withdrawn
from wardround.study.sites import Egress, SitesFile
from wardround.study.tasks import Split
from wardround.tasks.task import Dataset, Dealing, Prepared, SettingAside, Visited
from wardround.wire.files import reason

log = logging.getLogger(__name__)


class Datasets:
    """Data sets by site, each opened when it is first needed and shared by all arms of a process.

    Nothing measured on fewer than `floor` patients leaves, whatever a site's own rules say. Who trains and who tests is
    remembered in a site's history, which is in `folder` where its file names none; without a folder it is not.
    Patients who withdrew are in no part, from the moment they are on record; with `first`, by site, as it was when no
    more than that many had withdrawn.
    """

    def __init__(
        self,
        arm_specs: ArmSpecs,
        sites: SitesFile,
        floor: int = 1,
        folder: Path | None = None,
        first: Mapping[str, int] | None = None,
    ) -> None:
        self._arm_specs = arm_specs
        self._sites = sites
        self._floor = floor
        self._folder = folder
        self._first = first or {}
        self._gone: dict[str, Withdrawn] = {}
        self._seen: dict[str, int] = {}
        self._opened: dict[str, Dataset] = {}
        self._parts: dict[str, KnownParts] = {}
        self._aside: dict[str, tuple[Aside, ...]] = {}
        self._vetted: set[str] = set()

    def of(self, site: str) -> Dataset:
        """A site's data set.

        A site that scans the patients of others has no folder: it gets their test patients and theirs alone.
        """
        self.check_identifiers(site)
        self._look_for_withdrawals(site)
        if site not in self._opened:
            task, members = self._arm_specs.task, self._scanned_by(site)
            if isinstance(task, Dealing):
                task.deal_by(self._deal)
            elif site in self._sites.sites and self._sites.of(site).patients is not None:
                raise StudyError(f"sites.{site}.patients: the study's task parts its patients by itself; remove it")
            elif self.withdrawals(site):
                raise StudyError(
                    f"site {site}: patients withdrew, and the study's task parts its patients by itself and cannot go "
                    "on without them; take their files out of the data folder and start another run"
                )
            if isinstance(task, SettingAside):
                task.set_aside_by(self._set_aside)
            if not members:
                self._opened[site] = task.dataset(site, self._sites.of(site).data)
            elif isinstance(task, Visited):
                self._opened[site] = task.visits(site, {name: self._sites.of(name).data for name in members})
            else:
                raise StudyError(f"sites.{site}.scans: the study's task cannot show one site's patients to another")
        return self._opened[site]

    def withdrawals(self, site: str) -> int:
        """How many patients of whoever's data a site has withdrew so far; it is quickly found."""
        return sum(record.count() for owner in self.owners(site) if (record := self.withdrawn(owner)) is not None)

    def withdrawn(self, site: str) -> Withdrawn | None:
        """A site's record of who withdrew; none where it has no history."""
        history = history_of(self._sites, self._folder, site)
        return None if history is None else self._gone.setdefault(site, Withdrawn(history))

    def before(self, site: str, first: int) -> Datasets:
        """The same, as it was when no more than `first` patients of a site had withdrawn; it settles nothing."""
        return Datasets(self._arm_specs, self._sites, self._floor, self._folder, {site: first})

    def _look_for_withdrawals(self, site: str) -> None:
        """Let go of data of which a patient withdrew since they were opened."""
        now = self.withdrawals(site)
        if self._seen.setdefault(site, now) != now:
            self._seen[site] = now
            self._opened.pop(site, None)
            for owner in self.owners(site):
                self._parts.pop(owner, None)

    def check_identifiers(self, site: str) -> None:
        """Raises `DataError` where files that the site would open tell who patients are and their rule refuses that."""
        for owner in self.owners(site):
            entry = self._sites.sites.get(owner)
            if owner not in self._vetted and entry is not None:
                check_identifiers(owner, entry, self._floor)
                self._vetted.add(owner)

    def settle(self, site: str) -> None:
        """Put on record which of a site's patients train, validate and test; raises `DataError` where that fails."""
        if site in self._parts:
            self._parts[site].settle()

    def _deal(self, site: str, names: Sequence[str], split: Split, seed: int, role: Role) -> Parts:
        parts = self._deal_listed(site, names, split, seed, role)
        study, history = self._arm_specs.study, history_of(self._sites, self._folder, site)
        if study.update is None or not study.trains:
            return parts
        release = study.continues
        came_of = study.update.ancestors
        known = Lineage(history).trained(release, names, came_of) if release and history else frozenset[str]()
        return renewed(site, names, parts, role, study.update, known, history or Path())

    def _deal_listed(self, site: str, names: Sequence[str], split: Split, seed: int, role: Role) -> Parts:
        """The parts of the patients whom the site's list names, or of all."""
        entry = self._sites.sites.get(site)
        if entry is None or entry.patients is None:
            return self._deal_all(site, names, split, seed, role)
        listed = patients_of(entry.patients, site)
        record = self.withdrawn(site)
        gone = frozenset() if record is None else record.of(tuple(listed))
        if strangers := listed - set(names) - gone:
            raise DataError(
                f"sites.{site}.patients: {len(strangers)} of {len(listed)} names are of no patient in the data folder",
                detail=", ".join(sorted(strangers)[:20]),
            )
        own = [number for number, name in enumerate(names) if name in listed]
        parts = self._deal_all(site, [names[number] for number in own], split, seed, role)
        return {part: tuple(own[number] for number in numbers) for part, numbers in parts.items()}

    def _deal_all(self, site: str, names: Sequence[str], split: Split, seed: int, role: Role) -> Parts:
        history = history_of(self._sites, self._folder, site)
        if history is None:
            return by_seed(site, names, split, seed, role)
        release, update = self._arm_specs.study.continues, self._arm_specs.study.update
        came_of = () if update is None else update.ancestors
        fixed = {} if release is None else Lineage(history).parts(release, names, came_of)
        if site not in self._parts:
            self._parts[site] = KnownParts(history, self._first.get(site))
        return self._parts[site].deal(site, names, split, seed, role, fixed)

    def aside(self, site: str) -> tuple[Aside, ...]:
        """The patients of a site who cannot be used, also where they were too many for its data set to be opened."""
        return self._aside.get(site, ())

    def _set_aside(self, site: str, total: int, aside: Sequence[Aside]) -> None:
        record = self.withdrawn(site)
        gone = frozenset() if record is None else record.of([one.patient for one in aside])
        self._aside[site] = here = tuple(one for one in aside if one.patient not in gone)
        check_share(site, total, here, self._sites.of(site).quarantine)

    def owners(self, site: str) -> tuple[str, ...]:
        """Whose data a site has: its own, those of the sites whose patients it scans, or where data are pooled all."""
        if site == POOLED:
            return self._arm_specs.study.training_sites
        return self._scanned_by(site) or (site,)

    def egress(self, site: str) -> EgressRules:
        """What a site lets out; one that scans the patients of others keeps the strictest rules of those."""
        rules = (_rules_of(self._sites.of(name).egress) for name in self.owners(site))
        return strictest((EgressRules(floor=self._floor), *rules))

    def fingerprint(self, site: str) -> str | None:
        """What a site's data are; `None` where they cannot be read for a reason that is left to the round."""
        try:
            return self.of(site).fingerprint()
        except WardroundError:
            raise
        except Exception:
            log.debug("a site's data could not be read", exc_info=True)
            return None

    def slow(self) -> Iterator[Prepared]:
        """Those of the opened ones that have something to build."""
        return (dataset for dataset in self._opened.values() if isinstance(dataset, Prepared))

    def _scanned_by(self, site: str) -> tuple[str, ...]:
        sites = self._arm_specs.study.sites
        return sites[site].scans if site in sites else ()


def history_of(sites: SitesFile, folder: Path | None, site: str) -> Path | None:
    """The folder in which a site records what holds over all studies: the one of its file, or one of the run's own."""
    entry = sites.sites.get(site)
    given = None if entry is None else entry.history
    return given or (None if folder is None else folder / "work" / "sites" / site / "history")


def patients_of(path: Path, site: str) -> frozenset[str]:
    """The names in a site's list of patients, one a line. Raises DataError where it cannot be read or is empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = reason(error) if isinstance(error, OSError) else "it is no text in UTF-8"
        raise DataError(f"sites.{site}.patients: cannot be read ({said})", detail=str(path)) from error
    if not (names := frozenset(line.strip() for line in lines if line.strip())):
        raise DataError(f"sites.{site}.patients: names no patient", detail=str(path))
    return names


def _rules_of(egress: Egress) -> EgressRules:
    metrics = None if egress.metrics == "all" else frozenset(egress.metrics)
    return EgressRules(egress.per_site_results, metrics, egress.minimum_cohort, egress.scanner_facts)
