"""A task of your own: three hospitals learn together whether a small image shows a bright spot.

    python examples/own_task.py

A task says what is learned: a site's data, the model, the loss, the metrics. All else (rounds, sums, protection, the
report) is Wardround's. This file makes up its data, trains in a temporary folder and prints how well the model does.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import wardround
from wardround.study.sites import SiteData, SitesFile
from wardround.tasks.task import MetricSpec, Source, Split

# Of four patients of a site two train, one validates, one tests. A patient has a number here, never a name.
SPLITS = ("train", "train", "validation", "test")


@dataclass(frozen=True)
class Patients:
    """The data of one site, which stay there: a patient is an image and a label."""

    images: Tensor  # (patients, 16, 16)
    labels: Tensor  # (patients,): 1 with a spot, 0 without

    def of(self, split: Split) -> list[int]:
        """The patients of a split."""
        return [patient for patient in range(len(self.labels)) if SPLITS[patient % 4] == split]

    def fingerprint(self) -> str:
        """A hash of all that training can see: a run that goes on with other data is refused."""
        return hashlib.sha256(self.images.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.of("train"))

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Training examples by number. Augment them with `random` and nothing else, so that a run can be repeated."""
        patients = [self.of("train")[i] for i in indices]
        return self.images[patients], self.labels[patients]

    def owners(self) -> Sequence[int]:
        """The patient of each training example: the unit that differential privacy protects."""
        return self.of("train")

    def patients(self, split: Split) -> int:
        return len(self.of(split))

    def evaluation(self, split: Split) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(patient, batch) one patient after the other; a patient may have several batches."""
        return ((patient, (self.images[[patient]], self.labels[[patient]])) for patient in self.of(split))


class FindSpot:
    """What the study learns."""

    # Name, lowest and highest value, resolution, whether larger is better, label. The first selects the released round.
    # A metric is a mean over patients; `wardround.tasks.states` has others, such as an AUROC from sites' histograms.
    metrics = (MetricSpec("error", 0.0, 1.0, 1e-6, False, "Error", definition="1 - probability of the true label"),)

    def build_model(self) -> nn.Module:
        """A fresh network; Wardround seeds torch before, so that all sites begin with the same values."""
        layers = nn.Conv2d(1, 4, 5), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 1)
        return nn.Sequential(nn.Unflatten(1, (1, 16)), *layers)

    def dataset(self, site: str, source: Source) -> Patients:
        """The data of a site; `source` are the folders that the site's own file names."""
        with np.load(source[0] / "patients.npz") as file:
            return Patients(torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]))

    def pooled(self, parts: Sequence[Patients]) -> Patients:
        """All sites' data in one place, for `compare=["pooled"]`: an ideal that exists on one machine only."""
        return Patients(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The number that training lowers."""
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0]).squeeze(1), batch[1])

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The metrics of each example, by name: (B,)."""
        return {"error": (model(batch[0]).sigmoid().squeeze(1) - batch[1]).abs()}


def hospitals(folder: Path) -> SitesFile:
    """Three made-up hospitals: noise, and in half of the images a bright spot. Returns where each one's data lie."""
    folders = {name: folder / name for name in ("Aachen", "Bergen", "Cadiz")}
    for number, place in enumerate(folders.values()):
        random = np.random.default_rng(number)
        images = random.normal(0.0, 0.5, (64, 16, 16)).astype(np.float32)
        labels = (np.arange(64, dtype=np.float32) // 4) % 2
        for patient in np.flatnonzero(labels):
            row, column = random.integers(2, 11, 2)
            images[patient, row : row + 3, column : column + 3] += 1.5
        place.mkdir(parents=True)
        np.savez(place / "patients.npz", images=images, labels=labels)
    return SitesFile(sites={name: SiteData(data=(place,)) for name, place in folders.items()})


def main(out: Path, **changes: object) -> wardround.Result:
    """Train in `out` and return the result. `changes` replace parts of the study."""
    sites = hospitals(out / "data")
    task = {"kind": "custom", "factory": "own_task:FindSpot"}  # `module:callable`
    study = {"name": "own-task", "sites": {name: {} for name in sites.sites}, "task": task}
    study |= {"local": {"steps": 8, "batch": 8, "lr": 0.02}, "schedule": {"rounds": 4}} | changes
    # `allow_code`: the study names code by its place. Do that with your own studies, on your own machine, only.
    return wardround.run(study, sites, out / "run", engine="local", quiet=True, allow_code=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(f"Error, mean over sites: {main(Path(temporary)).metric('federated', 'mean', 'error'):.3f}")
