"""CT reconstruction: noisy sinograms of few views, simulated from a site's own images in Hounsfield units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.ct.cache import user_cache
from wardround.imaging.acquisition.ct.fbp import check_sweep
from wardround.imaging.acquisition.ct.geometry import check_geometry
from wardround.imaging.acquisition.ct.operator import matrix_limit
from wardround.imaging.acquisition.ct.simulate import REFINEMENT, CTSimulator
from wardround.imaging.acquisition.ct.system import CTSystem
from wardround.imaging.datasets.ct import CTFolder, CTIndex, Grid
from wardround.imaging.datasets.memory import CACHE_BYTES, ScanCache
from wardround.imaging.datasets.mri import SPLITS, SliceExample
from wardround.imaging.datasets.visits import Index, Visits
from wardround.imaging.readers.embeddings import Embeddings
from wardround.study import schema
from wardround.study import tasks as tasks_config
from wardround.study.ct import CTAcquisition
from wardround.study.protocols import HeaderFacts
from wardround.tasks.classical import Method
from wardround.tasks.ct_metrics import CT_METRICS, ct_scores, ct_windows
from wardround.tasks.reconstruction import NO_EMBEDDINGS, ReconstructionBase, ReconstructionDataset
from wardround.tasks.scans import Scans as CTScans
from wardround.tasks.scans import ScansBatch as CTBatch
from wardround.tasks.task import MetricSpec, Source, Split, Window
from wardround.wire.random import public_generator

_PICTURES = 2


class Scanner:
    """One acquisition: the simulator of its scans and the operator that reconstruction knows, built when first used.

    Their matrices are kept on the machine, see `imaging.acquisition.ct.cache.user_cache`. Raises GeometryError at once
    where the detector misses the patient, and for views that FBP cannot weigh; StudyError as `matrix_limit` does.
    """

    def __init__(self, acquisition: CTAcquisition) -> None:
        check_geometry(acquisition.geometry)
        check_sweep(acquisition.geometry)  # networks and baselines start at its image
        matrix_limit()  # where it cannot be read, that is an error of the study, not of a site when it trains
        self.acquisition = acquisition

    @property
    def grid(self) -> Grid:
        """The grid that slices are scanned on: finer than the image's."""
        geometry = self.acquisition.geometry
        rows, columns = geometry.size
        radius = min(rows, columns) * geometry.pixel / 2
        return Grid(
            (rows * REFINEMENT, columns * REFINEMENT),
            geometry.pixel / REFINEMENT,
            min(radius, geometry.body_radius or radius),
        )

    @cached_property
    def system(self) -> CTSystem:
        """The operator of reconstruction."""
        return CTSystem(self.acquisition, cache=user_cache())

    @cached_property
    def _simulator(self) -> CTSimulator:
        return CTSimulator(self.acquisition, refinement=REFINEMENT, cache=user_cache())

    def prepare(self, *, keep: bool) -> None:
        """Build both; without `keep` only into the cache of the machine, for other processes."""
        if keep:
            _ = self.system, self._simulator
        elif (cache := user_cache()) is not None:
            CTSystem(self.acquisition, cache=cache)
            CTSimulator(self.acquisition, refinement=REFINEMENT, cache=cache)

    def scan(self, hu: NDArray[np.float32], random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Data (views, bins) of `system` and the true image (H, W) of a slice in HU on `grid`."""
        measured = self._simulator(hu, random)
        return self.system.scaled(measured.sinogram), measured.reference / self.acquisition.mu_water

    def measured(self, hu: NDArray[np.float32], body: NDArray[np.bool_], random: np.random.Generator) -> CTScan:
        """A scan of a slice in HU with its body, both on `grid`."""
        data, target = self.scan(hu, random)
        rows, columns = target.shape
        share = body.reshape(rows, REFINEMENT, columns, REFINEMENT).mean((1, 3))
        return CTScan(data, target, torch.from_numpy(share >= 0.5))

    def batch(self, scan: CTScan, prompt: NDArray[np.float32] | None = None) -> CTBatch:
        """A batch of one scan, with the embedding of its patient if there is any."""
        part = CTScans(
            self.system,
            scan.data[None],
            scan.target[None],
            scan.body[None].float(),
            None if prompt is None else torch.from_numpy(prompt)[None],
        )
        return CTBatch((part,))


@dataclass(frozen=True, eq=False)
class CTScan:
    """One scan: data (views, bins), the true image and the body, bool, (H, W) each."""

    data: Tensor
    target: Tensor
    body: Tensor

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return self.data.nbytes + self.target.nbytes + self.body.nbytes


class CTDataset(ReconstructionDataset[CTBatch]):
    """One site's slices and their simulated CT scans.

    Noise is drawn for a slice. Scans are kept in memory up to `cache_bytes`; augmented ones, which never come again,
    are not. Raises DataError where an image cannot be used.
    """

    def __init__(
        self,
        index: Index,
        scanner: Scanner,
        task: tasks_config.ReconstructionTask,
        *,
        seed: int,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        super().__init__(index, task, CTBatch.joined)
        self.scanner = scanner
        self._seed = seed
        self._cache = ScanCache[CTScan](cache_bytes)

    def scan(self, example: SliceExample, flip: bool) -> CTBatch:
        """A batch of one slice, flipped left-right before its scan where `flip` says so."""

        def simulated() -> CTScan:
            random = public_generator(self._seed, self.site, "scan", example.patient, example.contrast, example.slice)
            return self.scanner.measured(*self._image(example, flip), random)

        return self._batch(self._cache.get((example, flip), simulated), example)

    def augmented(self, example: SliceExample, flip: bool, random: np.random.Generator) -> CTBatch:
        """With `task.augment`, turned by quarters before a scan with noise of its own."""
        if not self.task.augment:
            return self.scan(example, flip)
        image, body = self._image(example, flip)
        turned = _turned(image, body, random)
        return self._batch(self.scanner.measured(*turned, random), example)

    def prepare(self, *, keep: bool) -> None:
        """Build the scanner's matrices."""
        self.scanner.prepare(keep=keep)

    def remarks(self) -> tuple[str, ...]:
        """What somebody should know of the data before training on them."""
        return self._index.remarks() if isinstance(self._index, CTIndex) else ()

    def header_facts(self, minimum: int) -> HeaderFacts:
        """What headers of training patients say of the scanners; nothing where other sites' patients are scanned."""
        return self._index.header_facts(minimum) if isinstance(self._index, CTIndex) else HeaderFacts()

    def _image(self, example: SliceExample, flip: bool) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        image, body = self._index.image(example), self._index.mask(example)
        if flip:
            image, body = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(body[:, ::-1])
        return image, body

    def _batch(self, scan: CTScan, example: SliceExample) -> CTBatch:
        return self.scanner.batch(scan, self._index.prompt(example))


def _turned(
    image: NDArray[np.float32], body: NDArray[np.bool_], random: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """An image and its mask after a random number of quarter turns, of half turns where they are not square.

    No other angle and no scaling: interpolation blurs, and a network trained on blurred images restores sharp ones
    worse (measured on chest slices: 0.6 dB).
    """
    turns = int(random.integers(4))
    if image.shape[0] != image.shape[1]:
        turns -= turns % 2
    return np.ascontiguousarray(np.rot90(image, turns)), np.ascontiguousarray(np.rot90(body, turns))


class Scanners:
    """The scanners of a study; sites of one acquisition share one, and its matrices."""

    def __init__(self) -> None:
        self._known: dict[str, Scanner] = {}

    def of(self, acquisition: CTAcquisition, site: str | None) -> Scanner:
        """That of a site, or of the study. Raises StudyError for an impossible geometry."""
        key = acquisition.model_dump_json()
        if key not in self._known:
            try:
                self._known[key] = Scanner(acquisition)
            except GeometryError as error:
                place = "" if site is None else f"site {site}, "
                raise StudyError(f"{place}acquisition.geometry: {error}") from error
        return self._known[key]


class CTReconstruction(ReconstructionBase[CTBatch]):
    """Images in attenuation relative to water from noisy sinograms of few views.

    Raises StudyError for tiny images, for a geometry of another size than the task's, and for a geometry that cannot
    be measured with. `embeddings` are the files of the sites that provide them, for a model with `anatomy`.
    """

    def __init__(self, study: schema.Study, embeddings: Mapping[str, Path] = NO_EMBEDDINGS) -> None:
        super().__init__(study, embeddings)
        self._scanners = Scanners()
        for site in study.sites:
            self.scanner(site)

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """PSNR of the full range first: it selects the released round."""
        return CT_METRICS

    @property
    def windows(self) -> tuple[Window, ...]:
        """Lung and soft tissue."""
        return ct_windows()

    def scanner(self, site: str) -> Scanner:
        """The scanner of a site; sites of one acquisition share it. Raises StudyError for an impossible geometry."""
        acquisition = self.study.acquisition_of(site)
        assert isinstance(acquisition, CTAcquisition)
        return self._scanners.of(acquisition, site)

    def index(self, site: str, source: Source, scanner: str, served: Sequence[Split] = SPLITS) -> CTIndex:
        """The slices of a site's folders on the grid of the scanner of the site `scanner`; of `served` splits alone."""
        return CTIndex(
            CTFolder(source, site, self._prompts(site)),
            self.scanner(scanner).grid,
            slices=self.config.slices,
            split=self.config.split,
            seed=self.study.seed,
            role=self.study.sites[site].role,
            deal=self._deal,
            served=served,
        )

    def _prompts(self, site: str) -> Embeddings | None:
        """What a site provides of its patients, where the model takes it.

        A site that only tests may have none, as a hospital may that gets the model: its maps are neutral. Raises
        StudyError for a training site without.
        """
        dimension = self.study.model.prompt_dimension
        if dimension is None:
            return None
        if site in self._embeddings:
            return Embeddings(self._embeddings[site], dimension, f"site {site}")
        if site in self.study.training_sites:
            raise StudyError(
                f"model.anatomy needs an embedding of every patient, and site {site} provides none; add the file as "
                f"`sites.{site}.embeddings` to the sites file, or remove model.anatomy"
            )
        return None

    def visitors(self, site: str, sources: Mapping[str, Source]) -> Visits[CTIndex]:
        """The test patients of other sites, as an index of `site`."""
        return Visits(site, [self.index(member, source, site, ("test",)) for member, source in sources.items()])

    def scans(self, index: Index) -> CTDataset:
        """The acquisitions of an index's slices by its site's scanner."""
        return CTDataset(index, self.scanner(index.site), self.config, seed=self.study.seed)

    def joined(self, batches: Sequence[CTBatch]) -> CTBatch:
        """One batch of all slices, in order."""
        return CTBatch.joined(batches)

    def images(self, model: nn.Module, batch: CTBatch) -> Tensor:
        """The model's reconstruction (B, H, W), scanner by scanner."""
        return batch.images(model)

    def reconstruct(self, model: nn.Module, batch: CTBatch) -> Tensor:
        """Attenuation (B, H, W), at least 0, in evaluation mode and without gradients."""
        return super().reconstruct(model, batch).clamp_min(0.0)

    def inside(self, batch: CTBatch) -> Tensor:
        """Where the body is: (B, H, W)."""
        return batch.body

    def score_images(self, images: Tensor, batch: CTBatch) -> dict[str, Tensor]:
        """All metrics of images in attenuation relative to water (B, H, W): name -> (B,)."""
        return ct_scores(images, batch.target, batch.body)

    def classical(self, method: Method, batch: CTBatch) -> Tensor:
        """Attenuation (B, H, W), at least 0."""
        return batch.images(method).clamp_min(0.0)

    @property
    def _shown(self) -> int:
        return _PICTURES
