"""The commands of a federation's coordinator; each is in a file of its own, here they get their names."""

from __future__ import annotations

import typer

from wardround.cli import federation_kits

federation_app = typer.Typer(help="Run a federation of hospitals: what its coordinator does.", no_args_is_help=True)
federation_app.command("init")(federation_kits.init)
federation_app.command("invite")(federation_kits.invite)
federation_app.command("admit")(federation_kits.admit)
federation_app.command("renew")(federation_kits.renew)
federation_app.command("status")(federation_kits.status)
