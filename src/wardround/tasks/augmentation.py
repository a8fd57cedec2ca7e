"""Random changes of training images with their masks: MONAI's transforms, named in the study and drawn from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wardround.errors import StudyError

IMAGE, MASK = "image", "mask"
#: MONAI's dictionary transforms that move voxels, with whether they take a mode of interpolation: mask and image alike.
SPATIAL: Mapping[str, bool] = {
    "RandFlipd": False,
    "RandAxisFlipd": False,
    "RandRotate90d": False,
    "RandRotated": True,
    "RandZoomd": True,
    "RandAffined": True,
    "Rand2DElasticd": True,
    "Rand3DElasticd": True,
}
#: Those that change values: the image alone.
INTENSITY = (
    "RandScaleIntensityd",
    "RandShiftIntensityd",
    "RandAdjustContrastd",
    "RandGaussianNoised",
    "RandRicianNoised",
    "RandGaussianSmoothd",
    "RandGaussianSharpend",
    "RandBiasFieldd",
    "RandHistogramShiftd",
    "RandGibbsNoised",
    "RandCoarseDropoutd",
)


def standard(dimensions: int) -> tuple[Mapping[str, Any], ...]:
    """Flips along every axis, quarter turns in the plane, brightness and noise of images with deviation 1."""
    flips = tuple({"name": "RandFlipd", "prob": 0.5, "spatial_axis": axis} for axis in range(dimensions))
    return (
        *flips,
        {"name": "RandRotate90d", "prob": 0.5, "max_k": 3, "spatial_axes": [0, 1]},
        {"name": "RandScaleIntensityd", "prob": 1.0, "factors": 0.1},
        {"name": "RandShiftIntensityd", "prob": 1.0, "offsets": 0.1},
        {"name": "RandGaussianNoised", "prob": 0.2, "std": 0.1},
    )


class Augmentation:
    """A chain of MONAI's transforms. Raises StudyError for a name that is not listed, and for wrong arguments."""

    def __init__(self, chain: Sequence[Mapping[str, Any]]) -> None:
        # Late: MONAI takes seconds to import, and a study without augmentation needs none of it.
        from monai.transforms import Compose

        self._chain = Compose([_made(step) for step in chain]).set_random_state(seed=0)
        self._generators = [_generators(step) for step in self._chain.transforms]

    def __call__(self, image: Tensor, mask: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """image (C, *shape) float32 and mask (K, *shape) changed with `random` alone, of the same shapes."""
        changed = self._changed({IMAGE: image, MASK: mask}, random)
        return changed[IMAGE], changed[MASK]

    def of_image(self, image: Tensor, random: np.random.Generator) -> Tensor:
        """The same of an image (C, *shape) without a mask."""
        return self._changed({IMAGE: image}, random)[IMAGE]

    def _changed(self, parts: dict[str, Tensor], random: np.random.Generator) -> dict[str, Tensor]:
        if not self._generators:
            return parts
        from monai.data import set_track_meta
        from monai.data.meta_obj import get_track_meta

        self._seed(int(random.integers(2**32)))
        before = get_track_meta()
        set_track_meta(False)
        try:
            changed = self._chain(parts)
        finally:
            set_track_meta(before)
        return {name: torch.as_tensor(part).contiguous() for name, part in changed.items()}

    def _seed(self, seed: int) -> None:
        """As MONAI's `set_random_state` seeds a chain, in place: it makes new generators, which takes milliseconds."""
        from monai.utils import MAX_SEED

        self._chain.R.seed(seed % MAX_SEED)
        for generators in self._generators:
            own = int(self._chain.R.randint(MAX_SEED, dtype="uint32"))
            for generator in generators:
                generator.seed(own)


def _generators(part: Any) -> list[np.random.RandomState]:
    """The generators of a random transform and of those that it is made of."""
    from monai.transforms import Randomizable

    inner = [each for each in vars(part).values() if isinstance(each, Randomizable)]
    return [part.R, *(generator for each in inner for generator in _generators(each))]


def _made(step: Mapping[str, Any]) -> Any:
    import monai.transforms

    given = dict(step)
    name = given.pop("name", None)
    if name not in SPATIAL and name not in INTENSITY:
        raise StudyError(f"task.augment: {name!r} is none of {', '.join((*SPATIAL, *INTENSITY))}")
    given["keys"] = [IMAGE, MASK] if name in SPATIAL else [IMAGE]
    given["allow_missing_keys"] = True
    if SPATIAL.get(name):
        given.setdefault("mode", ["bilinear", "nearest"])
    try:
        return getattr(monai.transforms, name)(**given)
    except (TypeError, ValueError) as error:
        raise StudyError(f"task.augment: {name} cannot be made with these arguments: {error}") from error
