"""The commands by which a hospital joins a federation, and looks whether it is fit to take part."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import complain, say

_STYLES = {"ok": "", "warn": "yellow", "fail": "red"}


def join(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="The kit that the coordinator made: SITE.zip.")],
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="The site's folder (default: the federation's name).")
    ] = None,
    systemd: Annotated[bool, typer.Option("--systemd", help="Also write a unit of systemd into the folder.")] = False,
) -> None:
    """Join a federation with its kit, in a new folder; with a newer kit, renew the certificates of the one there."""
    from wardround.hospitals.keys import fingerprint
    from wardround.hospitals.membership.joining import join as join_federation
    from wardround.hospitals.membership.services import site_service

    done = join_federation(kit, folder)
    name, place = done.federation.name, done.folder.root
    until = f"{done.certificate.not_after:%Y-%m-%d}"
    if done.renewed:
        say(f"Site {done.site}: certificates of federation {name} are renewed until {until}, in {place}.")
    else:
        say(f"Site {done.site} has joined federation {name}, in {place}. The certificate holds until {until}.")
    if systemd:
        service = site_service(place, name, done.site)
        say(f"Unit of systemd: {service.write(place)}")
        say(f"  to install it: {service.install}")
    if not done.new_key:
        say("The site's key and site.yaml are as they were. If the agent runs, stop and start it.")
        return
    if done.renewed:
        complain("identity.key was lacking, so a new one was made: the coordinator admits it with --replace.")
    say("")
    say("Call the coordinator, by a number that did not come with the kit.")
    say(f"  It must read you the root's words:  {fingerprint(bytes.fromhex(done.federation.root_key))}")
    say("     If they differ, the kit is not from it: delete the folder.")
    say(f"  Read to it your site's key:         {_grouped(done.key.hex())}")
    say(f"  and then compare its words:         {fingerprint(done.key)}")
    say("")
    say("Next:")
    say(f"  1. Write into {done.folder.site} where the data lie, and what may leave.")
    say(f"  2. wardround site doctor {place}")
    say(f"  3. wardround site start {place}")
    say(f"Delete {kit.name}, which holds a private key, and keep a copy of identity.key where you keep passwords.")


def doctor(
    folder: Annotated[
        Path,
        typer.Argument(metavar="[FOLDER]", envvar="WARDROUND_SITE", help="The folder that `site join` made."),
    ] = Path("."),
) -> None:
    """Look at all that a site needs, and say what to do where it lacks something; exit code 1 where it cannot work."""
    from wardround.hospitals.membership.doctor import examine

    levels = []
    for finding in examine(folder):
        levels.append(finding.level)
        say(f"{finding.level:<6}{finding.what}: {finding.text}", style=_STYLES[finding.level])
        if finding.fix:
            say(f"      -> {finding.fix}")
    failed, warned = levels.count("fail"), levels.count("warn")
    if failed:
        say(f"{failed} to mend before this site can take part" + (f", {warned} to mind." if warned else "."))
        raise typer.Exit(1)
    say(f"This site can take part; {warned} to mind." if warned else "This site can take part.")


def _grouped(digits: str) -> str:
    return " ".join(digits[n : n + 8] for n in range(0, len(digits), 8))
