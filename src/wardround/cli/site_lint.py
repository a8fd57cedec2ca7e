"""The command that looks through a site's data for what tells who patients are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.shared import complain, say

if TYPE_CHECKING:
    from wardround.imaging.identifiers.lint import Looked

_JOINED = "site.yaml"


def lint(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="PLACE", help="A data folder, a sites file, or the folder of a site that joined a federation."
        ),
    ],
    detail: Annotated[
        Path | None,
        typer.Option(
            "--detail", metavar="FILE", help="Write which files and folders it is, for eyes at the site alone."
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Open every file, not some of each folder.")] = False,
) -> None:
    """Look through data for what tells who patients are, in DICOM, NIfTI, tables and names. Prints kinds and counts.

    Exit code 1 where something is found that a federation refuses.
    """
    looked = _looked(place, everything)
    for name, one in looked.items():
        say(f"{name}: {one.opened:,} of {one.files:,} files opened" + _more(one))
        for line in one.findings.lines() or ["nothing found"]:
            say(f"  {line}")
    say("Not checked: text and faces in pixels (a head scan shows the face), and cells of tables.")
    if detail is not None:
        _write(detail, "\n".join(f"# {name}\n{one.findings.detail()}" for name, one in looked.items()))
        say(f"Places: {detail} (it may name patients; keep it at the site)")
    if any(one.refused for one in looked.values()):
        complain("refused: a federation of hospitals does not train on these files (`identifiers` in the sites file)")
        raise typer.Exit(1)


def _looked(place: Path, everything: bool) -> dict[str, Looked]:
    from wardround.imaging.identifiers.lint import lint_folders
    from wardround.site.identifiers import lint_site
    from wardround.study.sites import load_sites

    if place.is_dir() and not (place / _JOINED).is_file():
        return {"the folder": lint_folders([place], everything=everything)}
    sites = load_sites(place / _JOINED if place.is_dir() else place)
    return {f"site {name}": lint_site(entry, everything=everything) for name, entry in sites.sites.items()}


def _more(one: Looked) -> str:
    return "; --all opens every one" if one.opened < one.files else ""


def _write(path: Path, text: str) -> None:
    """Write a new or emptied file that only this user may read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
