"""The command that shows how a federation and its studies are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.shared import console, say
from wardround.cli.submit import FederationOption
from wardround.errors import JournalError, StudyError
from wardround.printable import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from wardround.hospitals.coordinator.status import Status, StudyStatus
    from wardround.hospitals.folders import CoordinatorFolder

_LOOK = 1.0
# A study in one of these has ended, or goes on when people say so.
_ENDS = ("finished", "refused", "withdrawn", "stopped")


def watch(
    federation: FederationOption,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One study; without it all of them.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print how it is now, and end.")] = False,
) -> None:
    """Show the sites and studies of a federation as they go: drawn on a terminal, a line for each change elsewhere."""
    from wardround.hospitals.coordinator.status_lines import lines
    from wardround.hospitals.folders import CoordinatorFolder

    folder = CoordinatorFolder(Path(federation))
    status = _status(folder)
    _require(status, folder, name)
    if not once:
        follow(folder, name)
        return
    # Read again: what was imported meanwhile takes seconds, in which a coordinator at work would have become silent.
    for line in lines(_status(folder), name):
        say(line)


def follow(folder: CoordinatorFolder, name: str | None) -> None:
    """Show a study until it ends or stops, or without a name all of them until Ctrl-C."""
    if console.is_terminal:
        _draw(folder, name)
    else:
        for line in changes(folder, name):
            say(line)


def changes(folder: CoordinatorFolder, name: str | None) -> Iterator[str]:
    """A line for each thing that happens, as long as it is followed."""
    from wardround.hospitals.coordinator.status_lines import heading, rounds_of, validation_of

    shown, began, alive = 0.0, False, True
    rounds: dict[str, str] = {}
    while True:
        status = _status(folder, patient=began or name is not None)
        if not began and status.process.at:
            began, shown = True, status.process.at
            yield heading(status, time.time())
        elif began and alive and not status.alive(time.time()):
            yield heading(status, time.time())
        alive = status.alive(time.time())
        for event in status.events:
            if event.at > shown and (name is None or event.text.startswith(("site ", f"{name}: "))):
                yield event.text
        shown = max([shown, *(event.at for event in status.events)])
        for study in status.studies:
            if name in (None, study.name) and rounds.get(study.name) != (now := rounds_of(study)):
                rounds[study.name] = now
                yield f"{study.name}: round {now}, {validation_of(study)}"
        if _ended(status, name):
            return
        time.sleep(_LOOK)


def _draw(folder: CoordinatorFolder, name: str | None) -> None:
    from rich.live import Live

    with Live(console=console, screen=False, auto_refresh=False) as live:
        while True:
            status = _status(folder, patient=True)
            live.update(picture(status, name, time.time()), refresh=True)
            if _ended(status, name):
                return
            time.sleep(_LOOK)


def picture(status: Status, name: str | None, now: float) -> RenderableType:
    """The status as tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from wardround.hospitals.coordinator.status_lines import details, heading, site_row, warnings

    sites = Table("site", "state", "heard", "waiting", box=None, pad_edge=False, header_style="dim")
    styles = {"present": "green", "late": "yellow", "lost": "red", "never": "dim"}
    for site in status.sites:
        who, state, seen, waiting = site_row(site, now)
        sites.add_row(Text(who), Text(state, styles[site.state]), seen, waiting)
    parts: list[RenderableType] = [Text(heading(status, now), "bold")]
    parts += [Text(printable(warning), "yellow") for warning in warnings(status, now)]
    parts += [Text(), sites]
    for study in status.studies:
        if name in (None, study.name):
            parts += [Text(), _title(status, study, now), *(Text(printable(f"  {line}")) for line in details(study))]
    parts += [] if status.studies else [Text(), Text("No study was submitted yet.", "dim")]
    parts += [Text(), *(Text(printable(event.text), "dim") for event in status.events[-5:])]
    return Group(*parts)


def _title(status: Status, study: StudyStatus, now: float) -> RenderableType:
    from rich.text import Text

    from wardround.hospitals.coordinator.status_lines import rounds_of, state_of, validation_of

    how = state_of(status, study, now)
    style = {"running": "green", "finished": "green", "stopped": "red", "refused": "red"}.get(how, "yellow")
    return Text.assemble(
        (study.name, "bold"),
        "  ",
        (how, style),
        f"  round {rounds_of(study)}  {validation_of(study)}",
    )


def _status(folder: CoordinatorFolder, *, patient: bool = False) -> Status:
    """What the coordinator last said; who is `patient` waits for one that was not started yet."""
    from wardround.hospitals.coordinator.status import read_status

    while (found := read_status(folder.status)) is None:
        if not patient:
            raise JournalError(
                f"no coordinator was ever at work in this folder: wardround federation start {folder.root}"
            )
        time.sleep(_LOOK)
    return found


def _require(status: Status, folder: CoordinatorFolder, name: str | None) -> None:
    from wardround.hospitals.coordinator.submission import submitted

    if name is not None and status.study(name) is None and name not in submitted(folder):
        known = ", ".join(study.name for study in status.studies) or "none"
        raise StudyError(f"no study of this name was submitted; there are {known}")


def _ended(status: Status, name: str | None) -> bool:
    study = None if name is None else status.study(name)
    return study is not None and study.state in _ENDS and not study.waits_for
