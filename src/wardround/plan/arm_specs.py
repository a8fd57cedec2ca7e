"""What a study comes to: its arms, and what each of them is made of. Knows no folder and no data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.errors import StudyError
from wardround.learning.elastic import Pull
from wardround.learning.methods.apart import APART
from wardround.learning.methods.build import build_method
from wardround.learning.methods.method import BUFFERS, Method
from wardround.learning.methods.personal import UNSEEN
from wardround.learning.model_context import ModelContext
from wardround.learning.passes import parted, steps_in
from wardround.learning.policy import Policy, listed, matching
from wardround.models.adapters import added_values
from wardround.plan.arms import Arm, arms_of
from wardround.plan.leaving import left_before
from wardround.plan.retention import elastic_of, fisher_of, pull_of
from wardround.plan.sums import evaluation_metrics, round_metrics, validation_metrics
from wardround.plan.teachers import teacher_of
from wardround.plan.weights import begin
from wardround.protection.compression import Codec, build_codec
from wardround.protection.lattice import Lattice, LatticeCodec, lattice_of
from wardround.study.hashes import plan_sha256, study_sha256
from wardround.study.places import NO_PLACES, Places
from wardround.study.plugins import NO_PLUGINS, Plugins
from wardround.study.schema import Study
from wardround.tasks.build import build_task
from wardround.tasks.distillation import Student, Teacher
from wardround.tasks.stages import Curriculum, curriculum_of
from wardround.tasks.task import Task
from wardround.wire.bill import Kinds
from wardround.wire.host import on_host
from wardround.wire.ring import value_bits
from wardround.wire.tensors import tensors_sha256
from wardround.wire.update import Layout

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ArmSpec:
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
    curriculum: Curriculum
    kinds: Kinds

    @property
    def own(self) -> tuple[str, ...]:
        """The names of which each site has values of its own, beside those that it receives; none with most methods."""
        return (*self.policy.names("shared"), *self.policy.names("local")) if self.method.keeps_model else ()

    @property
    def steps(self) -> int:
        """The steps that a site takes in a round, in all passes."""
        return steps_in(self.method.passes(), self.arm.local.steps)


class ArmSpecs:
    """Everything that follows from a study alone, each part made once and only when it is needed.

    `embeddings` are the files that sites provide beside their images, by site; `plugins` what of the code that the
    study names may be called; `places` where the files that it names may lie.
    """

    def __init__(
        self,
        study: Study,
        compare: tuple[str, ...],
        embeddings: Mapping[str, Path] | None = None,
        plugins: Plugins = NO_PLUGINS,
        places: Places = NO_PLACES,
    ) -> None:
        self.study = plugins.opened(study)
        self.study_sha256 = study_sha256(self.study)
        self.plan_sha256 = plan_sha256(self.study)
        self.arms = {arm.name: arm for arm in arms_of(self.study, compare)}
        self._embeddings = dict(embeddings or {})
        self.places = self.study.places(Path()) if places == NO_PLACES else places
        self.plugins = plugins
        #: A folder for a file with the model's first values, and whether there are sites in the process that train it:
        #: set before there is a model.
        self.aside: Path | None = None
        self.trains = True
        self._arm_specs: dict[str, ArmSpec] = {}
        self._starts: dict[str, Mapping[str, Array]] = {}

    @cached_property
    def task(self) -> Task:
        """The task of the study. Raises `StudyError` where the study names code that is not allowed."""
        for why in self.plugins.refused(self.study):
            raise StudyError(why)
        task = build_task(self.study, self._embeddings, self.plugins)
        self._check_margins(task)
        if isinstance(task, Student):
            # Found when a loss is asked for: who trains nothing needs none.
            task.learn_from(lambda: self.teacher)
        return task

    def _check_margins(self, task: Task) -> None:
        """Raise `StudyError` for a margin of a metric that the task does not have."""
        known = [spec.name for spec in task.metrics]
        for name in () if self.study.update is None else self.study.update.margins:
            if name not in known:
                raise StudyError(f"update.margins: the task has no metric {name!r}; choose from {', '.join(known)}")

    @cached_property
    def teacher(self) -> Teacher:
        """The released model that teaches: one in a process. Raises `StudyError` where it is not there, or another."""
        named = self.study.task.taught_by
        assert named is not None
        return teacher_of(named, self.places, self.plugins)

    @cached_property
    def fisher(self) -> Mapping[str, Array]:
        """The Fisher information of the release that the study continues; see `plan.retention`. Raises `StudyError`."""
        return fisher_of(self.study, self.places)

    def pull(self, arm_spec: ArmSpec) -> Pull | None:
        """What holds an arm to the release (`update.retain: ewc`); `None` where nothing does. Raises `StudyError`."""
        if elastic_of(self.study) is None:
            return None
        return pull_of(self.study, self.fisher, self.model_context, arm_spec.policy)

    @cached_property
    def left(self) -> frozenset[str]:
        """Sites that left what the study starts from. Raises `StudyError` where one is back without a word of it."""
        return left_before(self.study, self.places)

    def check_teacher(self) -> None:
        """Raise `StudyError` where the study's teacher is not there, is another, or does not fit; nothing for none."""
        if self.study.task.taught_by is not None and isinstance(self.task, Student):
            self.task.check_teacher()

    @cached_property
    def model_context(self) -> ModelContext:
        """The model of this process, with what the study starts from in it."""
        study = self.study
        _ = self.left
        begins = partial(begin, study.start, self.places, study.adapters, whole=not study.trains)
        return ModelContext(
            self.task,
            study.seed,
            begins,
            study.parts.frozen,
            study.adapters,
            folds=study.method.folds,
            checkpoint=study.local.checkpoint,
            aside=self.aside,
            trains=self.trains,
            head=study.model.head_parts,
            only=study.method.only,
        )

    @cached_property
    def frozen_sha256(self) -> str | None:
        """The hash of the values that the study freezes; `None` where it freezes none."""
        frozen = self.frozen_values()
        return tensors_sha256(frozen) if frozen else None

    def frozen_values(self) -> dict[str, Array]:
        """The values that the study freezes, by name."""
        return {
            name: on_host(self.model_context.initial[name])
            for name in self.model_context.initial
            if name in self.model_context.frozen
        }

    @cached_property
    def curriculum(self) -> Curriculum:
        """Which stages of the task learn when. Raises `StudyError` where `schedule.phases` does not fit the task."""
        return curriculum_of(self.study.schedule.phases, self.task, self.model_context.model)

    @cached_property
    def lattice(self) -> Lattice | None:
        """The whole numbers of noise that sites share; `None` where each site's is enough. Raises `StudyError`."""
        study, rules = self.study, self.study.protection.privacy
        if rules is None or rules.noise == "site":
            return None
        frozen = self.model_context.frozen
        floats = [
            p
            for p in self.model_context.parameters
            if p.is_float and (p.trainable or p.buffer) and p.name not in frozen
        ]
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
        study, whole = self.study, frozenset({BUFFERS, UNSEEN, APART})
        if self.lattice is None:
            return build_codec(arm.compression(study), study.seed, whole)
        assert study.protection.privacy is not None
        # A step against the mean gradient.
        unit = -arm.local.lr * self.lattice.step / study.protection.privacy.patients_per_step
        return LatticeCodec(study.seed, whole, unit)

    def arm_spec(self, name: str) -> ArmSpec:
        """What an arm is made of."""
        if name not in self._arm_specs:
            arm, specs = self.arms[name], self.task.metrics
            method = build_method(arm.method, protocols_of(self.study, arm.members), self.plugins)
            method = method.within(self.study, len(arm.sites), self.model_context.model)
            arm.check_needs(method, self.study)
            self._check_passes(arm, method)
            policy = self._policy(arm, method)
            shared = tuple(p for p in self.model_context.parameters if policy.roles[p.name] == "shared")
            private = tuple(p for p in self.model_context.parameters if policy.roles[p.name] == "local")
            protection = self.study.protection
            max_weight = protection.max_weight if method.weights == "samples" else 1.0
            room = protection.max_sites
            declared = method.side_channel(private, protection.ring_bits)
            groups = (*method.groups(shared, protection.ring_bits), *declared)
            metrics = round_metrics(specs, private=protection.privacy is not None)
            self._arm_specs[name] = ArmSpec(
                arm=arm,
                identity=arm.identity(self.study_sha256, self.plan_sha256),
                method=method,
                policy=policy,
                layout=Layout(groups, metrics, room, max_weight),
                metrics_layout=Layout((), validation_metrics(specs), room),
                evaluation_layout=Layout((), evaluation_metrics(specs), room),
                codec=self._codec(arm),
                curriculum=self.curriculum,
                kinds=Kinds(
                    frozenset(policy.names("frozen")),
                    method.side_channels.union(group.name for group in declared),
                    added_values(self.model_context.model),
                ),
            )
        return self._arm_specs[name]

    def _policy(self, arm: Arm, method: Method) -> Policy:
        """The method's roles, and the study's own on top; raises `StudyError` where nothing is left to share."""
        parameters, frozen, parts = self.model_context.parameters, self.model_context.frozen, arm.parts(self.study)
        names = tuple(p.name for p in parameters)
        local = matching(parts.local, names, "parts.local")
        # A party that trains alone shares with itself what adapters keep at a site.
        local |= frozenset() if arm.alone else self.model_context.local
        if both := sorted(frozen & local):
            raise StudyError(f"parts: {listed(both)} would be both frozen and local; let one pattern match it")
        if not self.study.trains:
            self._check_shares_all(arm, method, frozen)
        if half := [p for p in parameters if p.is_half and p.name not in frozen and p.name not in local]:
            raise StudyError(
                f"{half[0].name} of the network is {half[0].info.dtype}, and what is trained and shared has 32 bits; "
                "freeze it (adapters, parts.frozen), keep it at the sites (parts.local), or make the network in float32"
            )
        left = (p for p in parameters if p.trainable and p.name not in local and method.role(p) == "shared")
        if (frozen or local) and not any(left):
            raise StudyError(
                f"parts: nothing is left to train and share with method.kind={arm.method.kind}; freeze less, or keep "
                "less at the sites"
            )
        return method.policy(parameters).with_parts(frozen, local)

    def _check_passes(self, arm: Arm, method: Method) -> None:
        """Raise `StudyError` for passes that make no round, or that a privacy budget does not cover."""
        parted(method.passes())
        if len(method.passes()) > 1 and self.study.protection.privacy is not None:
            raise StudyError(
                f"method.kind={arm.method.kind} passes over the patients more than once in a round, and "
                "protection.privacy counts one pass; choose another method, or leave out protection.privacy"
            )

    def _check_shares_all(self, arm: Arm, method: Method, frozen: Collection[str]) -> None:
        """Raise `StudyError` where a part of a model that is measured as it is would be of each site."""
        floats = [p for p in self.model_context.parameters if p.is_float and p.name not in frozen]
        if kept := [p.name for p in floats if method.role(p) == "local"]:
            raise StudyError(
                f"method.kind={arm.method.kind} keeps {listed(kept)} at the sites, and with schedule.rounds 0 no site "
                "has trained a part of its own; choose a method that shares all, as fedavg does"
            )

    def initial(self, arm_spec: ArmSpec) -> tuple[dict[str, Array], dict[str, Array]]:
        """What an arm begins with: the values that sites get, and what only its coordinator keeps."""
        return arm_spec.method.initial(arm_spec.layout.groups, self.model_context.initial_values())

    def extends(self, arm: Arm) -> bool:
        """Whether an aborted round comes on top of the study's; with privacy it is paid for."""
        return arm.masked(self.study) and self.study.protection.privacy is None

    def start(self, arm_spec: ArmSpec) -> Mapping[str, Array]:
        """The state of an arm before round 1, what sites get and what the coordinator keeps: one for all its sites."""
        name = arm_spec.arm.name
        if name not in self._starts:
            public, private = self.initial(arm_spec)
            self._starts[name] = MappingProxyType({**private, **public})
        return self._starts[name]


def protocols_of(study: Study, sites: Iterable[str]) -> dict[str, npt.NDArray[np.float32]]:
    """The public features of the sites' scanners; those of MRI have none."""
    scanners = {site: study.acquisition_of(site).features() for site in sites} if study.scans else {}
    return {site: np.array(found, np.float32) for site, found in scanners.items() if found is not None}
