"""The commands that look at the logs every party of a run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import complain, say


def verify_log(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder, or one log.jsonl.")],
) -> None:
    """Find what was edited, deleted, reordered or cut off in the logs of a run; exit code 1 where something was."""
    from wardround.storage.verify import verify

    found = verify(folder)
    for log in found.logs:
        signed = f"{log.signatures} signatures, key {log.key}" if log.key else "no signatures"
        say(f"{log.name}: {len(log.entries)} records, {signed}" + (f" ({log.note})" if log.note else ""))
    for damage in found.damages[:20]:
        complain(damage, "red")
    if (more := len(found.damages) - 20) > 0:
        complain(f"... and {more} more", "red")
    if found.damages:
        raise typer.Exit(1)
    if found.anchors:
        agree = f"{found.anchors} anchors in other parties' logs agree"
        say(f"Whole: {agree}. What follows a log's last anchor could be cut off unseen.")
    elif len(found.logs) == 1:
        say("Whole in itself. No other party's log is here, so records cut off its end would not show.")
    else:
        say("Whole, each in itself. None holds an anchor of another, so records cut off their ends would not show.")
