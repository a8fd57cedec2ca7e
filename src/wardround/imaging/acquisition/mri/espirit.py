"""ESPIRiT: coil sensitivities as eigenvectors, from the fully sampled centre of k-space.

Uecker et al., Magn. Reson. Med. 71 (2014), 990. Every k x k patch of multi-coil k-space lies, but for noise, in a space
of few dimensions, which the calibration lines show. Averaging all projections of patches onto that space is a
convolution in k-space, so in the image it multiplies the coils' values at each voxel q by a matrix G_q (C, C); what the
scanner can have measured is unchanged by it: G_q s_q = s_q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.compression import compression_matrix
from wardround.imaging.acquisition.mri.masks import centred
from wardround.study.acquisition import ESPIRIT_LINES
from wardround.wire.host import on_host

# Complex numbers (32 MiB) of the matrices G_q that are held at a time, and of the patches of the calibration lines.
_CHUNK = 2**22


@dataclass(frozen=True)
class Espirit:
    """The settings of ESPIRiT.

    kernel: side of a patch in samples, along each axis at most half of its calibration lines: with 6 and 8 lines a
    third of a head falls below `crop`, with 4 nothing. lines: fewer calibration lines are refused. calibration: at most
    this number of central lines of each axis are used. singular: singular values of the patches above this share of
    the largest span the signal; those below are noise. crop: maps are 0 where the eigenvalue, 1 in the object, is
    below. doublings: G_q is squared this number of times, which is a power iteration with 2^doublings steps.
    """

    kernel: int = 6
    lines: int = ESPIRIT_LINES
    calibration: int = 24
    singular: float = 0.02
    crop: float = 0.9
    doublings: int = 6


DEFAULT = Espirit()


def espirit_maps(kspace: Tensor, region: tuple[int, int], settings: Espirit = DEFAULT) -> Tensor:
    """Maps (B, C, H, W) of k-space (B, C, H, W), complex, whose central `region` (rows, columns) is fully sampled.

    Root sum of squares 1 in the object and 0 outside, where the eigenvalue is below `crop`. Maps are relative to a
    virtual coil, the combination of coils with most signal in the calibration lines: its map is real and positive, so
    the image's phase (and that of the virtual coil) stays in the image. `low_resolution_maps` carry that phase
    themselves, and only with them is what remains of the image nearly real.

    Each item on its own, the same bits in any batch. Memory beyond the result: about 32 MiB for matrices of a few rows
    of the image at a time, (C kernel^2)^2 numbers of the patches, never a matrix of all patches.
    Raises GeometryError for one coil, and for fewer calibration lines than `lines`.
    """
    _, coils, height, width = kspace.shape
    if coils == 1:
        raise GeometryError(
            "ESPIRiT compares coils, and this k-space has one; estimate its map with `maps: estimated` instead"
        )
    if min(region) < settings.lines:
        raise GeometryError(
            f"ESPIRiT needs {settings.lines} fully sampled lines in the centre of k-space along each axis, and the "
            f"scan has {region[0]} rows, {region[1]} columns; measure more (mask.calibration), or set maps: estimated"
        )
    rows, columns = (min(count, settings.calibration) for count in region)
    centre = kspace[..., centred(rows, height), centred(columns, width)]
    return torch.stack([_maps(each, (height, width), settings) for each in centre.detach()])


def _maps(centre: Tensor, shape: tuple[int, int], settings: Espirit) -> Tensor:
    """Maps (C, *shape) of one scan's calibration lines (C, rows, columns)."""
    coils, (height, width) = centre.shape[0], shape
    rows, columns = (min(settings.kernel, lines // 2) for lines in centre.shape[1:])
    spectrum = _spectrum(_signal_space(centre, (rows, columns), settings.singular), (coils, rows, columns))
    vertical, horizontal = _waves(height, rows, spectrum), _waves(width, columns, spectrum)
    virtual = compression_matrix(centre.flatten(1), 1)[0]
    maps = centre.new_empty(coils, height, width)
    step = max(1, _CHUNK // (width * coils**2))
    for top in range(0, height, step):
        part = slice(top, min(top + step, height))
        grams = torch.einsum("hy,yxm,wx->hwm", vertical[part], spectrum, horizontal)
        vectors, values = _leading(grams.reshape(-1, width, coils, coils), settings.doublings)
        seen = vectors @ virtual
        phase = torch.where(seen.abs() > 0, seen.conj() / seen.abs(), 1.0)
        kept = vectors * (phase * (values >= settings.crop)).unsqueeze(-1)
        maps[:, part] = kept.movedim(-1, 0)
    return maps


def _signal_space(centre: Tensor, kernel: tuple[int, int], singular: float) -> Tensor:
    """An orthonormal basis of the patches, (C * kernel, K), by the eigenvectors of their Gram matrix, in double."""
    patches = centre.to(torch.complex128).unfold(1, kernel[0], 1).unfold(2, kernel[1], 1)
    length = centre.shape[0] * kernel[0] * kernel[1]
    gram = torch.zeros(length, length, dtype=patches.dtype, device=patches.device)
    step = max(1, _CHUNK // (patches.shape[2] * length))
    for top in range(0, patches.shape[1], step):
        rows = patches[:, top : top + step].movedim(0, 2).reshape(-1, length)
        gram += rows.mT @ rows.conj()
    values, vectors = torch.linalg.eigh(gram)
    # In ascending order; at least one counts, also of nothing.
    signal = int(on_host(values > singular**2 * values[-1]).sum())
    basis: Tensor = vectors[:, length - max(signal, 1) :].to(centre.dtype)
    return basis


def _spectrum(basis: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Fourier coefficients (2 rows, 2 columns, C * C) of q -> G_q, from a basis of patches (C, rows, columns).

    There are no others, as the lags within a patch are shorter: G_q = sum_j g_j(q) g_j(q)* / (rows columns), where g_j
    is the transform of the basis's j-th patch. So no image of any g_j is made.
    """
    _, rows, columns = shape
    patches = basis.reshape(*shape, -1).permute(1, 2, 0, 3)
    points = torch.fft.ifftn(patches, s=(2 * rows, 2 * columns), dim=(0, 1), norm="forward")
    grams = points @ points.mH / (rows * columns)
    spectrum: Tensor = torch.fft.fftn(grams, dim=(0, 1), norm="forward")
    return spectrum.flatten(2)


def _waves(size: int, kernel: int, like: Tensor) -> Tensor:
    """The waves exp(2 pi i q d / size) at the voxels q of an axis, for the lags d of `_spectrum`: (size, 2 kernel)."""
    lags = torch.fft.fftfreq(2 * kernel, 1 / (2 * kernel), dtype=torch.float64, device=like.device)
    voxels = torch.arange(size, dtype=torch.float64, device=like.device) - size // 2
    angle = 2 * torch.pi / size * voxels[:, None] * lags
    return torch.polar(torch.ones_like(angle), angle).to(like.dtype)


def _leading(matrices: Tensor, doublings: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors (..., C), of length 1, of the largest eigenvalues (...) of matrices (..., C, C), and those."""
    power = matrices
    for _ in range(doublings):
        power = power @ power
        trace = power.diagonal(dim1=-2, dim2=-1).real.sum(-1)
        power = power / trace.clamp_min(torch.finfo(trace.dtype).tiny)[..., None, None]
    # Nearly u u*: its largest column is u, whatever u is.
    largest = power.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
    column = power.gather(-1, largest[..., None, None].expand(*power.shape[:-1], 1))
    length = torch.linalg.vector_norm(column, dim=-2, keepdim=True)
    vectors = column / length.clamp_min(torch.finfo(length.dtype).tiny)
    values = (vectors.mH @ matrices @ vectors)[..., 0, 0].real
    return vectors[..., 0], values
