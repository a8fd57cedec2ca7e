"""A federation of toy hospitals as real processes on this machine: what faults do to it, and what must hold."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tests.toys import toy_sites, toy_study
from wardround.errors import WardroundError
from wardround.hospitals.coordinator.status import StudyStatus, read_status
from wardround.hospitals.coordinator.submission import submit
from wardround.hospitals.federation import Carrier, Deadlines, load_federation, save_federation
from wardround.hospitals.rehearsal import COORDINATOR, Rehearsal, rehearse
from wardround.hospitals.site.control import status_of
from wardround.hospitals.site.decisions import Decisions, Proposed
from wardround.results.files import read_result
from wardround.results.schema import Result
from wardround.runs.session import run
from wardround.study.hashes import written
from wardround.study.schema import Study

SITES = ("A", "B", "C")
ROUNDS = 6
#: The longest that anything may take, in seconds, on a busy machine: no test waits that long where all is well.
LONG = 240.0
SECURE = {"protection": {"secure": True}}
#: A site that does not answer is waited for: until it is back, where nothing else is said.
PATIENT = {"reply": LONG, "attempts": 40, "pause": 0.5}
#: A site that is away is left out soon.
HASTY = {"reply": 6.0, "attempts": 40, "pause": 0.5}


def study_of(sites: Sequence[str] = SITES, **changes: Any) -> Study:
    """A study of toys whose rounds take long enough to be hit in one of them."""
    task = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"pause": 0.03}}
    return toy_study(sites, **{"task": task, "schedule": {"rounds": ROUNDS}, **changes})


@cache
def _expected(text: str) -> Result:
    with TemporaryDirectory() as folder:
        study = Study.model_validate(json.loads(text))
        return run(study, toy_sites(Path(folder), tuple(study.sites)), Path(folder) / "out", engine="local")


def expected(study: Study) -> Result:
    """What the local engine comes to."""
    return _expected(json.dumps(written(study), sort_keys=True))


@dataclass
class Ward:
    """A federation at work, and what a test does to it and asks of it."""

    federation: Rehearsal
    study: Study
    hold: Path
    name: str = "toy"
    watched: list[StudyStatus] = field(default_factory=list)

    @property
    def sites(self) -> tuple[str, ...]:
        """The study's sites."""
        return tuple(self.study.sites)

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.federation.coordinator.studies / self.name / "out"

    def submit(self) -> None:
        """Submit the study; every site approves it."""
        source = self.federation.root / "study.yaml"
        source.write_text(yaml.safe_dump(written(self.study), sort_keys=False))
        submit(self.federation.coordinator, source, allow_code=True)

    def approve(self, *sites: str) -> None:
        """Let sites, all by default, approve what was proposed to them."""
        for site in sites or self.sites:
            decisions = Decisions(self.federation.sites[site])
            found = self.wait(partial(_proposed, decisions), f"a proposal to {site}")
            decisions.mark_reviewed(found)
            decisions.decide(found, "approved")

    def begin(self) -> None:
        """Start all parties, submit the study and approve it."""
        self.federation.start()
        self.submit()
        self.approve()

    # What is seen -----------------------------------------------------------------------------------------------------

    def status(self) -> StudyStatus | None:
        """What the coordinator's file says of the study."""
        with suppress(OSError):
            found = read_status(self.federation.coordinator.status)
            return None if found is None else found.study(self.name)
        return None

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of `rounds.jsonl` so far."""
        with suppress(OSError, ValueError):
            return [json.loads(line) for line in (self.out / "rounds.jsonl").read_text().splitlines()]
        return []

    def wait(self, what: Callable[[], Any], name: str, seconds: float = LONG) -> Any:
        """The first answer that is not nothing."""
        return self.federation.wait_for(what, seconds, name, look=0.02)

    def wait_round(self, number: int) -> None:
        """Until a round is committed."""
        self.wait(lambda: len(self.rounds()) >= number or self.ended(), f"round {number}")

    def ended(self) -> bool:
        """Whether the study is finished; raises `WardroundError` where it ended in another way."""
        found = self.status()
        if found is not None and found.state in ("stopped", "refused", "withdrawn"):
            raise WardroundError(f"the study is {found.state}: {found.reason}")
        return found is not None and found.state == "finished"

    def finish(self, *, delivered: bool = True) -> Result:
        """The study's result, once it is finished and every site has the model."""

        def done() -> bool:
            found = self.status()
            return self.ended() and found is not None and not (delivered and found.undelivered)

        self.wait(done, "the end of the study")
        return read_result(self.out)

    def worker(self, site: str) -> int:
        """The process id of a site's worker, once it is at work."""

        def at_work() -> int | None:
            workers = status_of(self.federation.sites[site]).get("workers", [])
            return next((int(worker["pid"]) for worker in workers if worker["pid"]), None)

        return int(self.wait(at_work, f"work of {site}"))

    def children(self, party: str) -> list[int]:
        """The processes that a party's process started."""
        own = self.federation.processes[party].pid
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError, IndexError):
                    # The name of a program may hold anything, up to the last bracket.
                    if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == own:
                        found.append(int(entry.name))
        return found

    # What is done -----------------------------------------------------------------------------------------------------

    def kill_module(self, name: str) -> int:
        """kill -9 of the processes of this federation that run a Python module, by the end of its name; how many."""
        count = 0
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if not entry.name.isdecimal():
                    continue
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if any(word.startswith(str(self.federation.root)) for word in words) and any(
                    word.startswith("nvflare.") and word.endswith(name) for word in words
                ):
                    os.kill(int(entry.name), signal.SIGKILL)
                    count += 1
        return count

    def kill_worker(self, site: str) -> None:
        """kill -9 of what a site's process started."""
        for pid in self.children(site):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill(self, party: str) -> None:
        """kill -9, and no new start."""
        self.federation.kill(party)
        del self.federation.processes[party]

    def restart(self, party: str) -> None:
        """kill -9, and a new start a moment later, as systemd gives it."""
        self.kill(party)
        time.sleep(0.2)
        self.federation.start(party)

    def set_deadlines(self, **changes: float) -> None:
        """Change the federation's deadlines, and start its coordinator again, as its people would."""
        file = self.federation.coordinator.federation
        before = load_federation(file)
        waits = before.deadlines.model_copy(update=changes)
        save_federation(before.model_copy(update={"deadlines": waits}), file)
        self.federation.kill(COORDINATOR, signal.SIGTERM)
        self.federation.start(COORDINATOR)

    def through(self, site: str, port: int) -> None:
        """Let a site that is not started yet reach the coordinator by another port."""
        file = self.federation.sites[site].federation
        save_federation(load_federation(file).model_copy(update={"port": port}), file)

    @property
    def port(self) -> int:
        """Where the coordinator listens."""
        return load_federation(self.federation.coordinator.federation).port

    def present(self, *sites: str) -> None:
        """Until the coordinator sees sites, all by default."""
        names = set(sites or self.sites)

        def there() -> bool:
            with suppress(OSError):
                found = read_status(self.federation.coordinator.status)
                return found is not None and names <= {s.name for s in found.sites if s.state == "present"}
            return False

        self.wait(there, f"{', '.join(sorted(names))} present")

    def said(self, text: str) -> bool:
        """Whether the coordinator noted something."""
        with suppress(OSError):
            found = read_status(self.federation.coordinator.status)
            return found is not None and any(text in event.text for event in found.events)
        return False

    def holding(self, site: str = SITES[0]) -> None:
        """Until a site is in the middle of a round, where it stays while the file `hold` is there."""
        reached = self.hold.with_suffix(".reached")
        reached.unlink(missing_ok=True)
        self.wait(reached.exists, f"{site} at work")


