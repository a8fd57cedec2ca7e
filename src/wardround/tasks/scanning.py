"""What a chain must know of the scanners that begin it: one interface, which each modality implements in its own file.

A chain makes raw data of images, images of raw data, and a diagnosis of those. What raw data are, of which images they
are made, and how good an image is, is its acquisition's matter: `AcquisitionSettings.chain` names the class, which
`Scanning` describes and which is made of a study and its task's section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wardround.imaging.readers.labelled import LabelledImage
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.baselines import Baseline
from wardround.tasks.classical import Method
from wardround.tasks.images import Frame
from wardround.tasks.task import MetricSpec, Window


class ScanBatch(Protocol):
    """B slices with what a scanner measured of them; it moves to a device as one."""

    @property
    def target(self) -> Tensor:
        """What was scanned: float32 (B, H, W)."""
        ...

    @property
    def body(self) -> Tensor:
        """1 inside what is imaged: float32 (B, H, W)."""
        ...

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int) -> Self:
        """The slices from `start` to before `stop`."""
        ...

    def images(self, method: Method) -> Tensor:
        """What a method makes of operator and data: real images (B, H, W)."""
        ...

    @classmethod
    def joined(cls, batches: Sequence[Any]) -> Self:
        """One batch of all slices, in order."""
        ...


class ScanFrame(Frame, Protocol):
    """How images are taken to be scanned, and how what is made of the scans comes back to their own grids."""

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a slice when it is scanned."""
        ...

    def restored(self, values: Tensor, image: LabelledImage, placed: LabelledImage) -> NDArray[np.float32]:
        """Values (slices, K, H, W), as networks give them of an image that was `placed`, on its grid: (K, *shape)."""
        ...

    def in_units(self, images: NDArray[np.float32], image: LabelledImage) -> NDArray[np.float32]:
        """Reconstructed images (C, *shape) in the units of the image that was scanned."""
        ...


class SiteScanner(Protocol):
    """The simulated scanner of one site. Slices (H, W) come on the scale of its `frame`.

    One that is slow to build is `wardround.tasks.task.Prepared` as well.
    """

    @property
    def frame(self) -> ScanFrame:
        """How its images are taken."""
        ...

    def scan(self, image: Tensor, patient: int, random: np.random.Generator) -> ScanBatch:
        """A scan of one slice of a patient, with `random` alone."""
        ...

    def kept(self, image: Tensor, patient: int, *which: int) -> ScanBatch:
        """The scan of one slice in evaluation: `which` of the patient's; the same each time, and kept in memory."""
        ...

    def random(self, patient: int, *which: int) -> np.random.Generator:
        """Public randomness of one scan of a patient: every arm of a study sees the same."""
        ...


class Scanning(Protocol):
    """The scanners of a study and what there is to know of their images."""

    #: The classical method whose images the second network can see in place of reconstructed ones.
    start: str
    #: Whether slices are taken as they are shown to people, and not in the axes of their files.
    upright: bool

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Those of images."""
        ...

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows that a report shows images in."""
        ...

    def scanner(self, site: str | None) -> SiteScanner:
        """Of a site; of `None` the study's own, for images from outside. Raises StudyError where there is none."""
        ...

    def acquisition(self, site: str | None) -> AcquisitionSettings:
        """What that scanner measures."""
        ...

    @property
    def begin(self) -> Method:
        """The images of `start`: a plain function of operator and data, as a network is copied with it."""
        ...

    @property
    def seen(self) -> Callable[[Tensor], Tensor]:
        """Makes of images (B, C, H, W) what the second network sees; a plain function likewise."""
        ...

    def scores(self, images: Tensor, scans: Any) -> dict[str, Tensor]:
        """All of `metrics` of images (B, H, W): name -> (B,)."""
        ...

    def check_baselines(self, baselines: Mapping[str, Baseline]) -> None:
        """Raise StudyError for a classical method that does not fit the sites' scanners."""
        ...
