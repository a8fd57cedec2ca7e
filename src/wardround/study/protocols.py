"""The scanners that a model was trained on: typed, and saved in the model's file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.base import Config
from wardround.study.schema import Acquisition, SiteName


class HeaderFacts(Config):
    """What the headers of a site's training images say of its scanners: values without their order and their counts.

    Nothing of a patient: no date, no identifier, no tube current (which follows the patient's size).
    """

    scanners: tuple[str, ...] = Field((), description="vendor and model")
    kvp: tuple[float, ...] = Field((), description="tube voltages in kV")
    slice_thickness: tuple[float, ...] = Field((), description="mm")
    kernels: tuple[str, ...] = Field((), description="the vendors' names of reconstruction kernels")

    def __bool__(self) -> bool:
        return any((self.scanners, self.kvp, self.slice_thickness, self.kernels))

    @property
    def text(self) -> str:
        """All of it in a line: `SIEMENS Sensation 16; 120 kV; 5 mm; kernels B20f`."""
        parts = (
            *self.scanners,
            ", ".join(f"{value:g}" for value in self.kvp) + " kV" if self.kvp else "",
            ", ".join(f"{value:g}" for value in self.slice_thickness) + " mm" if self.slice_thickness else "",
            "kernels " + ", ".join(self.kernels) if self.kernels else "",
        )
        return "; ".join(part for part in parts if part)


class ModelProtocols(Config):
    """The scanners of the sites that trained a model: as simulated, and what the headers of their images say."""

    version: Literal[1] = 1
    scanners: dict[SiteName, Acquisition] = Field(description="the simulated protocol of each site")
    headers: dict[SiteName, HeaderFacts] = Field({}, description="of the sites that let them out and have any")

    @property
    def acquisitions(self) -> tuple[AcquisitionSettings, ...]:
        """The simulated protocols, in the order of the sites."""
        return tuple(self.scanners.values())
