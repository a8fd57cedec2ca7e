"""A study on one machine: builds the sites of a run in whichever process they live in."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from wardround.errors import DataError, StudyError, WardroundError
from wardround.federation.alone import OnlyTests, OwnArm, TrainsAlone
from wardround.federation.coordinator import Plan
from wardround.federation.egress import OPEN, EgressRules, strictest
from wardround.federation.examples import ExampleStream, SiteExamples, UnionExamples
from wardround.federation.exchange import ExchangeFactory, PlainSum
from wardround.federation.journal import Journal
from wardround.federation.measured import MeasuredSets
from wardround.federation.patients import PatientRows
from wardround.federation.private_training import PrivateTraining
from wardround.federation.robust import robust_mean
from wardround.federation.secure import SecureUpload, secure_sum
from wardround.federation.site import Site, SiteProtocol
from wardround.federation.store import SiteStore
from wardround.federation.training import Learner
from wardround.federation.vault import Vault
from wardround.protection.robust import Defence
from wardround.protection.rounding import study_root
from wardround.runner.arms import POOLED, Arm
from wardround.runner.blueprints import Blueprint, Blueprints
from wardround.runner.evaluators import evaluators_of, own_model
from wardround.runner.privacy import Purses
from wardround.runner.rosters import enrolled, roster_of
from wardround.runner.watching import OPERATORS, READING, Phase
from wardround.study.plugins import Plugins
from wardround.study.protocols import HeaderFacts
from wardround.study.schema import Study
from wardround.study.sites import Egress, SitesFile
from wardround.tasks.task import Dataset, Headed, Prepared, Visited
from wardround.wire.message import Header

log = logging.getLogger(__name__)
# The folder of whoever only looks: nothing can be made in it.
NOWHERE = Path(os.devnull)
Progress = Callable[[str, str, int, int, int], None]


class Host(Blueprints):
    """A study on this machine: its sites with their data, stores and purses, each made when it is first needed.

    `progress` is called with arm, site, round, step and steps. A run that was resumed goes on `without` some sites:
    they are not asked any more, and arms that cannot do without them are left out.
    """

    def __init__(
        self,
        study: Study,
        sites: SitesFile,
        out: Path,
        compare: tuple[str, ...],
        progress: Progress | None = None,
        without: Collection[str] = (),
    ) -> None:
        embeddings = {name: site.embeddings for name, site in sites.sites.items() if site.embeddings is not None}
        super().__init__(study, compare, embeddings, Plugins.of(study, sites))
        self.sites = sites
        self.out = out
        self.without = frozenset(without)
        self.asked = tuple(self.arms)
        self._leave_out()
        self._progress = progress
        self._by_identity = {arm.identity(self.study_sha256): arm for arm in self.arms.values()}
        self._compare = compare
        self._datasets: dict[str, Dataset] = {}
        self._sites: dict[tuple[str, str], Site] = {}
        self._rows: dict[str, PatientRows] = {}
        self.purses = Purses(study, sites, out, self.arms, lambda: self.lattice)

    def _leave_out(self) -> None:
        if unknown := sorted(self.without - self.study.sites.keys()):
            raise StudyError(
                f"--without {unknown[0]}: the study has no such site; it has {', '.join(self.study.sites)}"
            )
        if self.without and self.study.protection.privacy is not None:
            raise StudyError(
                "--without: with protection.privacy the run's statement needs what every site spent; restore the "
                "site's data, or start a new run in another folder"
            )
        gone = [arm for arm in self.arms.values() if self._needs(arm)]
        self.arms = {name: arm for name, arm in self.arms.items() if arm not in gone}
        left, needed = len(self.remaining(self.study.training_sites)), self.study.schedule.min_sites
        if self.without and left < needed:
            raise StudyError(
                f"--without {', '.join(sorted(self.without))}: {left} training sites are left, and schedule.min_sites "
                f"is {needed}; restore the data, or start a new run in another folder"
            )

    def _needs(self, arm: Arm) -> bool:
        """Whether an arm is nothing without one of the sites that are left out."""
        alone = len(arm.sites) == 1 or arm.name.removeprefix("without/") in self.without
        return alone and not self.without.isdisjoint((*arm.members, arm.name.removeprefix("without/")))

    def remaining(self, sites: Iterable[str]) -> tuple[str, ...]:
        """The sites among those that the run goes on with."""
        return tuple(site for site in sites if site not in self.without)

    def plan(self, name: str) -> Plan:
        """What the coordinator of an arm must know: whom it asks, too."""
        plan = super().plan(name)
        return replace(plan, sites=self.remaining(plan.sites))

    def find(self, header: Header) -> Site:
        """The site that a message addresses; built when it is first asked for."""
        arm = self._by_identity.get(header.study)
        if arm is None:
            raise StudyError("a message of another study, or of an arm that this run does not have")
        key = (arm.name, header.site)
        if key not in self._sites:
            self._sites[key] = self._build(arm.name, header.site)
        return self._sites[key]

    def dataset(self, site: str) -> Dataset:
        """A site's data set, shared by all arms of this process.

        A site that scans the patients of others has no folder: it gets their test patients and theirs alone.
        """
        if site not in self._datasets:
            members = self._scanned_by(site)
            if not members:
                self._datasets[site] = self.task.dataset(site, self.sites.of(site).data)
            elif isinstance(self.task, Visited):
                self._datasets[site] = self.task.visits(site, {name: self.sites.of(name).data for name in members})
            else:
                raise StudyError(f"sites.{site}.scans: the study's task cannot show one site's patients to another")
        return self._datasets[site]

    def egress(self, site: str) -> EgressRules:
        """What a site lets out; one that scans the patients of others keeps the strictest rules of those."""
        return strictest(_rules_of(self.sites.of(name).egress) for name in self._scanned_by(site) or (site,))

    @property
    def rounding_root(self) -> bytes:
        """What all sites of this machine round from: the study's seed, so that a run gives the same bits again."""
        return study_root(self.study.seed)

    def history(self, site: str) -> Path:
        """The folder in which a site records over all studies what it has answered, or this run's own."""
        entry = self.sites.sites.get(site)
        given = None if entry is None else entry.history
        return given or self.out / "work" / "sites" / site / "history"

    def header_facts(self, site: str) -> HeaderFacts:
        """What the headers of a site's training images say of its scanners, as far as its rules let out.

        Nothing with differential privacy, which has no noise for it, and nothing where the data cannot be used: a run
        survives that.
        """
        if site in self.without:
            return HeaderFacts()
        rules = self.egress(site)
        if not rules.scanner_facts or self.study.protection.privacy is not None:
            return HeaderFacts()
        try:
            dataset = self.dataset(site)
            return dataset.header_facts(rules.minimum_cohort) if isinstance(dataset, Headed) else HeaderFacts()
        except Exception:
            log.debug("the headers of a site cannot be read", exc_info=True)
            return HeaderFacts()

    def _scanned_by(self, site: str) -> tuple[str, ...]:
        return self.study.sites[site].scans if site in self.study.sites else ()

    def preflight(self, phase: Phase = lambda *_: None) -> None:
        """Build every arm and open every site's data; raises what would stop a run, before it has written anything.

        Across hospitals a round goes on without a site that fails. On one machine that would hide a mistake in the
        study or the data; whatever else goes wrong at a site is left to the round.
        """
        for name in self.arms:
            self.blueprint(name)
        sites = self.remaining(self.study.sites)
        for number, site in enumerate(sites):
            phase(READING, number, len(sites))
            try:
                dataset = self.dataset(site)
                if self.purses.rules is not None and site in self.study.training_sites:
                    self.purses.terms(site, dataset)
            except WardroundError:
                raise
            except Exception:
                log.debug("a site's data could not be opened", exc_info=True)
        phase(READING, len(sites), len(sites))

    def build_operators(self, phase: Phase, *, keep: bool) -> None:
        """Build what scanners of the study are slow to make before the first round, instead of in it.

        Without `keep`, for other processes: where they find it on the disk, and nowhere else.
        """
        slow = [dataset for dataset in self._datasets.values() if isinstance(dataset, Prepared)]
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
            known: set[str] = set()
            for arm in self.arms.values():
                if (self.out / "work" / "sites" / site / arm.folder).exists():
                    with closing(self._store(arm, site)) as store:
                        known |= {fact for fact in [store.fact("fingerprint")] if fact is not None}
            found = self._fingerprint(site) if known and site != POOLED else None
            if found is not None and known != {found}:
                changed.append(site)
        if changed:
            names = ", ".join(changed)
            again = " ".join(f"--without {name}" for name in changed)
            raise DataError(
                f"the data of {names} changed since the run began. Restore them and run again; or start a new run in "
                f"another folder; or go on without {names}: {again}"
            )

    def _fingerprint(self, site: str) -> str | None:
        """What a site's data are; nothing where they cannot be read for a reason that is left to the round."""
        try:
            return self.dataset(site).fingerprint()
        except WardroundError:
            raise
        except Exception:
            log.debug("a site's data could not be read", exc_info=True)
            return None

    def close(self) -> None:
        """Close what the sites of this process keep open; a site that is asked again opens it again."""
        while self._sites:
            self._sites.popitem()[1].close()
        self.purses.close()

    def spec(self) -> dict[str, Any]:
        """What another process needs to build the same host."""
        return {
            "study": self.study.model_dump(mode="json"),
            "sites": self.sites.model_dump(mode="json"),
            "allow_code": self.sites.allows_code,
            "out": str(self.out),
            "compare": list(self._compare),
            "without": sorted(self.without),
        }

    @staticmethod
    def from_spec(spec: dict[str, Any], progress: Progress | None = None) -> Host:
        """The host of a worker process."""
        sites = SitesFile.model_validate(spec["sites"])
        return Host(
            Study.model_validate(spec["study"]),
            sites.with_code() if spec["allow_code"] else sites,
            Path(spec["out"]),
            tuple(spec["compare"]),
            progress,
            spec["without"],
        )

    def _build(self, arm_name: str, name: str) -> Site:
        blueprint = self.blueprint(arm_name)
        known = name == POOLED or name in self.study.sites
        if not known:
            raise StudyError(f"the study has no site {name[:40]!r}")
        # Whoever pools data has all of them anyway.
        rules = self.rules(
            arm_name,
            egress=OPEN if name == POOLED else self.egress(name),
            lint=name in self.sites.sites and self.sites.of(name).lint,
            rounding_root=self.rounding_root,
            catch_up=self.sites.of(name).catch_up if name in self.sites.sites else 0,
        )
        if blueprint.arm.inside(self.study) and name not in blueprint.arm.sites:
            raise StudyError(
                f"site {name} has no part in an arm that another site trains alone: under protection.secure it stays "
                "inside that site"
            )
        models = self.out / "models" / name / blueprint.arm.folder
        pictures = self.out / "sites" / name / "pictures.npz"
        return Site(
            name,
            rules,
            lambda: self.learner(blueprint, name),
            self._store(blueprint.arm, name),
            protocol=self._protocol(blueprint, name, models),
            evaluators=evaluators_of(models, pictures),
            folder=models,
            rows=None if name == POOLED else self._patient_rows(name),
            sets=None if name == POOLED else MeasuredSets(self.history(name)),
        )

    def _patient_rows(self, site: str) -> PatientRows:
        """What a site measured of each patient; a readable table of it where its rules let a single patient out."""
        if site not in self._rows:
            vault, rules = Vault.of(self.sites.key(site)), self.egress(site)
            shown = vault is None and rules.per_site_results and rules.least == 1
            table = self.out / "sites" / site / "patients.csv" if shown else None
            self._rows[site] = PatientRows(self.out / "work" / "sites" / site / "patients", vault, table)
        return self._rows[site]

    def _protocol(self, blueprint: Blueprint, name: str, models: Path) -> SiteProtocol | None:
        """How a site answers in an arm; nothing special where its updates are summed in the clear."""
        arm = blueprint.arm
        if name not in arm.sites:
            return OnlyTests()
        if arm.inside(self.study):
            # Late: it needs this module.
            from wardround.runner.release import save_release

            model = own_model(models)
            return TrainsAlone(
                OwnArm(
                    plan=self.plan(arm.name),
                    method=blueprint.method,
                    initial=partial(self.initial, blueprint),
                    save=lambda release: save_release(self, blueprint, release, model),
                    model=model,
                )
            )
        threshold = arm.threshold(self.study)
        if threshold is None:
            return None
        return SecureUpload(threshold, partial(roster_of, self._roster_path(arm)), self.history(name))

    def exchange(self, arm: Arm, journal: Journal) -> ExchangeFactory:
        """How the updates of an arm become one: summed in the clear or under masks, or by a robust rule."""
        threshold, robust = arm.threshold(self.study), arm.robust(self.study)
        if threshold is not None:
            stores = {site: partial(self._store, arm, site) for site in arm.sites}
            return secure_sum(enrolled(self._roster_path(arm), stores), threshold, journal)
        if robust is None:
            return PlainSum
        defence = Defence(robust.rule, robust.tolerated(len(arm.sites)), robust.mixing, robust.gate)
        return robust_mean(defence, self.out / "work" / "arms" / arm.folder / "updates")

    def _roster_path(self, arm: Arm) -> Path:
        return self.out / "work" / "arms" / arm.folder / "roster.json"

    def _store(self, arm: Arm, site: str) -> SiteStore:
        return SiteStore(self.out / "work" / "sites" / site / arm.folder, Vault.of(self.sites.key(site)))

    def learner(self, blueprint: Blueprint, name: str) -> Learner:
        """What trains and evaluates at a site in an arm; all learners of a process share one model."""
        arm, seed = blueprint.arm, self.study.seed
        if name == POOLED:
            parts = [self.dataset(member) for member in arm.members]
            dataset = self.task.pooled(parts)
            offsets = tuple(sum(len(p) for p in parts[:i]) for i in range(len(parts)))
            streams = tuple(ExampleStream(len(p), seed, m) for p, m in zip(parts, arm.members, strict=True))
            examples: SiteExamples | UnionExamples = UnionExamples(streams, offsets, seed)
        else:
            dataset = self.dataset(name)
            examples = SiteExamples(ExampleStream(len(dataset), seed, name))
        report, robust = self._progress, arm.robust(self.study)
        private = None
        # A site that only evaluates an arm's model spends nothing, and may have no training patients at all.
        if self.purses.rules is not None and name in arm.sites:
            private = PrivateTraining(self.task, dataset, self.purses.of(name, dataset), self.study_sha256, arm.name)
        return Learner(
            site=name,
            bench=self.bench,
            dataset=dataset,
            examples=examples,
            method=blueprint.method,
            policy=blueprint.policy,
            local=arm.local,
            rounds=self.study.schedule.rounds,
            seed=seed,
            groups=tuple(g.name for g in blueprint.layout.groups),
            progress=None if report is None else (lambda *step: report(arm.name, name, *step)),
            momentum=0.0 if robust is None else robust.momentum,
            private=private,
        )


def _rules_of(egress: Egress) -> EgressRules:
    metrics = None if egress.metrics == "all" else frozenset(egress.metrics)
    return EgressRules(egress.per_site_results, metrics, egress.minimum_cohort, egress.scanner_facts)


def site_finder(spec: dict[str, Any], progress: Progress | None = None) -> Callable[[Header], Site]:
    """The entry of worker processes (see `wardround.engines.worker`)."""
    return Host.from_spec(spec, progress).find
