"""The command that is a federation's coordinator while it runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import say


def start(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The coordinator's folder of the federation.")],
    page: Annotated[
        str | None,
        typer.Option("--page", metavar="HOST:PORT", help="Also show it on a web page, as on 127.0.0.1:8080."),
    ] = None,
    page_behind_proxy: Annotated[
        bool,
        typer.Option("--page-behind-proxy", help="Let --page be an address that other machines reach; use TLS there."),
    ] = False,
) -> None:
    """Be the coordinator of a federation: reach its sites, and run the studies that are submitted, until it is ended.

    After a crash or a restart the same command goes on with every study.
    """
    from wardround.hospitals.coordinator.service import serve

    logger = logging.getLogger("wardround")
    if logger.level > logging.INFO:
        # A service's journal says what happens; a command's says what is wrong.
        logger.setLevel(logging.INFO)
    serve(folder, page=page, behind_proxy=page_behind_proxy, say=say)
