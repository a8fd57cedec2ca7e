"""What every acquisition says of itself in a study; each acquisition's own settings are in its file.

`wardround.study.registry` lists the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pydantic import ConfigDict

from wardround.errors import DataError
from wardround.study.base import Settings
from wardround.study.tasks import Modality, ReconstructionTask


class AcquisitionSettings(Settings):
    """The base of every acquisition's section: what a site's scanner does, as data; part of the study and every model.

    One of your own names its `modality` and builds an `operator`; sites then scan their own magnitude images with it.
    What else is here has defaults. Places (`package.module:name`) are imported when they are needed.
    """

    #: What images and raw data are: `mri` (complex images), `ct` (attenuation), or another name (real images).
    #: Networks and baselines say which modalities they take.
    modality: ClassVar[Modality]
    #: What a study that names no baselines compares with.
    baselines: ClassVar[tuple[str, ...]] = ("tv",)
    #: The class of the reconstruction task, made from the study and the sites' files of embeddings.
    reconstruction: ClassVar[str] = "wardround.tasks.general:GeneralReconstruction"
    #: What applies a released model, as `wardround.runs.apply_general.reconstruct_general`.
    applied: ClassVar[str] = "wardround.runs.apply_general:reconstruct_general"
    #: The class of `wardround.tasks.scanning.Scanning` by which chains begin, made of the study and its task's section;
    #: empty where none do.
    chain: ClassVar[str] = ""
    #: What reads raw data for a released chain, as `wardround.runs.raw_scans.raw_input`; empty for nothing.
    raw: ClassVar[str] = ""
    #: What `check` prints of all scanners of a study together, as memory (a function of the study); empty for nothing.
    costs: ClassVar[str] = ""
    #: Whether raw data are those that sites' scanners measured; else they are simulated of a site's images.
    measured: ClassVar[bool] = False
    #: Whether headers of a site's files say by which scanner its images were made, see `tasks.task.Headed`.
    headers: ClassVar[bool] = False
    #: Whether training examples can be changed by `task.augment`.
    augments: ClassVar[bool] = False
    #: Whether its measured samples can be split, for sites without true images (`study.supervision`).
    splits: ClassVar[bool] = False
    #: What of an image a `masked` loss is inside of.
    inside: ClassVar[str] = "foreground"
    #: What a model card says of the intended use.
    purpose: ClassVar[str] = "Research on reconstruction from raw data of the protocols below."
    #: What a report says of data that were simulated, and of the range of PSNR.
    caveat: ClassVar[str] = (
        "Each site's magnitude images were turned into raw data by a model of its scanner. Raw data measured by a "
        "scanner hold effects that this leaves out."
    )
    peak: ClassVar[str] = "The peak of PSNR is the volume's maximum; another range would shift all its values."

    def operator(self, shape: tuple[int, int], random: Any) -> Any:
        """The `LinearOperator` of one scan of images of `shape` (H, W).

        `random`: a NumPy generator, of the patient where `varies`, else of the site, and the same in every arm.
        """
        raise NotImplementedError

    @property
    def has_reference(self) -> bool:
        """Whether the images that were scanned are known: a target to learn from, and to measure against."""
        return True

    @property
    def varies(self) -> bool:
        """Whether each patient has an operator of its own (a mask that is drawn, say), or the whole site one."""
        return False

    def measure(self, operator: Any, image: Any, random: Any) -> Any:
        """Raw data (1, *data_shape) that the scanner makes of a real image (1, H, W) in [0, 1]: A x, without noise.

        `random`: a NumPy generator of this one scan, for noise.
        """
        return operator.A(image)

    def scanned(self, image: Any, of_operator: Any, of_scan: Any) -> tuple[Any, Any]:
        """The operator and the data of one scan of a real image (1, H, W) in [0, 1], for `reconstruct`.

        `of_operator` and `of_scan` are the generators of `operator` and of `measure`, which this calls by default.
        """
        operator = self.operator((image.shape[1], image.shape[2]), of_operator)
        return operator, self.measure(operator, image, of_scan)

    def read(self, raw: Any) -> tuple[Any, Any]:
        """What a real scanner measured of one slice, for `reconstruct`: its operator and its data (1, *data_shape).

        raw: an array of a file from outside, of any shape and type. Raises `DataError` where it is no such data.
        """
        raise DataError(f"the acquisition {self.kind} reads no raw data; give a NIfTI image, which is scanned first")

    def facts(self) -> dict[str, float | str]:
        """Numbers and words by names for people: a model's file lists them, and other scans are compared with them."""
        return dict(_plain(self))

    def trained(self) -> dict[str, tuple[float | str, ...]]:
        """`facts` of training scans: a value each, or the ends of its range where training scans vary."""
        return {name: (value,) for name, value in self.facts().items()}

    def features(self) -> tuple[float, ...] | None:
        """What tells a network or a method which scanner this is, each in [0, 1]; `None` where nothing does."""
        return None

    def subject(self, contrasts: Sequence[str]) -> str:
        """What is reconstructed, in a few words."""
        return ", ".join(contrasts)

    def check(self, task: ReconstructionTask, site: str) -> None:
        """Raise `StudyError` where the scanner of a site cannot serve the task."""


class ClosedAcquisition(AcquisitionSettings):
    """The section of a plug-in's acquisition as the file has it."""

    model_config = ConfigDict(extra="allow")
    closed = True
    modality = ""
    baselines = ()

    def describe(self) -> str:
        """What the file says."""
        return ", ".join([self.kind, *(f"{key} {value}" for key, value in _plain(self))])


def _plain(settings: Settings) -> Iterator[tuple[str, float | str]]:
    for key, value in settings:
        if key != "kind" and isinstance(value, bool | int | float | str):
            yield key.replace("_", " "), value if isinstance(value, float) else _counted(value)


def _counted(value: bool | int | str) -> float | str:
    return str(value).lower() if isinstance(value, bool) else float(value) if isinstance(value, int) else value
