"""Coil compression: fewer virtual coils that hold nearly all of the signal."""

from __future__ import annotations

import torch
from torch import Tensor

from wardround.errors import GeometryError


def compress(kspace: Tensor, coils: int, axis: int = -3) -> Tensor:
    """The `coils` virtual coils with most signal of k-space, in order: (..., C, H, W) to (..., coils, H, W).

    One matrix for all that is given, so a volume's slices keep the same virtual coils: hand over a whole scan. Noise
    that was white stays white, and what is left out is the least possible in the sum of squares: whiten first
    (`noise.whiten`). Maps have to be estimated afterwards, or compressed by the same matrix. `axis` is that of the
    coils, also of non-Cartesian samples. Raises GeometryError where there are not that many coils.
    Buehrer et al., Magn. Reson. Med. 57 (2007), 1131.
    """
    samples = kspace.movedim(axis, 0)
    matrix = compression_matrix(samples.flatten(1), coils)
    virtual: Tensor = torch.tensordot(matrix, samples, dims=1)
    return virtual.movedim(0, axis)


def compression_matrix(samples: Tensor, coils: int) -> Tensor:
    """The (coils, C) matrix with orthonormal rows that keeps most of samples (C, N), by their singular vectors.

    In double precision; the largest weight of each virtual coil is real and positive, so that the matrix is one.
    """
    present = samples.shape[0]
    if not 1 <= coils <= present:
        raise GeometryError(f"{present} coils cannot be compressed to {coils}; ask for 1 to {present}")
    exact = samples.to(torch.complex128)
    # Ascending; a virtual coil's weights are the conjugate of its singular vector.
    weights = torch.linalg.eigh(exact @ exact.mH)[1].flip(-1)[:, :coils].mH
    largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))
    matrix: Tensor = (weights * (largest.conj() / largest.abs())).to(samples.dtype)
    return matrix
