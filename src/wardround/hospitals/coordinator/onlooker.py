"""What there is to see of a study at its coordinator: read from its run's folder, and from what sites say at work."""

from __future__ import annotations

import json
import os
import statistics
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from wardround.errors import Interrupted, WardroundError
from wardround.hospitals.coordinator.status import ArmStatus, Heard, LeftOut
from wardround.plan.arms import FEDERATED
from wardround.results.files import RESULT_FILE, ROUNDS_FILE, read_result, read_rounds
from wardround.results.schema import RoundLine
from wardround.storage.hash_log import LOG
from wardround.storage.journal import RoundReport

# Rounds whose time says how long the next takes.
_RECENT = 5
_TAIL = 1 << 16


class Onlooker:
    """A watcher of a run that says nothing, and remembers what is under way; it stops the run once `stop` is set.

    `arms` names the arms by the hash that their messages carry.
    """

    def __init__(self, arms: Mapping[str, str], stop: threading.Event) -> None:
        self._names, self._stop = arms, stop
        self._lock = threading.Lock()
        self._working: dict[str, Heard] = {}
        self.doing = ""

    @property
    def working(self) -> dict[str, Heard]:
        """By site the last step that it said it took."""
        with self._lock:
            return dict(self._working)

    def progress(self, study: str, site: str, number: int, step: int, steps: int) -> None:
        """A site says that it took a step; the first argument is the hash of study and arm."""
        if study in self._names:
            self.step(self._names[study], site, number, step, steps)

    def phase(self, name: str, finished: int, total: int) -> None:
        """Parts of a phase are done."""
        self.doing = f"{name}, {finished} of {total}" if total else name

    def arms(self, names: Sequence[str], rounds: int) -> None:
        """Training begins."""
        self.doing = "training"

    def step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        """A site took a step."""
        with self._lock:
            self._working[site] = Heard(arm=arm, round=number, step=step, steps=steps)

    def round(self, report: RoundReport) -> None:
        """A round was committed; raises `Interrupted` where the run is to stop."""
        with self._lock:
            self._working = {site: heard for site, heard in self._working.items() if heard.arm != report.arm}
        if self._stop.is_set():
            raise Interrupted("stopped between two rounds")


class RunFiles:
    """Reads a run's files again when they changed."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._seen: tuple[Any, ...] = ()
        self._numbers: dict[str, Any] = {}

    def numbers(self) -> dict[str, Any]:
        """Fields of `StudyStatus`: rounds, who was in them, bytes, privacy and the log.

        Files that are damaged change nothing here: the run that goes on with them says it.
        """
        log = self._out / "work" / "arms" / FEDERATED / LOG
        seen = tuple(_stamp(path) for path in (self._out / ROUNDS_FILE, self._out / RESULT_FILE, log))
        if seen != self._seen:
            self._seen = seen
            with suppress(WardroundError, OSError, ValueError, KeyError):
                self._numbers = {**_of_rounds(read_rounds(self._out)), **_of_log(log), **_of_result(self._out)}
        return self._numbers


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _of_rounds(lines: Sequence[RoundLine]) -> dict[str, Any]:
    last: dict[str, RoundLine] = {line.arm: line for line in lines}
    validated = {line.arm: line.validation for line in lines if line.validation}
    federated = [line for line in lines if line.arm == FEDERATED]
    counts = Counter(site for line in federated for site in line.missing)
    reasons = {site: why for line in federated for site, why in line.missing.items()}
    arms = tuple(
        ArmStatus(name=name, round=line.round, loss=line.loss, validation=validated.get(name) or {})
        for name, line in last.items()
    )
    recent = [line.seconds for line in federated[-_RECENT:]]
    return {
        "arms": arms,
        "participants": federated[-1].participants if federated else (),
        "missing": federated[-1].missing if federated else {},
        "at_work": federated[-1].at_work if federated else {},
        "left_out": {site: LeftOut(rounds=count, reason=reasons[site]) for site, count in sorted(counts.items())},
        "seconds_a_round": statistics.median(recent) if recent else None,
        "bytes_up": sum(line.bytes_up for line in lines),
        "bytes_down": sum(line.bytes_down for line in lines),
    }


def _of_log(path: Path) -> dict[str, Any]:
    """The end of the coordinator's log, and the last heads of the sites' that it shows."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return {}
    entries: list[dict[str, Any]] = []
    for line in reversed(lines):
        with suppress(ValueError):
            found = json.loads(line)
            if line.endswith(b"\n") and isinstance(found, dict):
                entries.append(found)
    if not entries:
        return {}
    shown = [entry["payload"]["heads"] for entry in entries if "heads" in entry["payload"]]
    newest, heads = entries[0], shown[0] if shown else {}
    return {"log_records": int(newest["seq"]) + 1, "log_head": str(newest["hash"]), "site_heads": dict(heads)}


def _of_result(out: Path) -> dict[str, Any]:
    if not (out / RESULT_FILE).is_file():
        return {}
    result = read_result(out)
    spent = {} if result.privacy is None else {site: one.epsilon for site, one in result.privacy.sites.items()}
    traffic = result.traffic
    bills = [part for arm in traffic.arms.values() for part in (arm.rounds, arm.tests)] + [traffic.study]
    return {
        "epsilon": {site: epsilon for site, epsilon in spent.items() if epsilon < float("inf")},
        "metrics": tuple(metric.name for metric in result.metric_specs),
        "model_sha256": result.model_sha256,
        "bytes_up": sum(bill.up.total for bill in bills),
        "bytes_down": sum(bill.down.total for bill in bills),
    }
