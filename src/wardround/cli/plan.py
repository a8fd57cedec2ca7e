"""The command that says what a study takes, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import AllowCodeOption, CompareOption, SetOption, StudyFile, say, words


def plan(
    study: StudyFile,
    sites: Annotated[
        Path | None, typer.Option("--sites", help="Of the sites in it, take the memory with their own images.")
    ] = None,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option("--bandwidth", metavar="SPEED", help="Of a site's line, as in 100Mbit/s; repeatable."),
    ] = None,
    compare: CompareOption = "",
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Say what a study takes of each site and round: bytes, memory, disk and time. Trains nothing, writes nothing.

    An error where a site's `memory` in the sites file is too little.
    """
    from wardround.runs.outlook import outlook, room_of
    from wardround.site.memory import check_memory

    found = outlook(study, sites, bandwidth or [], words(compare), overrides or [], allow_code=allow_code)
    say(found.text)
    check_memory(found.memory)
    if room := room_of(found):
        say(room)
