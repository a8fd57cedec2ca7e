"""Asks a site to train an arm that never leaves it (`wardround.site.alone`)."""

from __future__ import annotations

from wardround.errors import NotEnoughSites
from wardround.federation.exchange import ALONE, DONE, Engine
from wardround.plan.arm_specs import ArmSpec
from wardround.storage.journal import RoundReport
from wardround.wire.message import Header, Message


def train_alone(engine: Engine, arm_spec: ArmSpec, number: int) -> RoundReport:
    """Have the one site of an arm train up to round `number`; an empty report, for those who watch.

    A message a round, so that a run can be stopped between two. Raises `NotEnoughSites` when the site declines.
    """
    (site,) = arm_spec.arm.sites
    (reply,) = engine.exchange([Message(Header(ALONE, arm_spec.identity, site, number))])
    if reply.header.kind != DONE:
        reason = reply.header.meta.get("reason", "no reason given")
        raise NotEnoughSites(f"{arm_spec.arm.name}: {reason}. Mend the cause and run again with --resume")
    return RoundReport(
        arm=arm_spec.arm.name,
        round=number,
        attempt=0,
        participants=(site,),
        missing={},
        loss=None,
        validation=None,
        bytes_up=0,
        bytes_down=0,
        seconds=0.0,
        coordinator_seconds=0.0,
        training_seconds=0.0,
        saturated_share=0.0,
        saturated=0.0,
        state_sha256="",
    )
