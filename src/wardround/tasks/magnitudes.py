"""What reconstructions of magnitude images share, whatever measured the raw data: slices of folders, PSNR first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from wardround.imaging.datasets.mri import SliceIndex
from wardround.imaging.datasets.visits import Visits
from wardround.imaging.readers.folder import SiteFolder
from wardround.tasks.metrics import RECONSTRUCTION_METRICS, reconstruction_scores
from wardround.tasks.reconstruction import ReconstructionBase
from wardround.tasks.task import MetricSpec, Source, Window

BatchT = TypeVar("BatchT", bound=Any)


class MagnitudeReconstruction(ReconstructionBase[BatchT]):
    """A reconstruction whose batches have a `target`, the true magnitudes (B, H, W)."""

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """PSNR first: it selects the released round."""
        return RECONSTRUCTION_METRICS

    @property
    def windows(self) -> tuple[Window, ...]:
        """None: a magnitude image has its own range."""
        return ()

    def index(self, site: str, source: Source, scanner: str) -> SliceIndex:
        """The slices of a site's folders; all scanners take them alike."""
        return SliceIndex(
            SiteFolder(source, site),
            contrasts=self.config.contrasts,
            size=self.config.size,
            slices=self.config.slices,
            split=self.config.split,
            seed=self.study.seed,
            role=self.study.sites[site].role,
            deal=self._deal,
        )

    def visitors(self, site: str, sources: Mapping[str, Source]) -> Visits[SliceIndex]:
        """The test patients of other sites, as an index of `site`."""
        return Visits(site, [self.index(member, source, site) for member, source in sources.items()])

    def score_images(self, images: Tensor, batch: BatchT) -> dict[str, Tensor]:
        """All metrics of magnitude images (B, H, W), from whatever method: name -> (B,)."""
        return reconstruction_scores(images, batch.target, self.inside(batch))
