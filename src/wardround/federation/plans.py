"""What the coordinator of an arm must know, from the study."""

from __future__ import annotations

from wardround.federation.coordinator import Plan
from wardround.plan.blueprints import Blueprints


def plan_of(blueprints: Blueprints, name: str) -> Plan:
    """The plan of an arm: whom it asks for what, and how it chooses the round that it releases."""
    blueprint, study = blueprints.blueprint(name), blueprints.study
    schedule, metrics = study.schedule, blueprints.task.metrics
    selection = metrics[0] if metrics else None
    return Plan(
        arm=name,
        identity=blueprint.identity,
        sites=blueprint.arm.sites,
        rounds=schedule.rounds,
        min_sites=min(schedule.min_sites, len(blueprint.arm.sites)),
        layout=blueprint.layout,
        metrics_layout=blueprint.metrics_layout,
        initial_scale=study.protection.initial_scale,
        codec=blueprint.codec,
        selection=None if selection is None else selection.name,
        larger_is_better=selection is None or selection.larger_is_better,
        metrics=metrics,
        validate_every=schedule.validate_every,
        release=schedule.release,
        keep=schedule.keep,
        extends=blueprints.extends(blueprint.arm),
        initial=blueprints.start(blueprint),
        curriculum=blueprint.curriculum,
    )
