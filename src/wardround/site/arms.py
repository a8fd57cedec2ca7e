"""The site in the arms of a study: what trains there, how it answers, and what it keeps of a release."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from wardround.errors import StudyError
from wardround.federation.plans import plan_of
from wardround.federation.release import (
    save_model,
    save_release,
    scanners_of_arm,
)
from wardround.learning.device import Placed
from wardround.learning.examples import ExampleStream, SiteExamples, UnionExamples
from wardround.learning.private_training import PrivateTraining
from wardround.learning.training import Learner
from wardround.plan.arm_specs import ArmSpec
from wardround.plan.arms import FEDERATED, POOLED, Arm
from wardround.site.alone import OnlyTests, OwnArm, TrainsAlone
from wardround.site.evaluators import Continued, PrivatePart, evaluators_of, own_model
from wardround.site.finetuned import OF, FineTuned
from wardround.site.holdings import Holdings, enrolled
from wardround.site.measured import MeasuredSets
from wardround.site.own_parts import carried_part
from wardround.site.protocol import SiteProtocol
from wardround.site.renewed import check_some
from wardround.site.rules import rules_of
from wardround.site.secure import SecureUpload
from wardround.site.shelf import check_disk
from wardround.site.site import Site
from wardround.site.validating import Validates
from wardround.storage.store import SiteStore

PICTURES = "pictures.npz"
Progress = Callable[[str, str, int, int, int], None]


class SiteArms:
    """Makes the site of each arm when it is first asked; `progress` is called with arm, site, round, step and steps."""

    def __init__(self, held: Holdings, progress: Progress | None = None) -> None:
        self._held, self._arm_specs = held, held.arm_specs
        self._progress = progress
        self._sites: dict[str, Site] = {}

    def site(self, arm: str) -> Site:
        """The site in an arm, made when it is first asked."""
        if arm not in self._sites:
            self._sites[arm] = self._build(arm)
        return self._sites[arm]

    def check_continued(self) -> None:
        """Raise `DataError` where the site's part of the release that the study continues is not what it was."""
        carried = self._carried(self._arm_specs.arms[FEDERATED])
        if carried is not None:
            carried()

    def earlier_fingerprints(self) -> set[str]:
        """What the site's data were in every arm of an earlier process; another key is an error."""
        known: set[str] = set()
        for arm in self._arm_specs.arms.values():
            if (self._held.kept / arm.folder).exists():
                store = self._store_of(arm)
                fact = store.fact("fingerprint")
                store.close()
                known |= {fact} if fact is not None else set()
        return known

    def _store_of(self, arm: Arm) -> SiteStore:
        return SiteStore(self._held.kept / arm.folder, self._held.cipher)

    def _build(self, arm_name: str) -> Site:
        name, arm_spec = self._held.name, self._arm_specs.arm_spec(arm_name)
        entry = self._held.entry
        if arm_spec.arm.inside(self._arm_specs.study) and name not in arm_spec.arm.sites:
            raise StudyError(
                f"site {name} has no part in an arm that another site trains alone: under protection.secure it stays "
                "inside that site"
            )
        rules = rules_of(
            self._arm_specs,
            arm_name,
            egress=self._held.egress,
            lint=entry is not None and entry.lint,
            rounding_root=self._held.rounding_root,
            catch_up=0 if entry is None else entry.catch_up,
        )
        models = self._held.folder / "models" / name / arm_spec.arm.folder
        pictures = self._held.folder / "sites" / name / PICTURES
        store = self._store_of(arm_spec.arm)
        enrolled(store, self._held.identity)
        carried = self._carried(arm_spec.arm)
        return Site(
            name,
            rules,
            lambda: self.learner(arm_spec),
            store,
            protocol=self._protocol(arm_spec, models),
            evaluators=evaluators_of(
                models,
                pictures,
                self._held.egress.least,
                labels=self._labels,
                continued=None if carried is None else Continued(carried, name in arm_spec.arm.sites),
                tuned=self._finetuned(arm_spec, models),
            ),
            carried=carried,
            folder=models,
            rows=None if name == POOLED else self._held.rows,
            sets=None if name == POOLED else MeasuredSets(self._held.history),
            withdrawals=lambda: self._held.datasets.withdrawals(name),
            follows=self._held.follows,
        )

    def _finetuned(self, arm_spec: ArmSpec, models: Path) -> FineTuned | None:
        """How the site fine-tunes what the federation releases; `None` where it does not."""
        arm, arm_specs = arm_spec.arm, self._arm_specs
        update = arm_specs.study.update
        if update is None or update.finetune is None or arm.name != FEDERATED or self._held.name not in arm.sites:
            return None

        def save(values: Mapping[str, Any], of: str) -> None:
            scanners = scanners_of_arm(arm_specs, arm, {self._held.name: self._held.header_facts()})
            own = {name: tensor for name, tensor in values.items() if name not in arm_specs.model_context.frozen}
            rounds = arm_specs.study.schedule.rounds
            save_model(arm_specs, arm_spec, own, rounds, scanners, own_model(models), {OF: of})

        return FineTuned(update.finetune, own_model(models), save)

    def _carried(self, arm: Arm) -> PrivatePart | None:
        """What the site has of the release that the study continues; an arm of one party shares all with itself."""
        release = self._arm_specs.study.continues
        if release is None or arm.alone:
            return None
        update, initial = self._arm_specs.study.update, self._arm_specs.model_context.initial
        releases = (release, *(() if update is None else update.ancestors))
        return cache(partial(carried_part, self._held.name, releases, self._held.history, initial))

    @property
    def _labels(self) -> bool:
        """Whether the site's validation patients choose thresholds for a model that the study was given."""
        return not self._arm_specs.study.trains and self._held.name in self._arm_specs.study.evaluating_sites

    def _protocol(self, arm_spec: ArmSpec, models: Path) -> SiteProtocol | None:
        """How the site answers in an arm; nothing special where its updates are summed in the clear."""
        arm, arm_specs = arm_spec.arm, self._arm_specs
        if self._held.name not in arm.sites:
            return Validates() if self._held.name in arm.evaluators else OnlyTests()
        if arm.inside(arm_specs.study):
            model = own_model(models)

            def save(release: Any) -> Path:
                scanners = scanners_of_arm(arm_specs, arm, {self._held.name: self._held.header_facts()})
                return save_release(arm_specs, arm_spec, release, scanners, model)

            return TrainsAlone(
                OwnArm(
                    plan=plan_of(arm_specs, arm.name),
                    method=arm_spec.method,
                    initial=partial(arm_specs.initial, arm_spec),
                    save=save,
                    model=model,
                )
            )
        threshold, entry = arm.threshold(arm_specs.study), self._held.entry
        return (
            None
            if threshold is None
            else SecureUpload(
                threshold,
                history=self._held.history,
                members=arm.sites,
                expected=None if entry is None else entry.roster_sha256,
            )
        )

    def learner(self, arm_spec: ArmSpec) -> Learner:
        """What trains and evaluates in an arm; all learners of a process on one device share one model."""
        arm, study, name = arm_spec.arm, self._arm_specs.study, self._held.name
        if name == POOLED:
            parts = [self._held.datasets.of(member) for member in arm.members]
            dataset = self._arm_specs.task.pooled(parts)
            offsets = tuple(sum(len(p) for p in parts[:i]) for i in range(len(parts)))
            streams = tuple(ExampleStream(len(p), study.seed, m) for p, m in zip(parts, arm.members, strict=True))
            each = () if study.local.passes is None else tuple(map(study.local.steps_of, map(len, parts)))
            stretches = tuple(steps * study.local.batch for steps in each)
            examples: SiteExamples | UnionExamples = UnionExamples(streams, offsets, study.seed, stretches)
        else:
            dataset = self._held.datasets.of(name)
            if name in arm.sites:
                check_some(name, len(dataset), study.update)
            examples = SiteExamples(ExampleStream(len(dataset), study.seed, name))
        # Another process may have taken a patient out since.
        self._held.rows.reread()
        begun = None if name == POOLED else self._held.begun(dataset)
        report, robust = self._progress, arm.robust(study)
        private = None
        # A site that only evaluates an arm's model spends nothing, and may have no training patients at all.
        if self._held.budgets.rules is not None and name in arm.sites:
            budget = self._held.budget(dataset)
            task = Placed(self._arm_specs.task, self._held.compute)
            private = PrivateTraining(task, dataset, budget, self._arm_specs.study_sha256, arm.name, self._held.compute)
        if self._held.shelf is not None:
            check_disk([self._held.shelf])
        return Learner(
            site=name,
            model_context=self._arm_specs.model_context.on(self._held.compute),
            dataset=dataset,
            examples=examples,
            method=arm_spec.method,
            policy=arm_spec.policy,
            local=arm.local,
            rounds=study.schedule.rounds,
            seed=study.seed,
            groups=tuple(g.name for g in arm_spec.layout.groups),
            progress=None if report is None else (lambda *step: report(arm.name, name, *step)),
            momentum=0.0 if robust is None else robust.momentum,
            private=private,
            curriculum=arm_spec.curriculum,
            shelf=self._held.shelf,
            least=self._held.egress.least,
            pull=self._arm_specs.pull(arm_spec) if name in arm.sites else None,
            samples=None if begun is None else begun.examples,
        )

    def close(self) -> None:
        """Close the sites; one that is asked for again is made again."""
        while self._sites:
            self._sites.popitem()[1].close()
