"""Brain phantoms for the demo: made-up patients with tumours, scanned by hospitals with their own protocols.

Anatomy starts from the ICBM152 tissue maps that nilearn ships (extra `demo`; Fonov et al., NeuroImage 2011).
Every patient is a random deformation of it, with random folds, head layers and tumour; images follow the
signal equations of magnetic resonance. Good for showing what federated training does; no claim about patients
can rest on them.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from wardround.errors import MissingExtra
from wardround.imaging.readers.volume import FloatArray, Volume, write_nifti
from wardround.wire.random import public_generator


@dataclass(frozen=True)
class Tissue:
    """Relaxation times in ms and relative proton density."""

    t1: float
    t2: float
    t2_star: float
    density: float


# Healthy tissue: BrainWeb (Cocosco et al., 1997), but CSF with its measured T1 of 4.3 s (Rooney et al., MRM
# 2007), which a FLAIR's inversion time is set to null, and a T2 to match; grey and white matter at 3 T after
# Wansapura et al. (JMRI 1999). Bone, skin at 3 T and tumour are plausible values of our own.
_TISSUES_AT_1_5_TESLA = {
    "csf": Tissue(4300, 1200, 300, 1.0),
    "grey": Tissue(833, 83, 69, 0.86),
    "white": Tissue(500, 70, 61, 0.77),
    "fat": Tissue(350, 70, 58, 1.0),
    "skin": Tissue(900, 47, 30, 0.9),
    "bone": Tissue(400, 5, 1, 0.12),
    "necrosis": Tissue(2200, 280, 150, 0.97),
    "rim": Tissue(1100, 110, 70, 0.88),
    "tumour": Tissue(1250, 150, 90, 0.92),
    "oedema": Tissue(1050, 140, 90, 0.88),
}
_OTHER_AT_3_TESLA = {
    "grey": Tissue(1331, 110, 66, 0.86),
    "white": Tissue(832, 80, 53, 0.77),
    "skin": Tissue(1300, 45, 25, 0.9),
    "rim": Tissue(1500, 130, 60, 0.88),
    "tumour": Tissue(1600, 220, 80, 0.92),
    "oedema": Tissue(1400, 190, 80, 0.88),
}
TISSUES = MappingProxyType({1.5: _TISSUES_AT_1_5_TESLA, 3.0: {**_TISSUES_AT_1_5_TESLA, **_OTHER_AT_3_TESLA}})
_LESION = ("necrosis", "rim", "tumour", "oedema")
# What gadolinium does to a leaky rim and to blood-rich skin: T1 in ms.
_ENHANCED_T1 = {"rim": 280.0, "skin": 600.0}


@dataclass(frozen=True)
class Protocol:
    """One pulse sequence: times in ms, flip angle in degrees, field 1.5 or 3 tesla."""

    kind: Literal["spin_echo", "gradient_echo", "inversion_recovery"]
    tr: float
    te: float
    ti: float = 0.0
    flip: float = 90.0
    field: float = 1.5
    gadolinium: bool = False


@dataclass(frozen=True)
class PhantomSite:
    """A made-up hospital: its sequence, field of view in mm, strength of the bias field, role in the demo."""

    name: str
    label: str
    protocol: Protocol
    field_of_view: float = 230.0
    bias: float = 0.15
    role: Literal["train", "unseen"] = "train"


def _flair(tr: float, te: float, ti: float, field: float) -> Protocol:
    return Protocol("inversion_recovery", tr=tr, te=te, ti=ti, field=field)


# The same kind of scan on unlike scanners: fluid dark, tumour and oedema bright.
DEMO_SITES: tuple[PhantomSite, ...] = (
    PhantomSite("Northfield", "FLAIR 9000/110/2500, 1.5 T", _flair(9000, 110, 2500, 1.5), 230, 0.12),
    PhantomSite("Harbour", "FLAIR 9000/100/2500, 3 T", _flair(9000, 100, 2500, 3.0), 220, 0.25),
    PhantomSite("Valley", "FLAIR 8000/120/2350, 1.5 T", _flair(8000, 120, 2350, 1.5), 250, 0.1),
    PhantomSite("Seaside", "FLAIR 10000/125/2650, 1.5 T", _flair(10000, 125, 2650, 1.5), 235, 0.15),
    PhantomSite("Island", "FLAIR 9000/90/2500, 3 T", _flair(9000, 90, 2500, 3.0), 240, 0.25, role="unseen"),
)
# Another kind of scan at every hospital.
CONTRAST_SITES: tuple[PhantomSite, ...] = (
    PhantomSite("Northfield", "T1w spin echo, 1.5 T", Protocol("spin_echo", tr=550, te=12), 230, 0.12),
    PhantomSite("Harbour", "FLAIR, 3 T", Protocol("inversion_recovery", 9000, 110, ti=2480, field=3.0), 220, 0.25),
    PhantomSite("Valley", "T2w spin echo, 1.5 T", Protocol("spin_echo", tr=4500, te=100), 250, 0.1),
    PhantomSite(
        "Island",
        "T1w gradient echo with gadolinium, 3 T",
        Protocol("gradient_echo", tr=25, te=4.6, flip=30, field=3.0, gadolinium=True),
        240,
        0.25,
        role="unseen",
    ),
)


def signal(protocol: Protocol, tissue: Tissue) -> float:
    """Return the signal of a tissue at equilibrium, relative to fully relaxed water; negative while inverted.

    Spin echo: M0 (1 - e^(-TR/T1)) e^(-TE/T2). Inversion recovery: M0 (1 - 2 e^(-TI/T1) + e^(-TR/T1))
    e^(-TE/T2). Spoiled gradient echo: M0 sin a (1 - E1) / (1 - cos a E1) e^(-TE/T2*), E1 = e^(-TR/T1).
    Source: Bernstein, King and Zhou, Handbook of MRI Pulse Sequences (2004).
    """
    recovery = np.exp(-protocol.tr / tissue.t1)
    if protocol.kind == "spin_echo":
        longitudinal, decay = 1 - recovery, tissue.t2
    elif protocol.kind == "inversion_recovery":
        longitudinal, decay = 1 - 2 * np.exp(-protocol.ti / tissue.t1) + recovery, tissue.t2
    else:
        angle = np.deg2rad(protocol.flip)
        longitudinal, decay = np.sin(angle) * (1 - recovery) / (1 - np.cos(angle) * recovery), tissue.t2_star
    return float(tissue.density * longitudinal * np.exp(-protocol.te / decay))


def make_site(
    out: Path,
    site: PhantomSite,
    patients: int,
    seed: int,
    *,
    size: int = 128,
    slices: int = 12,
    made: Callable[[], None] = lambda: None,
) -> Path:
    """Write a hospital's patients as `out/SITE/PATIENT/{image,seg}.nii.gz` and return `out/SITE`.

    Images are uint16 `(size, size, slices)`, front of the head up; `seg` is 1 where the tumour or its oedema
    is. The same seed gives the same bytes. Patients are made on all cores; `made` is called after each, in a thread
    of its own. Raises MissingExtra without nilearn.
    """
    _atlas()  # once, before threads ask for it

    def make(number: int) -> None:
        random = public_generator(seed, "phantom", site.name, number)
        image, seg = make_patient(site, random, size=size, slices=slices)
        folder = out / site.name / f"P{number + 1:03d}"
        write_nifti(image, folder / "image.nii.gz", np.uint16)
        write_nifti(seg, folder / "seg.nii.gz", np.uint8)
        made()

    # Threads, not processes: filters, transforms and compression, nearly all of the time, run without Python's lock.
    with ThreadPoolExecutor(_cores()) as pool:
        list(pool.map(make, range(patients)))
    return out / site.name


def make_patient(
    site: PhantomSite, random: np.random.Generator, *, size: int = 128, slices: int = 12
) -> tuple[Volume, Volume]:
    """Return the image and the tumour mask of one random patient. Raises MissingExtra without nilearn."""
    grid = _Grid(size, slices, site.field_of_view / size, 66.0 / slices)
    fractions = _head(grid, random)
    fractions = _grow_tumour(fractions, grid, random)
    image = _scan(fractions, site, grid, random)
    lesion = np.sum([fractions[name] for name in _LESION], axis=0)
    spacing = (grid.pixel, grid.pixel, grid.thickness)
    affine = np.array(
        [
            [0, grid.pixel, 0, -grid.pixel * size / 2],
            [-grid.pixel, 0, 0, grid.pixel * size / 2],
            [0, 0, grid.thickness, 0],
            [0, 0, 0, 1],
        ]
    )
    return Volume(image, spacing, affine), Volume((lesion > 0.5).astype(np.float32), spacing, affine)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Grid:
    """The scanned slab: `size` x `size` pixels of `pixel` mm, `slices` of `thickness` mm."""

    size: int
    slices: int
    pixel: float
    thickness: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, self.slices

    def positions(self) -> FloatArray:
        """Return (left-right, back-front, foot-head) in mm around the centre, `(3, H, W, slices)`."""
        rows = (self.size / 2 - np.arange(self.size)) * self.pixel
        columns = (np.arange(self.size) - self.size / 2) * self.pixel
        heights = (np.arange(self.slices) - (self.slices - 1) / 2) * self.thickness
        y, x, z = np.meshgrid(rows, columns, heights, indexing="ij")
        return np.stack([x, y, z]).astype(np.float32)

    def texture(self, random: np.random.Generator, length: float) -> FloatArray:
        """Return a random field of zero mean and unit variance that varies over `length` mm.

        White noise under a Gaussian that wraps around, as a product in the frequencies: a fifth of the time of a
        convolution.
        """
        noise = random.standard_normal(self.shape, dtype=np.float32)
        sigmas = (length / self.pixel, length / self.pixel, length / self.thickness)
        frequencies = (*(fft.fftfreq(n) for n in self.shape[:2]), fft.rfftfreq(self.shape[2]))
        rows, columns, heights = (
            np.exp(-2 * (np.pi * sigma * f) ** 2).astype(np.float32)
            for sigma, f in zip(sigmas, frequencies, strict=True)
        )
        response = rows[:, None, None] * columns[None, :, None] * heights[None, None, :]
        field = fft.irfftn(fft.rfftn(noise) * response, s=self.shape)
        field -= field.mean()
        return np.asarray(field / field.std(), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class _Atlas:
    """Tissue maps at 1 mm and, at 2 mm, the distance in mm from the brain's hull (negative inside)."""

    grey: FloatArray
    white: FloatArray
    depth: FloatArray


