"""The command with which a patient withdraws."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import complain, say
from wardround.errors import StudyError


def withdraw(
    patients: Annotated[
        list[str] | None, typer.Argument(metavar="[PATIENT]...", help="Names, as the site's data have them.")
    ] = None,
    sites: Annotated[
        Path,
        typer.Option(
            "--sites", envvar="WARDROUND_SITE", help="A sites file, or the folder of a site that joined a federation."
        ),
    ] = Path(),
    site: Annotated[
        str | None, typer.Option("--site", metavar="NAME", help="Of the sites in the file, this one.")
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option("--out", metavar="RUN", help="The folder of a run of this machine; repeatable.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A text file with names, one a line.")] = None,
) -> None:
    """Take patients who withdraw out of all that this site keeps; no later round, split or test has them.

    A running study goes on without them. Models that learned of them before still hold it: wardround forget.
    """
    names = [*(patients or ()), *(() if file is None else _names(file))]
    if sites.is_dir():
        from wardround.hospitals.folders import SiteFolder
        from wardround.hospitals.site.withdrawing import withdraw_here

        if out:
            raise StudyError("--out: a hospital's folder knows its studies itself; leave it out")
        found = withdraw_here(SiteFolder(sites.absolute()), names)
    else:
        from wardround.runs.withdrawing import withdraw_from_runs
        from wardround.study.sites import load_sites

        known = load_sites(sites)
        if site is None and len(known.sites) != 1:
            raise StudyError(f"the sites file has {len(known.sites)} sites; name one: --site")
        found = withdraw_from_runs(site or next(iter(known.sites)), names, known, out or ())
    say("Withdrawn." if found.new else "Was withdrawn before; what was left of it is deleted now.")
    say("No split, round or test has it from now on. Delete its files from the data folder yourself.")
    for name, uses in found.uses.items():
        say(f"{name}: in {len(uses)} released models; the list stays here" if uses else f"{name}: in no released model")
        for use in uses:
            say(f"  {use.release[:12]} of study {use.study[:12]}: {use.part}, {use.time}")
    say("Models trained before hold what they learned of it (`wardround forget`); reports written before may show it.")
    if not sites.is_dir() and not out:
        complain("No run was named: what the folders of runs hold of the patient stays. Name them with --out")
    for folder in found.stuck:
        complain(
            f"{folder}: this run cannot go on: its data changed otherwise too, or the study has too few patients left"
        )


def _names(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise StudyError("--file: cannot be read as text in UTF-8", detail=str(file)) from None
    return [line.strip() for line in lines if line.strip()]
