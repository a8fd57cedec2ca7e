"""Measure the CT projectors: accuracy, speed next to ASTRA's on the CPU, and the size of a clinical geometry.

    python benchmarks/ct_operator.py [--quick | --full]

Times are CPU seconds of one thread, comparisons alternate, ratios and times are medians. ASTRA is optional, see
requirements-ct.txt. Prints a table and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from wardround.imaging.acquisition.ct.fbp import FBP
from wardround.imaging.acquisition.ct.operator import CTProjector, StoredWeights
from wardround.imaging.acquisition.ct.phantom import HEAD, ellipse_image, ellipse_sinogram
from wardround.imaging.acquisition.ct.projector import Model
from wardround.study.ct import CTGeometry

SEED = 0
BATCH = 8
VIEWS = {"size": (256, 256), "pixel": 1.0, "views": 180, "bins": 368}
FAN = {"source_distance": 595.0, "detector_distance": 490.6}
GEOMETRIES = {
    "parallel": CTGeometry(kind="parallel", bin=1.0, **VIEWS),
    "fan flat": CTGeometry(kind="fan_flat", bin=2.0, **VIEWS, **FAN),
    "fan arc": CTGeometry(kind="fan_arc", bin=2.0, **VIEWS, **FAN),
}
MODELS: tuple[Model, ...] = ("joseph", "strip")
# The detector of a Siemens Definition AS+, 720 views.
CLINICAL = CTGeometry(
    kind="fan_arc", size=(512, 512), pixel=0.9766, views=720, bins=736, bin=1.2858, offset=1.125, **FAN
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="fewer repeats")
    effort.add_argument("--full", action="store_true", help="the default")
    repeats = 3 if parser.parse_args().quick else 9
    torch.set_num_threads(1)

    accuracy = [measure_accuracy(name, model, repeats) for name in GEOMETRIES for model in MODELS]
    header = ("geometry", "model", "error", "adjoint", "FBP dB", "build s", "MB", "fwd+bwd s", f"batch {BATCH}")
    print(("{:>10}" * len(header)).format(*header))
    for row in accuracy:
        print(
            f"{row['geometry']:>10}{row['model']:>10}{row['sinogram_error']:10.4f}{row['adjoint_error']:10.1e}"
            f"{row['fbp_psnr']:10.1f}{row['build']:10.2f}{row['megabytes']:10.0f}{row['one']:10.4f}{row['batch']:10.4f}"
        )
    astra = measure_astra(repeats)
    # In a process of its own: the peak is this geometry's alone.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        clinical = pool.submit(measure_clinical, repeats).result()
    print("\n512 x 512, 720 views x 736 bins, curved detector")
    for key, value in clinical.items():
        print(f"{key:>26} {value:.4g}")
    print("\nASTRA, fan flat, 256 x 256, 180 views, batch", BATCH)
    for key, value in astra.items():
        print(f"{key:>26} {value}")
    result = {
        "sinogram_error": max(row["sinogram_error"] for row in accuracy),
        "adjoint_error": max(row["adjoint_error"] for row in accuracy),
        "speedup_over_astra": astra["speedup"],
        "seconds_per_slice_512": clinical["seconds_per_slice"],
        "matrix_gb_512": clinical["matrix_gb"],
        "peak_gb_512": clinical["peak_gb"],
        "conditions": conditions(repeats, astra, clinical),
    }
    print(json.dumps(result))


def measure_accuracy(name: str, model: Model, repeats: int) -> dict[str, Any]:
    """Errors against ellipses in closed form and of the adjoint, FBP of exact data, and times."""
    geometry = GEOMETRIES[name]
    started = time.process_time()
    operator = CTProjector(geometry, model=model)
    build = time.process_time() - started
    image = ellipse_image(HEAD, geometry)
    # A line model is compared with lines through the bins' middles, an area model with means over the bins.
    exact = ellipse_sinogram(HEAD, geometry, rays_per_bin=1 if model == "joseph" else 8)
    error = operator.A(torch.from_numpy(image)[None])[0].numpy() - exact
    random = torch.Generator().manual_seed(SEED)
    x = torch.rand(BATCH, *operator.image_shape, generator=random)
    y = torch.rand(BATCH, *operator.data_shape, generator=random)
    forward, backward = inner(operator.A(x), y), inner(x, operator.A_adjoint(y))
    reconstructed = FBP(geometry)(torch.from_numpy(exact)[None])[0].numpy()
    assert isinstance(operator.weights, StoredWeights)
    return {
        "geometry": name,
        "model": model,
        "sinogram_error": float(np.linalg.norm(error) / np.linalg.norm(exact)),
        "adjoint_error": abs(forward - backward) / abs(forward),
        "fbp_psnr": 10 * math.log10(image.max() ** 2 / np.mean((reconstructed - image) ** 2)),
        "build": build,
        "megabytes": operator.weights.nbytes / 1e6,
        "one": statistics.median(seconds(forward_backward(operator, x[:1])) for _ in range(repeats)),
        "batch": statistics.median(seconds(forward_backward(operator, x)) for _ in range(repeats)),
    }


def measure_astra(repeats: int) -> dict[str, Any]:
    """Ratio of ASTRA's time to ours for the same job, in turns; null where ASTRA is not installed."""
    try:
        import astra
    except ImportError:
        return {"speedup": None, "note": "astra-toolbox is not installed, see benchmarks/requirements-ct.txt"}
    geometry = GEOMETRIES["fan flat"]
    rows, columns = geometry.size
    volume = astra.create_vol_geom(rows, columns)
    angles = 2 * np.pi * np.arange(geometry.views) / geometry.views
    fan = astra.create_proj_geom("fanflat", geometry.bin, geometry.bins, angles, *FAN.values())
    theirs = astra.OpTomo(astra.create_projector("line_fanflat", fan, volume))
    ours = CTProjector(geometry)
    x = torch.rand(BATCH, rows, columns, generator=torch.Generator().manual_seed(SEED))
    images = x.numpy()

    def run() -> None:
        for image in images:
            theirs.BP(theirs.FP(image))

    mine, other = forward_backward(ours, x), run
    mine(), other()
    pairs = [(seconds(other), seconds(mine)) for _ in range(repeats)]
    difference = theirs.FP(images[0]) - ours.A(x[:1])[0].numpy()
    return {
        "speedup": statistics.median(a / b for a, b in pairs),
        "ratios": [round(a / b, 1) for a, b in pairs],
        "astra_seconds": statistics.median(a for a, _ in pairs),
        "wardround_seconds": statistics.median(b for _, b in pairs),
        "relative_difference_on_noise": float(np.linalg.norm(difference) / np.linalg.norm(theirs.FP(images[0]))),
        "version": astra.__version__,
    }


