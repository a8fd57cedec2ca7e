"""MRI reconstruction from raw data that a site's own scanner measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wardround.imaging.acquisition.mri.coils import estimate_maps
from wardround.imaging.acquisition.mri.masks import sampling_mask
from wardround.imaging.acquisition.mri.operator import ifft2c
from wardround.imaging.acquisition.mri.scanner import Scan
from wardround.imaging.datasets.memory import CACHE_BYTES, ScanCache
from wardround.imaging.datasets.mri import SPLITS, BoolArray, SliceExample
from wardround.imaging.datasets.raw import Quarantine, RawExample, RawIndex, RawVisits, mirrored
from wardround.imaging.datasets.visits import Index
from wardround.imaging.readers.aside import refuse
from wardround.imaging.readers.raw.folder import RawFolder
from wardround.imaging.readers.volume import FloatArray
from wardround.study import schema
from wardround.study import tasks as tasks_config
from wardround.study.raw_acquisition import RawAcquisition
from wardround.tasks.mri import MRIBatch, MRIReconstruction
from wardround.tasks.reconstruction import NO_EMBEDDINGS, ReconstructionDataset
from wardround.tasks.task import Source, Split
from wardround.wire.random import public_generator


@dataclass(frozen=True, eq=False)
class _Kept:
    """A slice as it is measured and what it is compared with."""

    scan: Scan
    reference: FloatArray
    head: BoolArray

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return self.scan.nbytes + self.reference.nbytes + self.head.nbytes


class RawDataset(ReconstructionDataset[MRIBatch]):
    """One site's slices of raw data, undersampled as the study says; see `wardround.tasks.task.Dataset`.

    The mask is drawn for a patient (for the site where `mask.fixed`), from public randomness, so every arm of a study
    sees the same. Scans are kept in memory up to `cache_bytes`, measured samples only. A flip turns coil images and
    coils alike, about the middle column, before lines are left out; a file's own mask turns with them.
    """

    def __init__(
        self,
        index: RawIndex | RawVisits,
        acquisition: RawAcquisition,
        task: tasks_config.ReconstructionTask,
        *,
        seed: int,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        super().__init__(index, task, MRIBatch.joined)
        self.acquisition = acquisition
        self._raw, self._seed = index, seed
        self._cache = ScanCache[_Kept](cache_bytes)

    def scan(self, example: SliceExample, flip: bool) -> MRIBatch:
        """A batch of one slice, turned left-right before lines are left out where `flip` says so."""
        kept = self._cache.get((example, flip), lambda: self._measured_slice(example, flip))
        return MRIBatch.of(kept.scan, kept.reference, kept.head)

    def set_aside(self) -> Mapping[Split, int]:
        """How many patients of each part cannot be used; see `wardround.tasks.task.SetsAside`."""
        return self._raw.set_aside()

    def set_aside_unknown(self) -> int:
        """None: every file is somebody's."""
        return 0

    def _measured_slice(self, example: SliceExample, flip: bool) -> _Kept:
        found = self._raw.raw(example)
        if flip:
            turned = (mirrored(part) for part in (found.kspace, found.mask, found.reference, found.head))
            found = RawExample(*turned)
        mask = found.mask * self._mask(example.patient, found.mask.shape)
        where = torch.from_numpy(mask != 0)
        kspace = torch.from_numpy(found.kspace)
        scan = Scan(kspace[:, where], where, None)
        if self.acquisition.maps == "espirit":
            # Kept: to estimate them again at every visit would cost more than a step of training.
            measured, mask_of_it, _ = scan.unpacked()
            scan = replace(scan, maps=estimate_maps(measured[None], mask_of_it[None], "espirit")[0])
        reference = found.reference
        if self.acquisition.reference == "combined":
            _, _, maps = scan.unpacked()
            reference = combined(kspace, maps).numpy()
        return _Kept(scan, reference, found.head)

    def _mask(self, patient: int, shape: tuple[int, ...]) -> FloatArray:
        if self.acquisition.sampling == "own":
            return np.ones(shape, np.float32)
        whose = () if self.acquisition.mask.fixed else (patient,)
        random = public_generator(self._seed, self.site, "mask", *whose)
        return sampling_mask(self.acquisition.mask, (shape[0], shape[1]), random)


class RawMRIReconstruction(MRIReconstruction):
    """Magnitude images from undersampled k-space that scanners measured."""

    def __init__(self, study: schema.Study, embeddings: Mapping[str, Path] = NO_EMBEDDINGS) -> None:
        super().__init__(study, embeddings)
        self._quarantine: Quarantine = refuse

    def set_aside_by(self, quarantine: Quarantine) -> None:
        """See `wardround.tasks.task.SettingAside`."""
        self._quarantine = quarantine

    def index(self, site: str, source: Source, scanner: str, served: Sequence[Split] = SPLITS) -> RawIndex:  # type: ignore[override]
        """The slices of a site's files, as the study's settings for the site `scanner` take them."""
        acquisition = self._acquisition(scanner)
        return RawIndex(
            RawFolder(source, site),
            size=self.config.size,
            slices=self.config.slices,
            split=self.config.split,
            seed=self.study.seed,
            sampling=acquisition.sampling,
            reference=acquisition.has_reference,
            espirit=acquisition.maps == "espirit",
            role=self.study.sites[site].role,
            deal=self._deal,
            quarantine=self._quarantine,
            served=served,
        )

    def visitors(self, site: str, sources: Mapping[str, Source]) -> RawVisits:  # type: ignore[override]
        """The test patients of other sites, as an index of `site`."""
        return RawVisits(site, [self.index(member, source, site, ("test",)) for member, source in sources.items()])

    def scans(self, index: Index) -> RawDataset:  # type: ignore[override]
        """What is left of an index's slices as the study says for its site."""
        assert isinstance(index, RawIndex | RawVisits)
        return RawDataset(index, self._acquisition(index.site), self.config, seed=self.study.seed)

    def _acquisition(self, site: str) -> RawAcquisition:
        found = self.study.acquisition_of(site)
        assert isinstance(found, RawAcquisition)
        return found


def combined(kspace: Tensor, maps: Tensor) -> Tensor:
    """Magnitude (H, W) of coil images combined by maps, |sum conj(S_c) F* k_c|, of full k-space (C, H, W).

    With maps of root sum of squares 1 it is what least squares finds of the full scan, and never above the root sum of
    squares of the coil images. Roemer et al., Magn. Reson. Med. 16 (1990), 192.
    """
    return (maps.conj() * ifft2c(kspace)).sum(0).abs()
