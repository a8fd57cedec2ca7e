"""The updates that are attacked: a site's own, the network that must leak, and what protects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from wardround.audit.inversion import Gradients, Objective, Victim, gradient, one_hot, sent_after, statistics_of
from wardround.errors import StudyError
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.acquisition.wrapped import RealImage
from wardround.learning.frozen import train_mode
from wardround.tasks.mri import MRIBatch
from wardround.tasks.scans import ScansBatch
from wardround.tasks.task import Batch, Task

CONTROL_SIDE = 32
_CLASSES = 4


@dataclass(frozen=True)
class Noise:
    """What differential privacy does to an update: clipped to a norm, then Gaussian noise of `multiplier * clip`."""

    clip: float
    multiplier: float


def measured_anew(batch: Batch, images: Tensor) -> Batch:
    """The batch that a scanner known to the adversary would have made of other images (B, H, W).

    The operator (mask and coil maps, or geometry) is the batch's; the scan has no noise and, in MRI, no phase but that
    of the coil maps. Raises StudyError for batches that are no scans.
    """
    if isinstance(batch, MRIBatch):
        operator: LinearOperator = RealImage(batch.operator)
        return replace(batch, kspace=operator.A(images), target=images)
    if isinstance(batch, ScansBatch):
        parts, start = [], 0
        for part in batch.parts:
            mine = images[start : start + len(part)]
            parts.append(replace(part, data=part.operator.A(mine), target=mine))
            start += len(part)
        return ScansBatch(tuple(parts))
    raise StudyError("inversion knows batches of MRI and CT reconstruction; this task's updates were not attacked")


def is_scan(batch: Batch) -> bool:
    """Whether the attacks on images know how the batch was measured."""
    return isinstance(batch, MRIBatch | ScansBatch)


def masks_of(batch: Batch) -> Tensor:
    """Where the head or the body is: (B, H, W)."""
    mask: Tensor = batch.head if isinstance(batch, MRIBatch) else batch.body
    return mask


def singles(batch: Batch) -> list[Batch]:
    """A batch of scans as batches of one. Raises StudyError for batches that are no scans."""
    if isinstance(batch, MRIBatch):
        return [batch.part(i, i + 1) for i in range(len(batch))]
    if isinstance(batch, ScansBatch):
        return [ScansBatch((part.alone(i),)) for part in batch.parts for i in range(len(part))]
    raise StudyError("the audit knows batches of MRI and CT reconstruction alone")


def victim_of(
    task: Task,
    network: nn.Module,
    batches: Sequence[Batch],
    shared: frozenset[str] | None = None,
    *,
    rate: float = 0.0,
    noise: Noise | None = None,
    seed: int = 0,
    sent: Gradients | None = None,
) -> Victim:
    """The update of one local step for each batch, plain SGD; `rate` matters where there are several.

    The truth is sent with everything a real scan has; the adversary predicts with `measured_anew`. Noise is drawn from
    `seed`, which stands for the site's secret here. `sent` overrides what left the site. Raises StudyError for tasks
    that are no reconstruction.
    """
    for batch in batches:
        if not is_scan(batch):
            measured_anew(batch, torch.zeros(()))
    objective = Objective(network, lambda net, step, x, _: task.loss(net, measured_anew(batches[step], x)), shared)
    real = Objective(network, lambda net, step, x, _: task.loss(net, batches[step]), shared)
    images = torch.cat([batch.target for batch in batches])
    train_mode(network)
    sent = sent_after(real, len(batches), rate, images) if sent is None else sent
    return Victim(
        objective=objective,
        images=images,
        sent=protected(sent, noise, seed),
        steps=len(batches),
        rate=rate,
        masks=torch.cat([masks_of(batch) for batch in batches]),
        statistics=statistics_of(real, images[: len(batches[0])]),
    )


def protected(sent: Gradients, noise: Noise | None, seed: int) -> Gradients:
    """Clip all parameters together and add Gaussian noise."""
    if noise is None:
        return sent
    norm = torch.stack([g.square().sum() for g in sent]).sum().sqrt()
    factor = (noise.clip / norm.clamp_min(1e-30)).clamp_max(1.0)
    random = torch.Generator().manual_seed(seed)
    spread = noise.multiplier * noise.clip
    return tuple(g * factor + spread * torch.randn(g.shape, generator=random, dtype=g.dtype) for g in sent)


def control_victim(image: Tensor, index: int) -> Victim:
    """One image (H, W) in a network known to leak, one step, no protection; the label is made up.

    Smooth activations and a wide linear layer behind one convolution: the gradient of such a network holds its input
    (Zhu, Liu & Han 2019; Geiping et al. 2020, section 3).
    """
    small: Tensor = interpolate(image[None, None].double(), size=(CONTROL_SIDE, CONTROL_SIDE), mode="area")[0]
    objective = Objective(_leaky_network(), _classified)
    labels = torch.tensor([index % _CLASSES])
    sent = gradient(objective, small, one_hot(labels, _CLASSES, small))
    return Victim(objective, small, sent, labels, _CLASSES)


def _classified(network: nn.Module, _: int, images: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return cross_entropy(network(images), labels)


def _leaky_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Unflatten(1, (1, CONTROL_SIDE)),
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(4 * CONTROL_SIDE**2, 32),
            nn.Sigmoid(),
            nn.Linear(32, _CLASSES),
        ).double()
