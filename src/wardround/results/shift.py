"""How unlike the images of a study's sites are, before training: what `shift.json` holds, and distances of sites."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from wardround.study.base import Config
from wardround.wire.files import write_text

SHIFT_FILE = "shift.json"
_Rounded = Annotated[float, AfterValidator(lambda value: round(value, 6))]
_Share = Annotated[float, Field(ge=0.0)]


class Spread(Config):
    """Mean and standard deviation over a site's patients."""

    mean: _Rounded
    std: _Rounded


class Channel(Config):
    """A channel of a site's images, normalised as the study says."""

    histogram: tuple[_Rounded, ...] = Field((), description="share of each bin, every patient counted alike")
    mean: _Rounded | None = None
    std: _Rounded | None = None
    percentiles: dict[str, _Rounded] = Field({}, description="p5, p25, p50, p75, p95; from the histogram")
    spectrum: tuple[_Rounded, ...] = Field(
        (), description="mean log amplitude (natural) by ring, from 0 to half a cycle a pixel of the network's grid"
    )
    noise: Spread | None = Field(None, description="robust deviation of the finest details, in units of the image's")


class Drawn(Config):
    """What is drawn of a structure at a site."""

    share: Spread | None = Field(None, description="of an image's voxels")
    slices: Spread | None = Field(None, description="share of slices that show it, of a picture 1 or 0")
    volume_ml: Spread | None = None


class SiteProfile(Config):
    """What a site says of its images; `null` or empty where it says nothing."""

    split: str | None = Field(None, description="whose images: train, or where nobody trains validation or test")
    patients: int | None = None
    channels: tuple[Channel, ...] = ()
    matrix: tuple[Spread, ...] = Field((), description="voxels along each axis")
    spacing: tuple[Spread, ...] = Field((), description="mm along each axis")
    structures: dict[str, Drawn] = Field({}, description="what is drawn")
    classes: dict[str, int] = Field({}, description="patients by class; small ones together in `small classes`")
    withheld: dict[str, str] = Field({}, description="why something stays at the site")


class SharedLandmarks(Config):
    """The mean of what patients' percentiles become, the outer two at -2 and 2: over all training patients."""

    percentiles: tuple[float, ...]
    values: tuple[tuple[_Rounded, ...], ...] = Field(description="by channel")
    patients: int
    sites: tuple[str, ...]


class Shift(Config):
    """What all sites say of their images, and how far they are from each other."""

    version: Literal[1] = 1
    study: str
    images: tuple[str, ...] = Field(description="names of the channels")
    normalised: str = Field(description="how the images' numbers were changed before they were described")
    low: float = Field(description="where the first bin of a histogram begins")
    high: float = Field(description="where the last one ends; outer bins hold what lies beyond")
    sites: dict[str, SiteProfile]
    distances: dict[Literal["intensity", "spectrum"], dict[str, dict[str, _Rounded]]] = Field(
        description="by kind and pair of sites. intensity: Jensen-Shannon divergence of histograms in bits, 0 to 1; "
        "spectrum: root mean square difference of log spectra; both are means over channels"
    )
    landmarks: SharedLandmarks | None = None
    failed: dict[str, str] = Field({}, description="by site: why it gave no answer")

    @property
    def values(self) -> str:
        """What `shift.json` holds."""
        return json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"


def write_shift(out: Path, shift: Shift) -> Path:
    """Write `shift.json` and `shift.html` into a folder; the page's path."""
    from wardround.results.shift_page import render

    write_text(out / SHIFT_FILE, shift.values)
    page = out / "shift.html"
    write_text(page, render(shift))
    return page


# Distances ------------------------------------------------------------------------------------------------------------


def jensen_shannon(p: Sequence[float], q: Sequence[float]) -> float:
    """The Jensen-Shannon divergence of two histograms, in bits: 0 of equal ones, 1 of those that share no bin.

    JS = (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2 (Lin, *Divergence measures based on the Shannon entropy*, 1991).
    """
    a, b = (np.asarray(each, np.float64) / math.fsum(each) for each in (p, q))
    middle = (a + b) / 2.0
    terms = [each[each > 0] * np.log2(each[each > 0] / middle[each > 0]) for each in (a, b)]
    return max(0.0, float(sum(term.sum() for term in terms)) / 2.0)


def log_distance(p: Sequence[float], q: Sequence[float]) -> float:
    """The root mean square difference of two log spectra, over rings."""
    return float(np.sqrt(np.mean(np.square(np.asarray(p, np.float64) - np.asarray(q, np.float64)))))


def distances(sites: Mapping[str, SiteProfile]) -> dict[Literal["intensity", "spectrum"], dict[str, dict[str, float]]]:
    """Both kinds, of every pair of sites that show what it needs."""
    return {
        "intensity": _pairs(sites, lambda channel: channel.histogram, jensen_shannon),
        "spectrum": _pairs(sites, lambda channel: channel.spectrum, log_distance),
    }


def _pairs(
    sites: Mapping[str, SiteProfile],
    part: Callable[[Channel], Sequence[float]],
    distance: Callable[[Sequence[float], Sequence[float]], float],
) -> dict[str, dict[str, float]]:
    shown = {
        name: parts for name, site in sites.items() if (parts := [part(each) for each in site.channels]) and all(parts)
    }
    found: dict[str, dict[str, float]] = {name: {name: 0.0} for name in shown}
    for a, b in combinations(shown, 2):
        value = float(np.mean([distance(p, q) for p, q in zip(shown[a], shown[b], strict=True)]))
        found[a][b] = found[b][a] = value
    return found
