"""The commands of a federation's coordinator; each is in a file of its own, here they get their names."""

from __future__ import annotations

import typer

from wardround.cli import federation_demo, federation_kits, federation_service

federation_app = typer.Typer(help="Run a federation of hospitals: what its coordinator does.", no_args_is_help=True)

for command in (
    federation_kits.init,
    federation_kits.invite,
    federation_kits.admit,
    federation_service.start,
    federation_kits.status,
    federation_kits.renew,
    federation_demo.demo,
):
    federation_app.command()(command)
