"""The commands of a hospital in a federation; each is in a file of its own, here they get their names."""

from __future__ import annotations

import typer

from wardround.cli.site_fetch import fetch
from wardround.cli.site_lint import lint

site_app = typer.Typer(help="Take part in a federation: what a hospital does.", no_args_is_help=True)
site_app.command()(lint)
site_app.command()(fetch)
