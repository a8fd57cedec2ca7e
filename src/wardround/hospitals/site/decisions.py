"""What was proposed to a hospital and what it decided, in its folder; read anew whenever a message needs it."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from wardround.deidentify import scrub
from wardround.errors import Rejected, StudyError, WardroundError, WireError
from wardround.federation.facts import parsed
from wardround.hospitals.federation import load_federation
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.keys import read_key
from wardround.hospitals.proposal import (
    LARGEST_STUDY,
    Decision,
    Proposal,
    Standing,
    proposal_in,
    proposed_study,
)
from wardround.hospitals.roster import SignedRoster, take_over
from wardround.hospitals.site.approval import Binding
from wardround.plan.arms import FEDERATED, LOCAL, WITHOUT
from wardround.study.hashes import study_sha256
from wardround.study.load import read_yaml, validate
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.wire.canonical import canonical_json, digest, parse_json
from wardround.wire.files import reason as reason_of
from wardround.wire.files import written
from wardround.wire.message import Message

log = logging.getLogger(__name__)
# Studies that wait for a decision; each is some kB, and a person reads every one.
MOST_PENDING = 100
_HASH = re.compile(r"[0-9a-f]{64}")
# A proposal has a list of sites beside the study.
_LARGEST = LARGEST_STUDY + (4 << 20)


class NotApproved(WardroundError):
    """A hospital has not approved what is asked of it."""


class Stopped(WardroundError):
    """A hospital stopped all work of the federation."""


@dataclass(frozen=True)
class StudyFolder:
    """Where a hospital keeps a study that was proposed to it."""

    root: Path

    @property
    def proposal(self) -> Path:
        """The newest proposal of it."""
        return self.root / "proposal.json"

    @property
    def decision(self) -> Path:
        """The hospital's decision, signed."""
        return self.root / "decision.json"

    @property
    def reviewed(self) -> Path:
        """The hash of what was last shown to a person."""
        return self.root / "reviewed"

    @property
    def earlier(self) -> Path:
        """All decisions, the newest last; for people, and for nothing that runs."""
        return self.root / "decisions.jsonl"

    @property
    def spec(self) -> Path:
        """What the study's worker process is given."""
        return self.root / "worker.json"

    @property
    def own(self) -> Path:
        """What the site keeps of the run: stores, logs, models."""
        return self.root / "own"


@dataclass(frozen=True)
class Proposed:
    """A study that was proposed."""

    sha256: str
    proposal: Proposal
    study: Study
    folder: StudyFolder

    @cached_property
    def identities(self) -> frozenset[str]:
        """What a message of this study may name: the study, or any arm that it might have.

        Which arms it has follows from its task, which only its worker reads; the worker refuses all others.
        """
        sites = self.study.sites
        arms = (FEDERATED, *(f"{kind}{site}" for kind in (LOCAL, WITHOUT) for site in sites))
        # As `Arm.identity` makes it.
        return frozenset((self.sha256, *(digest([self.sha256, self.proposal.plan_sha256, arm]) for arm in arms)))


