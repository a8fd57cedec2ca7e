"""A released model applied to images and to k-space, by somebody who has nothing but the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import wardround
from tests.applied import reconstruct
from tests.mri_hospitals import SIZE, head, save
from wardround.errors import DataError, GeometryError, StudyError, WardroundError
from wardround.federation.release import FORMAT
from wardround.imaging.acquisition.mri.simulate import simulate
from wardround.models.build import build_model
from wardround.runs.releases import ReleasedModel
from wardround.study.load import load_study
from wardround.study.schema import Study

STUDY: dict[str, Any] = {
    "name": "applied",
    "sites": {"Alpha": {}, "Beta": {"acquisition": {"coils": 6, "mask": {"acceleration": 2, "calibration": 0.1}}}},
    "acquisition": {"coils": 4, "mask": {"calibration": 0.1}},
    "task": {"contrasts": ["flair"], "size": [SIZE, SIZE]},
    "model": {"preset": "tiny"},
}


def _release(path: Path, study: Study, written: str | None = None) -> Path:
    """A released model as `wardround run` writes it; untrained, so that it is the regularised least squares."""
    torch.manual_seed(0)
    tensors = {name: tensor.numpy() for name, tensor in build_model(study.model).state_dict().items()}
    save_file(tensors, path, metadata={"format": FORMAT, "study": written or study.model_dump_json()})
    return path


@pytest.fixture
def study() -> Study:
    return load_study(STUDY)


@pytest.fixture
def model(tmp_path: Path, study: Study) -> Path:
    return _release(tmp_path / "model.safetensors", study)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    save(head(1), tmp_path / "image.nii.gz")
    return tmp_path / "image.nii.gz"


def _kspace(study: Study, slices: int = 2, site: str = "Alpha") -> np.ndarray:
    volume = head(1, slices).astype(np.float32)
    images = volume / volume.max()
    acquisition = study.acquisition_of(site)
    scans = [simulate(images[..., z], acquisition, np.random.default_rng(z)).kspace for z in range(slices)]
    return torch.stack(scans).numpy()


def _read(path: Path) -> Any:
    return nib.load(path)  # type: ignore[attr-defined]


def _error(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_an_image_comes_back_with_its_geometry_and_intensities(model: Path, image: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.nii.gz"
    said = reconstruct(model, image, output)
    assert "3 slices of 64 x 64" in said
    assert "R = 4, 4 coils" in said
    assert str(output) in said
    before, after = _read(image), _read(output)
    assert np.array_equal(before.affine, after.affine)
    assert before.header.get_zooms() == after.header.get_zooms()
    assert _error(after.get_fdata(), before.get_fdata()) < 0.4


@pytest.mark.slow
def test_what_was_reconstructed_says_which_release_it_came_of(model: Path, image: Path, tmp_path: Path) -> None:
    wardround.reconstruct(model, image, tmp_path / "one.nii.gz")
    wardround.reconstruct(model, [image], tmp_path / "many")
    known = ReleasedModel.opened(model).used.to_json()
    for said in (tmp_path / "one.model.json", tmp_path / "many" / "model.json"):
        assert json.loads(said.read_text()) == known


def test_the_same_image_gives_the_same_bytes_and_a_site_its_own_scanner(
    model: Path, image: Path, tmp_path: Path
) -> None:
    outputs = [tmp_path / f"{name}.nii.gz" for name in "abc"]
    for output, site in zip(outputs, (None, None, "Beta"), strict=True):
        said = reconstruct(model, image, output, site=site)
    assert "R = 2, 6 coils" in said
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    original = _read(image).get_fdata()
    errors = [_error(_read(output).get_fdata(), original) for output in outputs[1:]]
    assert errors[1] < errors[0]  # half of the lines instead of a quarter


@pytest.mark.slow
def test_sizes_that_the_network_does_not_divide_are_reconstructed(model: Path, tmp_path: Path) -> None:
    save(head(1)[:61, :59], tmp_path / "odd.nii")
    reconstruct(model, tmp_path / "odd.nii", tmp_path / "out.nii")
    assert _read(tmp_path / "out.nii").shape == (61, 59, 3)


def test_kspace_is_reconstructed_in_its_own_units(model: Path, study: Study, tmp_path: Path) -> None:
    volume = head(1, 2) / head(1, 2).max()
    for name, factor in (("one", 1.0), ("many", 1e4)):
        np.save(tmp_path / f"{name}.npy", _kspace(study) * factor)
        said = reconstruct(model, tmp_path / f"{name}.npy", tmp_path / f"{name}.nii.gz")
        assert "2 slices of 64 x 64 from k-space of 4 coils" in said
    one, many = (_read(tmp_path / f"{name}.nii.gz").get_fdata() for name in ("one", "many"))
    np.testing.assert_allclose(many, 1e4 * one, rtol=1e-3, atol=1.0)
    assert _error(one, volume) < 0.4


def test_one_slice_of_kspace_is_enough(model: Path, study: Study, tmp_path: Path) -> None:
    np.save(tmp_path / "k.npy", _kspace(study)[0].astype(np.complex128))
    reconstruct(model, tmp_path / "k.npy", tmp_path / "out.nii.gz")
    assert _read(tmp_path / "out.nii.gz").shape == (SIZE, SIZE, 1)


def test_the_whole_volume_has_one_scale(model: Path, study: Study, tmp_path: Path) -> None:
    """A slice is the same beside a darker one: the network sees it on the scale of its volume."""
    kspace = _kspace(study)
    kspace[1] *= 0.5
    for name, part in (("both", kspace), ("first", kspace[:1])):
        np.save(tmp_path / f"{name}.npy", part)
        reconstruct(model, tmp_path / f"{name}.npy", tmp_path / f"{name}.nii.gz")
    both, first = (_read(tmp_path / f"{name}.nii.gz").get_fdata() for name in ("both", "first"))
    np.testing.assert_allclose(both[..., 0], first[..., 0], rtol=1e-4, atol=1e-5)


def _bad_kspace(study: Study) -> dict[str, tuple[np.ndarray, str]]:
    good = _kspace(study)
    nan = good.copy()
    nan[0, 0, 3, 3] = np.nan
    hollow = good.copy()
    hollow[..., SIZE // 2] = 0
    return {
        "axes": (np.moveaxis(good[0], 0, -1), r"more coils \(64\) than lines; its axes must be \(coils, H, W\)"),
        "real": (good.real, r"must be complex.*this is float32 of shape \(2, 4, 64, 64\)"),
        "flat": (good[0, 0], r"must be complex, \(coils, H, W\)"),
        "empty": (good[:0], "must be complex"),
        "nan": (nan, "NaN or infinite"),
        "hollow": (hollow, "centre of k-space was not measured"),
    }


@pytest.mark.parametrize("name", ["axes", "real", "flat", "empty", "nan", "hollow"])
def test_bad_kspace_is_refused_and_nothing_written(name: str, model: Path, study: Study, tmp_path: Path) -> None:
    kspace, message = _bad_kspace(study)[name]
    np.save(tmp_path / "k.npy", kspace)
    with pytest.raises((DataError, GeometryError), match=message):
        reconstruct(model, tmp_path / "k.npy", tmp_path / "out" / "out.nii.gz")
    assert not (tmp_path / "out").exists()


def test_another_number_of_coils_is_a_remark(model: Path, study: Study, tmp_path: Path) -> None:
    np.save(tmp_path / "k.npy", _kspace(study)[:, :3])
    said = reconstruct(model, tmp_path / "k.npy", tmp_path / "out.nii.gz")
    assert "coils 3 (trained on 4 to 6)" in said
    assert (tmp_path / "out.nii.gz").exists()


@pytest.mark.parametrize("content", [b"", b"no array", "several"])
def test_files_that_are_no_array_are_refused(content: bytes | str, model: Path, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / "k.npy").write_bytes(content)
    else:
        with (tmp_path / "k.npy").open("wb") as file:
            np.savez(file, a=np.zeros(3))
    with pytest.raises(DataError, match=r"\.npy|is empty"):
        reconstruct(model, tmp_path / "k.npy", tmp_path / "out.nii.gz")
    with pytest.raises(DataError, match="does not exist"):
        reconstruct(model, tmp_path / "absent.npy", tmp_path / "out.nii.gz")


def test_images_that_are_no_magnitude_images_are_refused(model: Path, tmp_path: Path) -> None:
    hounsfield = head(1).astype(np.int16) * 10 - 1000
    nan = head(1).astype(np.float32)
    nan[5, 5, 0] = np.nan
    for bad, message in ((hounsfield, "negative values"), (nan, "NaN")):
        save(bad, tmp_path / "image.nii.gz")
        with pytest.raises(DataError, match=message):
            reconstruct(model, tmp_path / "image.nii.gz", tmp_path / "out.nii.gz")
    assert not (tmp_path / "out.nii.gz").exists()


def test_outputs_that_make_no_sense_are_refused(model: Path, image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    with pytest.raises(StudyError, match=r"NAME\.nii\.gz"):
        reconstruct(model, image, tmp_path / "out.png")
    with pytest.raises(StudyError, match="overwrite the input"):
        reconstruct(model, image, image)
    with pytest.raises(StudyError, match=r"--site Gamma.*only Alpha, Beta"):
        reconstruct(model, image, tmp_path / "out.nii.gz", site="Gamma")
    with pytest.raises(DataError, match="cannot be written"):
        reconstruct(model, image, image / "out.nii.gz")
    assert image.read_bytes() == before


def _broken_models(model: Path, study: Study) -> dict[str, str]:
    whole, folder = model.read_bytes(), model.parent
    tensors = load_file(model)
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "text.safetensors").write_text("not a model", encoding="utf-8")
    save_file(tensors, folder / "foreign.safetensors")
    _release(folder / "later.safetensors", study, json.dumps({**STUDY, "from_the_future": 1}))
    _release(folder / "unnamed.safetensors", study, "{")
    other = study.model_copy(update={"model": study.model.model_copy(update={"channels": 12})})
    _release(folder / "other.safetensors", study, other.model_dump_json())
    custom = {**STUDY, "task": {"kind": "custom", "factory": "a:b"}, "model": {"kind": "own_network"}}
    _release(folder / "custom.safetensors", study, load_study(custom).model_dump_json())
    return {
        "truncated": "cannot be read",
        "text": "cannot be read",
        "absent": "cannot be read",
        "foreign": "not a model that `wardround run` wrote",
        "later": "no study that this version",
        "unnamed": "no study that this version",
        "other": "do not fit the network",
        "custom": "does not reconstruct images",
    }


def test_models_that_cannot_be_used_say_why(model: Path, study: Study, image: Path, tmp_path: Path) -> None:
    for name, message in _broken_models(model, study).items():
        with pytest.raises(WardroundError, match=message) as raised:
            reconstruct(tmp_path / f"{name}.safetensors", image, tmp_path / "out.nii.gz")
        assert "\n" not in str(raised.value) + raised.value.detail
        assert str(tmp_path) not in str(raised.value)
    with pytest.raises(DataError, match="cannot be read"):
        reconstruct(tmp_path, image, tmp_path / "out.nii.gz")
    assert not (tmp_path / "out.nii.gz").exists()


@pytest.mark.slow
def test_a_site_has_its_own_part_of_the_model(tmp_path: Path, study: Study, model: Path, image: Path) -> None:
    """What `wardround run` left beside the model: models/SITE/ARM/local.safetensors."""
    reconstruct(model, image, tmp_path / "plain.nii.gz", site="Alpha")
    tensors = load_file(model)
    last = next(name for name in reversed(tensors) if name.endswith("bias") and "denoiser" in name)
    own = tmp_path / "Alpha" / "model" / "local.safetensors"
    own.parent.mkdir(parents=True)
    save_file({last: tensors[last] + 0.3}, own)
    reconstruct(model, image, tmp_path / "own.nii.gz", site="Alpha")
    reconstruct(model, image, tmp_path / "other.nii.gz", site="Beta")
    reconstruct(model, image, tmp_path / "nobody.nii.gz")
    plain, ours = (_read(tmp_path / f"{name}.nii.gz").get_fdata() for name in ("plain", "own"))
    assert _error(ours, plain) > 0.01
    # The study's scanner is that of Alpha, so without its part this is what Alpha had before.
    assert np.array_equal(_read(tmp_path / "nobody.nii.gz").get_fdata(), plain)
    save_file({last: np.zeros(7, np.float32)}, own)
    with pytest.raises(DataError, match="belongs to another model"):
        reconstruct(model, image, tmp_path / "own.nii.gz", site="Alpha")
    own.write_bytes(b"nothing")
    with pytest.raises(DataError, match="private part of site Alpha cannot be read"):
        reconstruct(model, image, tmp_path / "own.nii.gz", site="Alpha")
