"""The command that hands a study to the hospitals of a federation, and takes it back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.shared import SetOption, say, words
from wardround.errors import StudyError

if TYPE_CHECKING:
    from wardround.hospitals.folders import CoordinatorFolder

FederationOption = Annotated[
    Path, typer.Option("--federation", metavar="FOLDER", help="The coordinator's folder of the federation.")
]


def submit(
    federation: FederationOption,
    study: Annotated[Path | None, typer.Argument(metavar="STUDY", help="The study file (YAML).")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of its folder (default: the study's name).")] = None,
    compare: Annotated[str, typer.Option("--compare", help="What to compare with: local.")] = "",
    overrides: SetOption = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="NAME", help="A plug-in that the study may name here; repeatable."),
    ] = None,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option("--bandwidth", metavar="SPEED", help="Of a site's line, as in 100Mbit/s; repeatable."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Then show how it goes, until it ends.")] = False,
    withdraw: Annotated[
        str | None, typer.Option("--withdraw", metavar="NAME", help="Stop a study; what it has committed stays.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="NAME", help="Let a study that stopped go on.")
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="SITE", help="With --resume: go on without a site for good."),
    ] = None,
) -> None:
    """Hand a study to the hospitals of a federation: its coordinator proposes it, and runs it when all approved.

    Says before what it takes of each site's line, as `wardround plan` does.
    """
    from wardround.hospitals.coordinator import submission
    from wardround.hospitals.folders import CoordinatorFolder

    folder = CoordinatorFolder(federation)
    chosen = [what for what in (study, withdraw, resume) if what is not None]
    if len(chosen) != 1:
        raise StudyError("give one of these: a study file, --withdraw NAME, or --resume NAME")
    if without and resume is None:
        raise StudyError("--without: goes with --resume; for a new study, take the site out of its file")
    if withdraw is not None:
        news = submission.withdraw(folder, withdraw)
        say(f"{withdraw} is withdrawn." if news else f"{withdraw} was withdrawn already.")
        return
    if resume is not None:
        name = resume
        submission.resume(folder, resume, without or [])
        say(f"{resume} goes on.")
    else:
        assert study is not None
        before = _outlook(study, bandwidth or [], words(compare), overrides or [])
        name, new = submission.submit(
            folder, study, name=name, compare=words(compare), overrides=overrides or [], plugins=plugin or []
        )
        if before is not None and new:
            say(f"{before}\n")
        say(f"Submitted as {name}." if new else f"{name} was submitted already; nothing changed.")
        if new and not _at_work(folder):
            say(f"No coordinator is at work there; it begins with: wardround federation start {federation}")
    if watch:
        from wardround.cli.watch import follow

        follow(folder, name)


def _outlook(study: Path, bandwidth: list[str], compare: list[str], overrides: list[str]) -> str | None:
    """What the study takes; nothing for one with code of its own, of which nothing is known before it is called."""
    from wardround.runs.outlook import outlook
    from wardround.study.load import load_study
    from wardround.study.plugins import NO_PLUGINS

    if "pooled" in compare or any(NO_PLUGINS.refused(load_study(study, overrides))):
        return None
    return outlook(study, None, bandwidth, compare, overrides).text


def _at_work(folder: CoordinatorFolder) -> bool:
    import time

    from wardround.hospitals.coordinator.status import read_status

    found = read_status(folder.status)
    return found is not None and found.alive(time.time())
