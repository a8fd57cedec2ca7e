"""`wardround site drift`: whether recent patients look to a release as its own did. Everything stays at the site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import say


def drift(
    release: Annotated[
        Path, typer.Argument(metavar="RELEASE", help="The released model's file, or the folder of its run.")
    ],
    name: Annotated[str, typer.Option("--site", help="The site's name in the release's study.")],
    sites: Annotated[Path, typer.Option("--sites", help="The sites file, or the site's own file.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the numbers there, as JSON.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure the release's own patients anew, over what is on record.")
    ] = False,
    plugin: Annotated[
        list[str] | None, typer.Option("--plugin", help="An installed plug-in that the release may use.")
    ] = None,
) -> None:
    """Compare recent patients with those on whom a release was validated and tested here. Nothing leaves the site.

    Exit code 1 where anything drifted.
    """
    from wardround.runs.columns import table
    from wardround.runs.drift import drift as look
    from wardround.runs.drift import rows_of

    found = look(release, name, sites, plugins=tuple(plugin or ()), again=again, out=out)
    say(table(("measure", "release", "now", "p", "patients", "verdict"), rows_of(found)))
    whose = "on record" if found.recorded else "measured now, and put on record"
    say(f"Release {found.release[:12]}; its own patients: {whose}. p by permutation, adjusted for all measures (Holm).")
    if not found.drifted:
        say("Nothing drifted by more than chance would move it.")
        return
    say(
        f"Drifted: {', '.join(found.drifted)}. Update the model: wardround update RELEASE STUDY --sites SITES --out OUT"
    )
    raise typer.Exit(1)
