"""What a coordinator asks of sites beside updates: facts before the rounds, rosters, spending and delivery after them.

Answers are kept in the run's folder: a site that is away when the run is resumed has said it before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wardround.errors import DataError, JournalError, NotEnoughSites, WardroundError, WireError
from wardround.federation.exchange import DONE, ERROR, RELEASE, Engine
from wardround.federation.facts import (
    DELIVER,
    FACTS,
    LOCAL_SHA256,
    PLAN,
    ROSTER,
    SPENT,
    SiteFacts,
    SiteSpending,
    meta_of,
    parsed,
)
from wardround.plan.arm_specs import ArmSpec
from wardround.plan.arms import POOLED, Arm
from wardround.protection.identity import Roster
from wardround.runs.context import Context
from wardround.storage.hash_log import is_hash
from wardround.wire.files import write_text
from wardround.wire.message import FileBody, Header, Message, body_sha256

log = logging.getLogger(__name__)
_FACTS = "facts.json"


def ask_facts(context: Context, engine: Engine) -> dict[str, SiteFacts]:
    """The facts of every site that ever gave any, by site; those of an earlier process where a site is away.

    Raises `DataError` where a site's data changed since the run began, and `JournalError` where its key did.
    """
    path = context.out / "work" / _FACTS
    known = _read(path)
    changed = []
    for site, reply in _ask_all(engine, FACTS, context, context.remaining(context.study.sites)).items():
        if reply.header.kind != FACTS:
            log.warning("site %s said nothing of itself: %s", site, _reason(reply))
            continue
        found = parsed(SiteFacts, reply.header.meta)
        before = known.get(site)
        if before is not None and before.public_key != found.public_key:
            raise JournalError(
                f"site {site} answers with another key than when the run began: its store was lost, or another party "
                "answers in its place. Restore the store, or start a new run in another folder"
            )
        if before is not None and None not in (before.fingerprint, found.fingerprint):
            changed += [site] if before.fingerprint != found.fingerprint else []
        if before is not None and found.fingerprint is None:
            # Data that cannot be read now are no other data.
            found = found.model_copy(
                update={name: getattr(before, name) for name in ("fingerprint", "patients", "set_aside")}
            )
        known[site] = found
    if changed:
        raise data_changed(changed)
    write_text(path, json.dumps({site: meta_of(facts) for site, facts in known.items()}, indent=2), durable=True)
    return known


def agree_on_roster(context: Context, engine: Engine, arm: Arm, facts: Mapping[str, SiteFacts]) -> Roster | None:
    """The keys of an arm that sums under masks, shown to all of its sites; `None` for an arm that does not.

    The first roster stands: sites hold on to it. Raises `NotEnoughSites` where a site's key is not known.
    """
    if arm.threshold(context.study) is None:
        return None
    path = context.out / "work" / "arms" / arm.folder / "roster.json"
    if path.exists():
        roster = _roster(path)
    else:
        lacking = [site for site in arm.sites if site not in facts]
        if lacking:
            raise NotEnoughSites(
                f"{arm.name}: protection.secure needs the key of every site before round 1, and {', '.join(lacking)} "
                "did not answer. Mend the cause and run again"
            )
        roster = Roster({site: bytes.fromhex(facts[site].public_key) for site in arm.sites})
        write_text(path, json.dumps(roster.to_json()), durable=True)
        log.info("roster_sha256 of %s, for the hospitals to compare: %s", arm.name, roster.sha256)
    identity = arm.identity(context.study_sha256, context.plan_sha256)
    asked = [
        Message(Header(ROSTER, identity, s, meta={"keys": roster.to_json()})) for s in context.remaining(arm.sites)
    ]
    for reply in engine.exchange(asked):
        if reply.header.kind != DONE:
            # A round goes on without it, where enough others are there.
            log.warning("site %s did not take the roster: %s", reply.header.site, _reason(reply))
    return roster


def ask_release(
    context: Context, engine: Engine, arm_spec: ArmSpec, number: int, aborted: Collection[int]
) -> dict[str, str]:
    """Have the sites of an arm write their private parts of the released model; the parts' hashes by site.

    Raises `WardroundError` where a site could not.
    """
    if not arm_spec.policy.names("local") and not arm_spec.own:
        return {}
    sites = [site for site in context.remaining(arm_spec.arm.sites) if site != POOLED]
    # Rounds that took the place of aborted ones come after the study's last.
    meta: dict[str, Any] = {"aborted": sorted(aborted)} if aborted else {}
    found = {}
    for reply in engine.exchange(Message(Header(RELEASE, arm_spec.identity, s, number, meta=meta)) for s in sites):
        site, said = reply.header.site, reply.header.meta
        if reply.header.kind != DONE:
            raise WardroundError(f"site {site} could not save its part: {_reason(reply)}")
        if LOCAL_SHA256 in said:
            if not is_hash(said[LOCAL_SHA256]):
                raise WireError(f"site {site} names a private part by what is no hash")
            found[site] = str(said[LOCAL_SHA256])
    return found


def ask_spending(
    context: Context, engine: Engine, facts: Mapping[str, SiteFacts], took_part: Collection[str]
) -> dict[str, SiteSpending]:
    """What every training site spent; nothing where rounds cost no privacy.

    Raises `WardroundError` where a site does not say, for it is never guessed; one whose data could not be used, and
    that took part in no round, may be silent.
    """
    if context.study.protection.privacy is None:
        return {}
    usable = {site for site, said in facts.items() if said.patients is not None}
    found = {}
    for site, reply in _ask_all(engine, SPENT, context, context.study.training_sites).items():
        if reply.header.kind != SPENT:
            if site not in usable and site not in took_part:
                log.warning("site %s trained in no round, and says nothing of its privacy: %s", site, _reason(reply))
                continue
            raise WardroundError(
                f"site {site} trains and does not say what privacy it spent ({_reason(reply)}). Mend the cause and run "
                "again with --resume"
            )
        found[site] = parsed(SiteSpending, reply.header.meta)
    return found


def deliveries(context: Context, model: Path, card: Path) -> list[Message]:
    """The messages with the released model and its card, one a site."""
    body = FileBody(model, model.stat().st_size)
    header = Header(
        DELIVER,
        context.study_sha256,
        "",
        meta={"card": card.read_text(encoding="utf-8")},
        body_nbytes=body.nbytes,
        body_sha256=body_sha256(body),
    )
    return [Message(replace(header, site=site), body) for site in context.remaining(context.study.sites)]


def deliver(engine: Engine, messages: Sequence[Message]) -> dict[str, str]:
    """Send the released model; why it did not reach a site, by site."""
    return {r.header.site: _reason(r) for r in engine.exchange(messages) if r.header.kind != DONE}


def data_changed(sites: Collection[str]) -> DataError:
    """What to say where a run goes on with other data than it began with."""
    names = ", ".join(sites)
    again = " ".join(f"--without {name}" for name in sites)
    return DataError(
        f"the data of {names} changed since the run began. Restore them and run again; or start a new run in "
        f"another folder; or go on without {names}: {again}"
    )


def _ask_all(engine: Engine, kind: str, context: Context, sites: Sequence[str]) -> dict[str, Message]:
    meta = {PLAN: context.plan_sha256}
    asked = [Message(Header(kind, context.study_sha256, site, meta=meta)) for site in sites]
    replies = {reply.header.site: reply for reply in engine.exchange(asked)}
    return {site: replies[site] for site in sites}


def _reason(reply: Message) -> str:
    return str(reply.header.meta.get("reason", "no reason given")) if reply.header.kind == ERROR else "another answer"


def _read(path: Path) -> dict[str, SiteFacts]:
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {site: parsed(SiteFacts, meta) for site, meta in kept.items()}
    except (OSError, ValueError, AttributeError, WireError) as error:
        raise JournalError("what the sites said of themselves is lost; restore it", detail=str(path)) from error


def _roster(path: Path) -> Roster:
    try:
        return Roster.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise JournalError("the roster of the run is lost; start again in another folder", detail=str(path)) from None
