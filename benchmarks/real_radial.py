"""Reconstruct a real radial scan: a heart, twelve coils, 25 spokes of 256 samples, no full reference.

    WARDROUND_DATA=/folder python benchmarks/real_radial.py [--quick | --full]

The data are those of gpuNUFFT's demonstration (MIT). As nothing fully sampled exists to compare with, every fifth spoke
is held out in turn of the others' image: weights are chosen, and methods compared, by how well they predict its samples
outside the dense centre. Where `bart` is installed the same images are made by `bart nufft` and `bart pics` from the
same maps, and compared. Full (the default) tries more weights and writes docs/images/real_radial.png; --quick tries one
and writes nothing. The last line is JSON.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.io import loadmat
from torch import Tensor

from common import arguments, conditions, finish, need_images, table
from wardround.imaging.acquisition.mri.noncartesian import NonCartesianMRI, gridded_maps
from wardround.imaging.acquisition.mri.nufft import EVALUATION, transform_of
from wardround.imaging.acquisition.mri.trajectories import dense_radius, even_weights, radial_areas
from wardround.imaging.acquisition.solvers import cg_sense, tv

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FILE = Path("kspace/gpunufft_radial_cardiac_25_projections_12ch.mat")
PICTURE = Path(__file__).resolve().parents[1] / "docs/images/real_radial.png"
SIZE, EACH = 256, 5
# Three times the most of TV predicts held-out samples, mostly noise, a little better, and wipes small vessels out.
WEIGHTS = {"CG-SENSE": (0.03, 0.1, 0.3), "TV": (0.001, 0.003, 0.009)}
SOLVERS: dict[str, Callable[[NonCartesianMRI, Tensor, float], Tensor]] = {
    "gridding": lambda operator, data, _: operator.initial(data),
    "CG-SENSE": lambda operator, data, weight: cg_sense(operator, data, weight, iterations=20),
    "TV": lambda operator, data, weight: tv(operator, data, weight, iterations=20),
}


@dataclass(frozen=True)
class Spokes:
    """Samples (C, spokes, samples) of lines at points (spokes, samples, 2), radii (samples,) along each."""

    kspace: Tensor
    points: np.ndarray
    radii: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Spokes:
        """As the file has them: the position k is complex, x + i y."""
        found = loadmat(path)
        z = found["k"].T
        # The first spoke runs from +0.5 to -0.5; along it radii fall.
        radii = np.sort(np.sign(np.real(z[0] / z[0, 0])) * np.abs(z[0]))
        points = np.stack([z.imag, z.real], -1)
        return cls(torch.from_numpy(found["rawdata"].transpose(2, 1, 0).astype(np.complex64)), points, radii)

    def some(self, which: np.ndarray) -> Spokes:
        """These spokes alone."""
        return Spokes(self.kspace[:, torch.from_numpy(which)], self.points[which], self.radii)

    def data(self) -> Tensor:
        """(1, C, S)."""
        return self.kspace.flatten(1)[None]

    def path(self) -> tuple[Tensor, Tensor, Tensor]:
        """Trajectory (1, S, 2), even weights and areas (1, S)."""
        flat, shape = self.points.reshape(-1, 2), (SIZE, SIZE)
        ends = self.points[:, 0]
        areas = radial_areas(np.arctan2(ends[:, 0], ends[:, 1]), self.radii, shape)
        return (*(torch.from_numpy(part).float()[None] for part in (flat, even_weights(flat, shape), areas)),)

    def operator(self, maps: Tensor, weighted: bool = True) -> NonCartesianMRI:
        """The scan with these maps."""
        trajectory, weights, areas = self.path()
        return NonCartesianMRI(maps, trajectory, weights if weighted else None, areas=areas, tolerance=EVALUATION)

    def maps(self) -> Tensor:
        """Estimated from the dense centre."""
        trajectory, _, areas = self.path()
        return gridded_maps(self.data(), trajectory, areas, (SIZE, SIZE))


def held_out_error(image: Tensor, maps: Tensor, held: Spokes, radius: float) -> float:
    """How far the image is from samples that it never saw, outside the dense centre, relative to their size."""
    flat = held.points.reshape(-1, 2)
    outside = torch.from_numpy(np.hypot(*flat.T) > radius)
    trajectory = torch.from_numpy(flat).float()[None]
    found = NonCartesianMRI(maps, trajectory, tolerance=EVALUATION).A(image)[..., outside]
    truth = held.data()[..., outside]
    return float((found - truth).norm() / truth.norm())


def bart(*arguments: object, **arrays: Tensor | np.ndarray) -> np.ndarray:
    """What a command of BART makes of arrays; names in `arguments` that are keys of `arrays` are files of theirs."""
    with tempfile.TemporaryDirectory() as folder:
        for name, array in arrays.items():
            write_cfl(Path(folder) / name, np.asarray(array))
        words = [str(Path(folder) / str(a)) if str(a) in arrays else str(a) for a in arguments]
        subprocess.run(["bart", *words, str(Path(folder) / "out")], check=True, capture_output=True)
        return read_cfl(Path(folder) / "out")


def write_cfl(path: Path, array: np.ndarray) -> None:
    """A pair of files in BART's form: dimensions as text, and complex64 in Fortran's order."""
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, array.shape)) + "\n")
    array.astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path) -> np.ndarray:
    """The array of such a pair without its last axes of 1."""
    shape = [int(n) for n in path.with_suffix(".hdr").read_text().splitlines()[1].split()]
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return np.fromfile(path.with_suffix(".cfl"), np.complex64).reshape(shape, order="F")


def nrmse(ours: Tensor, theirs: np.ndarray) -> float:
    """Root-mean-square difference relative to theirs, after the one factor that BART leaves open."""
    a, b = ours.numpy().ravel(), theirs.ravel()
    return float(np.linalg.norm(a * (np.vdot(a, b) / np.vdot(a, a)) - b) / np.linalg.norm(b))


def beside_bart(spokes: Spokes, maps: Tensor, iterations: int = 20) -> dict[str, float]:
    """The transform, its adjoint and CG-SENSE of unweighted data beside BART's, with the same maps and iterations.

    BART's points are in steps of the grid, its axes (x, y, z, coil): the rows of our images are its first axis.
    """
    operator = spokes.operator(maps, weighted=False)
    flat = spokes.points.reshape(-1, 2)
    data = spokes.data()
    trajectory = np.concatenate([SIZE * flat.T, np.zeros((1, len(flat)))])[..., None]
    image = operator.initial(data)
    seen = maps[0] * image[0]
    planes = np.moveaxis(seen.numpy(), 0, -1)[:, :, None]
    samples = np.moveaxis(data[0].numpy(), 0, -1)[None, :, None]
    there = bart("nufft", "t", "x", t=trajectory, x=planes)
    back = bart("nufft", "-a", "-d", f"{SIZE}:{SIZE}:1", "t", "y", t=trajectory, y=samples)
    shape = (SIZE, SIZE)
    transform = transform_of(torch.from_numpy(flat).float(), shape, EVALUATION)
    forward, adjoint = transform.forward(seen), transform.adjoint(data[0])
    coils = np.moveaxis(maps[0].numpy(), 0, -1)[:, :, None]
    # Both begin at nothing and are stopped early, so both take the same steps.
    sense = bart(
        "pics", "-S", "-w", 1, "-l2", "-r", 0.0, "-i", iterations, "-t", "t", "y", "s", t=trajectory, y=samples, s=coils
    )
    ours = cg_sense(operator, data, 0.0, iterations=iterations)
    return {
        "forward": nrmse(forward, np.moveaxis(there.reshape(len(flat), -1), -1, 0)),
        "adjoint": nrmse(adjoint, np.moveaxis(back.reshape(SIZE, SIZE, -1), -1, 0)),
        "cg_sense": nrmse(ours[0], sense.reshape(SIZE, SIZE)),
    }


def main() -> None:
    quick = arguments(str(__doc__)).parse_args().quick
    torch.set_num_threads(1)
    need_images(str(FILE))
    spokes = Spokes.load(Path(os.environ["WARDROUND_DATA"]) / FILE)
    maps = spokes.maps()
    operator = spokes.operator(maps)
    scale = operator.initial(operator.weighed(spokes.data())).abs().max()
    spokes = Spokes(spokes.kspace / scale, spokes.points, spokes.radii)
    numbers = np.arange(len(spokes.points))
    held, seen = spokes.some(numbers[::EACH]), spokes.some(numbers[numbers % EACH > 0])
    radius = dense_radius(seen.points.reshape(-1, 2), (SIZE, SIZE))
    training_maps = seen.maps()
    training = seen.operator(training_maps)
    rows, images = {}, {}
    for name, solver in SOLVERS.items():
        weights = WEIGHTS.get(name, (0.0,))
        errors = {}
        for weight in weights[len(weights) // 2 :][:1] if quick else weights:
            image = solver(training, training.weighed(seen.data()), weight)
            errors[weight] = held_out_error(image, training_maps, held, radius)
        weight = min(errors, key=lambda w: errors[w])
        began = time.process_time()
        images[name] = solver(operator, operator.weighed(spokes.data()), weight)
        seconds = time.process_time() - began
        rows[name] = {"weight": weight, "held_out_error": round(errors[weight], 4), "cpu_seconds": round(seconds, 2)}
    table(["method", "weight", "held-out error", "CPU s"], [[name, *row.values()] for name, row in rows.items()])
    beside = beside_bart(spokes, maps) if shutil.which("bart") else None
    if not quick:
        draw(images, rows)
    finish(
        {
            "real_radial": rows,
            "nrmse_to_bart": beside,
            "conditions": conditions(
                size=SIZE, spokes=len(numbers), samples=len(spokes.radii), coils=len(spokes.kspace), threads=1
            ),
        }
    )


def draw(images: dict[str, Tensor], rows: dict[str, dict[str, float]]) -> None:
    """Write the methods side by side, each from black to nearly its brightest."""
    figure, axes = plt.subplots(1, len(images), figsize=(10.5, 3.9), layout="constrained")
    for axis, (name, image) in zip(axes, images.items(), strict=True):
        magnitude = image[0].abs()
        axis.imshow(magnitude, cmap="gray", vmin=0, vmax=float(torch.quantile(magnitude, 0.995)))
        axis.set_title(f"{name}: {rows[name]['held_out_error']:.2f}", fontsize=10)
        axis.axis("off")
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
