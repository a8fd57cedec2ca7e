"""The commands of released models and of files: apply one, and say what a path holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import say


def reconstruct(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A released model (models/ARM.safetensors).")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="A NIfTI image, k-space (.npy: slices x coils x H x W), a DICOM CT folder."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The NIfTI file to write, or for DICOM a folder.")],
    site: Annotated[str | None, typer.Option("--site", help="Whose scanner and coils (default: the study's).")] = None,
    embedding: Annotated[
        Path | None, typer.Option("--embedding", help="A file with the patient's embedding, for a model with anatomy.")
    ] = None,
    dose: Annotated[
        float | None, typer.Option("--dose", help="Put noise into CT projections first: the share of their dose left.")
    ] = None,
) -> None:
    """Reconstruct with a released model. An image is scanned by the study's simulated scanner first."""
    from wardround.runner.apply import reconstruct as apply

    say(apply(model, source, output, site=site, embedding=embedding, dose=dose))


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file, a folder, or a released model.")],
) -> None:
    """Say what a file or folder holds, without naming a patient."""
    from wardround.data.convert import inspect_path

    if path.suffix == ".safetensors":
        from wardround.runner.inspection import inspect_model

        say(inspect_model(path))
        return
    say(str(inspect_path(path)))
