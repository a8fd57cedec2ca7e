"""Progress on a terminal: a bar and the time left for every phase, and while training for every arm and site."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from wardround.runs.watching import TRAINING
from wardround.storage.journal import RoundReport


class LiveProgress:
    """A watcher of a run that draws on a terminal; its calls may come from any thread."""

    def __init__(self, console: Console) -> None:
        # As wide as the terminal at most: what does not fit is cut off, and the note goes first.
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=22)),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            transient=True,
            expand=True,
            speed_estimate_period=600,
        )
        self._lock = threading.Lock()
        self._phases: dict[str, TaskID] = {}
        self._arms: dict[str, TaskID] = {}
        self._sites: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        self._at: dict[str, float] = {}
        self._share: dict[str, dict[str, float]] = {}

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, finished: int, total: int) -> None:
        """Move the bar of a phase; what belongs to training goes when the next phase begins."""
        with self._lock:
            if name not in self._phases:
                for task in (*self._arms.values(), *self._sites.values()):
                    self._progress.update(task, visible=False)
                self._phases[name] = self._progress.add_task(f"[bold]{name}", total=total, note="")
            self._progress.update(self._phases[name], completed=finished, total=total)

    def arms(self, names: Sequence[str], rounds: int) -> None:
        """Draw the bar of training, and one of rounds for every arm."""
        with self._lock:
            self._phases[TRAINING] = self._progress.add_task(
                f"[bold]{TRAINING}", total=rounds * len(names), note="rounds of all arms"
            )
            for name in names:
                self._arms[name] = self._progress.add_task(f"  {name}", total=rounds, note="")
                self._done[name], self._share[name] = 0, {}

    def step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        """Move the bar of a site's steps, and those of its arm and of training by its part of the round."""
        with self._lock:
            if site not in self._sites:
                self._sites[site] = self._progress.add_task(f"  steps at {site}", total=steps, note="")
            self._progress.update(self._sites[site], total=steps, completed=step, note=f"{arm}, round {number}")
            self._share[arm][site] = step / max(1, steps) if number > self._done[arm] else 0.0
            self._move(arm)

    def round(self, report: RoundReport) -> None:
        """Move an arm's bar and show its loss and validation."""
        note = "" if report.loss is None else f"loss {report.loss:.4f}"
        for name, value in list((report.validation or {}).items())[:1]:
            note += f", {name} {value:.2f}"
        if report.missing:
            note += f", without {', '.join(report.missing)}"
        with self._lock:
            self._progress.update(self._arms[report.arm], note=note)
            if report.round > self._done[report.arm]:
                self._done[report.arm] = report.round
                self._share[report.arm] = dict.fromkeys(self._share[report.arm], 0.0)
                self._move(report.arm)

    def _move(self, arm: str) -> None:
        share = self._share[arm]
        within = sum(share.values()) / len(share) if share else 0.0
        self._at[arm] = self._done[arm] + within
        self._progress.update(self._arms[arm], completed=self._at[arm])
        self._progress.update(self._phases[TRAINING], completed=sum(self._at.values()))
