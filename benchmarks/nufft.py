"""The transform at any points of k-space: how exact, how exact its adjoint, how fast beside torchkbnufft.

    python benchmarks/nufft.py [--quick | --full]

256 x 256, eight coils, 64 golden-angle spokes of 512 samples, one thread. Errors are those of the evaluation tolerance:
`relative_error` against the sum over pixels in 64 bits for one sample in 64, `adjoint_error` |<Fx, y> - <x, F*y>| over
|Fx| |y|. Speeds are at the training tolerance, whose error is smaller than that of torchkbnufft's default (both are
printed: the same class of accuracy, with the advantage on the other side): forward and adjoint in turn, and forward
with backward by autograd, A/B/A/B, medians of ratios of CPU seconds. `speedup_over_torchkbnufft` is the smaller of the
two; null where torchkbnufft is not installed. Full repeats 7 times, --quick 3. The last line is JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common import arguments, conditions, finish, median, table
from wardround.imaging.acquisition.mri.coils import birdcage_maps
from wardround.imaging.acquisition.mri.noncartesian import NonCartesianMRI
from wardround.imaging.acquisition.mri.nufft import EVALUATION, TRAINING, Transform
from wardround.imaging.acquisition.mri.trajectories import even_weights, radial, spoke_angles

SIZE, SPOKES, COILS, SEED, EVERY = 256, 64, 8, 0, 64
Transforms = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def exact(points: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The sum over pixels, (C, S)."""
    wave = np.exp(-2j * np.pi * np.einsum("sa,n->asn", points, np.arange(SIZE) - SIZE // 2))
    rows = np.einsum("sy,cyx->csx", wave[0], images, optimize=True)
    return np.einsum("csx,sx->cs", rows, wave[1]) / SIZE


def error(found: Tensor, expected: np.ndarray) -> float:
    """Relative, in the root of the sum of squares."""
    return float(np.linalg.norm(found.numpy()[:, ::EVERY] - expected) / np.linalg.norm(expected))


def peer(points: np.ndarray) -> Transforms | str:
    """torchkbnufft's pair with its defaults, on the same scale; or why there is none."""
    try:
        import torchkbnufft
    except ImportError:
        return "torchkbnufft is not installed: pip install torchkbnufft==1.5.2"
    omega = torch.from_numpy(2 * np.pi * points.T.copy()).float()
    there, back = torchkbnufft.KbNufft(im_size=(SIZE, SIZE)), torchkbnufft.KbNufftAdjoint(im_size=(SIZE, SIZE))
    return lambda x: there(x[None], omega)[0] / SIZE, lambda y: back(y[None], omega)[0] / SIZE


def seconds(pair: Transforms, x: Tensor, y: Tensor) -> tuple[float, float]:
    """CPU seconds of forward and adjoint, and of forward with backward."""
    began = time.process_time()
    pair[0](x)
    pair[1](y)
    both = time.process_time() - began
    learned = x.clone().requires_grad_()
    began = time.process_time()
    pair[0](learned).abs().square().sum().backward()
    return both, time.process_time() - began


def main() -> None:
    quick = arguments(str(__doc__)).parse_args().quick
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(SEED)
    points = radial(spoke_angles(SPOKES, True), 2 * SIZE)
    x = torch.randn(COILS, SIZE, SIZE, generator=random, dtype=torch.complex64)
    y = torch.randn(COILS, len(points), generator=random, dtype=torch.complex64)
    expected = exact(points[::EVERY], x.numpy().astype(np.complex128))
    ours = {
        name: Transform(points, (SIZE, SIZE), t) for name, t in (("training", TRAINING), ("evaluation", EVALUATION))
    }
    pairs: dict[str, Transforms] = {name: (each.forward, each.adjoint) for name, each in ours.items()}
    other = peer(points)
    if isinstance(other, str):
        print(other)
    else:
        pairs["torchkbnufft"] = other
    rows: dict[str, dict[str, float]] = {}
    for name, (forward, adjoint) in pairs.items():
        there, back = forward(x), adjoint(y)
        difference = torch.vdot(y.flatten(), there.flatten()) - torch.vdot(back.flatten(), x.flatten())
        rows[name] = {
            "relative_error": error(there, expected),
            "adjoint_error": float(difference.abs() / (there.norm() * y.norm())),
        }
    repeats = 3 if quick else 7
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for _ in range(repeats):
        for name, pair in pairs.items():
            times[name].append(seconds(pair, x, y))
    for name, found in times.items():
        rows[name] |= {"pair_seconds": median([a for a, _ in found]), "autograd_seconds": median([b for _, b in found])}
    # The normal operator of a network's data consistency, by the kernel and by the pair.
    maps = torch.from_numpy(birdcage_maps(COILS, (SIZE, SIZE)))[None]
    path = torch.from_numpy(points).float()[None]
    weights = torch.from_numpy(even_weights(points, (SIZE, SIZE))).float()[None]
    operator = NonCartesianMRI(maps, path, weights)
    image = x[:1]
    by_kernel, by_pair = operator.normal(image), operator.A_adjoint(operator.A(image))
    kernels = []
    for _ in range(repeats):
        began = time.process_time()
        operator.normal(image)
        kernels.append(time.process_time() - began)
    table(
        ["transform", "relative error", "adjoint error", "forward + adjoint", "forward + backward"],
        [[name, *(f"{value:.2g}" for value in row.values())] for name, row in rows.items()],
    )
    speedups = None
    if "torchkbnufft" in times:
        ratios = [
            [theirs[i] / mine[i] for theirs, mine in zip(times["torchkbnufft"], times["training"], strict=True)]
            for i in range(2)
        ]
        speedups = {"pair": round(median(ratios[0]), 2), "autograd": round(median(ratios[1]), 2)}
    finish(
        {
            "relative_error": rows["evaluation"]["relative_error"],
            "adjoint_error": max(rows["evaluation"]["adjoint_error"], rows["training"]["adjoint_error"]),
            "speedup_over_torchkbnufft": None if speedups is None else min(speedups.values()),
            "speedups": speedups,
            "transforms": rows,
            "normal_seconds": median(kernels),
            "normal_to_pair": float((by_kernel - by_pair).norm() / by_pair.norm()),
            "message": other if isinstance(other, str) else "",
            "conditions": conditions(
                size=SIZE, spokes=SPOKES, samples=len(points), coils=COILS, threads=1, seed=SEED, repeats=repeats
            ),
        }
    )


if __name__ == "__main__":
    main()
