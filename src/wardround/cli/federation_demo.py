"""`wardround federation demo`: a federation of three made-up hospitals on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import SetOption, say, summary


def demo(
    out: Annotated[Path, typer.Option("--out", help="A new folder for all parties.")] = Path("runs/federation-demo"),
    carrier: Annotated[
        str, typer.Option("--carrier", help="What carries messages: https, or nvflare (extra `hospitals`).")
    ] = "https",
    overrides: SetOption = None,
    page: Annotated[
        str | None, typer.Option("--page", metavar="HOST:PORT", help="Also show it on a web page (extra `page`).")
    ] = None,
) -> None:
    """Stand up a coordinator and three made-up hospitals on this machine, and run a study across them."""
    from wardround.errors import StudyError
    from wardround.hospitals.demo import federation_demo

    if carrier not in ("https", "nvflare"):
        raise StudyError(f"--carrier {carrier}: take https or nvflare")
    result = federation_demo(
        out, "nvflare" if carrier == "nvflare" else "https", say, overrides=overrides or [], page=page
    )
    summary(result)
