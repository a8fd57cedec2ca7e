"""Compare CG-SENSE and total variation with an independent program on real scans: BART's `pics`.

    WARDROUND_DATA=/folder python benchmarks/bart_oracle.py [--quick | --full]

Both programs get the same k-space, mask and coil maps, and minimise the same function with the same weight: CG-SENSE
|A x - y|^2 + w |x|^2, which is BART's `pics -l2 -r w`; TV |A x - y|^2 / 2 + w TV(x), `pics -R T:3:0:w`. BART is told
not to scale the data (`-w 1`), and its transform in `pics` is orthonormal and centred as ours. Its differences wrap
around the image's edges, where ours end: objects that do not reach the edges do not notice. Full (the default) takes
R = 3 and 4, equispaced and random lines, of all real scans; --quick one mask of each. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat
from torch import Tensor

from common import arguments, conditions, need_images, table
from wardround.imaging.acquisition.mri.coils import estimate_maps
from wardround.imaging.acquisition.mri.masks import sampling_mask
from wardround.imaging.acquisition.mri.operator import CartesianMRI, fft2c
from wardround.imaging.acquisition.solvers import cg_sense, tv, zero_filled
from wardround.imaging.acquisition.wrapped import Wrapped
from wardround.study import Mask

# Relative to a zero-filled image of peak 1: what is chosen for the real eight-coil scan (docs/physics.md).
CG_WEIGHT, TV_WEIGHT = 0.01, 0.002
# BART iterates until it no longer moves, so that what differs is not its stopping.
CG_ITERATIONS = 100
# Its default penalty, 0.5, is far too stiff for images of peak 1: after 100 iterations the image is still 5 % off.
TV_HOW = ["-i100", "-u0.02"]
TIMEOUT = 900.0
SEED = 0


class NoBart(RuntimeError):
    """BART is not installed, or failed; the message says what to do."""


class Flipped(Wrapped):
    """An operator for images that are upside down and mirrored.

    Isotropic total variation pairs a pixel's differences along both axes: ours are those to the next pixel, BART's
    those to the one before. Of flipped images ours is BART's; else the two best images differ by 0.5 %.
    """

    def A(self, x: Tensor) -> Tensor:
        """Measure the flipped image."""
        return super().A(x.flip(-2, -1))

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The flipped adjoint."""
        return super().A_adjoint(y).flip(-2, -1)

    def normal(self, x: Tensor) -> Tensor:
        """A* A by the operator's shortcut."""
        return self._operator.normal(x.flip(-2, -1)).flip(-2, -1)

    def norm(self, like: Tensor, *, iterations: int = 30) -> Tensor:
        """The operator's norm."""
        return self._operator.norm(like, iterations=iterations)


def nrmse_to_bart(
    kspace: Tensor,
    mask: Tensor,
    maps: Tensor,
    *,
    cg_weight: float = CG_WEIGHT,
    tv_weight: float = TV_WEIGHT,
    timeout: float = TIMEOUT,
) -> dict[str, float]:
    """{"cg_sense": e, "tv": e} with e = |ours - u BART's| / |BART's|, complex images of one slice.

    u is one phase for the whole image: BART's images have the other sign where half of an axis is odd (230 x 180).

    kspace, maps: complex (C, H, W) or (1, C, H, W). mask: (H, W) or (1, H, W), 1 where measured. Weights are relative
    to a zero-filled image of peak 1, to which the data are scaled. Ours run with their default iterations, as baselines
    do; BART's until they have converged. Raises NoBart where `bart` is missing, fails or takes `timeout` seconds.
    """
    operator = CartesianMRI(maps.reshape(1, *maps.shape[-3:]), mask.reshape(1, *mask.shape[-2:]))
    data = kspace.reshape(1, *kspace.shape[-3:]) * operator.mask[:, None]
    data = data / zero_filled(operator, data).abs().max()
    pairs = {
        "cg_sense": (cg_sense(operator, data, cg_weight), ["-l2", f"-r{cg_weight:g}", f"-i{CG_ITERATIONS}"]),
        "tv": (tv(Flipped(operator), data, tv_weight).flip(-2, -1), [f"-RT:3:0:{tv_weight:g}", *TV_HOW]),
    }
    found = {}
    for name, (ours, how) in pairs.items():
        theirs = pics(data[0], operator.mask[0].expand(data.shape[-2:]), operator.maps[0], how, timeout)
        product = torch.vdot(theirs.flatten(), ours.flatten())
        found[name] = float((ours[0] - product / product.abs() * theirs).norm() / theirs.norm())
    return found


