"""Measure a training step on the CPU and on a GPU: MoDL and LEARN at their papers' sizes.

    python benchmarks/device.py [--quick | --full]

MoDL: 256 x 256, 12 coils, a quarter of the lines. LEARN: 256 x 256, 64 views of a fan beam. A step is loss, gradients
and Adam for one slice. CPU seconds of one thread; GPU seconds by the clock, with everything asked of it done, after one
step that is not counted; medians. `vit_l_lora_*`: ViT-L/16 on 16 images of 224 x 224, frozen but for LoRA of rank 8 on
q and v and its head, on a GPU alone. Prints a table and ends with one line of JSON, with null where there is no GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bill_task
from common import arguments, conditions, finish, median, table
from wardround.imaging.acquisition.ct.system import CTSystem
from wardround.imaging.acquisition.mri.coils import birdcage_maps
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.learning.device import CPU, Compute, compute_of
from wardround.learning.frozen import train_mode
from wardround.models import learn, unrolled
from wardround.models.adapters import attach
from wardround.study.adapters import LoRA
from wardround.study.ct import CTAcquisition, CTGeometry
from wardround.study.sites import Precision
from wardround.wire.host import on_host

SIZE, SEED = 256, 0
COILS, ACCELERATION, VIEWS, BINS = 12, 4, 64, 512
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
IMAGES = 16


@dataclass(frozen=True)
class Scan:
    """One slice: the operator, its data and the image that they are of."""

    operator: LinearOperator
    data: Tensor
    target: Tensor


def mri() -> Scan:
    """Every fourth line and the 24 of the centre, from a disc with a phase of zero."""
    maps = torch.from_numpy(birdcage_maps(COILS, (SIZE, SIZE)))[None]
    mask = torch.zeros(SIZE)
    mask[::ACCELERATION] = mask[SIZE // 2 - 12 : SIZE // 2 + 12] = 1.0
    operator, target = CartesianMRI(maps, mask), _disc()
    return Scan(operator, operator.A(target + 0j), target)


def ct() -> Scan:
    """A fan beam with a flat detector."""
    geometry = CTGeometry(
        kind="fan_flat",
        size=(SIZE, SIZE),
        pixel=1.5,
        views=VIEWS,
        bins=BINS,
        bin=1.8,
        source_distance=595.0,
        detector_distance=490.6,
    )
    operator = CTSystem(CTAcquisition(kind="ct", geometry=geometry))
    return Scan(operator, operator.A(_disc()), _disc())


def _disc() -> Tensor:
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    return torch.from_numpy((x**2 + y**2 < 0.5).astype(np.float32))[None]


CASES: dict[str, tuple[Callable[[], Scan], Callable[[], nn.Module]]] = {
    "modl": (mri, lambda: unrolled.MoDL(unrolled.PRESETS["paper"])),
    "learn": (ct, lambda: learn.Learn(learn.PRESETS["paper"])),
}


def steps(scan: Scan, model: nn.Module, compute: Compute, repeats: int) -> list[float]:
    """Seconds of each step: of CPU time on the CPU, by the clock on another device."""
    model, scan = model.to(compute.device), compute.moved(scan)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    clock, seconds = (time.process_time if compute.on_cpu else time.perf_counter), []
    for _ in range(repeats + 1):
        began = clock()
        optimizer.zero_grad(set_to_none=True)
        with compute.autocast():
            image = model(scan.operator, scan.data)
            loss = (image.abs() - scan.target).square().mean()
        loss.backward()
        optimizer.step()
        # The copy waits for the step.
        on_host(next(model.parameters()))
        seconds.append(clock() - began)
    return seconds[1:]


def adapted(model: nn.Module) -> nn.Module:
    """A transformer of which LoRA on queries and values and the head are trained."""
    targets = ("blocks.*.q", "blocks.*.v")
    attach(model, LoRA(kind="lora", targets=targets, rank=8, alpha=16, factors="second", trained=("head.*",)))
    train_mode(model)
    return model


def lora_seconds(model: nn.Module, compute: Compute, images: int, repeats: int) -> list[float]:
    """Seconds of each step of an adapted transformer."""
    model = model.to(compute.device)
    seen = torch.randn(images, 3, bill_task.SIZE, bill_task.SIZE, device=compute.device)
    classes = torch.arange(images, device=compute.device) % 2
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, seconds = torch.optim.Adam(trained, lr=1e-4), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with compute.autocast():
            loss = nn.functional.cross_entropy(model(seen).float(), classes)
        loss.backward()
        optimizer.step()
        on_host(trained[0])
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def large(quick: bool) -> dict[str, dict[str, float | None]]:
    """Steps a second and memory of ViT-L, by precision."""
    found: dict[str, dict[str, float | None]] = {"vit_l_lora_steps_per_second": {}, "vit_l_lora_peak_gb": {}}
    for precision in PRECISIONS:
        rate = peak = None
        if torch.cuda.is_available():
            compute = compute_of("cuda", precision, "benchmark")
            torch.cuda.reset_peak_memory_stats(compute.device)
            model = adapted(bill_task.Transformer())
            rate = round(1.0 / median(lora_seconds(model, compute, IMAGES, 5 if quick else 20)), 3)
            peak = round(torch.cuda.max_memory_allocated(compute.device) / 1e9, 3)
        found["vit_l_lora_steps_per_second"][precision], found["vit_l_lora_peak_gb"][precision] = rate, peak
    return found


def main() -> None:
    quick = arguments(str(__doc__)).parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    gpu = compute_of("cuda", "fp32", "benchmark") if torch.cuda.is_available() else None
    found: dict[str, dict[str, Any]] = {"cpu_seconds": {}, "gpu_seconds": {}, "gpu_peak_gb": {}}
    for name, (scanned, build) in CASES.items():
        scan = scanned()
        found["cpu_seconds"][name] = round(median(steps(scan, build(), CPU, 1 if quick else 3)), 3)
        found["gpu_seconds"][name] = found["gpu_peak_gb"][name] = None
        if gpu is not None:
            torch.cuda.reset_peak_memory_stats(gpu.device)
            found["gpu_seconds"][name] = round(median(steps(scan, build(), gpu, 5 if quick else 20)), 5)
            found["gpu_peak_gb"][name] = round(torch.cuda.max_memory_allocated(gpu.device) / 1e9, 3)
    table(["seconds a step", *CASES], [[key, *values.values()] for key, values in found.items()])
    vision = large(quick)
    table(["ViT-L/16 with LoRA", *PRECISIONS], [[key, *values.values()] for key, values in vision.items()])
    place = (CPU if gpu is None else gpu).facts()
    finish({**found, **vision, "conditions": conditions(**place, size=SIZE, seed=SEED, quick=quick, threads=1)})


if __name__ == "__main__":
    main()
