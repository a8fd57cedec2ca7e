"""Coil compression keeps what it says, and leaves white noise white."""

from __future__ import annotations

import pytest
import torch

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.compression import compress, compression_matrix


def _kspace(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.complex64)


def test_it_keeps_the_leading_singular_vectors_of_the_whole_scan() -> None:
    kspace = torch.tensor([3.0, 2.0, 1.0, 0.5])[:, None, None] * _kspace(2, 4, 6, 5)
    found = compress(kspace, 2)
    samples = kspace.movedim(1, 0).flatten(1)
    left, values, _ = torch.linalg.svd(samples, full_matrices=False)
    assert found.shape == (2, 2, 6, 5)
    kept = torch.linalg.vector_norm(found.movedim(1, 0).flatten(1), dim=1)
    torch.testing.assert_close(kept, values[:2])
    # Slice by slice the same two combinations of coils.
    expected = (left[:, :2].mH @ samples).unflatten(1, (2, 6, 5)).movedim(0, 1)
    turns = (found * expected.conj()).sum((0, 2, 3))
    torch.testing.assert_close(found, expected * (turns / turns.abs())[:, None, None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compress(kspace.movedim(1, -1), 2, axis=-1), found.movedim(1, -1))


def test_all_coils_are_only_turned_and_few_that_depend_on_each_other_lose_nothing() -> None:
    kspace = _kspace(5, 8, 7)
    torch.testing.assert_close(compress(kspace, 5).abs().square().sum(0), kspace.abs().square().sum(0))
    mixed = torch.einsum("dc,chw->dhw", _kspace(6, 2), _kspace(2, 8, 7))
    torch.testing.assert_close(compress(mixed, 2).abs().square().sum(0), mixed.abs().square().sum(0))


def test_rows_are_orthonormal_so_that_white_noise_stays_white_and_the_matrix_is_one() -> None:
    samples = _kspace(6, 40)
    matrix = compression_matrix(samples, 4)
    torch.testing.assert_close(matrix @ matrix.mH, torch.eye(4) + 0j)
    torch.testing.assert_close(compression_matrix(7 * samples, 4), matrix)
    largest = matrix.gather(1, matrix.abs().argmax(1, keepdim=True))
    assert (largest.real > 0).all()
    assert largest.imag.abs().max() < 1e-6


@pytest.mark.parametrize("coils", [0, 4])
def test_more_coils_than_there_are_and_none_are_refused(coils: int) -> None:
    with pytest.raises(GeometryError, match=f"3 coils cannot be compressed to {coils}; ask for 1 to 3"):
        compress(_kspace(3, 4, 4), coils)
