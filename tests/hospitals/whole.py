"""A whole federation in the process of a test: a coordinator's service and residents of sites, HTTPS between them.

Folders, certificates, keys and decisions are those of a real one. The sites' workers are in this process, too, unless
`processes` is asked for.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wardround.engines.local import answer
from wardround.engines.process import KeptProcess, Progress
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.coordinator.service import KnownSites, Service
from wardround.hospitals.coordinator.status import StudyStatus, read_status
from wardround.hospitals.coordinator.submission import submit
from wardround.hospitals.federation import Deadlines, load_federation
from wardround.hospitals.folders import SiteFolder, StudyFolder
from wardround.hospitals.https.server import HttpsCarrier
from wardround.hospitals.rehearsal import Rehearsal, rehearse
from wardround.hospitals.site.agent import Limits, Resident
from wardround.hospitals.site.decisions import Decisions, Proposed
from wardround.hospitals.site.worker import agent_finder
from wardround.hospitals.site.workers import Start, kept_process
from wardround.learning.model_context import _DRAWING
from wardround.protection.rounding import study_root
from wardround.results.files import read_result
from wardround.results.schema import Result
from wardround.study.hashes import study_sha256, written
from wardround.study.schema import Study
from wardround.wire.message import Message

# Longer than any of these studies takes on a machine that others use, too.
_LONG = 240.0


class Here:
    """A worker in this process. Torch's generator is one for all that share a process, so they take turns."""

    pid = None

    def __init__(self, spec: Path, progress: Progress) -> None:
        self._find = agent_finder(json.loads(spec.read_text(encoding="utf-8")), progress)

    def ask(self, message: Message) -> Message | None:
        """The site's answer."""
        with _DRAWING:
            return answer(self._find, message)

    def kill(self) -> None:
        """There is no process."""

    close = kill


def here(spec: Path, progress: Progress) -> KeptProcess:
    """A worker without a process."""
    found: Any = Here(spec, progress)
    return found  # type: ignore[no-any-return]


@dataclass
class Whole:
    """A federation at work."""

    made: Rehearsal

    def submit(self, study: Study, compare: Sequence[str] = (), name: str | None = None) -> str:
        """Hand a study in; its name there."""
        name = name or study.name
        path = self.made.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(written(study)), encoding="utf-8")
        return submit(self.made.coordinator, path, name=name, compare=compare, allow_code=True)[0]

    def approve(self, study: Study) -> None:
        """Approve it at each of its sites, once it was proposed."""
        sha256 = study_sha256(study)
        for site in study.sites:
            decisions = Decisions(self.made.sites[site])

            def proposed(decisions: Decisions = decisions) -> Proposed | None:
                return decisions.get(sha256)

            found = until(proposed)
            decisions.decide(found, "approved")

    def finish(self, name: str) -> Result:
        """The result of a study, once every site has the released model."""

        def done() -> StudyStatus | None:
            status = read_status(self.made.coordinator.status)
            found = None if status is None else status.study(name)
            assert found is None or found.state not in ("stopped", "refused", "withdrawn"), found
            return found if found is not None and found.state == "finished" and not found.undelivered else None

        until(done)
        return read_result(StudyFolder(self.made.coordinator.studies / name).out)

    def run(self, study: Study, compare: Sequence[str] = ()) -> Result:
        """A whole study."""
        name = self.submit(study, compare)
        self.approve(study)
        return self.finish(name)

    def own(self, site: str, study: Study) -> Path:
        """What a site keeps of a study."""
        return own_folder(self.made.sites[site], study)


def own_folder(site: SiteFolder, study: Study) -> Path:
    """Where a site keeps what is its own of a study."""
    return site.studies / study_sha256(study) / "own"


def until(happened: Callable[[], Any], seconds: float = _LONG) -> Any:
    """The first thing that is not nothing; fails where it never comes."""
    end, tries = time.monotonic() + seconds, threading.Event()
    while time.monotonic() < end:
        if found := happened():
            return found
        tries.wait(0.02)
    raise AssertionError("it never happened")


@contextmanager
def whole(folder: Path, data: Mapping[str, Path], *, processes: bool = False, floor: int = 1) -> Iterator[Whole]:
    """A federation of the sites of `data`, at work until the end."""
    made = rehearse(
        folder, "https", {site: {"data": [str(path)]} for site, path in data.items()}, deadlines=Deadlines(reply=_LONG)
    )
    start: Start = kept_process if processes else here
    federation = load_federation(made.coordinator.federation)
    known = KnownSites(made.coordinator, federation)
    hub = Hub(made.coordinator.spool, known.key, federation.deadlines, federation.largest_nbytes)
    stop = threading.Event()
    with ExitStack() as ending:
        ending.callback(hub.close)
        carrier = HttpsCarrier(hub, federation, made.coordinator.certificates, made.coordinator.spool)
        carrier.start()
        ending.callback(carrier.close)
        residents = [
            Resident(
                site,
                Limits(workers=2),
                allow_code=True,
                floor=floor,
                rounding=lambda study: study_root(study.seed),
                start=start,
            )
            for site in made.sites.values()
        ]
        service = Service(made.coordinator, federation, known, hub, pause=0.05)
        threads = [
            threading.Thread(target=service.run, args=(stop, 0.05), daemon=True),
            *(threading.Thread(target=resident.run, args=(stop,), daemon=True) for resident in residents),
        ]
        for thread in threads:
            thread.start()
        try:
            yield Whole(made)
        finally:
            stop.set()
            for thread in threads:
                thread.join(30.0)
                assert not thread.is_alive()
