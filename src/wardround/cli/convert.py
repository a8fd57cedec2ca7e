"""The commands that convert public downloads into Wardround's folder layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import say


def convert_lgg(
    download: Annotated[
        Path, typer.Argument(metavar="DOWNLOAD", help="The unpacked public download (it holds kaggle_3m/).")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write SITE/PATIENT/*.nii.gz into.")],
) -> None:
    """Convert the public LGG MRI segmentation collection."""
    from wardround.imaging.convert import convert_lgg as convert

    report = convert(download, out)
    patients = ", ".join(f"{site} {count}" for site, count in sorted(report.patients.items()))
    say(f"Patients by site: {patients}; {report.without_t1ce} without t1ce (FLAIR stands in).")