class Decisions:
    """The proposals and decisions of one site of a federation, by its folder.

    Raises `WardroundError` where the folder lacks the federation's file, the site's own file or its key.
    """

    def __init__(self, folder: SiteFolder) -> None:
        self.folder = folder
        self.federation = load_federation(folder.federation)
        self.site = site_of(folder)
        self.identity = read_key(folder.identity)
        self._lock = threading.Lock()
        self._known: dict[str, tuple[object, Proposed]] = {}

    # What a coordinator proposes -------------------------------------------------------------------------------------

    def propose(self, message: Message) -> Standing:
        """Keep what a message proposes, and the roster in it where it is newer; how the site stands to the study.

        Raises `WireError` and `StudyError` for what is refused, and then nothing of it is kept.
        """
        proposal, study = proposal_in(message)
        if self.site not in study.sites:
            raise Rejected("the study does not name this site; a study is proposed to its sites alone")
        Binding.of(self.site, message.header.study, study, proposal, self._taken_over(proposal))
        with self._lock:
            folder = self._folder(message.header.study)
            if (
                not folder.proposal.exists()
                and sum(1 for found in self.all() if self._undecided(found)) >= MOST_PENDING
            ):
                raise Rejected(
                    f"{MOST_PENDING} studies wait for a decision of this hospital, and no more are kept; decide on "
                    "them first (wardround site review)"
                )
            text = canonical_json(proposal.model_dump(mode="json"))
            if not folder.proposal.exists() or folder.proposal.read_bytes() != text:
                _write(folder.proposal, text)
                log.info("study %s (%s) was proposed", study.name, message.header.study[:12])
        return self.standing(message.header.study)

    def _taken_over(self, proposal: Proposal) -> SignedRoster:
        """The roster of a proposal, kept where it is newer than the site's; raises `Rejected` as `take_over` does."""
        new = SignedRoster.from_json(proposal.roster)
        with self._lock:
            known = SignedRoster.load(self.folder.roster) if self.folder.roster.exists() else None
            take_over(
                new,
                known,
                federation=self.federation.name,
                root_key=self._root_key,
                site=self.site,
                key=self.identity.public,
            )
            if known is None or new.serial > known.serial:
                new.save(self.folder.roster)
        return new

    # What the site decided -------------------------------------------------------------------------------------------

    def standing(self, sha256: str) -> Standing:
        """How the site stands to a study now. A decision that does not count leaves the study `pending`, with why.

        Raises `NotApproved` for a study that was not proposed.
        """
        found = self.get(sha256)
        if found is None:
            raise NotApproved("this hospital has no study with this hash: it was not proposed here, or was removed")
        return self._standing(found)

    def approved(self, sha256: str) -> Proposed:
        """A study that the site approved, with all that the approval is bound to. Raises `NotApproved`."""
        found = self.get(sha256)
        if found is None:
            raise NotApproved("this hospital has no study with this hash: it was not proposed here, or was removed")
        self.check_approved(found)
        return found

    def check_approved(self, found: Proposed) -> None:
        """Raise `NotApproved` unless the site approved exactly this proposal of a study, and still does.

        By the proposal in hand and not by the newest: another may be written at any moment, and one that was approved
        may be put back in its place as fast.
        """
        standing = self._standing(found)
        if standing.state != "approved":
            what = "refused this study" if standing.state == "refused" else "has not approved this study"
            raise NotApproved(f"this hospital {what}: {standing.reason}")

    def _standing(self, found: Proposed) -> Standing:
        try:
            return self.binding(found).standing(self.decision(found), self.identity.public)
        except WardroundError as error:
            return Standing(state="pending", reason=scrub(str(error))[:500])

    def binding(self, found: Proposed) -> Binding:
        """What a decision on a study is bound to now. Raises `WireError` where the site's roster is none."""
        roster = SignedRoster.load(self.folder.roster)
        roster.verify(self._root_key)
        if roster.keys.get(self.site) != self.identity.public:
            raise Rejected("the federation's list gives this site another key than its own, or none")
        return Binding.of(self.site, found.sha256, found.study, found.proposal, roster)

    def decision(self, found: Proposed) -> Decision | None:
        """The decision that is kept with a study, not verified; raises `WireError` for a file that is none."""
        data = _read(found.folder.decision, 1 << 20)
        if data is None:
            return None
        try:
            return parsed(Decision, parse_json(data))
        except (TypeError, ValueError, WireError):
            raise Rejected("the decision on this study cannot be read; review the study and decide again") from None

    def decide(self, found: Proposed, state: Literal["approved", "refused"], reason: str = "") -> Decision:
        """Decide on a study as it was reviewed: sign and keep it. Raises `StudyError` for a proposal that changed.

        The coordinator reads the `reason`; what looks like a path, a name or a number of a patient is taken out of it.
        """
        with self._lock:
            if self.get(found.sha256) != found:
                raise StudyError("another proposal of this study came meanwhile; review it again")
            decision = self.binding(found).decide(state, self.identity, scrub(reason)[:500])
            text = canonical_json(decision.model_dump(mode="json"))
            with found.folder.earlier.open("ab") as file:
                file.write(text + b"\n")
            _write(found.folder.decision, text)
        return decision

    def mark_reviewed(self, found: Proposed) -> None:
        """Remember that a person was shown the study as it is now."""
        _write(found.folder.reviewed, self.binding(found).sha256.encode())

    def check_reviewed(self, found: Proposed) -> None:
        """Raise `StudyError` where the study was not shown to a person as it is now."""
        shown = _read(found.folder.reviewed, 64)
        if shown is None:
            raise StudyError(f"review the study first: wardround site review {found.sha256[:12]}")
        if shown != self.binding(found).sha256.encode():
            raise StudyError(
                "since it was reviewed the study was proposed anew with other terms, or something that a decision is "
                f"bound to changed here; review it again: wardround site review {found.sha256[:12]}"
            )

    # What there is ---------------------------------------------------------------------------------------------------

    def get(self, sha256: str) -> Proposed | None:
        """A study that was proposed; nothing for any other. Raises `WireError` for a file that is no proposal."""
        if _HASH.fullmatch(sha256) is None:
            return None
        folder = self._folder(sha256)
        try:
            status = folder.proposal.stat()
        except OSError:
            return None
        stamp = status.st_mtime_ns, status.st_ino, status.st_size
        known = self._known.get(sha256)
        if known is None or known[0] != stamp:
            data = _read(folder.proposal, _LARGEST)
            if data is None:
                return None
            proposal = parsed(Proposal, parse_json(data))
            study = proposed_study(proposal)
            if study_sha256(study) != sha256:
                raise Rejected(
                    "the proposal that is kept here is of another study; the coordinator may propose it again"
                )
            known = self._known[sha256] = stamp, Proposed(sha256, proposal, study, folder)
        return known[1]

    def all(self) -> Iterator[Proposed]:
        """All that were proposed and can be read, by their hashes."""
        with suppress(FileNotFoundError):
            for name in sorted(os.listdir(self.folder.studies)):
                with suppress(WardroundError):
                    if (found := self.get(name)) is not None:
                        yield found

    def named(self, identity: str) -> Proposed:
        """The study that a message names by its own hash or one of its arms'. Raises `NotApproved` for any other."""
        found = self.get(identity)
        if found is None:
            found = next((each for each in self.all() if identity in each.identities), None)
        if found is None:
            raise NotApproved("a message of a study that was not proposed to this hospital, or of an arm of none")
        return found

    def find(self, text: str) -> Proposed:
        """The study that a person means: by its name, or the beginning of its hash. Raises `StudyError`."""
        found = list(self.all())
        # A coordinator chooses names: one may look like the hash of another study, and must not take its place.
        meant = [each for each in found if each.sha256 == text] or [
            each for each in found if each.study.name == text or (len(text) >= 4 and each.sha256.startswith(text))
        ]
        if len(meant) == 1:
            return meant[0]
        if meant:
            shown = "; ".join(f"{each.study.name} ({each.sha256})" for each in meant)
            raise StudyError(f"{len(meant)} studies are meant by {text!r}: {shown}; give one's hash")
        shown = "; ".join(f"{each.study.name} ({each.sha256[:12]})" for each in found)
        raise StudyError(f"no proposed study {text!r}" + (f"; there are {shown}" if shown else "; none was proposed"))

    def _undecided(self, found: Proposed) -> bool:
        return not found.folder.decision.exists()

    def _folder(self, sha256: str) -> StudyFolder:
        return StudyFolder(self.folder.studies / sha256)

    @property
    def _root_key(self) -> bytes:
        return bytes.fromhex(self.federation.root_key)


def site_of(folder: SiteFolder) -> str:
    """The name of the site, by its own file. Raises `StudyError` where that has not just one entry."""
    # Where its data are is looked at when a study needs them: a disk that is not mounted is no reason not to answer.
    names = list(validate(SitesFile, read_yaml(folder.site, "site"), "site", show_values=False).sites)
    if len(names) != 1:
        raise StudyError(f"site.yaml: names {len(names)} sites; at a hospital it has the entry of this one alone")
    return names[0]


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with written(path, durable=True) as file:
            file.write(data)
    except OSError as error:
        raise WardroundError(f"this site's disk refuses: {reason_of(error)}", detail=str(path)) from error


def _read(path: Path, most: int) -> bytes | None:
    """A file of at most so many bytes; nothing where there is none. Raises `WireError`."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WireError(f"a file of this site cannot be read: {reason_of(error)}", detail=str(path)) from error
    if len(data) > most:
        raise WireError(f"a file of this site has more than {most} bytes", detail=str(path))
    return data
