"""The commands of weights files: make one that a study can start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import say


def import_weights(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .pth or .pt file; of a .safetensors, only the hash.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write (default: beside FILE, ending .safetensors).")
    ] = None,
    part: Annotated[
        str | None, typer.Option("--part", help="Which tensors, of a file with several sets: model, ema.model, ...")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
) -> None:
    """Convert a checkpoint to .safetensors once, and print what a study that starts from it says."""
    from wardround.plan.checkpoints import import_checkpoint
    from wardround.results.units import human_bytes

    found = import_checkpoint(file, out, part=part, overwrite=force)
    wrote = f"Wrote {found.path}" if found.path != file else f"{found.path}"
    place = f", from `{found.part}` of {file.name}" if found.part else ""
    say(f"{wrote}: {found.tensors:,} tensors, {found.values:,} values, {human_bytes(found.nbytes)}{place}")
    if found.left_out:
        say(f"Left out: {', '.join(found.left_out)}")
    if found.made_whole:
        say(f"Made whole, as they shared memory: {', '.join(found.made_whole)}")
    say(f"sha256: {found.sha256}")
    say("In the study, with the file below its folder:")
    say(found.study)
