"""A scanner of your own: a camera that blurs. A network learns to undo the blur, at three hospitals together.

    python examples/own_operator.py

Physics is one class, a linear operator A with its exact adjoint. Wardround's unrolled networks and solvers take any
operator: below, MoDL (a denoiser and conjugate gradients in turn) restores images from blurred, noisy measurements.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from own_task import Patients
from torch import Tensor, nn

import wardround
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.models.unrolled import PRESETS, MoDL
from wardround.study.sites import SiteData, SitesFile
from wardround.tasks.task import MetricSpec, Source, Split

SIZE = 32


class Blur(LinearOperator):
    """y = A x: a Gaussian blur that wraps around the edges, a product in Fourier space. Shapes lack the batch axis."""

    def __init__(self, widths: Tensor) -> None:
        """`widths` (B,) in pixels: each scan of a batch may have a blur of its own."""
        frequency = torch.fft.fftfreq(SIZE)
        squared = frequency[:, None] ** 2 + frequency[None, :] ** 2
        # Tensors that are attributes move to a site's device with the operator.
        self.response = torch.exp(-2.0 * (torch.pi * widths[:, None, None]) ** 2 * squared)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return (SIZE, SIZE)

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (SIZE, SIZE)

    def A(self, x: Tensor) -> Tensor:
        """Measure: images (B, 32, 32) to data (B, 32, 32)."""
        return torch.fft.ifft2(torch.fft.fft2(x) * self.response).real

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The adjoint: <A x, y> = <x, A_adjoint y> for all x and y. In Fourier space it is the conjugate factor."""
        return torch.fft.ifft2(torch.fft.fft2(y) * self.response.conj()).real


# What a batch is, the task decides: a tensor, a tuple, a dataclass. It moves to the device as one.
Batch = tuple[LinearOperator, Tensor, Tensor]  # the operator, the data, the true images


@dataclass(frozen=True)
class Scans(Patients):
    """The scans of a site; patients are split as in `own_task.py`. `labels` are the widths of their blur in pixels."""

    data: Tensor  # (patients, 32, 32): the images, blurred and noisy

    def rows(self, patients: Sequence[int]) -> Batch:
        return Blur(self.labels[patients]), self.data[patients], self.images[patients]

    def fingerprint(self) -> str:
        return hashlib.sha256(self.data.numpy().tobytes()).hexdigest()

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> Batch:
        return self.rows([self.of("train")[i] for i in indices])

    def evaluation(self, split: Split) -> Iterator[tuple[int, Batch]]:
        return ((patient, self.rows([patient])) for patient in self.of(split))


class Deblur:
    """The task: images from blurred data."""

    metrics = (MetricSpec("rmse", 0.0, 10.0, 1e-6, False, "RMSE", definition="root of the mean squared error"),)

    def build_model(self) -> nn.Module:
        return MoDL(replace(PRESETS["tiny"], image="real"))

    def dataset(self, site: str, source: Source) -> Scans:
        """Made-up squares, measured by the camera of this site, which blurs by a width of its own."""
        random, widths = torch.Generator().manual_seed(sum(map(ord, site))), torch.full((16,), 1.0 + 0.1 * len(site))
        images = torch.zeros(16, SIZE, SIZE)
        for image in images:
            for row, column in torch.randint(0, SIZE - 8, (4, 2), generator=random).tolist():
                image[row : row + 8, column : column + 8] += 0.25
        return Scans(images, widths, Blur(widths).A(images) + 0.02 * torch.randn(images.shape, generator=random))

    def pooled(self, parts: Sequence[Scans]) -> Scans:
        return Scans(*(torch.cat([getattr(one, name) for one in parts]) for name in ("images", "labels", "data")))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0], batch[1]) - batch[2]).abs().mean()

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"rmse": (model(batch[0], batch[1]) - batch[2]).square().mean((1, 2)).sqrt()}


def main(out: Path) -> wardround.Result:
    """Train in `out` and return the result. The folders are empty: this task makes its images up."""
    folders = {name: out / name for name in ("Ulm", "Bergen", "Coventry")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    sites = SitesFile(sites={name: SiteData(data=(folder,)) for name, folder in folders.items()})
    study = {"name": "own-operator", "sites": {name: {} for name in folders}, "schedule": {"rounds": 5}}
    study |= {"task": {"kind": "custom", "factory": "own_operator:Deblur"}, "local": {"steps": 4, "batch": 4}}
    return wardround.run(study, sites, out / "run", engine="local", quiet=True, allow_code=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(f"RMSE, mean over sites: {main(Path(temporary)).metric('federated', 'mean', 'rmse'):.4f}")