def measure_clinical(repeats: int) -> dict[str, float]:
    """Size, peak memory and times of a clinical geometry, building included in the peak."""
    torch.set_num_threads(1)
    started = time.process_time()
    operator = CTProjector(CLINICAL)
    build = time.process_time() - started
    x = torch.rand(BATCH, *operator.image_shape, generator=torch.Generator().manual_seed(SEED))
    forward_backward(operator, x[:1])()
    one = statistics.median(seconds(forward_backward(operator, x[:1])) for _ in range(repeats))
    batch = statistics.median(seconds(forward_backward(operator, x)) for _ in range(repeats))
    assert isinstance(operator.weights, StoredWeights)
    return {
        "seconds_per_slice": one,
        "seconds_per_slice_batch": batch / BATCH,
        "build_seconds": build,
        "matrix_gb": operator.weights.nbytes / 1e9,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def forward_backward(operator: CTProjector, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        image = x.clone().requires_grad_()
        y = operator.A(image)
        y.backward(y.detach())

    return run


def seconds(run: Callable[[], None]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def inner(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def conditions(repeats: int, astra: dict[str, Any], clinical: dict[str, float]) -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "seconds": "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "seed": SEED,
        "repeats": repeats,
        "batch": BATCH,
        "sizes": {name: geometry.model_dump(mode="json") for name, geometry in GEOMETRIES.items()},
        "clinical": {"geometry": CLINICAL.model_dump(mode="json"), **clinical},
        "astra": astra,
    }


if __name__ == "__main__":
    main()
