"""When a hospital's decision on a study counts: what it is bound to, and what to say where one of these changed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Literal, Protocol

from wardround.errors import Rejected
from wardround.hospitals.proposal import Decision, Proposal, Standing, named_code
from wardround.protection.identity import Identity
from wardround.study.registry import GROUPS
from wardround.study.schema import Study
from wardround.version import __version__
from wardround.wire.canonical import digest

PENDING = "the hospital has not decided on the study yet"
_AGAIN = "Review the study and decide again"
# Seconds for which the version of an installed plug-in is believed.
_BELIEVED = 10.0


class KeysOfSites(Protocol):
    """The list of a federation's sites and their keys, once the root's signature on it was checked."""

    @property
    def keys(self) -> Mapping[str, bytes]:
        """Site -> public key."""

    def sha256_of(self, sites: Iterable[str]) -> str:
        """The hash of these sites' keys; raises `Rejected` for a site that is not listed."""


@dataclass(frozen=True)
class Binding:
    """All that a decision on a study is bound to, as it is at this moment at this hospital."""

    site: str
    study_sha256: str
    compare: tuple[str, ...]
    plan_sha256: str
    package: str
    start_sha256: str | None
    teacher_sha256: str | None
    plugins: Mapping[str, str]
    roster_sha256: str

    @staticmethod
    def of(site: str, study_sha256: str, study: Study, proposal: Proposal, roster: KeysOfSites) -> Binding:
        """What a decision made now would be bound to.

        Raises `Rejected` where the roster lacks a site of the study, and `StudyError` for a name of code that is none.
        """
        return Binding(
            site=site,
            study_sha256=study_sha256,
            compare=proposal.compare,
            plan_sha256=proposal.plan_sha256,
            package=__version__,
            start_sha256=proposal.start_sha256,
            teacher_sha256=proposal.teacher_sha256,
            plugins=installed_code(study),
            roster_sha256=roster.sha256_of(study.sites),
        )

    @property
    def sha256(self) -> str:
        """The hash of all of it."""
        return digest(asdict(self))

    def decide(self, state: Literal["approved", "refused"], identity: Identity, reason: str = "") -> Decision:
        """A decision, signed and dated."""
        return Decision(
            state=state,
            site=self.site,
            study_sha256=self.study_sha256,
            compare=self.compare,
            plan_sha256=self.plan_sha256,
            package=self.package,
            start_sha256=self.start_sha256,
            teacher_sha256=self.teacher_sha256,
            plugins=dict(self.plugins),
            roster_sha256=self.roster_sha256,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            reason=reason,
        ).signed(identity)

    def standing(self, decision: Decision | None, key: bytes) -> Standing:
        """How the hospital with this public key stands to the study: an approval counts only where all is as it was.

        A refusal counts whatever changed. Raises `Rejected` for a decision that `key` did not sign, or of another study
        or hospital: somebody put it there.
        """
        if decision is None:
            return Standing(state="pending", reason=PENDING)
        decision.verify(key)
        if (decision.study_sha256, decision.site) != (self.study_sha256, self.site):
            raise Rejected(f"the decision that is kept with this study is one on another study. {_AGAIN}")
        if decision.state == "refused":
            return Standing(state="refused", reason=decision.reason or "the hospital refused", decision=decision)
        if why := self.changed(decision):
            return Standing(state="pending", reason=f"the approval no longer counts: {why}. {_AGAIN}")
        return Standing(state="approved", decision=decision)

    def changed(self, decision: Decision) -> str:
        """What changed since a decision, in words; empty where nothing did."""
        changes = []
        if sorted(decision.compare) != sorted(self.compare):
            changes.append("other models would be trained beside the federation's to compare with it")
        if decision.plan_sha256 != self.plan_sha256:
            changes.append("the coordinator's version fills in other defaults of the study (another plan_sha256)")
        if decision.package != self.package:
            changes.append(f"Wardround {decision.package} was installed here, and now {self.package} is")
        if decision.start_sha256 != self.start_sha256:
            changes.append("the model would begin with other base weights")
        if decision.teacher_sha256 != self.teacher_sha256:
            changes.append("another model would teach")
        if named := sorted(
            name
            for name in {**decision.plugins, **self.plugins}
            if decision.plugins.get(name) != self.plugins.get(name)
        ):
            changes.append(f"plug-in {named[0]} is installed here in another version, or no longer")
        if decision.roster_sha256 != self.roster_sha256:
            changes.append("the federation's list gives another key to a hospital of the study")
        return "; ".join(changes)


def installed_code(study: Study, *, anew: bool = False) -> dict[str, str]:
    """The plug-ins that a study names, and the version of the package that has each here; imports none.

    A version is empty where no installed package has the plug-in. What was found is believed for some seconds, since
    all installed packages are looked through; `anew`: before a process starts that will import it.
    """
    if anew:
        _versions.cache_clear()
    period = int(time.monotonic() / _BELIEVED)
    return {name: _versions(part, period).get(name, "") for part, name in named_code(study)}


@lru_cache(maxsize=16)
def _versions(part: str, period: int) -> Mapping[str, str]:
    """All plug-ins of a part, and the packages that have them, with their versions.

    Looked up at once: a study may name thousands, and the packages are not looked through for each of them.
    """
    found: dict[str, set[str]] = {}
    for point in entry_points(group=GROUPS[part]):
        if point.dist:
            found.setdefault(point.name, set()).add(f"{point.dist.name} {point.dist.version}")
    return {name: ", ".join(sorted(packages)) for name, packages in found.items()}
