"""Progress on a terminal: a bar for every arm's rounds and for every site that is training. Quiet elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from wardround.federation.journal import RoundReport


class LiveProgress:
    """A watcher of a run that draws on a terminal; its calls may come from any thread."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._arms: dict[str, TaskID] = {}
        self._sites: dict[str, TaskID] = {}
        self._evaluation: TaskID | None = None

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def arms(self, names: Sequence[str], rounds: int) -> None:
        """Draw a bar of rounds for every arm."""
        for name in names:
            self._arms[name] = self._progress.add_task(f"[bold]{name}", total=rounds, note="")

    def step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        """Move the bar of a site's steps."""
        if site not in self._sites:
            self._sites[site] = self._progress.add_task(f"  steps at {site}", total=steps, note="")
        self._progress.update(self._sites[site], total=steps, completed=step, note=f"{arm}, round {number}")

    def round(self, report: RoundReport) -> None:
        """Move an arm's bar and show its loss and validation."""
        note = "" if report.loss is None else f"loss {report.loss:.4f}"
        for name, value in list((report.validation or {}).items())[:1]:
            note += f", validation {name} {value:.2f}"
        if report.missing:
            note += f", without {', '.join(report.missing)}"
        self._progress.update(self._arms[report.arm], completed=report.round, note=note)

    def evaluated(self, finished: int, total: int) -> None:
        """Move the bar of the final evaluation."""
        if self._evaluation is None:
            for task in self._sites.values():
                self._progress.update(task, visible=False)
            self._evaluation = self._progress.add_task("[bold]evaluating on test patients", total=total, note="")
        self._progress.update(self._evaluation, completed=finished)
