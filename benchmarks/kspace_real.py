"""A network that was trained on simulated scans alone, on real raw data that it never saw.

    WARDROUND_DATA=/folder python benchmarks/kspace_real.py [--quick | --full] [--out FOLDER]

Trains examples/lgg-transfer.yaml by federation (four institutions, simulated scans of 1, 4, 8 and 12 coils), then
undersamples fully sampled k-space of real scanners and reconstructs it without any fallback: a brain of 256 x 256 and a
knee of 332 x 640, each from a single coil, and a brain whose four coil images are real and whose k-space is their
Fourier transform, which is reported apart. R = 3 and 4, equispaced and random lines, 8 % calibration lines, three
masks each. The weights of CG-SENSE and of both total variations were chosen on simulated scans of the study's
validation patients, with as many coils and the same kind of mask, never on real data. All methods have the same coil
maps, estimated from the calibration lines; the reference is the root sum of squares of all lines, and 1 is its maximum.

With --out the released model and the chosen weights are kept, and a second call goes on with them. --model FILE takes a
released model instead of training one. --quick takes one mask of each. The last line is JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from common import arguments, conditions, finish, need_images, released, table

ROOT = Path(__file__).resolve().parent.parent
STUDY, SITES = ROOT / "examples/lgg-transfer.yaml", ROOT / "examples/lgg-sites.yaml"
FAMILIES, ACCELERATIONS, MASKS = ("equispaced", "random"), (3.0, 4.0), 3
CALIBRATION = 0.08
# A denser choice than the study's: TV and the others are to be at their best.
WEIGHTS: Mapping[str, tuple[float, ...]] = {
    "cg_sense": (0.001, 0.003, 0.01, 0.03, 0.1),
    "tv": (0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012),
    "tv_real": (0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012),
}
METHODS = ("zero_filled", "cg_sense", "tv", "tv_real", "network")
# Of the whole image, as the reference has it, and within the head: where there is air, a root sum of squares holds the
# length of noise, which no combination of coils by maps has.
METRICS = ("psnr", "ssim", "psnr_head", "ssim_head")
# One slice of every so many validation patients chooses weights.
TUNING_SLICES = 10


@dataclass(frozen=True)
class Scan:
    """Full k-space (1, C, H, W), lines along the last axis, whose image has peak 1, and that image (1, H, W)."""

    name: str
    kspace: Any
    target: Any

    @property
    def coils(self) -> int:
        """How many."""
        return int(self.kspace.shape[1])

    @cached_property
    def head(self) -> Any:
        """Where the head is in the image (1, H, W)."""
        import torch

        from wardround.imaging.datasets.mri import head_of_slice

        return torch.from_numpy(head_of_slice(self.target[0].numpy()))[None].to(self.target.dtype)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, help="keep the released model and the weights here, and go on with them")
    parser.add_argument("--model", type=Path, help="a released model (.safetensors) instead of training one")
    options = parser.parse_args()
    need_images("lgg")
    need_images("kspace")
    state = conditions(seed=2026, quick=options.quick)
    import torch

    torch.set_num_threads(1)
    folder = options.out or Path(tempfile.mkdtemp(prefix="kspace-real-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    network, _ = released(options.model or trained(folder))
    scans = list(real_scans(Path(os.environ["WARDROUND_DATA"]) / "kspace"))
    weights = chosen_weights(folder / "weights.json", sorted({scan.coils for scan in scans}))
    cases = [
        measured(scan, family, acceleration, network, weights, 1 if options.quick else MASKS)
        for scan, acceleration, family in product(scans, ACCELERATIONS, FAMILIES)
    ]
    for metric in METRICS:
        print(f"\n{metric}, mean over masks")
        table(["", *METHODS], [[case["name"], *(fmean(case[metric][m]) for m in METHODS)] for case in cases])
    gains, head_gains = (
        {
            scan.name: [gain for case in cases if case["scan"] == scan.name for gain in over_tv(case[metric])]
            for scan in scans
        }
        for metric in ("psnr", "psnr_head")
    )
    finish(
        {
            "gain_over_tv_db": fmean(gains["brain"]),
            "worst_gain_over_tv_db": min(gains["brain"]),
            "gain_over_tv_real_db": fmean(
                gain for case in cases if case["scan"] == "brain" for gain in over_tv(case["psnr"], "tv_real")
            ),
            "knee_gain_over_tv_db": fmean(gains["knee"]),
            "four_coil_gain_over_tv_db": fmean(gains["brain4"]),
            "head_gain_over_tv_db": {name: fmean(each) for name, each in head_gains.items()},
            "all_lines": {scan.name: all_lines(scan) for scan in scans},
            "nrmse_to_bart": oracle(scans),
            "cases": {
                metric: {case["name"]: {m: fmean(case[metric][m]) for m in METHODS} for case in cases}
                for metric in METRICS
            },
            "weights": weights,
            "seconds": time.perf_counter() - began,
            "conditions": {**state, "masks": 1 if options.quick else MASKS, "calibration": CALIBRATION},
        }
    )
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


def trained(folder: Path) -> Path:
    """The released model of the federated study; a run that was stopped goes on."""
    path = folder / "run" / "models" / "federated.safetensors"
    if not (folder / "run" / "result.json").exists():
        import wardround

        wardround.run(STUDY, SITES, folder / "run")
    return path


def real_scans(folder: Path) -> Iterator[Scan]:
    """The three fully sampled files."""
    import numpy as np
    import torch
    from scipy.io import loadmat

    from wardround.imaging.acquisition.mri.operator import fft2c, ifft2c

    def scan(name: str, kspace: Any) -> Scan:
        data = torch.from_numpy(np.ascontiguousarray(kspace, np.complex64))[None]
        # The axis with fewer samples is the one of phase encoding: lines along the last axis are left out.
        data = data.transpose(-2, -1) if data.shape[-1] > data.shape[-2] else data
        image = ifft2c(data).abs().square().sum(1).sqrt()
        return Scan(name, data / image.max(), image / image.max())

    yield scan("brain", loadmat(folder / "larsonlab_se_t1_sag_brain.mat")["data"][None])
    yield scan("knee", loadmat(folder / "larsonlab_coronal_fatsat_2D_knee.mat")["kdata"][None])
    images = loadmat(folder / "gpunufft_img_brain_4ch.mat")["img"].transpose(2, 0, 1)
    yield scan("brain4", fft2c(torch.from_numpy(np.ascontiguousarray(images, np.complex64))).numpy())


def mask_of(shape: tuple[int, int], family: str, acceleration: float, number: int) -> Any:
    """Which lines of an image of `shape` are kept: (1, H, W)."""
    import torch

    from wardround.imaging.acquisition.mri.masks import sampling_mask
    from wardround.study import Mask
    from wardround.wire.random import public_generator

    settings = Mask.model_validate({"family": family, "acceleration": acceleration, "calibration": CALIBRATION})
    random = public_generator(0, "kspace_real", family, round(acceleration), number)
    return torch.from_numpy(sampling_mask(settings, shape, random))[None]


def measured(
    scan: Scan, family: str, acceleration: float, network: Any, weights: Mapping[str, Mapping[str, float]], masks: int
) -> dict[str, Any]:
    """All methods on the scan with lines left out: `METRICS` for each mask."""
    import torch

    from wardround.imaging.acquisition.mri.coils import low_resolution_maps
    from wardround.imaging.acquisition.mri.operator import CartesianMRI

    found: dict[str, dict[str, list[float]]] = {metric: {m: [] for m in METHODS} for metric in METRICS}
    for number in range(masks):
        mask = mask_of(tuple(scan.target.shape[1:]), family, acceleration, number)
        data = scan.kspace * mask[:, None]
        operator = CartesianMRI(low_resolution_maps(data, mask), mask)
        for name in METHODS:
            with torch.no_grad():
                image = _method(name, weights[_case(scan.coils, family, acceleration)], network)(operator, data).abs()
            for metric, value in scores(image, scan).items():
                found[metric][name].append(value)
    return {"scan": scan.name, "name": f"{scan.name} R={acceleration:g} {family}", **found}


def scores(image: Any, scan: Scan) -> dict[str, float]:
    """`METRICS` of an image (1, H, W)."""
    from wardround.tasks.metrics import reconstruction_scores

    values = reconstruction_scores(image, scan.target, scan.head)
    return {metric: float(values[metric]) for metric in METRICS}


def over_tv(found: Mapping[str, list[float]], tv: str = "tv") -> list[float]:
    """The network's gain over total variation for each mask."""
    return [ours - theirs for ours, theirs in zip(found["network"], found[tv], strict=True)]


