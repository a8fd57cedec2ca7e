"""The commands of a hospital in a federation; each is in a file of its own, here they get their names."""

from __future__ import annotations

import typer

from wardround.cli import site_agent, site_drift, site_fetch, site_joining, site_lint, site_withdraw

site_app = typer.Typer(help="Take part in a federation: what a hospital does.", no_args_is_help=True)

for command in (
    site_joining.join,
    site_joining.doctor,
    site_lint.lint,
    site_fetch.fetch,
    site_drift.drift,
    site_withdraw.withdraw,
    site_agent.start,
    site_agent.stop,
    site_agent.resume,
    site_agent.status,
    site_agent.review,
    site_agent.approve,
    site_agent.refuse,
    site_agent.report,
):
    site_app.command()(command)
