"""Who looks on while a run goes on; nothing that happens to a watcher changes what is trained."""

from __future__ import annotations

import logging
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from wardround.deidentify import describe_error
from wardround.errors import Interrupted
from wardround.storage.journal import RoundReport

log = logging.getLogger(__name__)

# The phases of a run in the order in which they begin, and what each counts.
PHANTOMS, READING, OPERATORS = "making phantoms", "reading", "building operators"
TRAINING, TUNING, TESTING = "training", "tuning baselines", "testing"
_COUNTED = {
    PHANTOMS: "patient",
    READING: "site",
    OPERATORS: "scanner",
    TUNING: "baseline at a site",
    TESTING: "model at a site",
}
_PLURALS = {"baseline at a site": "baselines at sites", "model at a site": "models at sites"}
_WIDTH = 80
Phase = Callable[[str, int, int], None]


class Watcher(Protocol):
    """Sees a run go on; every call may come from another thread.

    What it raises is logged and changes nothing, but for `Interrupted` between two rounds: that stops the run.
    """

    def phase(self, name: str, finished: int, total: int) -> None:
        """Parts of a phase are done; it begins with 0. The other calls report training."""

    def arms(self, names: Sequence[str], rounds: int) -> None:
        """The run will train these arms."""

    def step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        """A site took a step."""

    def round(self, report: RoundReport) -> None:
        """A round was committed, or its validation became known; of an earlier run, its last round."""


class Silent:
    """A watcher that says nothing."""

    def phase(self, name: str, finished: int, total: int) -> None:
        """Say nothing."""

    def arms(self, names: Sequence[str], rounds: int) -> None:
        """Say nothing."""

    def step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        """Say nothing."""

    def round(self, report: RoundReport) -> None:
        """Say nothing."""


class Lines:
    """A watcher for logs and notebooks: a line for each phase and each round on stderr, of 80 columns at most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._began = 0.0
        self._rounds = 0
        self._done: dict[str, int] = {}
        self._earlier: dict[str, int] = {}
        self._validated: dict[str, str] = {}

    def phase(self, name: str, finished: int, total: int) -> None:
        """Say that a phase begins."""
        if finished == 0 and total:
            counted = _COUNTED.get(name, "part")
            self._say(f"{name}: {total} {counted if total == 1 else _PLURALS.get(counted, counted + 's')}")

    def arms(self, names: Sequence[str], rounds: int) -> None:
        """Say that training begins."""
        self._began, self._rounds = self._clock(), rounds
        self._done = dict.fromkeys(names, 0)
        arms, each = ("arm", "") if len(names) == 1 else ("arms", " each")
        self._say(f"{TRAINING}: {len(names)} {arms}, {rounds} round{'s' if rounds != 1 else ''}{each}")

    def step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        """Say nothing: a round has many steps."""

    def round(self, report: RoundReport) -> None:
        """Say a round once, with the newest validation that is known; that of the last round has a line of its own."""
        with self._lock:
            for name, value in list((report.validation or {}).items())[:1]:
                self._validated[report.arm] = f"{name} {value:.4g} after round {report.round}"
            if report.round <= self._done[report.arm]:
                # No round follows that would say it.
                if report.validation and report.round >= self._rounds:
                    self._say(f"{report.arm}, validated: {self._validated[report.arm]}")
                return
            self._done[report.arm] = report.round
            parts = [] if report.loss is None else [f"loss {report.loss:.4g}"]
            parts += [self._validated[report.arm]] if report.arm in self._validated else []
            parts += [f"without {', '.join(report.missing)}"] if report.missing else []
            parts += [f"at work: {', '.join(report.at_work)}"] if report.at_work else []
            parts += [left] if (left := self._left(report)) else []
        said = f"{report.arm}, round {report.round} of {self._rounds}"
        self._say(f"{said}: {', '.join(parts)}" if parts else said)

    def _left(self, report: RoundReport) -> str:
        """The time that is left for training all arms, as fast as until now; nothing before there is a measure."""
        # The first report of a resumed arm is that of an earlier run, which took no time of this one.
        first = self._earlier.setdefault(report.arm, report.round if report.round > 1 else 0)
        if report.round == first:
            return ""
        done = sum(self._done.values()) - sum(self._earlier.values())
        missing = len(self._done) * self._rounds - sum(self._done.values())
        return f"{duration((self._clock() - self._began) / done * missing)} left" if missing > 0 < done else ""

    def _say(self, text: str) -> None:
        print(textwrap.shorten(text, _WIDTH, placeholder=" ..."), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`42 s`, `3 min` or `2 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Shielded:
    """A watcher whose failures stay its own.

    It is called from inside a site's training: what it raised there would count as the site's failure, and the round
    would go on without the site, to another model.
    """

    def __init__(self, watcher: Watcher | None) -> None:
        self._watcher: Watcher = watcher or Silent()
        self._said = False

    def phase(self, name: str, finished: int, total: int) -> None:
        """Parts of a phase are done."""
        self._try(lambda: self._watcher.phase(name, finished, total))

    def arms(self, names: Sequence[str], rounds: int) -> None:
        """The run will train these arms."""
        self._try(lambda: self._watcher.arms(names, rounds))

    def step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        """A site took a step."""
        self._try(lambda: self._watcher.step(arm, site, number, step, steps))

    def round(self, report: RoundReport) -> None:
        """A round was committed, or its validation became known; raises `Interrupted` where the watcher does."""
        self._try(lambda: self._watcher.round(report), stops=True)

    def _try(self, call: Callable[[], None], *, stops: bool = False) -> None:
        try:
            call()
        except Exception as error:
            if stops and isinstance(error, Interrupted):
                raise
            if not self._said:
                self._said = True
                log.warning("the watcher of the run fails (%s); the run goes on", describe_error(error))
                log.debug("details", exc_info=True)