def same_model(ward: Ward, result: Result) -> None:
    """The model is that of one machine, no site was ever missing, and all sites have it.

    A masked round whose keys died with a process is aborted and its number used up: as many rounds are added up in the
    end, of other numbers, and so of other examples than on one machine (tests/protection/test_aborted_rounds.py).
    """
    rounds, total = ward.rounds(), ward.study.schedule.rounds
    numbers = [line["round"] for line in rounds]
    if ward.study.protection.secure and numbers != list(range(1, total + 1)):
        assert numbers == sorted(set(numbers))
        assert len(numbers) == total
        assert any("aborted" in note for line in rounds for note in line["notes"])
    else:
        local = expected(ward.study)
        assert result.model_sha256 == local.model_sha256
        assert result.selected_round == local.selected_round
        assert numbers == list(range(1, total + 1))
    assert [line["participants"] for line in rounds] == [list(ward.sites)] * len(rounds)
    assert not any(line["missing"] for line in rounds)
    released(ward)


def released(ward: Ward) -> None:
    """All sites hold the very model that the coordinator released."""
    model = (ward.out / "models" / "federated.safetensors").read_bytes()
    for site in ward.sites:
        (kept,) = ward.federation.sites[site].studies.glob("*/own/models/federated.safetensors")
        assert kept.read_bytes() == model


def _proposed(decisions: Decisions) -> Proposed | None:
    return next(iter(decisions.all()), None)


def _party(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "tests.hospitals.party", str(folder), *words]


@contextmanager
def ward(
    root: Path,
    carrier: Carrier = "https",
    *,
    deadlines: Mapping[str, Any] = PATIENT,
    holds: Sequence[str] = (),
    plain: Sequence[str] = (),
    host: str = "127.0.0.1",
    sites: Sequence[str] = SITES,
    **changes: Any,
) -> Iterator[Ward]:
    """A federation whose processes end with the test, whatever happens in it; none is started yet.

    Training of the sites `holds` waits while `Ward.hold` is there; the sites `plain` run the product's own command.
    """
    data = root / "data"
    toy_sites(data, sites)
    entries = {site: {"data": str(data / site), "egress": {"minimum_cohort": 1}} for site in sites}
    federation = rehearse(root, carrier, entries, deadlines=Deadlines.model_validate(deadlines), host=host)
    hold = root / "hold"
    federation.commands = {
        site: _party(folder.root, *(("--hold", str(hold)) if site in holds else ()))
        for site, folder in federation.sites.items()
        if site not in plain
    }
    made = Ward(federation, study_of(sites, **changes), hold)
    try:
        yield made
    except BaseException:
        for party in federation.parties:
            log = federation.log(party)
            print(f"--- {party}\n{log.read_text(errors='replace')[-3000:] if log.exists() else ''}")
        raise
    finally:
        hold.unlink(missing_ok=True)
        federation.stop()


__all__ = ["COORDINATOR", "HASTY", "LONG", "PATIENT", "ROUNDS", "SECURE", "SITES", "Ward", "expected", "ward"]