def pics(kspace: Tensor, mask: Tensor, maps: Tensor, how: list[str], timeout: float = TIMEOUT) -> Tensor:
    """The image (H, W) that BART makes of k-space and maps (C, H, W) and a mask (H, W). Raises NoBart."""
    program = shutil.which("bart")
    if program is None:
        raise NoBart("`bart` is not on the PATH: install BART (Debian and Ubuntu: apt install bart), or leave this out")
    with tempfile.TemporaryDirectory() as folder:
        names = {name: str(Path(folder) / name) for name in ("kspace", "maps", "mask", "image")}
        _write(names["kspace"], _with_coils_last(kspace))
        _write(names["maps"], _with_coils_last(maps))
        _write(names["mask"], mask.numpy()[:, :, None])
        command = [
            program,
            "pics",
            "-S",
            "-w1",
            *how,
            "-p",
            names["mask"],
            names["kspace"],
            names["maps"],
            names["image"],
        ]
        try:
            subprocess.run(
                command,
                check=True,
                capture_output=True,
                text=True,
                timeout=timeout,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired as error:
            raise NoBart(f"`bart pics` did not end within {timeout:g} seconds") from error
        except subprocess.CalledProcessError as error:
            raise NoBart(
                f"`bart pics {' '.join(how)}` failed: {error.stderr.strip() or error.stdout.strip()}"
            ) from error
        return torch.from_numpy(_read(names["image"]).reshape(mask.shape))


def _with_coils_last(x: Tensor) -> NDArray[np.complex64]:
    """(C, H, W) as BART has it: rows, columns, partitions, coils."""
    return np.moveaxis(x.resolve_conj().numpy(), 0, -1)[:, :, None, :]


def _write(name: str, array: NDArray[np.generic]) -> None:
    """A .cfl and .hdr pair: column-major complex64, and its sizes."""
    Path(name + ".hdr").write_text("# Dimensions\n" + " ".join(map(str, array.shape)) + "\n", encoding="ascii")
    array.astype(np.complex64).ravel(order="F").tofile(name + ".cfl")


def _read(name: str) -> NDArray[np.complex64]:
    shape = [int(n) for n in Path(name + ".hdr").read_text(encoding="ascii").splitlines()[1].split()]
    return np.fromfile(name + ".cfl", np.complex64).reshape(shape, order="F")


def scans(root: Path) -> Iterator[tuple[str, Tensor]]:
    """Real scans, fully sampled: their names and k-space (C, H, W), phase-encode lines along W."""
    folder = root / "kspace"
    brain = loadmat(folder / "larsonlab_se_t1_sag_brain.mat")["data"]
    yield "brain, 1 coil", torch.from_numpy(brain.astype(np.complex64))[None]
    knee = loadmat(folder / "larsonlab_coronal_fatsat_2D_knee.mat")["kdata"]
    yield "knee, 1 coil", torch.from_numpy(knee.astype(np.complex64).T.copy())[None]
    # Its coil images are real; the k-space is their transform.
    images = loadmat(folder / "gpunufft_img_brain_4ch.mat")["img"]
    yield "brain, 4 coils", fft2c(torch.from_numpy(np.moveaxis(images, -1, 0).astype(np.complex64).copy()))


def main() -> None:
    quick = arguments(__doc__ or "").parse_args().quick
    need_images("kspace")
    torch.set_num_threads(1)
    root = Path(os.environ["WARDROUND_DATA"])
    rows: dict[str, dict[str, float]] = {}
    for name, kspace in scans(root):
        for family in ("equispaced",) if quick else ("equispaced", "random"):
            for acceleration in (4,) if quick else (3, 4):
                mask = _mask(family, acceleration, kspace)
                maps = estimate_maps(kspace[None] * mask, mask, "estimated")[0]
                rows[f"{name}, {family}, R = {acceleration}"] = nrmse_to_bart(kspace, mask, maps)
    for how in ("estimated", "espirit"):
        kspace = torch.from_numpy(np.load(root / "kspace" / "sigpy_brain8ch_poisson.npy"))
        mask = (kspace.abs().sum(0) > 0).float()
        rows[f"brain, 8 coils, Poisson disc, maps {how}"] = nrmse_to_bart(
            kspace, mask, estimate_maps(kspace[None], mask, how)[0]
        )
    table(
        ["scan", "CG-SENSE", "TV"], [[name, f"{row['cg_sense']:.1e}", f"{row['tv']:.1e}"] for name, row in rows.items()]
    )
    print(
        json.dumps({"nrmse_to_bart": rows, "conditions": conditions(seed=SEED, cg=CG_WEIGHT, tv=TV_WEIGHT, threads=1)})
    )


def _mask(family: str, acceleration: float, kspace: Tensor) -> Tensor:
    settings = Mask.model_validate({"family": family, "acceleration": acceleration})
    return torch.from_numpy(sampling_mask(settings, tuple(kspace.shape[-2:]), np.random.default_rng(SEED)))


if __name__ == "__main__":
    main()
