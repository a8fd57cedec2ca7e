"""Builds the sites of a run in whichever process they live in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.errors import StudyError, WardroundError
from wardround.federation.coordinator import Plan
from wardround.federation.egress import OPEN, EgressRules, strictest
from wardround.federation.examples import ExampleStream, SiteExamples, UnionExamples
from wardround.federation.exchange import ExchangeFactory, PlainSum
from wardround.federation.journal import Journal
from wardround.federation.methods.build import build_method
from wardround.federation.methods.method import BUFFERS, Method
from wardround.federation.methods.personal import STRANGER
from wardround.federation.policy import Policy
from wardround.federation.private_training import PrivateTraining
from wardround.federation.robust import robust_mean
from wardround.federation.secure import SecureUpload, secure_sum
from wardround.federation.site import Rules, Site
from wardround.federation.store import SiteStore
from wardround.federation.sums import evaluation_metrics, round_metrics, validation_metrics
from wardround.federation.training import Learner, Workbench
from wardround.federation.vault import Vault
from wardround.physics.scanners import protocol_features
from wardround.protection.compression import Codec, build_codec
from wardround.protection.lattice import Lattice, LatticeCodec, lattice_of
from wardround.protection.robust import Defence
from wardround.runner.arms import POOLED, Arm, arms_of
from wardround.runner.evaluators import evaluators_of
from wardround.runner.privacy import Purses
from wardround.runner.rosters import enrolled, roster_of
from wardround.study.ct import CTAcquisition
from wardround.study.load import study_sha256
from wardround.study.protocols import HeaderFacts
from wardround.study.schema import Study
from wardround.study.sites import Egress, SitesFile
from wardround.tasks.build import build_task
from wardround.tasks.task import Dataset, Headed, Task, Visited
from wardround.wire.message import Header
from wardround.wire.ring import value_bits
from wardround.wire.update import Layout

log = logging.getLogger(__name__)
Progress = Callable[[str, str, int, int, int], None]


@dataclass(frozen=True)
class Blueprint:
    """An arm with everything derived from it: method, policy and the layouts of its updates, and their codec.

    `layout` is the method's; `codec.sent(layout)` is what travels.
    """

    arm: Arm
    identity: str
    method: Method
    policy: Policy
    layout: Layout
    metrics_layout: Layout
    evaluation_layout: Layout
    codec: Codec


class Host:
    """Everything that is built from a study on this machine, each part once and only when it is needed.

    `progress` is called with arm, site, round, step and steps.
    """

    def __init__(
        self,
        study: Study,
        sites: SitesFile,
        out: Path,
        compare: tuple[str, ...],
        progress: Progress | None = None,
    ) -> None:
        self.study = study
        self.sites = sites
        self.out = out
        self.arms = {arm.name: arm for arm in arms_of(study, compare)}
        self.study_sha256 = study_sha256(study)
        self._progress = progress
        self._by_identity = {arm.identity(self.study_sha256): arm for arm in self.arms.values()}
        self._compare = compare
        self._datasets: dict[str, Dataset] = {}
        self._sites: dict[tuple[str, str], Site] = {}
        self._blueprints: dict[str, Blueprint] = {}
        self.purses = Purses(study, sites, out, self.arms, lambda: self.lattice)

    @cached_property
    def task(self) -> Task:
        """The task of the study."""
        known = {name: site.embeddings for name, site in self.sites.sites.items() if site.embeddings is not None}
        return build_task(self.study, known)

    @cached_property
    def bench(self) -> Workbench:
        """The model of this process."""
        return Workbench(self.task, self.study.seed)

    @cached_property
    def lattice(self) -> Lattice | None:
        """The whole numbers of noise that sites share; `None` where each site's is enough. Raises `StudyError`."""
        study, rules = self.study, self.study.protection.privacy
        if rules is None or rules.noise == "site":
            return None
        floats = [p for p in self.bench.parameters if p.is_float and (p.trainable or p.buffer)]
        untrained = [p.info.name for p in floats if not p.trainable]
        if untrained:
            raise StudyError(
                f"protection.privacy.noise=distributed: {untrained[0]} of the model is averaged and not trained, so no "
                "noise would cover it; choose a model without such values, or `noise: site`"
            )
        return lattice_of(
            rules,
            bits=value_bits(study.protection.ring_bits, study.protection.max_sites),
            parties=study.protection.threshold_for(len(study.training_sites)),
            dimension=sum(p.info.size for p in floats),
            steps=study.schedule.rounds,
        )

    def _codec(self, arm: Arm) -> Codec:
        """How an arm's changes are written in whole numbers."""
        study, whole = self.study, frozenset({BUFFERS, STRANGER})
        if self.lattice is None:
            return build_codec(arm.compression(study), study.seed, whole)
        assert study.protection.privacy is not None
        # A step against the mean gradient.
        unit = -arm.local.lr * self.lattice.step / study.protection.privacy.patients_per_step
        return LatticeCodec(study.seed, whole, unit)

    @property
    def replicates(self) -> int:
        """Bootstrap replicates of an evaluation."""
        return 0 if self.study.evaluation is None else self.study.evaluation.bootstrap

    def blueprint(self, name: str) -> Blueprint:
        """What an arm is made of."""
        if name not in self._blueprints:
            arm = self.arms[name]
            method = build_method(arm.method, protocols_of(self.study, arm.members))
            policy = method.policy(self.bench.parameters)
            shared = tuple(p for p in self.bench.parameters if policy.roles[p.name] == "shared")
            private = tuple(p for p in self.bench.parameters if policy.roles[p.name] == "local")
            protection = self.study.protection
            max_weight = protection.max_weight if method.weights == "samples" else 1.0
            room = protection.max_sites
            specs = self.task.metrics
            groups = (
                *method.groups(shared, protection.ring_bits),
                *method.side_channel(private, protection.ring_bits),
            )
            metrics = round_metrics(specs, private=protection.privacy is not None)
            self._blueprints[name] = Blueprint(
                arm=arm,
                identity=arm.identity(self.study_sha256),
                method=method,
                policy=policy,
                layout=Layout(groups, metrics, room, max_weight),
                metrics_layout=Layout((), validation_metrics(specs), room),
                evaluation_layout=Layout((), evaluation_metrics(specs, self.replicates), room),
                codec=self._codec(arm),
            )
        return self._blueprints[name]

    def plan(self, name: str) -> Plan:
        """What the coordinator of an arm must know."""
        blueprint, schedule = self.blueprint(name), self.study.schedule
        selection = self.task.metrics[0] if self.task.metrics else None
        return Plan(
            arm=name,
            identity=blueprint.identity,
            sites=blueprint.arm.sites,
            rounds=schedule.rounds,
            min_sites=min(schedule.min_sites, len(blueprint.arm.sites)),
            layout=blueprint.layout,
            metrics_layout=blueprint.metrics_layout,
            initial_scale=self.study.protection.initial_scale,
            codec=blueprint.codec,
            selection=None if selection is None else selection.name,
            larger_is_better=selection is None or selection.larger_is_better,
            validate_every=schedule.validate_every,
            release=schedule.release,
            keep=schedule.keep,
            extends=self.study.protection.privacy is None,
        )

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

    def header_facts(self, site: str) -> HeaderFacts:
        """What the headers of a site's training images say of its scanners, as far as its rules let out.

        Nothing with differential privacy, which has no noise for it, and nothing where the data cannot be used: a run
        survives that.
        """
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

    def preflight(self) -> None:
        """Build every arm and open every site's data; raises what would stop a run, before it has written anything.

        Across hospitals a round goes on without a site that fails. On one machine that would hide a mistake in the
        study or the data; whatever else goes wrong at a site is left to the round.
        """
        for name in self.arms:
            self.blueprint(name)
        for site in self.study.sites:
            try:
                dataset = self.dataset(site)
                if self.purses.rules is not None and site in self.study.training_sites:
                    self.purses.terms(site, dataset)
            except WardroundError:
                raise
            except Exception:
                log.debug("a site's data could not be opened", exc_info=True)

    def open_stores(self) -> None:
        """Open what sites kept of an earlier run in the folder: another key is an error of the whole run."""
        for arm in self.arms.values():
            for site in arm.sites:
                if (self.out / "work" / "sites" / site / arm.folder).exists():
                    self._store(arm, site).close()

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
            "out": str(self.out),
            "compare": list(self._compare),
        }

    @staticmethod
    def from_spec(spec: dict[str, Any], progress: Progress | None = None) -> Host:
        """The host of a worker process."""
        return Host(
            Study.model_validate(spec["study"]),
            SitesFile.model_validate(spec["sites"]),
            Path(spec["out"]),
            tuple(spec["compare"]),
            progress,
        )

    def _build(self, arm_name: str, name: str) -> Site:
        blueprint = self.blueprint(arm_name)
        known = name == POOLED or name in self.study.sites
        if not known:
            raise StudyError(f"the study has no site {name[:40]!r}")
        rules = Rules(
            identity=blueprint.identity,
            layout=blueprint.codec.sent(blueprint.layout),
            metrics_layout=blueprint.metrics_layout,
            evaluation_layout=blueprint.evaluation_layout,
            replicates=self.replicates,
            seed=self.study.seed,
            egress=OPEN if name == POOLED else self.egress(name),
            codec=blueprint.codec,
            # Whoever pools data has all of them anyway.
            lint=name in self.sites.sites and self.sites.of(name).lint,
            initial_scale=self.study.protection.initial_scale,
            rounds=self.study.schedule.rounds,
            extends=self.study.protection.privacy is None,
        )
        threshold = blueprint.arm.threshold(self.study)
        roster = self._roster_path(blueprint.arm)
        models = self.out / "models" / name / blueprint.arm.folder
        pictures = self.out / "sites" / name / "pictures.npz"
        return Site(
            name,
            rules,
            lambda: self.learner(blueprint, name),
            self._store(blueprint.arm, name),
            protocol=None if threshold is None else SecureUpload(threshold, partial(roster_of, roster)),
            evaluators=evaluators_of(models, pictures),
            folder=models,
        )

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


def protocols_of(study: Study, sites: Iterable[str]) -> dict[str, npt.NDArray[np.float32]]:
    """The public features of the sites' scanners; MRI has none."""
    scanners = {site: study.acquisition_of(site) for site in sites}
    return {site: protocol_features(a) for site, a in scanners.items() if isinstance(a, CTAcquisition)}


def _rules_of(egress: Egress) -> EgressRules:
    metrics = None if egress.metrics == "all" else frozenset(egress.metrics)
    return EgressRules(egress.per_site_results, metrics, egress.minimum_cohort, egress.scanner_facts)


def site_finder(spec: dict[str, Any], progress: Progress | None = None) -> Callable[[Header], Site]:
    """The entry of worker processes (see `wardround.engines.worker`)."""
    return Host.from_spec(spec, progress).find