# The middle of the slab in voxels of the atlas: half-way through the head, the ventricles in view.
_CENTRE = (98.0, 116.0, 101.0)


@functools.cache
def _atlas() -> _Atlas:
    try:
        from nilearn import datasets
    except ImportError as error:
        raise MissingExtra("making phantoms", "demo") from error
    grey, white = (
        np.asarray(load(resolution=1).dataobj, dtype=np.float32)
        for load in (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    )
    brain = (grey + white)[::2, ::2, ::2] > 0.1
    # Closing over 12 mm bridges the fissures: the skull follows the hull, not the folds.
    dilated = ndimage.distance_transform_edt(~brain) <= 6
    hull = ndimage.distance_transform_edt(dilated) > 6
    depth = 2 * (ndimage.distance_transform_edt(~hull) - ndimage.distance_transform_edt(hull))
    # Thick slices see an average along the axis of the body.
    grey, white = (ndimage.gaussian_filter(tissue, (0.5, 0.5, 1.5)) for tissue in (grey, white))
    return _Atlas(grey, white, depth.astype(np.float32))


Fractions = dict[str, FloatArray]


def _head(grid: _Grid, random: np.random.Generator) -> Fractions:
    """Return the share of every tissue in every voxel; what is missing to 1 is air."""
    atlas = _atlas()
    places = _deform(grid, random) + np.array(_CENTRE, dtype=np.float32).reshape(3, 1, 1, 1)
    depth = _sample(atlas.depth, np.asarray(places / 2, dtype=np.float32))
    grey, white = _sample(atlas.grey, places), _sample(atlas.white, places)
    # An average brain is blurred: sharpen it, and let chance decide between tissues where the average cannot.
    maps = [grey, white, np.clip(1 - grey - white, 0, 1)]
    odds = np.stack([(m + 0.01) ** 2.5 * np.exp(0.9 * grid.texture(random, 3.5)) for m in maps])
    inside = _below(depth, 0.0, grid.pixel)
    brain = odds / odds.sum(axis=0) * inside
    wobble = 1 + 0.07 * grid.texture(random, 25.0)
    edges = np.cumsum(np.array([2.0, 2.2, 2.5, 2.2, 4.5, 2.0]) * random.uniform(0.8, 1.2, 6))
    reached = [inside] + [_below(depth, edge * wobble, grid.pixel) for edge in edges]
    fluid, inner, marrow, outer, fat, skin = (b - a for a, b in itertools.pairwise(reached))
    return {
        "grey": brain[0],
        "white": brain[1],
        "csf": brain[2] + fluid,
        "bone": inner + outer + 0.55 * marrow,
        "fat": fat + 0.45 * marrow,
        "skin": skin,
    }


def _deform(grid: _Grid, random: np.random.Generator) -> FloatArray:
    """Return where in the atlas (mm around its middle) a random patient's voxels lie, `(3, H, W, slices)`."""
    turn, nod, tilt = np.deg2rad(random.normal(0, (4.0, 2.5, 2.5)))
    rotation = _rotation(0, 1, turn) @ _rotation(1, 2, nod) @ _rotation(0, 2, tilt)
    affine = rotation @ np.diag(random.uniform(0.93, 1.07, 3)) + random.normal(0, 0.015, (3, 3))
    positions = grid.positions()
    moved = np.tensordot(affine, positions, axes=1) + random.normal(0, 2.5, 3).reshape(3, 1, 1, 1)
    warp = np.stack([grid.texture(random, 28.0) for _ in range(3)]) * 3.0
    return np.asarray(moved + warp, dtype=np.float32)


def _rotation(first: int, second: int, angle: float) -> NDArray[np.float64]:
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def _sample(volume: FloatArray, places: FloatArray) -> FloatArray:
    return np.asarray(ndimage.map_coordinates(volume, places, order=1, mode="nearest"), dtype=np.float32)


def _below(values: FloatArray, edge: float | FloatArray, width: float) -> FloatArray:
    """Return 1 below an edge and 0 above, with a ramp `width` wide: a voxel's share of volume."""
    return np.asarray(np.clip(0.5 + (edge - values) / width, 0, 1), dtype=np.float32)


def _grow_tumour(fractions: Fractions, grid: _Grid, random: np.random.Generator) -> Fractions:
    """Replace healthy tissue by a tumour that starts in white matter; oedema follows the white matter."""
    positions = grid.positions()
    x, _, z = positions
    middle = abs(z) < 0.3 * grid.slices * grid.thickness
    seeds = np.argwhere((fractions["white"] > 0.9) & (abs(x) > 15) & middle)
    centre = positions[:, *seeds[random.integers(len(seeds))]]
    radius = random.uniform(9.0, 20.0)
    distance = np.linalg.norm(positions - centre.reshape(3, 1, 1, 1), axis=0) / radius
    distance = distance * np.exp(0.25 * grid.texture(random, 8.0))
    ramp = grid.pixel / radius
    brain = np.minimum(1, fractions["grey"] + fractions["white"] + 0.5 * fractions["csf"])
    mass = _below(distance, 1.0, ramp)
    ragged = distance * np.exp(0.2 * grid.texture(random, 4.0))
    core, ring = (np.minimum(mass, _below(ragged, edge, ramp)) for edge in (0.5, 0.72))
    reach = random.uniform(1.4, 2.0)
    spread = _below(distance, reach, 3 * ramp) * fractions["white"]
    lesion = {
        "necrosis": core * brain,
        "rim": (ring - core) * brain,
        "tumour": (mass - ring) * brain,
        "oedema": 0.85 * (1 - mass) * spread,
    }
    lesion = {name: share.astype(np.float32) for name, share in lesion.items()}
    taken = np.minimum(1, np.sum(list(lesion.values()), axis=0))
    healthy = {name: share * (1 - taken) for name, share in fractions.items()}
    return healthy | lesion


def _scan(fractions: Fractions, site: PhantomSite, grid: _Grid, random: np.random.Generator) -> FloatArray:
    """Return the magnitude image in whole numbers, as scanners store it."""
    image = np.zeros(grid.shape, dtype=np.float32)
    for name, share in fractions.items():
        tissue = TISSUES[site.protocol.field][name]
        if site.protocol.gadolinium and name in _ENHANCED_T1:
            tissue = replace(tissue, t1=_ENHANCED_T1[name])
        tissue = replace(tissue, t1=tissue.t1 * random.uniform(0.95, 1.05), t2=tissue.t2 * random.uniform(0.95, 1.05))
        grain = 1 + 0.03 * grid.texture(random, 2.5)
        image += share * grain * signal(site.protocol, tissue)
    x, y, z = grid.positions() / (site.field_of_view / 2)
    weights = random.uniform(-1, 1, 6)
    bias = sum(w * term for w, term in zip(weights, (x, y, z, x * y, x * x, y * y), strict=True))
    image = np.abs(ndimage.gaussian_filter(image, (0.45, 0.45, 0))) * np.exp(site.bias * bias)
    noise = 0.003 * np.percentile(image, 99.5) * random.standard_normal((2, *grid.shape))
    magnitude = np.hypot(image + noise[0], noise[1])
    return np.asarray(np.round(magnitude / magnitude.max() * random.uniform(900, 3500)), dtype=np.float32)