def all_lines(scan: Scan) -> dict[str, float]:
    """What the reference gives to all lines, nothing left out, combined by the maps that the methods have."""
    import torch

    from wardround.imaging.acquisition.mri.coils import low_resolution_maps
    from wardround.imaging.acquisition.mri.operator import CartesianMRI

    mask = mask_of(tuple(scan.target.shape[1:]), "equispaced", 4.0, 0)
    maps = low_resolution_maps(scan.kspace * mask[:, None], mask)
    return scores(CartesianMRI(maps, torch.ones_like(mask)).A_adjoint(scan.kspace).abs(), scan)


def _case(coils: int, family: str, acceleration: float) -> str:
    return f"{coils} coil{'s' if coils > 1 else ''} R={acceleration:g} {family}"


def _method(name: str, weights: Mapping[str, float], network: Any = None) -> Callable[[Any, Any], Any]:
    from wardround.study.registry import baseline

    if name == "network":
        return lambda operator, data: network(operator, data)
    return lambda operator, data: baseline(name).reconstruct(operator, data, weights.get(name))


def chosen_weights(path: Path, coils: list[int]) -> dict[str, dict[str, float]]:
    """The best weight of each method for each kind of scan, on simulated scans of validation patients; kept there."""
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for count, acceleration, family in product(coils, ACCELERATIONS, FAMILIES):
        case = _case(count, family, acceleration)
        if case not in found:
            batches = list(simulated(count, acceleration, family))
            found[case] = {name: _best(name, grid, batches) for name, grid in WEIGHTS.items()}
            path.write_text(json.dumps(found, indent=1))
            print(f"{case}: {found[case]}", flush=True)
    return found


