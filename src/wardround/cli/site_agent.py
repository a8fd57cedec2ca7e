"""`wardround site start|stop|resume|status|review|approve|refuse|report`: a hospital decides what runs."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.shared import say
from wardround.errors import WardroundError
from wardround.hospitals.folders import SiteFolder

if TYPE_CHECKING:
    from wardround.hospitals.site.decisions import Decisions

# A status that is older than this is no longer news.
_FRESH = 15.0
FolderArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", envvar="WARDROUND_SITE", help="The folder that `site join` made.")
]
FolderOption = Annotated[
    Path, typer.Option("--folder", envvar="WARDROUND_SITE", help="The folder that `site join` made (default: here).")
]
StudyArgument = Annotated[
    str, typer.Argument(metavar="STUDY", help="A proposed study: its name, or the beginning of its hash.")
]
HERE = Path()


def start(
    folder: FolderArgument = HERE,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Studies that are at work at once.")] = 2,
) -> None:
    """Answer the federation's coordinator until stopped; nothing runs that this hospital did not approve."""
    from wardround.hospitals.site.agent import Limits, Resident

    resident = Resident(_site(folder), Limits(workers=workers))
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        resident.run(
            stop,
            lambda: say(f"Site {resident.site} of federation {resident.federation.name} answers; stop it with Ctrl-C"),
        )
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    say("Ended")


def stop(
    folder: FolderArgument = HERE,
    now: Annotated[
        bool, typer.Option("--now", help="Stop all work of the federation here, until `wardround site resume`.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the record of this hospital.")] = "",
) -> None:
    """End the process that answers; `start` begins it again where it was.

    With --now all work stops at once and for good: workers are killed, every message is refused, also by a process that
    is started again. That works without a network.
    """
    from wardround.hospitals.site.control import stop_all_work, stop_process

    place = _site(folder)
    if now:
        killed = stop_all_work(place, reason)
        say(f"All work is stopped; {len(killed)} worker processes were killed. Nothing is answered and nothing leaves.")
        say("It goes on only after: wardround site resume")
        return
    say("The process ended." if stop_process(place) else "No process was running.")


def resume(folder: FolderArgument = HERE) -> None:
    """Let work go on after `wardround site stop --now`."""
    from wardround.hospitals.site.control import resume as go_on
    from wardround.hospitals.site.running import holder

    place = _site(folder)
    if not go_on(place):
        say("Work was not stopped; nothing changed.")
    elif holder(place.lock) is None:
        say("Work may go on; no process is running: wardround site start")
    else:
        say("Work goes on.")


def status(folder: FolderArgument = HERE) -> None:
    """Say what runs here, how this hospital stands to each study, and whether the coordinator is reached."""
    from wardround.hospitals.site.control import status_of
    from wardround.hospitals.site.running import holder
    from wardround.runs.columns import entry, table

    place = _site(folder)
    decisions, pid, said = _decisions(place), holder(place.lock), status_of(place)
    lines = [f"Site {decisions.site} of federation {decisions.federation.name}"]
    lines.append(entry("process", "not running: wardround site start" if pid is None else f"running, number {pid}"))
    if place.stopped.exists():
        lines.append(entry("all work", "is stopped: nothing is answered, until wardround site resume"))
    if pid is not None and said.get("pid") == pid:
        age = time.time() - float(said.get("at", 0.0))
        late = "" if age < _FRESH else f"; it said so {age:.0f} s ago and nothing since: it may hang"
        lines.append(entry("carrier", f"{said.get('carrier')}: {said.get('carrier_state')}{late}"))
        for worker in said.get("workers", ()):
            doing = "idle" if worker["kind"] is None else f"{worker['kind']}, round {worker['round']}"
            lines.append(entry("at work", f"study {worker['study'][:12]}: {doing}"))
    rows = []
    for found in decisions.all():
        standing = decisions.standing(found.sha256)
        rows.append((found.study.name, found.sha256[:12], standing.state, standing.reason))
    say("\n".join(lines))
    say(table(("study", "hash", "state", ""), rows) if rows else "  No study was proposed yet.")


def review(
    study: Annotated[str, typer.Argument(metavar="[STUDY]", help="Its name, or the beginning of its hash.")] = "",
    folder: FolderOption = HERE,
) -> None:
    """Say in plain words what a proposed study would do here; without STUDY list those that wait for a decision."""
    from wardround.hospitals.site.review import review as look

    decisions = _decisions(_site(folder))
    if not study:
        waiting = [found for found in decisions.all() if decisions.standing(found.sha256).state == "pending"]
        for found in waiting:
            say(f"{found.study.name}  {found.sha256[:12]}  {decisions.standing(found.sha256).reason}")
        say("wardround site review STUDY says what it would do" if waiting else "No study waits for a decision.")
        return
    found = decisions.find(study)
    seen = look(decisions, found)
    say(seen.text)
    if seen.obstacles:
        say(f"\nTo refuse it: wardround site refuse {found.sha256[:12]} --reason WHY")
        return
    decisions.mark_reviewed(found)
    say(f"\nTo decide: wardround site approve {found.sha256[:12]}, or refuse {found.sha256[:12]} --reason WHY")


def approve(study: StudyArgument, folder: FolderOption = HERE) -> None:
    """Allow a study that was reviewed: from now on its messages are answered here."""
    from wardround.hospitals.site.review import refuse_obstacles
    from wardround.hospitals.site.review import review as look

    decisions = _decisions(_site(folder))
    found = decisions.find(study)
    decisions.check_reviewed(found)
    refuse_obstacles(look(decisions, found))
    decision = decisions.decide(found, "approved")
    say(f"Approved {found.study.name} ({found.sha256[:12]}), signed with this hospital's key at {decision.at}")
    say("It counts until the study, its plan, Wardround's version here, base weights, plug-ins or a key changes.")


def refuse(
    study: StudyArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why; the coordinator reads it: no patient, no path.")] = "",
    folder: FolderOption = HERE,
) -> None:
    """Refuse a study, also one that was approved: no more of it runs here."""
    if len(reason) > 500:
        raise WardroundError("--reason: at most 500 characters")
    decisions = _decisions(_site(folder))
    found = decisions.find(study)
    decision = decisions.decide(found, "refused", reason)
    say(f"Refused {found.study.name} ({found.sha256[:12]}); the coordinator hears it when it asks")
    if decision.reason != reason:
        say(f"It reads of your reason: {decision.reason}")


def report(study: StudyArgument, folder: FolderOption = HERE) -> None:
    """Write this hospital's own page of a study, with pictures of its patients; it stays here.

    It is written by itself when the released model comes; before that it has what pictures there are.
    """
    from wardround.results.site_page import write_site_page

    decisions = _decisions(_site(folder))
    found = decisions.find(study)
    if not found.folder.own.is_dir():
        raise WardroundError(f"nothing of {found.study.name} ran here yet: there is nothing to show")
    say(str(write_site_page(found.folder.own, decisions.site, found.study)))


def _site(folder: Path) -> SiteFolder:
    place = SiteFolder(folder.absolute())
    if not place.federation.is_file():
        raise WardroundError(
            "this is no folder of a site that joined a federation; give the one that `wardround site join` made",
            detail=str(place.root),
        )
    return place


def _decisions(place: SiteFolder) -> Decisions:
    from wardround.hospitals.site.decisions import Decisions

    return Decisions(place)
