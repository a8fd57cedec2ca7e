"""`wardround predict` with a chain: raw data or images in, images and outlines out."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import wardround
from tests.outlines import SIZE, blob
from tests.tasks.test_chain import chain_study
from wardround.errors import DataError
from wardround.federation.release import FORMAT
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.runs.predict_images import Outline
from wardround.runs.releases import ReleasedModel
from wardround.study.schema import Study
from wardround.tasks.build import build_task
from wardround.tasks.mri import MRIBatch

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def released(folder: Path, **changes: Any) -> tuple[Study, Path]:
    """An untrained chain as `wardround run` writes it, that marks some of each image."""
    study = chain_study(**changes)
    torch.manual_seed(3)
    model = build_task(study).build_model().eval()
    tensors = {
        name: np.zeros_like(values) if (values == -3).all() else values
        for name, values in ((name, tensor.numpy()) for name, tensor in model.state_dict().items())
    }
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": FORMAT, "study": study.model_dump_json()})
    return study, path


def network_of(study: Study, model: Path) -> Any:
    return ReleasedModel.opened(model).network(build_task(study).build_model, None, None)


def written(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def predicted(model: Path, source: Path, out: Path, **how: Any) -> Outline:
    found = wardround.predict(model, source, out, **how)
    assert not found.failed
    (one,) = found.outlines
    return one


def kspace_of(slices: int, coils: int, seed: int = 5) -> tuple[np.ndarray, CartesianMRI]:
    """K-space (slices, coils, H, W) of blobs, every third line and the middle, and the operator of the first slice."""
    image = blob(seed, slices)[0].astype(np.float32)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    maps = np.stack([np.exp(-((x - shift) ** 2) - y**2 + 1j * shift * y) for shift in np.linspace(-1, 1, coils)])
    maps = (maps / np.sqrt((np.abs(maps) ** 2).sum(0))).astype(np.complex64)
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[:, ::3], mask[:, SIZE // 2 - 4 : SIZE // 2 + 4] = 1, 1
    operator = CartesianMRI(torch.from_numpy(maps)[None], torch.from_numpy(mask)[None])
    measured = [operator.A(torch.from_numpy(image[..., n]).to(torch.complex64)[None])[0] for n in range(slices)]
    return torch.stack(measured).numpy(), operator


def test_raw_data_become_an_image_and_outlines_in_their_own_units(tmp_path: Path) -> None:
    """The image is that of the first network, on the scale of the k-space; the outlines those of the second."""
    study, model = released(tmp_path)
    kspace, _ = kspace_of(3, 2)
    np.save(tmp_path / "scan.npy", 7 * kspace)
    one = predicted(model, tmp_path / "scan.npy", tmp_path / "out")
    assert one.output.name == "scan.nii.gz"
    assert "Reconstructed from k-space: scan-image.nii.gz." in one.said
    image, mask = written(tmp_path / "out" / "scan-image.nii.gz"), written(one.output)
    assert image.shape == mask.shape == (SIZE, SIZE, 3)
    zero_filled = [np.abs(part) for part in _zero_filled(7 * kspace)]
    assert image.max() == pytest.approx(max(part.max() for part in zero_filled), rel=1.0)
    network = network_of(study, model)
    scale = max(float(part.max()) for part in zero_filled)
    with torch.no_grad():
        logits = network.diagnosed(torch.from_numpy(np.moveaxis(image / scale, -1, 0))[:, None].float())
    expected = np.moveaxis((logits[:, 0] > 0).numpy(), 0, -1)
    assert 0 < expected.mean() < 1
    # The image was rounded to float32 on its way through the file: voxels at the threshold may differ.
    assert (mask.astype(bool) != expected).mean() < 1e-3
    with (tmp_path / "out" / "volumes.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert int(row["voxels"]) == mask.astype(bool).sum()
    assert row["volume_ml"] == ""
    # Twice the k-space is twice the image and the same outlines.
    np.save(tmp_path / "twice.npy", 14 * kspace)
    other = predicted(model, tmp_path / "twice.npy", tmp_path / "out")
    np.testing.assert_allclose(written(tmp_path / "out" / "twice-image.nii.gz"), 2 * image, rtol=1e-4, atol=1e-3)
    assert (written(other.output) != mask).mean() < 1e-3


def _zero_filled(kspace: np.ndarray) -> list[np.ndarray]:
    from wardround.imaging.readers.raw import RawSlices
    from wardround.runs.measured import measured_scans

    found = measured_scans(RawSlices("test", kspace.shape, lambda number: kspace[number]))
    pairs = (scan() for scan in found.scans)
    return [(found.scale * operator.A_adjoint(data))[0].abs().numpy() for operator, data in pairs]


def test_an_image_is_scanned_first_by_the_study_or_by_a_site(tmp_path: Path) -> None:
    sites = {"A": {}, "B": {"acquisition": {"mask": {"acceleration": 6}}}}
    _, model = released(tmp_path, sites=sites)
    image = blob(1, 2)[0]
    source = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(image[:, :24], AFFINE), source)
    one = predicted(model, source, tmp_path / "out")
    other = predicted(model, source, tmp_path / "other", site="B")
    assert "simulated scanner first (3× random, 2 coils, noise 0.005) and reconstructed: scan-image.nii.gz." in one.said
    assert "(6× random" in other.said
    made, seen = nibabel.load(tmp_path / "out" / "scan-image.nii.gz"), written(tmp_path / "other" / "scan-image.nii.gz")
    np.testing.assert_allclose(made.affine, AFFINE)
    assert made.shape == nibabel.load(one.output).shape == (SIZE, 24, 2)
    assert not np.array_equal(np.asarray(made.dataobj), seen)
    # In the units of the input: what was simulated came back.
    assert np.corrcoef(np.asarray(made.dataobj).ravel(), image[:, :24].ravel())[0, 1] > 0.8
    assert np.asarray(made.dataobj).max() > 0.5 * image.max()
    assert one.structures[0].volume_ml == pytest.approx(one.structures[0].voxels * 6 / 1000)


def test_a_chain_of_two_channels_takes_images_alone(tmp_path: Path) -> None:
    _, model = released(tmp_path, task={"images": ["one", "two"], "channels": 2})
    np.save(tmp_path / "scan.npy", kspace_of(1, 2)[0])
    with pytest.raises(DataError, match="sees 2 images of a slice, and raw data are of one; give it images"):
        wardround.predict(model, tmp_path / "scan.npy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_raw_data_of_other_coils_it_is_said(tmp_path: Path) -> None:
    _, model = released(tmp_path)
    np.save(tmp_path / "scan.npy", kspace_of(1, 3)[0])
    one = predicted(model, tmp_path / "scan.npy", tmp_path / "out")
    assert "Mind: the raw data are of 3 coils, and the model was trained with 2. Untested there." in one.said


def test_larger_raw_data_are_outlined_at_the_studys_size(tmp_path: Path) -> None:
    """The second network sees images of `task.size`; what it says is brought back to the grid of the raw data."""
    study, model = released(tmp_path)
    task: Any = build_task(study)
    large = torch.zeros(1, 2, SIZE + 8, SIZE + 8, dtype=torch.complex64)
    large[..., SIZE // 2, SIZE // 2] = 10.0
    ones = torch.ones(1, SIZE + 8, SIZE + 8)
    scans = MRIBatch(large, torch.ones_like(large) / np.sqrt(2), ones, ones, ones)
    found = task.predict_scans(network_of(study, model), scans)
    assert found.marked.shape == (1, SIZE + 8, SIZE + 8, 1)
    assert found.images.shape == (1, SIZE + 8, SIZE + 8, 1)


@pytest.mark.parametrize(("coils", "within"), [(2, True), (3, True), (5, False)])
def test_a_model_knows_the_numbers_of_coils_that_its_training_drew(tmp_path: Path, coils: int, within: bool) -> None:
    acquisition = {"coils": 2, "mask": {"acceleration": 3, "calibration": 0.15}, "vary": {"coils": [2, 4]}}
    _, model = released(tmp_path, acquisition=acquisition)
    np.save(tmp_path / "scan.npy", kspace_of(1, coils)[0])
    one = predicted(model, tmp_path / "scan.npy", tmp_path / "out")
    assert ("was trained with 2 to 4. Untested there." not in one.said) == within
