"""The other side of overhead_images.py: made-up hospitals, and the loops that a MONAI user would write for them.

They are lean where MONAI lets them be: files are read and normalised once (CacheDataset), tensors carry no metadata
(its guide to fast training), no worker processes. Their sites are averaged by hand.
"""

from __future__ import annotations

import copy
import csv
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 128
CLASSES = ("plain", "striped", "bright")
SLICES = 8
SEED = 0
# The variable of the environment with a number: another one shuffles the images otherwise.
ORDER = "OVERHEAD_ORDER"


@dataclass(frozen=True)
class Work:
    """How much is done: `sites` with `images` slices or pictures each, which a round goes over `epochs` times."""

    sites: int = 4
    images: int = 32
    batch: int = 4
    epochs: int = 2
    rounds: int = 3
    augment: bool = True

    @property
    def steps(self) -> int:
        """Of a site in a round."""
        return self.epochs * self.images // self.batch

    @property
    def names(self) -> list[str]:
        """Of the sites."""
        return [f"S{n}" for n in range(self.sites)]


# So little that every batch is all of a site's images: whatever their order, both sides compute the same.
SAME = Work(sites=2, images=8, batch=8, epochs=3, rounds=3, augment=False)


@dataclass(frozen=True)
class Round:
    """What was used when a round ended, and its mean training loss."""

    cpu: float
    wall: float
    loss: float

    @classmethod
    def ended(cls, loss: float) -> Round:
        """Now."""
        return cls(time.process_time(), time.perf_counter(), loss)


# Hospitals -----------------------------------------------------------------------------------------------------------


def make_volumes(folder: Path, work: Work) -> None:
    """A folder a site: volumes of 8 slices of noise with a bright ball, and the ball, as NIfTI."""
    import nibabel

    y, x, z = np.meshgrid(np.arange(SIZE), np.arange(SIZE), np.arange(SLICES), indexing="ij")
    for site, random in _sites(folder, work):
        for patient in range(work.images // SLICES):
            centre, radius = random.uniform(30, SIZE - 30, 2), random.uniform(12, 25)
            # Every slice shows it, so that every slice is an example.
            ball = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 + (z - SLICES / 2) ** 2 < radius**2
            image = 110 + 10 * random.standard_normal(y.shape) + 60 * ball
            to = site / f"P{patient:02d}"
            to.mkdir()
            for name, array in (("image", np.clip(image, 60, 255)), ("mask", ball)):
                nibabel.save(nibabel.Nifti1Image(array.astype(np.uint8), np.eye(4)), to / f"{name}.nii.gz")


def make_pictures(folder: Path, work: Work) -> None:
    """A folder a site: pictures of three textures as PNG, and their classes in a table."""
    from PIL import Image

    for site, random in _sites(folder, work):
        rows = []
        for number in range(work.images):
            kind = number % len(CLASSES)
            picture = 110 + 15 * random.standard_normal((SIZE, SIZE, 3))
            picture[:: 2 if kind == 1 else SIZE] += 25
            picture[32:96, 32:96] += 25 * (kind == 2)
            name = f"i{number:03d}"
            Image.fromarray(np.clip(picture, 60, 255).astype(np.uint8)).save(site / f"{name}.png")
            rows.append((name, f"P{number:03d}", CLASSES[kind]))
        with (site / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "patient", "label"), *rows])


def _sites(folder: Path, work: Work) -> Iterator[tuple[Path, np.random.Generator]]:
    for number, name in enumerate(work.names):
        (folder / name).mkdir()
        yield folder / name, np.random.default_rng(number)


# Loops ---------------------------------------------------------------------------------------------------------------


