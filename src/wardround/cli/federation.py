"""The commands of a federation's coordinator; each is in a file of its own, here they get their names."""

from __future__ import annotations

import typer

from wardround.cli import federation_service

federation_app = typer.Typer(help="Run a federation of hospitals: what its coordinator does.", no_args_is_help=True)
federation_app.command("start")(federation_service.start)
