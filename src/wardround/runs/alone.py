"""Asks a site to train an arm that never leaves it (`wardround.site.alone`)."""

from __future__ import annotations

from wardround.errors import NotEnoughSites
from wardround.federation.exchange import ALONE, DONE, Engine
from wardround.plan.blueprints import Blueprint
from wardround.storage.journal import RoundReport
from wardround.wire.message import Header, Message


def train_alone(engine: Engine, blueprint: Blueprint, number: int) -> RoundReport:
    """Have the one site of an arm train up to round `number`; an empty report, for those who watch.

    A message a round, so that a run can be stopped between two. Raises `NotEnoughSites` when the site declines.
    """
    (site,) = blueprint.arm.sites
    (reply,) = engine.exchange([Message(Header(ALONE, blueprint.identity, site, number))])
    if reply.header.kind != DONE:
        reason = reply.header.meta.get("reason", "no reason given")
        raise NotEnoughSites(f"{blueprint.arm.name}: {reason}. Mend the cause and run again with --resume")
    return RoundReport(
        arm=blueprint.arm.name,
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
