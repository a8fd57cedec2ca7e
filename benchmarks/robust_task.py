"""The workload of robust.py: 20 sites with small networks, trained side by side as one batched computation.

Two sets of small images: PneumoniaMNIST (2 classes, averaged to 14 x 14; MedMNIST v2, CC BY 4.0) and the 8 x 8 digits
that scikit-learn bundles (10 classes). Each class is dealt to the sites by a Dirichlet draw, so sites differ in size
and in their mix of labels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
SITES = 20
HIDDEN = 32
FEWEST = 10
# In standard deviations above the mean: brighter than any pixel.
BRIGHT = 2.5


@dataclass(frozen=True)
class Images:
    """Training images (N, p), standardised, and labels (N,), and the same for testing; `side` is the images' edge."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    side: int

    @property
    def chance(self) -> float:
        return 1.0 / self.classes


def pneumonia() -> Images:
    """PneumoniaMNIST from ${WARDROUND_DATA}/pneumoniamnist, its own split into training and testing."""
    file = Path(os.environ.get("WARDROUND_DATA", "data")) / "pneumoniamnist" / "pneumoniamnist.npz"
    if not file.exists():
        raise SystemExit("set WARDROUND_DATA to a folder that holds pneumoniamnist/pneumoniamnist.npz")
    data = np.load(file)

    def part(which: str) -> tuple[Tensor, Tensor]:
        images = data[f"{which}_images"].astype(np.float32).reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)) / 255.0
        return torch.from_numpy(images.reshape(len(images), -1)), torch.from_numpy(data[f"{which}_labels"][:, 0]).long()

    return standardised(Images("pneumonia", *part("train"), *part("test"), classes=2, side=14))


def digits() -> Images:
    """scikit-learn's digits, every fourth one for testing."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x.astype(np.float32) / 16.0), torch.from_numpy(y).long()
    test = torch.arange(len(x)) % 4 == 3
    return standardised(Images("digits", x[~test], y[~test], x[test], y[test], classes=10, side=8))


def standardised(images: Images) -> Images:
    """The same with mean 0 and variance 1 over all pixels of the training images."""
    mean, deviation = images.x.mean(), images.x.std()
    return replace(images, x=(images.x - mean) / deviation, test_x=(images.test_x - mean) / deviation)


def dirichlet_split(y: Tensor, alpha: float, random: np.random.Generator) -> list[npt.NDArray[np.intp]]:
    """The examples of each site: every class by a Dirichlet(alpha) draw, again until each has `FEWEST`."""
    labels = y.numpy()
    while True:
        parts: list[list[npt.NDArray[np.intp]]] = [[] for _ in range(SITES)]
        for label in np.unique(labels):
            members = random.permutation(np.flatnonzero(labels == label))
            cuts = np.cumsum(random.dirichlet(np.full(SITES, alpha)))[:-1] * len(members)
            for part, piece in zip(parts, np.split(members, cuts.astype(int)), strict=True):
                part.append(piece)
        sites = [np.concatenate(part) for part in parts]
        if min(map(len, sites)) >= FEWEST:
            return sites


def initial_parameters(images: Images, random: np.random.Generator) -> Floats:
    """One hidden layer, He initialisation, flattened: (d,)."""
    p = images.x.shape[1]
    first = random.standard_normal((p, HIDDEN)) * np.sqrt(2.0 / p)
    second = random.standard_normal((HIDDEN, images.classes)) * np.sqrt(2.0 / HIDDEN)
    return np.concatenate([first.ravel(), np.zeros(HIDDEN), second.ravel(), np.zeros(images.classes)])


def logits(parameters: Tensor, x: Tensor, classes: int) -> Tensor:
    """(n, d) parameters of n networks and their inputs (n, B, p) to (n, B, classes)."""
    p = x.shape[-1]
    sizes = (p * HIDDEN, HIDDEN, HIDDEN * classes, classes)
    first, bias, second, last = parameters.split(sizes, dim=1)
    hidden = torch.relu(torch.baddbmm(bias.unsqueeze(1), x, first.view(-1, p, HIDDEN)))
    return torch.baddbmm(last.unsqueeze(1), hidden, second.view(-1, HIDDEN, classes))


def train_sites(start: Floats, x: Tensor, y: Tensor, classes: int, lr: float) -> Floats:
    """Every site's change after SGD from the same start: x (steps, n, B, p), y (steps, n, B) to (n, d)."""
    parameters = torch.from_numpy(start.astype(np.float32)).expand(x.shape[1], -1).clone().requires_grad_()
    for images, labels in zip(x, y, strict=True):
        loss = torch.nn.functional.cross_entropy(
            logits(parameters, images, classes).flatten(0, 1), labels.flatten(), reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss / labels.shape[1], parameters)
        with torch.no_grad():
            parameters -= lr * gradient
    return parameters.detach().numpy().astype(np.float64) - start


def predictions(parameters: Floats, x: Tensor, classes: int) -> Tensor:
    """The labels that a network gives (N, p) images."""
    with torch.no_grad():
        return logits(torch.from_numpy(parameters.astype(np.float32))[None], x[None], classes)[0].argmax(dim=1)


def balanced_accuracy(parameters: Floats, images: Images) -> float:
    """The mean over classes of the share recognised; a network that is not finite guesses."""
    if not np.isfinite(parameters).all():
        return images.chance
    right = predictions(parameters, images.test_x, images.classes) == images.test_y
    return float(np.mean([right[images.test_y == c].double().mean().item() for c in range(images.classes)]))


def with_patch(x: Tensor, side: int) -> Tensor:
    """Images with a bright square of 3 x 3 pixels in the last corner: the backdoor's trigger."""
    patched = x.clone().reshape(*x.shape[:-1], side, side)
    patched[..., -3:, -3:] = BRIGHT
    return patched.reshape(x.shape)


def attack_success(parameters: Floats, images: Images, target: int) -> float:
    """The share of test images of other classes that the trigger turns into the target."""
    if not np.isfinite(parameters).all():
        return 0.0
    others = images.test_x[images.test_y != target]
    hit = predictions(parameters, with_patch(others, images.side), images.classes) == target
    return float(hit.double().mean())
