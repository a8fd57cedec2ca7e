"""The coordinator proposes a study to each of its sites and asks again until all have decided."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace

from pydantic import ValidationError

from wardround.errors import Interrupted, JournalError, Rejected, StudyError, WireError
from wardround.federation.exchange import ERROR, Engine
from wardround.federation.facts import meta_of, parsed
from wardround.hospitals.coordinator.status import Said, read_json
from wardround.hospitals.folders import StudyFolder
from wardround.hospitals.proposal import (
    PROPOSED,
    Decision,
    Proposal,
    Standing,
    proposal_message,
    start_of,
    teacher_of,
)
from wardround.hospitals.roster import SignedRoster
from wardround.runs.context import Context
from wardround.study.hashes import written
from wardround.version import __version__
from wardround.wire.canonical import canonical_json
from wardround.wire.files import write_text
from wardround.wire.message import Message

log = logging.getLogger(__name__)
ASK_AGAIN_SECONDS = 5.0


class Refused(StudyError):
    """A site refused the study: it does not take place with this site."""


def proposal_of(context: Context, roster: SignedRoster) -> Proposal:
    """What is proposed to every site of a study. Raises `StudyError`."""
    return Proposal(
        study=written(context.study),
        compare=tuple(sorted({"local"} & {name.partition("/")[0] for name in context.asked})),
        plan_sha256=context.plan_sha256,
        package=__version__,
        start_sha256=start_of(context.study),
        teacher_sha256=teacher_of(context.study),
        roster=roster.to_json(),
    )


class Approvals:
    """Asks the sites of a study for their decisions, all at once and for as long as it takes.

    `said` is what each said last. Decisions are kept in `folder`, and a site that approved this very study is not asked
    again. `decided` is called whenever what a site says has changed.
    """

    def __init__(
        self,
        context: Context,
        folder: StudyFolder,
        roster: SignedRoster,
        decided: Callable[[str, Said], None] = lambda site, said: None,
    ) -> None:
        self._context, self._folder, self._roster, self._decided = context, folder, roster, decided
        self._proposal = proposal_of(context, roster)
        self._keys_sha256 = roster.sha256_of(context.study.sites)
        self._lock = threading.Lock()
        self._decisions = self._kept()
        self.said = {
            site: Said(state="approved") if site in self._decisions else Said()
            for site in context.remaining(context.study.sites)
        }

    def run(self, engine: Engine, stop: threading.Event, pause: float = ASK_AGAIN_SECONDS) -> None:
        """Ask until every site has approved. Raises `Refused` for the first that refuses, and `Interrupted`.

        Closes the engine.
        """
        open_sites = [site for site, said in self.said.items() if said.state != "approved"]
        if not open_sites:
            engine.close()
            return
        with ThreadPoolExecutor(len(open_sites)) as pool:
            futures = [pool.submit(self._ask, engine, site, stop, pause) for site in open_sites]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # Who is still waiting for a site's answer gets an error.
                engine.close()
        failed = [error for future in done if (error := future.exception()) is not None]
        if failed:
            raise next((error for error in failed if not isinstance(error, Interrupted)), failed[0])

    def _ask(self, engine: Engine, site: str, stop: threading.Event, pause: float) -> None:
        while True:
            standing = self._standing(engine, site)
            if standing is not None and standing.state == "refused":
                reason = standing.reason or "no reason given"
                self._note(site, Said(state="refused", reason=reason))
                raise Refused(f"site {site} refused the study: {reason}")
            if standing is not None and standing.state == "approved":
                if standing.decision is None:
                    raise Rejected(f"site {site} says that it approved the study, and shows no signed decision")
                self._check(site, standing.decision)
                self._keep(site, standing.decision)
                self._note(site, Said(state="approved"))
                return
            if stop.wait(pause):
                raise Interrupted("stopped while sites were asked")

    def _standing(self, engine: Engine, site: str) -> Standing | None:
        """What a site says now; nothing where it did not answer."""
        message = proposal_message(self._proposal, site)
        # Each question is another message: the answer to an earlier one may be kept somewhere on the way.
        asked = Message(replace(message.header, attempt=int(time.time())), message.body)
        (reply,) = engine.exchange([asked])
        if reply.header.kind == ERROR:
            self._note(site, Said(state="asked", reason=str(reply.header.meta.get("reason", ""))))
            return None
        if reply.header.kind != PROPOSED:
            raise WireError(f"site {site} answers a proposal with something else")
        standing = parsed(Standing, reply.header.meta)
        if standing.state == "pending":
            self._note(site, Said(state="pending", reason=standing.reason))
        return standing

    def _check(self, site: str, decision: Decision) -> None:
        """Raise `Rejected` for a decision that this site did not sign, or that is of something else."""
        decision.verify(self._roster.keys[site])
        proposal = self._proposal
        expected = {
            "state": "approved",
            "site": site,
            "study_sha256": self._context.study_sha256,
            "plan_sha256": proposal.plan_sha256,
            "start_sha256": proposal.start_sha256,
            "teacher_sha256": proposal.teacher_sha256,
            "roster_sha256": self._keys_sha256,
        }
        for key, value in expected.items():
            if getattr(decision, key) != value:
                raise Rejected(f"the approval of site {site} is of another {key}; it has to review the study again")

    def _note(self, site: str, said: Said) -> None:
        if self.said[site] != said:
            self.said[site] = said
            self._decided(site, said)

    def _keep(self, site: str, decision: Decision) -> None:
        with self._lock:
            self._decisions[site] = decision
            kept = {name: meta_of(each) for name, each in sorted(self._decisions.items())}
            write_text(self._folder.decisions, canonical_json(kept).decode() + "\n", durable=True)

    def _kept(self) -> dict[str, Decision]:
        """The approvals of this very study that an earlier process heard."""
        found = {}
        for site, value in _read(self._folder).items():
            try:
                decision = Decision.model_validate(value)
                self._check(site, decision)
            except (ValidationError, Rejected, KeyError):
                log.info("the decision of a site that was kept does not hold any more; it is asked again")
                continue
            found[site] = decision
        return found


def _read(folder: StudyFolder) -> Mapping[str, object]:
    try:
        return read_json(folder.decisions)
    except JournalError:
        # They are asked for again.
        return {}
