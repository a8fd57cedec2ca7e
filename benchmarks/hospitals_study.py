"""One study of hospitals.py in a federation whose processes are at work: submitted, approved, watched, ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hospitals_processes import cpu_seconds
from wardround.hospitals.folders import StudyFolder
from wardround.hospitals.rehearsal import Rehearsal
from wardround.hospitals.site.decisions import Decisions

HERE = Path(__file__).parent
SITES = ("A", "B", "C")
_LONG = 1800.0


def study_of(name: str, values: int, rounds: int) -> dict[str, Any]:
    """A study of so many values (float32), whose sites take one small step a round."""
    return {
        "name": name,
        "seed": 7,
        "sites": {site: {} for site in SITES},
        "task": {"kind": "custom", "factory": "hospitals_task:make_task", "options": {"values": values}},
        "local": {"steps": 1, "batch": 1, "optimizer": "sgd", "lr": 0.01},
        "schedule": {"rounds": rounds, "validate_every": 0, "release": "last"},
    }


@dataclass
class Submitted:
    """A study that was submitted to a rehearsed federation, and when its rounds were committed."""

    federation: Rehearsal
    values: Mapping[str, Any]
    counts_cpu: bool = False
    commits: dict[int, float] = field(default_factory=dict)
    spent: dict[int, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the study, and of its folder at the coordinator."""
        return str(self.values["name"])

    @property
    def folder(self) -> StudyFolder:
        """Of the study at the coordinator."""
        return StudyFolder(self.federation.coordinator.studies / self.name)

    @property
    def sha256(self) -> str:
        """The study's hash, once it is submitted."""
        return str(json.loads(self.folder.submission.read_text(encoding="utf-8"))["study_sha256"])

    def submit(self) -> None:
        """Hand it in, in a process of its own: that builds the model."""
        path = self.federation.root / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(dict(self.values)), encoding="utf-8")
        command = [sys.executable, str(HERE / "hospitals_party.py"), "submit"]
        subprocess.run([*command, str(self.federation.coordinator.root), str(path)], check=True)

    def approve(self) -> None:
        """Approve it at each site, as soon as it was proposed there."""
        for site, folder in self.federation.sites.items():
            decisions = Decisions(folder)

            def proposed(decisions: Decisions = decisions) -> Any:
                return next((found for found in decisions.all() if found.study.name == self.name), None)

            found = self.federation.wait_for(proposed, _LONG, f"a proposal to {site}", look=0.05)
            decisions.decide(found, "approved")

    def state(self) -> dict[str, Any]:
        """What the coordinator keeps of it; nothing while it is not taken up."""
        with suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads(self.folder.record.read_text(encoding="utf-8"))
            return found
        return {}

    def last_round(self) -> int:
        """The last one that was committed; when is noted by the time of the file that says so."""
        path = self.folder.out / "rounds.jsonl"
        with suppress(OSError, ValueError, IndexError):
            with path.open("rb") as file:
                at = os.fstat(file.fileno()).st_mtime
                number = int(json.loads(file.read().splitlines()[-1])["round"])
            if self.commits.setdefault(number, at) == at and self.counts_cpu and number not in self.spent:
                roots = [process.pid for process in self.federation.processes.values()]
                self.spent[number] = sum(cpu_seconds(root, workers=True) for root in roots)
            return number
        return 0

    def wait(self, happened: Callable[[], Any], what: str, look: float = 0.01) -> None:
        """Wait until something is true, and note each round that is committed meanwhile."""
        checked = 0.0

        def true() -> bool:
            nonlocal checked
            self.last_round()
            if time.monotonic() > checked + 1.0:
                checked = time.monotonic()
                found = self.state()
                if found.get("state") in ("stopped", "refused", "withdrawn"):
                    raise SystemExit(f"the study {self.name} is {found['state']}: {found.get('reason')}")
            return bool(happened())

        self.federation.wait_for(true, _LONG, what, look=look)

    def finish(self) -> str:
        """Wait for its end and the deliveries; the hash of its model."""

        def done() -> bool:
            found = self.state()
            return found.get("state") == "finished" and not found.get("undelivered")

        self.wait(done, f"the end of {self.name}")
        result = json.loads((self.folder.out / "result.json").read_text(encoding="utf-8"))
        return str(result["model_sha256"])

    def round_cpu_seconds(self, first: int) -> list[float]:
        """CPU time of all processes from one commit to the next: what a round takes where nothing else is at work."""
        return [self.spent[n] - self.spent[n - 1] for n in sorted(self.spent) if n > first and n - 1 in self.spent]

    def round_seconds(self, first: int) -> list[float]:
        """From one commit to the next, of rounds after the number `first`: what the sites' start took is in none."""
        return [
            self.commits[n] - self.commits[n - 1] for n in sorted(self.commits) if n > first and n - 1 in self.commits
        ]


def local_sha256(values: Mapping[str, Any], folder: Path) -> str:
    """The hash of the model of the same study on one machine."""
    from wardround.runs.session import run
    from wardround.study.schema import Study
    from wardround.study.sites import SiteData, SitesFile

    for site in SITES:
        (folder / site).mkdir(parents=True, exist_ok=True)
    sites = SitesFile(sites={site: SiteData(data=folder / site) for site in SITES}).with_code()
    study = Study.model_validate(dict(values))
    return run(study, sites, folder / "out", engine="local", quiet=True, allow_code=True).model_sha256
