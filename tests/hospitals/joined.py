"""Sites that joined a federation, as folders, without a kit and without a carrier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from wardround.hospitals.federation import Federation, save_federation
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.keys import make_key
from wardround.hospitals.proposal import Proposal, proposal_message, proposal_of
from wardround.hospitals.roster import SignedRoster
from wardround.hospitals.signing import verified
from wardround.hospitals.site.agent import Limits, Resident
from wardround.hospitals.site.decisions import Decisions
from wardround.plan.arm_specs import ArmSpecs
from wardround.protection.identity import Identity
from wardround.protection.rounding import study_root
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.wire.message import Message

ROOT = Identity(b"r" * 32)


@dataclass
class Consortium:
    """A federation's root and its sites, each in a folder of its own."""

    folder: Path
    names: Sequence[str] = ("A", "B", "C")
    keys: dict[str, bytes] = field(default_factory=dict)
    serial: int = 1

    def __post_init__(self) -> None:
        federation = Federation(name="tests", carrier="https", host="localhost", root_key=ROOT.public.hex())
        for name in self.names:
            own = self.of(name)
            data = own.root / "data"
            data.mkdir(parents=True)
            save_federation(federation, own.federation)
            own.site.write_text(yaml.safe_dump({"sites": {name: {"data": "data"}}}), encoding="utf-8")
            self.keys[name] = make_key(own.identity).public

    def of(self, name: str) -> SiteFolder:
        return SiteFolder(self.folder / name)

    def roster(self, **changes: bytes) -> SignedRoster:
        """The list that the root signed; with `changes` a newer one."""
        if changes:
            self.serial += 1
            self.keys |= changes
        return SignedRoster.sign("tests", self.serial, self.keys, ROOT)

    def proposal(self, study: Study, compare: Sequence[str] = ()) -> Proposal:
        plan = ArmSpecs(study, tuple(compare), None, Plugins({}, True)).plan_sha256
        return proposal_of(study, compare, plan, self.roster().to_json())

    def propose(self, site: str, study: Study, compare: Sequence[str] = ()) -> Message:
        return proposal_message(self.proposal(study, compare), site)

    def approve(self, site: str, study_sha256: str, state: Any = "approved", reason: str = "") -> None:
        """What `wardround site approve` does, in another process."""
        decisions = Decisions(self.of(site))
        found = decisions.get(study_sha256)
        assert found is not None
        decisions.decide(found, state, reason)

    def said(self, site: str, reply: Message) -> Message:
        """The reply, whose signature is looked at."""
        return verified(reply, self.keys[site])


class NoCourier:
    """A carrier that brings nothing."""

    state = "idle"

    def run(self, stop: threading.Event) -> None:
        stop.wait()


def resident(folder: SiteFolder, **how: Any) -> Resident:
    """A resident process's inside for toys: any code, sums of a single patient, the rounding of one machine."""
    given: Mapping[str, Any] = {
        "limits": Limits(),
        "couriers": lambda *_: NoCourier(),
        "allow_code": True,
        "floor": 1,
        "rounding": lambda study: study_root(study.seed),
    }
    return Resident(folder, **{**given, **how})


@contextmanager
def serving(found: Resident) -> Iterator[Resident]:
    """A resident whose socket, kill switch and status are at work, in a thread."""
    stop = threading.Event()
    thread = threading.Thread(target=found.run, args=(stop,), daemon=True)
    thread.start()
    try:
        wait_for(lambda: found.folder.status.exists())
        yield found
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def wait_for(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something happened, and fail where it never does."""
    tries = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if happened():
            return
        tries.wait(0.02)
    raise AssertionError("it never happened")
