"""The command that brings a site's images from its archive into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import QuietOption, complain, say
from wardround.errors import StudyError


def fetch(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="PLACE", help="A sites file, or the folder of a site that joined a federation: with `archive`."
        ),
    ],
    site: Annotated[
        str | None, typer.Option("--site", metavar="NAME", help="Of the sites in the file, this one.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Fetch a site's patients from its archive (PACS) by DICOMweb, and remove identifiers as they arrive.

    The one command that reaches an archive. It goes on where it stopped; exit code 1 where patients are still to come.
    """
    from wardround.hospitals.archive.fetch import Fetch
    from wardround.study.sites import load_sites

    sites = load_sites(place / "site.yaml" if place.is_dir() else place, fetching=True)
    named = {name: entry.archive for name, entry in sites.sites.items() if entry.archive and site in (None, name)}
    if len(named) != 1:
        what = "no site" if not named else f"{len(named)} sites"
        raise StudyError(f"{what} with `archive` in the sites file; " + ("add it" if not named else "name one: --site"))
    (archive,) = named.values()
    fetched = Fetch(archive, (lambda _: None) if quiet else say).run()
    for line in fetched.lines():
        say(line)
    if fetched.again:
        complain("some patients are still to come: run the same command again")
        raise typer.Exit(1)
