"""The commands of released models and of files: apply one, and say what a path holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from wardround.cli.shared import AllowCodeOption, complain, explain, say
from wardround.errors import StudyError

# Endings of files that are no folder's.
_NO_FOLDERS = (".hdr", ".dcm", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".csv", ".json", ".safetensors", ".npz")
PluginOption = Annotated[
    list[str] | None, typer.Option("--plugin", help="A plug-in that the model's file may name; give it again.")
]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="The frozen part of a model that names one, where it lies elsewhere.")
]


def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A released model (models/ARM.safetensors).")],
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="NIfTI images, raw data of MRI (.h5, .mrd, .cfl, .npy, .mat), DICOM folders; for a segmentation or "
            "classification images, folders of patients or an MR or CT series. Without --out the last path is the "
            "output: a folder, or of one reconstruction a NIfTI file.",
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="A folder for the results of all inputs.")] = None,
    site: Annotated[str | None, typer.Option("--site", help="Whose scanner and coils (default: the study's).")] = None,
    embedding: Annotated[
        Path | None, typer.Option("--embedding", help="A file with the patient's embedding, for a model with anatomy.")
    ] = None,
    dose: Annotated[
        float | None, typer.Option("--dose", help="Put noise into CT projections first: the share of their dose left.")
    ] = None,
    fallback: Annotated[
        Literal["tv"] | None,
        typer.Option("--fallback", help="Write total variation's image where the network is out of its depth."),
    ] = None,
    adapt_to_scan: Annotated[
        int | None,
        typer.Option(
            "--adapt-to-scan",
            metavar="STEPS",
            help="MRI, research: train a copy of the network on each scan's own samples, at most STEPS steps. "
            "Where it was measured, images became no better.",
        ),
    ] = None,
    plugins: PluginOption = None,
    weights: WeightsOption = None,
) -> None:
    """Apply a released model: reconstruct raw data, outline structures, or name what images show.

    Raw data are reconstructed as they were measured; an image given to a model that reconstructs is scanned by the
    study's simulated scanner first. Exit code 1 where some of several inputs could not be used.
    """
    from wardround.runs.predict import predict as apply

    if out is None and len(paths) < 2:
        raise StudyError("give one input and the output, or several inputs and a folder for them with --out")
    *inputs, last = paths if out is None else [*paths, out]
    single = inputs[0] if out is None and len(inputs) == 1 else inputs
    check_output(last, one=out is None and len(inputs) == 1)
    found = apply(
        model,
        single,
        last,
        site=site,
        embedding=embedding,
        dose=dose,
        fallback=fallback,
        adapt_to_scan=adapt_to_scan,
        plugins=plugins or (),
        weights=weights,
        told=lambda one: say(f"{one.source}\n{one.said}"),
    )
    say(f"By {found.release.said} (model_sha256 {found.release.sha256}).")
    if found.temperature is not None:
        say(f"Probabilities are over the temperature of {site}, {found.temperature:.3g}.")
    if found.table is not None:
        say(f"Table: {found.table}")
    for failure in found.failed:
        named = failure.detail.startswith(str(failure.source))
        parts = ("" if named else str(failure.source), failure.patient, failure.detail)
        explain(f"{failure.reason}", ": ".join(filter(None, parts)))
    if found.failed:
        complain(f"{len(found.failed)} of {len(found.done) + len(found.failed)} inputs could not be used")
        raise typer.Exit(1)


def check_output(path: Path, *, one: bool) -> None:
    """Raise `StudyError` where a path is no place for results: a file, or named as one, but NIfTI of `one` input.

    So an output that was left out is not taken for one of the inputs, and no folder is named as a file.
    """
    from wardround.imaging.readers.raw import ENDINGS

    nifti = path.name.endswith((".nii", ".nii.gz"))
    if one and (nifti or path.is_dir()):
        return
    if nifti or path.is_file() or path.suffix.lower() in (*ENDINGS, *_NO_FOLDERS):
        raise StudyError(
            "the last path, or --out, is where results are written: a folder, or NAME.nii.gz for the image of one "
            "input without --out; this is, or is named as, another file",
            detail=str(path),
        )


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A released model of images (segmentation, ...).")],
    output: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write.")],
    site: Annotated[str | None, typer.Option("--site", help="As this site has it (default: for any site).")] = None,
    plugins: PluginOption = None,
    weights: WeightsOption = None,
) -> None:
    """Write a released model's network as ONNX, checked against torch. It takes normalised images or windows."""
    from wardround.runs.export import export as write

    say(write(model, output, site=site, plugins=plugins or (), weights=weights).said)


def inspect(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="PATH", help="A file, a folder, a released model, the folder of a run; with --across a study."
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Of a finished run: write its numbers into this file, a row for each.")
    ] = None,
    across: Annotated[
        Path | None,
        typer.Option("--across", metavar="SITES", help="How unlike the images of these sites are, before training."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="With --across: a folder for the page (default: runs/STUDY-shift).")
    ] = None,
    landmarks: Annotated[
        Path | None,
        typer.Option("--landmarks", help="With --across: write task.normalise of a study, the mean of all sites."),
    ] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Of a run with --compare local: each site's own model at each other site.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --across or --matrix: JSON instead of tables.")] = False,
    names: Annotated[
        bool, typer.Option("--names", help="Of a folder: list the files that cannot be used, which may name patients.")
    ] = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Say what a file or folder holds, without naming a patient; of a run, how far it has come.

    With --across, describe the images of several sites in sums and say how unlike they are. Exit code 1 where a file
    cannot be used.
    """
    from wardround.cli.shift import describe_sites, show_matrix

    if across is not None:
        describe_sites(across, path, out, landmarks, as_json=as_json, allow_code=allow_code)
        return
    if path is None:
        raise StudyError("give a path, or --across with a sites file")
    if matrix:
        show_matrix(path, as_json=as_json)
        return
    if csv is not None:
        write_numbers(path, csv)
        return
    if path.suffix == ".safetensors" or is_run(path):
        from wardround.runs.inspection import inspect_model, inspect_run

        say(inspect_run(path) if path.is_dir() else inspect_model(path))
        return
    from wardround.imaging.convert import inspect_path

    found = inspect_path(path)
    say(str(found))
    if names:
        say("\n".join(["Files that cannot be used; keep this list at the site:", *(found.unusable or ["  none"])]))
    if path.is_file() and found.problems:
        raise typer.Exit(1)


def write_numbers(out: Path, file: Path) -> None:
    """Write the numbers of a finished run as CSV."""
    from wardround.results.files import read_result
    from wardround.results.tables import csv_of
    from wardround.wire.files import write_text

    write_text(file, csv_of(read_result(out)))
    say(f"Wrote {file}")


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, finished or not."""
    return (path / "study.yaml").is_file() and (path / "work").is_dir()
