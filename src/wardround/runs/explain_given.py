"""What `check` says of a study that trains nothing."""

from __future__ import annotations

from collections.abc import Iterator

from wardround.plan.arm_specs import ArmSpec
from wardround.results.units import human_bytes
from wardround.runs.columns import entry
from wardround.runs.machine import Machine
from wardround.study.schema import Study


def measuring_lines(study: Study) -> Iterator[str]:
    """What is measured, on whom, and beside what."""
    yield entry("nothing", "is trained: schedule.rounds is 0")
    yield entry("measured", "the model that the study starts from, on the test patients of every site")
    if alone := ", ".join(study.member_sites):
        yield entry("left alone", f"the training patients of {alone}; `role: evaluate` has none")
    if compared := ", ".join(study.baselines):
        yield entry("beside it", f"what learned nothing: {compared}")


def given_traffic(host: Machine, arm_spec: ArmSpec) -> Iterator[str]:
    """What the values of the model weigh; `wardround plan` counts whole messages."""
    frozen = frozenset(arm_spec.policy.names("frozen"))
    nbytes = sum(p.info.nbytes for p in host.model_context.parameters if p.name not in frozen)
    yield entry("traffic", f"the model twice to a site, to measure and to keep: 2 x {human_bytes(nbytes)}")
    yield entry("", f"all sites: {human_bytes(2 * len(host.study.sites) * nbytes)}")
