"""The commands of a federation's coordinator; each is in a file of its own, here they get their names."""

from __future__ import annotations

import typer

from wardround.cli import federation_kits as kits

federation_app = typer.Typer(help="Run a federation of hospitals: what its coordinator does.", no_args_is_help=True)
for kits_command in (kits.init, kits.invite, kits.admit, kits.renew, kits.status):
    federation_app.command()(kits_command)
