"""Reconstruct a real scan: eight coils, 12 % Poisson-disc sampling, no full reference.

    WARDROUND_DATA=/folder python benchmarks/real_kspace.py [--quick | --full]

The k-space is the brain of the sigpy tutorial (BSD-3). As nothing fully sampled exists to compare with, one sample
in ten outside the calibration block is held out: weights are chosen, and methods compared, by how well they predict
it. The picture is then made from all samples. Full (the default) tries more weights and writes
docs/images/real_kspace.png; --quick tries three and writes nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import numpy as np
import torch
from torch import Tensor

from wardround.imaging.acquisition.mri.coils import calibration_region, low_resolution_maps
from wardround.imaging.acquisition.mri.masks import centred
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.solvers import cg_sense, tv, zero_filled

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FILE = Path("kspace/sigpy_brain8ch_poisson.npy")
PICTURE = Path(__file__).resolve().parents[1] / "docs/images/real_kspace.png"
SEED, HELD_OUT, REPEATS = 0, 0.1, 5
WEIGHTS = {
    "CG-SENSE": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "TV": (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
}
SOLVERS: dict[str, Callable[[CartesianMRI, Tensor, float], Tensor]] = {
    "zero-filled": lambda operator, data, _: zero_filled(operator, data),
    "CG-SENSE": lambda operator, data, weight: cg_sense(operator, data, weight, iterations=30),
    "TV": lambda operator, data, weight: tv(operator, data, weight, iterations=60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true")
    size.add_argument("--full", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    folder = os.environ.get("WARDROUND_DATA")
    if folder is None or not (Path(folder) / FILE).exists():
        sys.exit(f"set WARDROUND_DATA to a folder that holds {FILE}")
    kspace, mask = load(Path(folder) / FILE)
    block = calibration_region(mask[0].numpy())
    seen = hold_out(mask, block)
    held = mask - seen

    training = CartesianMRI(low_resolution_maps(kspace * seen, seen), seen)
    operator = CartesianMRI(low_resolution_maps(kspace, mask), mask)
    predict = CartesianMRI(training.maps, held)
    rows = {}
    images = {}
    for name, solver in SOLVERS.items():
        weights = WEIGHTS.get(name, (0.0,))
        if quick and name in WEIGHTS:
            weights = weights[1:-1:2]
        errors = {
            weight: relative(predict.A(solver(training, kspace * seen, weight)), kspace * held) for weight in weights
        }
        weight = min(errors, key=lambda w: errors[w])
        seconds = []
        for _ in range(1 if quick else REPEATS):
            began = time.process_time()
            images[name] = solver(operator, kspace, weight)
            seconds.append(time.process_time() - began)
        rows[name] = {
            "weight": weight,
            "held_out_error": errors[weight],
            "data_residual": relative(operator.A(images[name]), kspace),
            "cpu_seconds": statistics.median(seconds),
        }
    print(f"{'method':12} {'weight':>8} {'held-out error':>15} {'data residual':>14} {'CPU s':>7}")
    for name, row in rows.items():
        print(
            f"{name:12} {row['weight']:8.4f} {row['held_out_error']:15.3f} {row['data_residual']:14.3f} "
            f"{row['cpu_seconds']:7.3f}"
        )
    if not quick:
        draw(mask, images, rows)
    conditions = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
        "shape": list(kspace.shape[1:]),
        "measured": round(float(mask.mean()), 4),
        "calibration": list(block),
        "seed": SEED,
        "repeats": 1 if quick else REPEATS,
    }
    print(json.dumps({"real_kspace": rows, "conditions": conditions}))


def load(path: Path) -> tuple[Tensor, Tensor]:
    """Read k-space (1, C, H, W), scaled to a zero-filled image of peak 1, and its mask (1, H, W)."""
    kspace = torch.from_numpy(np.load(path, allow_pickle=False))[None]
    mask = (kspace.abs().sum(1) > 0).float()
    image = zero_filled(CartesianMRI(low_resolution_maps(kspace, mask), mask), kspace)
    return kspace / image.abs().max(), mask


def hold_out(mask: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the mask without one sample in ten of those outside the calibration block."""
    random = torch.Generator().manual_seed(SEED)
    keep = (torch.rand(mask.shape, generator=random) >= HELD_OUT).float()
    height, width = mask.shape[1:]
    keep[:, centred(block[0], height), centred(block[1], width)] = 1
    return mask * keep


def relative(estimate: Tensor, truth: Tensor) -> float:
    """Root-mean-square error relative to the root mean square of the truth."""
    return float((estimate - truth).norm() / truth.norm())


def draw(mask: Tensor, images: dict[str, Tensor], rows: dict[str, dict[str, float]]) -> None:
    """Write the methods side by side, on one grey scale."""
    figure, axes = plt.subplots(1, len(images) + 1, figsize=(11, 4.3), layout="constrained")
    axes[0].imshow(mask[0], cmap="gray", interpolation="nearest")
    axes[0].set_title(f"measured: {float(mask.mean()):.1%}", fontsize=10)
    top = float(torch.quantile(images["TV"].abs(), 0.998))
    for axis, (name, image) in zip(axes[1:], images.items(), strict=True):
        axis.imshow(image[0].abs(), cmap="gray", vmin=0, vmax=top)
        axis.set_title(f"{name}\nheld-out error {rows[name]['held_out_error']:.2f}", fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
