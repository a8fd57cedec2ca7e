"""What the coordinator of an arm must know, from the study."""

from __future__ import annotations

from wardround.federation.commits import Plan
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.arms import Arm
from wardround.study.schema import Study
from wardround.wire.staleness import Staleness


def plan_of(arm_specs: ArmSpecs, name: str) -> Plan:
    """The plan of an arm: whom it asks for what, and how it chooses the round that it releases."""
    arm_spec, study = arm_specs.arm_spec(name), arm_specs.study
    schedule, metrics = study.schedule, arm_specs.task.metrics
    selection = metrics[0] if metrics else None
    return Plan(
        arm=name,
        identity=arm_spec.identity,
        sites=arm_spec.arm.sites,
        evaluators=arm_spec.arm.evaluators,
        rounds=schedule.rounds,
        min_sites=min(schedule.min_sites, len(arm_spec.arm.sites)),
        layout=arm_spec.layout,
        metrics_layout=arm_spec.metrics_layout,
        initial_scale=study.protection.initial_scale,
        codec=arm_spec.codec,
        selection=None if selection is None else selection.name,
        larger_is_better=selection is None or selection.larger_is_better,
        metrics=metrics,
        validate_every=schedule.validate_every,
        release=schedule.release,
        keep=schedule.keep,
        extends=arm_specs.extends(arm_spec.arm),
        initial=arm_specs.start(arm_spec),
        curriculum=arm_spec.curriculum,
        kinds=arm_spec.kinds,
        staleness=staleness_of(study, arm_spec.arm),
    )


def staleness_of(study: Study, arm: Arm) -> Staleness | None:
    """How late updates of an arm count; `None` where rounds wait for all, as those of one site do."""
    rules = study.schedule.asynchronous
    if rules is None or len(arm.sites) == 1:
        return None
    return Staleness(min(rules.buffer, len(arm.sites)), rules.exponent, rules.max_staleness)
