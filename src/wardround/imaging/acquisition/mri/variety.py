"""Training scans of many scanners: what `acquisition.vary` draws, and how it changes the image that is scanned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import PchipInterpolator

from wardround.imaging.acquisition.mri.simulate import smooth_phase
from wardround.study import MRIAcquisition
from wardround.study.acquisition import MRIVariety

FloatArray = NDArray[np.float32]
# Calibration lines leave at least this share of the measured ones to the rest of k-space.
_REST = 0.4
# A curve of intensities: the number of its random points above 0, and the lowest value that they can have.
_POINTS, _LEAST = 5, 0.05


def drawn(acquisition: MRIAcquisition, random: np.random.Generator) -> MRIAcquisition:
    """The scanner of one training scan: the site's with what `vary` says drawn from its ranges, and no `vary`."""
    variety = acquisition.vary
    if variety is None:
        return acquisition
    new: dict[str, float] = {}
    for name in ("noise", "noise_correlation", "phase", "phase_detail", "coil_radius"):
        ends = getattr(variety, name)
        if ends is not None:
            new[name] = evenly_in_logarithms(ends, random) if name == "noise" else float(random.uniform(*ends))
    mask: dict[str, float | str] = {}
    if variety.acceleration is not None:
        mask["acceleration"] = float(random.uniform(*variety.acceleration))
    if variety.families:
        mask["family"] = variety.families[int(random.integers(len(variety.families)))]
    if variety.calibration is not None:
        mask["calibration"] = float(random.uniform(*variety.calibration))
    changed = acquisition.mask.model_copy(update=mask)
    room = (1 - _REST) / changed.acceleration if changed.acceleration > 1 else 1.0
    changed = changed.model_copy(update={"calibration": min(changed.calibration, room)})
    if variety.coils is not None:
        fewest, most = variety.coils
        new["coils"] = min(int(evenly_in_logarithms((fewest, most + 1), random)), most)
    return acquisition.model_copy(update={**new, "mask": changed, "vary": None})


def evenly_in_logarithms(ends: tuple[float, float], random: np.random.Generator) -> float:
    """A number between two positive ones, evenly drawn on a logarithmic scale."""
    return float(np.exp(random.uniform(np.log(ends[0]), np.log(ends[1]))))


def changed(image: FloatArray, variety: MRIVariety, random: np.random.Generator) -> FloatArray:
    """An image (H, W) in [0, 1] as another scanner would show it: turned, zoomed, of other contrast and shading."""
    if variety.turns and image.shape[0] == image.shape[1]:
        image = np.rot90(image, int(random.integers(4)))
    if variety.zoom is not None:
        image = zoomed(image, evenly_in_logarithms(variety.zoom, random), random)
    if variety.gamma is not None:
        image = image ** np.float32(evenly_in_logarithms(variety.gamma, random))
    if variety.tones > 0 and random.random() < variety.tones:
        image = toned(image, random)
    if variety.bias > 0:
        shape = (image.shape[0], image.shape[1])
        image = image * (1 + smooth_phase(shape, variety.bias * random.random(), random))
    return np.ascontiguousarray(image, dtype=np.float32)


def toned(image: FloatArray, random: np.random.Generator) -> FloatArray:
    """The image (H, W) in [0, 1] with its intensities along a random curve; air stays 0, and the peak what it was.

    The curve need not rise: fat may come to be darker than fluid, and edges between tissues may vanish or turn round,
    as from one weighting (T1, T2, FLAIR) to another. Monotone between its points, so that no new grey is made.
    """
    peak = float(image.max())
    if peak <= 0:
        return image
    heights = np.concatenate([[0.0], random.uniform(_LEAST, 1.0, _POINTS)])
    curve = PchipInterpolator(np.linspace(0, 1, _POINTS + 1), heights)
    new = curve(image / peak)
    return np.asarray(new * (peak / new.max()), dtype=np.float32)


def zoomed(image: FloatArray, factor: float, random: np.random.Generator) -> FloatArray:
    """The image (H, W) enlarged by `factor`, with cubic splines, in a field of view of the same number of pixels.

    An enlarged one is cut somewhere within a quarter of what no longer fits; one made smaller is smoothed beforehand,
    so that nothing folds, and has air around it. Values stay in [0, 1].
    """
    shape = np.array(image.shape)
    centre = shape / 2 - 0.5
    slack = 0.25 * shape * abs(1 - 1 / factor)
    start = centre + random.uniform(-slack, slack)
    if factor < 1:
        image = ndimage.gaussian_filter(image, 0.4 * np.sqrt(1 / factor**2 - 1))
    moved = ndimage.affine_transform(image, np.full(2, 1 / factor), start - centre / factor, order=3, prefilter=True)
    return np.asarray(np.clip(moved, 0, 1), dtype=np.float32)