def segmentation(folder: Path, work: Work) -> list[Round]:
    """Slices of volumes, MONAI's residual UNet and DiceCELoss."""
    import torch
    from monai.data import Dataset
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        EnsureTyped,
        LoadImaged,
        NormalizeIntensityd,
    )

    both = ["image", "mask"]
    fixed = Compose(
        [
            LoadImaged(keys=both),
            EnsureChannelFirstd(keys=both),
            NormalizeIntensityd(keys="image"),
            EnsureTyped(keys=both, track_meta=False),
        ]
    )

    def slices(site: Path) -> Dataset:
        files = [{key: str(path / f"{key}.nii.gz") for key in both} for path in sorted(site.iterdir())]
        volumes = [fixed(file) for file in files]
        cut = [{key: volume[key][..., k].contiguous() for key in both} for volume in volumes for k in range(SLICES)]
        return Dataset(cut, _changes(both, work))

    loss = DiceCELoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)
    _seed()
    model = UNet(2, 1, 1, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, norm="batch")
    last = [module for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))][-1]
    torch.nn.init.constant_(last.bias, -3.0)  # a tumour is rare
    return _trained(
        model,
        [slices(folder / name) for name in work.names],
        lambda batch: loss(model(batch["image"]), batch["mask"]),
        work,
    )


def classification(folder: Path, work: Work) -> list[Round]:
    """Pictures and MONAI's DenseNet."""
    from monai.data import CacheDataset
    from monai.networks.nets import DenseNet
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        EnsureTyped,
        LoadImaged,
        NormalizeIntensityd,
    )
    from torch import nn

    def pictures(site: Path) -> CacheDataset:
        with (site / "labels.csv").open(newline="") as file:
            rows = [
                {"image": str(site / f"{row['image']}.png"), "label": CLASSES.index(row["label"])}
                for row in csv.DictReader(file)
            ]
        fixed = [
            LoadImaged(keys="image", reader="PILReader", reverse_indexing=False),
            EnsureChannelFirstd(keys="image"),
            NormalizeIntensityd(keys="image", channel_wise=True),
            EnsureTyped(keys="image", track_meta=False),
        ]
        changes = _changes(["image"], work)
        return CacheDataset(rows, Compose([*fixed, *changes.transforms]), progress=False)

    loss = nn.CrossEntropyLoss()
    _seed()
    model = DenseNet(2, 3, len(CLASSES), init_features=24, growth_rate=12, block_config=(3, 6, 12, 8))
    return _trained(
        model,
        [pictures(folder / name) for name in work.names],
        lambda batch: loss(model(batch["image"]), batch["label"]),
        work,
    )


def _changes(keys: list[str], work: Work) -> Any:
    """What a study calls `augment: standard`."""
    from monai.transforms import (
        Compose,
        RandFlipd,
        RandGaussianNoised,
        RandRotate90d,
        RandScaleIntensityd,
        RandShiftIntensityd,
    )

    changes = [
        RandFlipd(keys=keys, prob=0.5, spatial_axis=0),
        RandFlipd(keys=keys, prob=0.5, spatial_axis=1),
        RandRotate90d(keys=keys, prob=0.5, max_k=3, spatial_axes=(0, 1)),
        RandScaleIntensityd(keys="image", prob=1.0, factors=0.1),
        RandShiftIntensityd(keys="image", prob=1.0, offsets=0.1),
        RandGaussianNoised(keys="image", prob=0.2, std=0.1),
    ]
    return Compose(changes if work.augment else [])


def _seed() -> None:
    """As a study with seed 0 begins, so that both sides start from the same weights."""
    import torch

    from wardround.wire.random import public_seed

    torch.manual_seed(public_seed(SEED, "initialisation") % 2**63)


def _trained(model: Any, sites: list[Any], loss_of: Callable[[Any], Any], work: Work) -> list[Round]:
    import torch
    from monai.data import DataLoader, set_track_meta

    torch.set_num_threads(1)
    set_track_meta(False)
    torch.manual_seed(SEED + int(os.environ.get(ORDER, "0")))
    loaders = [DataLoader(data, batch_size=work.batch, shuffle=True, num_workers=0) for data in sites]
    state = copy.deepcopy(model.state_dict())
    ended = []
    for _ in range(work.rounds):
        mean = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in state.items()}
        losses = []
        for loader in loaders:
            model.load_state_dict(state)
            model.train()
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            for _ in range(work.epochs):
                for batch in loader:
                    optimizer.zero_grad(set_to_none=True)
                    loss = loss_of(batch)
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
            for name, tensor in model.state_dict().items():
                mean[name] += tensor / work.sites
        state = mean
        ended.append(Round.ended(sum(losses) / len(losses)))
    return ended
