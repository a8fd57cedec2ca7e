"""Applies any released model to a clinic's own data: what `wardround predict` and `wardround.predict` do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from wardround.errors import DataError, StudyError
from wardround.federation.release import own_folder
from wardround.runs.apply import Reconstruction, Reconstructor, trained_coils
from wardround.runs.predict_images import Diagnosis, Failure, ImagePredictor, Outline
from wardround.runs.reconstruct import Fallback, PathLike, paths_of, reconstruct_all
from wardround.runs.releases import ReleasedModel, ReleaseUsed
from wardround.tasks.build import build_task
from wardround.tasks.task import Calibrated, Predicts, PredictsScans
from wardround.tasks.temperature import kept_calibration

Predicted = Reconstruction | Outline | Diagnosis


@dataclass(frozen=True)
class Predictions:
    """What became of all inputs: `done` in their order, `failed` those that cannot be used, `table` the CSV if any.

    `release` is the model that was used. `temperature` is the site's own, over which its probabilities are; None
    without one.
    """

    done: tuple[Predicted, ...]
    failed: tuple[Failure, ...]
    release: ReleaseUsed
    table: Path | None = None
    temperature: float | None = None

    @property
    def outlines(self) -> tuple[Outline, ...]:
        """Those of a segmentation."""
        return tuple(one for one in self.done if isinstance(one, Outline))

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Those of a classification."""
        return tuple(one for one in self.done if isinstance(one, Diagnosis))


def predict(
    model: PathLike,
    inputs: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    site: str | None = None,
    embedding: PathLike | None = None,
    dose: float | None = None,
    fallback: Fallback | None = None,
    adapt_to_scan: int | None = None,
    plugins: Collection[str] = (),
    weights: PathLike | None = None,
    told: Callable[[Predicted], None] = lambda _: None,
) -> Predictions:
    """Apply a released model of any kind to `inputs`.

    A model that reconstructs does what `wardround.reconstruct` does. A model of images takes image files, the folder of
    a patient, a folder of patients or images named as in its study, or the folder of one MR or CT series in DICOM, and
    writes into the folder `out`. A segmentation writes for each image the structures as numbers 1, 2, ... in the order
    of the study, the later one where they overlap (NIfTI on the input's grid and place; PNG for a picture; for DICOM a
    SEG, in which they stay apart), a picture in `overlays`, and `volumes.csv`. A classification writes
    `probabilities.csv`, a row an image, and `patients.csv` where a patient has several. A chain takes raw data of MRI
    (.h5, .mrd, .cfl, .npy, .mat), or images, which the simulated scanner of the study or of `site` scans first, and
    writes what a segmentation does and the image that it reconstructed; one that ends in a class writes what a
    classification does. All write `model.json`: which release it was. `site` serves the model as one of its training
    sites has it; `plugins` and `weights` are as for `wardround.reconstruct`. `told` is called after each patient.

    Inputs that cannot be used are in `failed` and the others go on. Raises `StudyError` and `DataError` for a model or
    an option that does not fit, and the error of a single input; `MissingExtra` for DICOM SEG without its library.

    >>> found = predict("out/models/federated.safetensors", ["scan.nii.gz"], "images")
    >>> [one.output.name for one in found.done], found.failed
    (['scan.nii.gz'], ())
    """
    released = ReleasedModel.opened(Path(model), plugins)
    place = None if weights is None else Path(weights)
    if released.study.task.kind == "reconstruction":
        reconstructor = Reconstructor(
            released,
            site=site,
            embedding=None if embedding is None else Path(embedding),
            dose=dose,
            fallback=fallback == "tv",
            adapt_to_scan=adapt_to_scan,
            weights=place,
        )
        images, failed = reconstruct_all(reconstructor, inputs, out, told)
        failures = tuple(Failure(source, "", str(e), e.detail) for source, e in failed)
        return Predictions(tuple(images), failures, released.used)
    given = {"embedding": embedding, "dose": dose, "fallback": fallback, "adapt-to-scan": adapt_to_scan}
    for option, value in given.items():
        if value is not None:
            raise StudyError(f"--{option}: this model does not reconstruct ({released.study.task.kind}); leave it out")
    task = build_task(released.study, plugins=released.plugins)
    if not isinstance(task, Predicts):
        raise StudyError(f"this model does not predict from images: its study's task is `{released.study.task.kind}`")
    network = released.network(task.build_model, site, place)
    calibration = None if site is None else kept_calibration(own_folder(released.path, site))
    if calibration is not None and isinstance(task, Calibrated):
        scaled = task.calibrated(calibration)
        task = scaled if isinstance(scaled, Predicts) else task
    coils: tuple[int, ...] = ()
    if isinstance(task, PredictsScans):
        task, coils = task.scanned_by(site), trained_coils(released.study, site)
    predictor = ImagePredictor(task, network, released.used, Path(out), told, coils)
    table = predictor(paths_of(inputs))
    if not predictor.done and len(predictor.failed) == 1:
        alone = predictor.failed[0]
        raise DataError(alone.reason, detail=": ".join(part for part in (alone.patient, alone.detail) if part))
    temperature = None if calibration is None else calibration.temperature
    return Predictions(tuple(predictor.done), tuple(predictor.failed), released.used, table, temperature)
