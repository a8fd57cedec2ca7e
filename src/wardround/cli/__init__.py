"""The commands; thin. A file a group; here they get their names."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType
from typing import Annotated

import typer

from wardround import __version__
from wardround.cli import audit, convert, forgetting, joining, living, logs, models, plan, study, submit, watch, weights
from wardround.cli.federation import federation_app
from wardround.cli.shared import Commands, say
from wardround.cli.site import site_app
from wardround.logs import log_to_stderr

app = typer.Typer(
    cls=Commands,
    help="Train imaging models across hospitals without moving a scan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(help="Convert public downloads into Wardround's folder layout.", no_args_is_help=True)
weights_app = typer.Typer(
    help="Make the weights files that studies and other programs start from.", no_args_is_help=True
)
log_app = typer.Typer(help="Look at the logs that every party of a run keeps.", no_args_is_help=True)


def main() -> None:
    """The entry of the `wardround` command."""
    log_to_stderr(logging.DEBUG if os.environ.get("WARDROUND_DEBUG") else logging.WARNING)
    # Whoever stops a service or a batch job sends this: it ends a run as Ctrl-C does, to be gone on with.
    signal.signal(signal.SIGTERM, _interrupt)
    app()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _print_version(asked: bool) -> None:
    if asked:
        say(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train imaging models across hospitals without moving a scan."""


def version() -> None:
    """Print the version."""
    say(__version__)


for command in (
    study.run,
    study.demo,
    study.evaluate,
    living.update,
    models.predict,
    models.export,
    study.init,
    study.check,
    plan.plan,
    study.partition,
    models.inspect,
    joining.join,
):
    app.command()(command)
app.command("reconstruct", help="The same as predict: reconstruct raw data with a released model.")(models.predict)
app.command()(audit.audit)
app.command("verify-audit")(audit.verify_audit)
app.command()(submit.submit)
app.command()(forgetting.forget)
app.command()(watch.watch)
app.command()(version)
log_app.command("verify")(logs.verify_log)
convert_app.command("lgg")(convert.convert_lgg)
weights_app.command("import")(weights.import_weights)
weights_app.command("merge")(weights.merge_weights)
weights_app.command("adapter")(weights.write_adapter)
app.add_typer(weights_app, name="weights")
app.add_typer(convert_app, name="convert")
app.add_typer(log_app, name="log")
app.add_typer(living.releases_app, name="releases")
app.add_typer(federation_app, name="federation")
app.add_typer(site_app, name="site")
