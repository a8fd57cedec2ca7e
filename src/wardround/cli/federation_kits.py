"""The commands by which a consortium stands up a federation: make it, invite hospitals, admit keys, look at it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from wardround.cli.shared import complain, console, say

FederationFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The federation's folder at its coordinator.")]
SiteArgument = Annotated[str, typer.Argument(metavar="SITE", help="The site's name, as studies use it.")]
RootOption = Annotated[
    Path | None,
    typer.Option("--root", metavar="PATH", help="Where the root's private keys are (default: FOLDER/root)."),
]
DaysOption = Annotated[int, typer.Option("--days", min=1, max=3650, help="Days for which the certificate holds.")]


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the federation.")],
    name: Annotated[str, typer.Option("--name", help="Its name: lower-case letters, digits, hyphens.")],
    host: Annotated[str, typer.Option("--host", help="Name or address at which hospitals reach the coordinator.")],
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The coordinator's one open port.")] = 8443,
    carrier: Annotated[
        Literal["nvflare", "https"], typer.Option("--carrier", help="What carries messages; the default is NVFlare.")
    ] = "nvflare",
    root: RootOption = None,
    systemd: Annotated[bool, typer.Option("--systemd", help="Also write a unit of systemd into the folder.")] = False,
) -> None:
    """Make a federation: its file, the keys of its root, the coordinator's certificate and an empty list of sites."""
    from wardround.hospitals.federation import Federation
    from wardround.hospitals.keys import fingerprint
    from wardround.hospitals.membership import kits
    from wardround.hospitals.membership.services import coordinator_service
    from wardround.study.load import validate

    asked = {"name": name, "host": host, "port": port, "carrier": carrier, "root_key": "0" * 64}
    federation = kits.init(folder, validate(Federation, asked, "federation"), root)
    keys = root or folder / "root"
    say(f"Federation {federation.name} is in {folder}; sites will reach {host}, port {port} (TCP, outgoing at sites).")
    say(f"Fingerprint of its root, for hospitals to compare: {fingerprint(bytes.fromhex(federation.root_key))}")
    say("")
    say(f"Keep offline: {keys}")
    say("  root.key signs kits and the list of sites: who has it can pose as any hospital.")
    say("  ca.key signs certificates: who has it can connect as any hospital.")
    say("  Both are needed to invite, admit and renew, and for nothing else. Move the folder to a medium that is")
    say("  locked away, with a copy elsewhere, and give it with --root PATH then. Without it, all sites join anew.")
    say("")
    if systemd:
        service = coordinator_service(folder, federation.name)
        say(f"Unit of systemd: {service.write(folder)}")
        say(f"  to install it: {service.install}")
    say(f"Next, for each hospital: wardround federation invite {folder} SITE")


def invite(
    folder: FederationFolder,
    site: SiteArgument,
    root: RootOption = None,
    days: DaysOption = 365,
) -> None:
    """Make the kit by which a hospital joins; for a hospital that joined, a new one renews its certificate."""
    from wardround.hospitals.keys import fingerprint
    from wardround.hospitals.membership import kits

    made = kits.invite(folder, site, root, days=days)
    _, federation = kits.opened(folder)
    until = f"until {made.certificate.not_after:%Y-%m-%d}"
    say(f"{'Renewed kit' if made.renewed else 'Kit'} of {made.site}, {until}: {made.kit}")
    say("It holds a private key for the connection: hand it over on a way that others cannot read, and delete it here")
    say("once the hospital has joined.")
    if made.renewed:
        say(
            f"The hospital runs `wardround site join {made.kit.name} --folder FOLDER` with the folder that it has. Its "
            "own key stays, so nothing is admitted again."
        )
        say("An earlier kit still connects until its certificate ends; it cannot answer in the hospital's name.")
        return
    say(f"The hospital runs:  wardround site join {made.kit.name}")
    say("Then call it, by a number that you did not get with an e-mail:")
    say(f"  it must see the root's words:  {fingerprint(bytes.fromhex(federation.root_key))}")
    say(f"  it reads out its key:          wardround federation admit {folder} {made.site} KEY")


def admit(
    folder: FederationFolder,
    site: SiteArgument,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The site's public key as it read it out: 64 hex digits.")],
    root: RootOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="The site made a new key, and said so by telephone: take it.")
    ] = False,
) -> None:
    """Write a hospital's key into the list of sites, and sign the list with the root's key."""
    from wardround.hospitals.keys import fingerprint, public_key
    from wardround.hospitals.membership import kits

    done = kits.admit(folder, site, public_key(key), root, replace=replace)
    how = "is in the list of sites" if done.changed else "was in the list of sites already"
    say(f"Site {done.site} {how} (serial {done.roster.serial}, {len(done.roster.keys)} in it).")
    say(f"Its words are: {fingerprint(done.key)}")
    say("Compare them with those that the site sees. If they differ, a digit is wrong or another computer answered.")
    if replace and done.changed:
        say("Studies that this site approved with its old key have to be approved again, at all of their sites.")


def renew(folder: FederationFolder, root: RootOption = None, days: DaysOption = 365) -> None:
    """Renew the coordinator's own certificates, for the host that federation.yaml names. Stop its service before."""
    from wardround.hospitals.membership import kits

    made = kits.renew(folder, root, days=days)
    say(f"The coordinator's certificate now holds until {made.not_after:%Y-%m-%d}. Start its service again.")


def status(folder: FederationFolder) -> None:
    """Show sites, certificates and keys, and what the service last said; exit code 1 where it is urgent."""
    from rich.table import Table

    from wardround.hospitals.membership.overview import overview

    found = overview(folder, datetime.now(UTC))
    federation = found.federation
    say(f"Federation {federation.name}: {federation.carrier}, {federation.host}, port {federation.port}")
    say(f"List of sites: serial {found.serial}, {len(found.admitted)} admitted. {found.service}")
    if found.sites:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for heading in ("site", "invited", "admitted", "connection", "certificate"):
            table.add_column(heading)
        for site in found.sites:
            table.add_row(
                site.name,
                "yes" if site.invited else "no",
                "yes" if site.admitted else "not yet",
                site.connection,
                site.certificate,
            )
        console.print(table)
    else:
        say(f"No site is invited yet: wardround federation invite {folder} SITE")
    for study in found.studies:
        say(f"Study {study}")
    for notice in found.notices:
        complain(notice.text, "red" if notice.urgent else "yellow")
    if any(notice.urgent for notice in found.notices):
        raise typer.Exit(1)