def _best(name: str, grid: tuple[float, ...], batches: list[Any]) -> float:
    from wardround.tasks.metrics import psnr

    def mean(weight: float) -> float:
        method = _method(name, {name: weight})
        return fmean(float(psnr(method(b.operator, b.kspace).abs(), b.target)) for b in batches)

    return max(grid, key=mean)


def simulated(coils: int, acceleration: float, family: str) -> Iterator[Any]:
    """The middle slices of validation patients, as the study's scanner with so many coils and such a mask sees them."""
    from wardround.study.load import load_study
    from wardround.study.sites import load_sites
    from wardround.tasks.build import build_task

    study = load_study(STUDY)
    changes = {
        "coils": coils,
        "mask.family": family,
        "mask.acceleration": acceleration,
        "mask.calibration": CALIBRATION,
    }
    overrides = [
        f"sites.{site}.acquisition.{key}={value}" for site in study.training_sites for key, value in changes.items()
    ]
    task: Any = build_task(load_study(STUDY, overrides))
    sources = load_sites(SITES)
    found = [
        batch
        for site in study.training_sites
        for _, _, batch in task.dataset(site, sources.sites[site].data).middle("validation")
    ]
    step = max(1, len(found) // TUNING_SLICES)
    yield from found[::step]


def oracle(scans: list[Scan]) -> Any:
    """How far our CG-SENSE and TV are from BART's, where it is installed; nothing where it is not."""
    from wardround.imaging.acquisition.mri.coils import low_resolution_maps

    try:
        compare = importlib.import_module("bart_oracle").nrmse_to_bart
    except ImportError:
        return None
    if shutil.which("bart") is None:
        return None
    found = {}
    for scan in scans:
        mask = mask_of(tuple(scan.target.shape[1:]), "random", 3.0, 0)
        data = scan.kspace * mask[:, None]
        found[scan.name] = compare(data, mask, low_resolution_maps(data, mask))
    return found


if __name__ == "__main__":
    main()
