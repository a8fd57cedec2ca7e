"""The commands of weights files: make one that a study, or another program, can start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.models import PluginOption, WeightsOption
from wardround.cli.shared import say

if TYPE_CHECKING:
    from wardround.plan.checkpoints import Imported

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A released model (models/ARM.safetensors), or the folder of a run.")
]
SiteOption = Annotated[
    str | None, typer.Option("--site", help="With what this site keeps to itself, which must lie beside the model.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]


def import_weights(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .pth or .pt file; of a .safetensors, only the hash.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write (default: beside FILE, ending .safetensors).")
    ] = None,
    part: Annotated[
        str | None, typer.Option("--part", help="Which tensors, of a file with several sets: model, ema.model, ...")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Convert a checkpoint to .safetensors once, and print what a study that starts from it says."""
    from wardround.plan.checkpoints import import_checkpoint

    found = import_checkpoint(file, out, part=part, overwrite=force)
    wrote = "Wrote " if found.path != file else ""
    place = f", from `{found.part}` of {file.name}" if found.part else ""
    say(f"{wrote}{_described(found)}{place}")
    if found.left_out:
        say(f"Left out: {', '.join(found.left_out)}")
    if found.made_whole:
        say(f"Made whole, as they shared memory: {', '.join(found.made_whole)}")
    _say_study(found)


def merge_weights(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="The .safetensors file to write.")],
    site: SiteOption = None,
    weights: WeightsOption = None,
    plugins: PluginOption = None,
    force: ForceOption = False,
) -> None:
    """Write a model of LoRA adapters as plain weights, with their products added to those of its base."""
    from wardround.runs.merging import merge

    found = merge(model, out, site=site, weights=weights, plugins=plugins or (), overwrite=force)
    say(f"Wrote {_described(found.file)}")
    say(f"{found.said}. Research use only.")
    _say_study(found.file)


def write_adapter(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.")],
    site: SiteOption = None,
    weights: WeightsOption = None,
    plugins: PluginOption = None,
    force: ForceOption = False,
) -> None:
    """Write the LoRA adapters of a model as Hugging Face's peft reads them, with their base named by its hash."""
    from wardround.plan.peft import CONFIG, MODEL
    from wardround.runs.adapter_files import write_adapter as write

    found = write(model, out, site=site, weights=weights, plugins=plugins or (), overwrite=force)
    beside = f", and {', '.join(found.whole)} as a whole" if found.whole else ""
    say(f"Wrote {MODEL} and {CONFIG} to {found.folder}: factors of rank {found.rank} of {found.layers} layers{beside}")
    say(f"sha256: {found.sha256}")
    say("In the `start` of a study on the same base, with the folder below the study's:")
    say(found.study)


def _described(file: Imported) -> str:
    from wardround.results.units import human_bytes

    return f"{file.path}: {file.tensors:,} tensors, {file.values:,} values, {human_bytes(file.nbytes)}"


def _say_study(file: Imported) -> None:
    say(f"sha256: {file.sha256}")
    say("In the study, with the file below its folder:")
    say(file.study)
