"""DICOM-CT-PD: a simulated scan written as the public collections are, read, and reconstructed.

The scan is made of points in the patient, none of the reader's formulas: where the focal spot and each detector element
are follows the text of `wardround.imaging.readers.ct_projections`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from safetensors.numpy import save_file
from tests.applied import reconstruct
from tests.ct_files import PATIENT_ID, ct_header, setting, write_series
from tests.ct_hospitals import ct_study

from wardround.errors import DataError, StudyError
from wardround.federation.release import FORMAT
from wardround.imaging.acquisition.ct.fbp import FBP
from wardround.imaging.acquisition.ct.system import CTSystem
from wardround.imaging.readers.ct_projections import read_projections
from wardround.models.build import build_model
from wardround.runs.apply_ct import reconstruct_ct
from wardround.study.ct import CTGeometry
from wardround.study.load import load_study

SCAN = CTGeometry(
    kind="fan_arc",
    size=(64, 64),
    pixel=3.5,
    views=120,
    start=50.0,
    bins=160,
    bin=3.2,
    offset=1.125,
    source_distance=595.0,
    detector_distance=490.6,
)
# As few views as a scan may have that is not looked at.
SHORT = SCAN.model_copy(update={"views": 24})
# Ellipses in the patient: x to the left, y to the back, half axes in mm, attenuation in 1/mm. The last is a bead on the
# left and in front.
PATIENT_ELLIPSES = ((0, 0, 92, 108, 0.0192), (-30, 20, 20, 35, -0.006), (45, -50, 16, 16, 0.02))

Elements = dict[tuple[int, int], tuple[str, object]]
Spoil = Callable[[int, FileDataset, Elements], None]


def _elements(geometry: CTGeometry, rows: int, view: int) -> Elements:
    source, detector = geometry.source_distance or 0.0, geometry.detector_distance or 0.0
    shape = "CYLINDRICAL" if geometry.kind == "fan_arc" else "FLAT"
    return {
        (0x7029, 0x1010): ("US", rows),
        (0x7029, 0x1011): ("US", geometry.bins),
        (0x7029, 0x1002): ("FL", geometry.bin),
        (0x7029, 0x1006): ("FL", 1.0947),
        (0x7029, 0x100B): ("CS", shape),
        (0x7031, 0x1001): ("FL", _phi(geometry, view) % (2 * math.pi)),
        (0x7031, 0x1002): ("FL", -200.0),
        (0x7031, 0x1003): ("FL", source),
        (0x7031, 0x1031): ("FL", source + detector),
        (0x7031, 0x1033): ("FL", [geometry.offset + (geometry.bins + 1) / 2, (rows + 1) / 2]),
        (0x7033, 0x100B): ("FL", 0.0),
        (0x7033, 0x100C): ("FL", 0.0),
        (0x7033, 0x100D): ("FL", 0.0),
        (0x7033, 0x100E): ("CS", "FFSNONE"),
        (0x7033, 0x1013): ("US", geometry.views),
        (0x7033, 0x1065): ("FL", [1e5 + bin for bin in range(geometry.bins)]),
        (0x7037, 0x1009): ("CS", "AXIAL"),
        (0x7037, 0x100A): ("CS", "FANBEAM"),
        (0x7041, 0x1001): ("FL", 0.0195),
    }


def _raw(kind: str, value: object) -> bytes:
    values = value if isinstance(value, list) else [value]
    if kind == "CS":
        text = str(value)
        return (text + " " * (len(text) % 2)).encode()
    return b"".join(struct.pack("<f" if kind == "FL" else "<H", part) for part in values)


def write_projections(
    folder: Path,
    sinogram: NDArray[np.float32],
    geometry: CTGeometry = SCAN,
    *,
    raw: bool = False,
    spoil: Spoil = lambda view, header, elements: None,
) -> Path:
    """Write line integrals (views, rows, bins), views in reverse, as one file each; `raw` writes unknown VRs."""
    folder.mkdir(parents=True)
    slope = float(np.float32(sinogram.max() / 60000))
    for view, data in enumerate(sinogram):
        header = ct_header(number=view)
        for keyword in ("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"):
            delattr(header, keyword)
        elements = _elements(geometry, sinogram.shape[1], view)
        header.Rows, header.Columns = geometry.bins, sinogram.shape[1]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 0
        header.RescaleSlope, header.RescaleIntercept = f"{slope:.9g}", "-0.01"
        header.PixelData = np.rint((data.T + 0.01) / slope).astype("<u2").tobytes()
        spoil(view, header, elements)
        for group in {group for group, _ in elements}:
            header.add_new((group, 0x0010), "LO", "AN UNKNOWN CREATOR")
        for tag, (kind, value) in elements.items():
            header.add_new(tag, "UN" if raw else kind, _raw(kind, value) if raw else value)
        header.save_as(folder / f"view_{geometry.views - view:05d}.dcm", enforce_file_format=True)
    return folder


def _phi(geometry: CTGeometry, view: int) -> float:
    """The angle that the file of a view states."""
    return math.pi - math.radians(geometry.start + 360 * view / geometry.views)


def _elements_in_patient(geometry: CTGeometry, phi: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Focal spot (2,) and the middles of the detector's columns (columns, 2) in the patient, mm."""
    radius, whole = (
        geometry.source_distance or 0.0,
        (geometry.source_distance or 0.0) + (geometry.detector_distance or 0.0),
    )
    spot = radius * np.array([math.sin(phi), -math.cos(phi)])
    through = -spot / radius
    onwards = np.array([-math.cos(phi), -math.sin(phi)])  # how the detector moves as phi grows
    along = (np.arange(1, geometry.bins + 1) - (geometry.offset + (geometry.bins + 1) / 2))[:, None] * geometry.bin
    if geometry.kind == "fan_flat":
        return spot, spot + whole * through + along * onwards
    return spot, spot + whole * (np.cos(along / whole) * through + np.sin(along / whole) * onwards)


def _line_integrals(spot: NDArray[np.float64], ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each line from the focal spot to an element: the roots of a quadratic are where it enters and leaves."""
    length = np.linalg.norm(ends - spot, axis=1)
    total = np.zeros(len(ends))
    for x, y, a, b, value in PATIENT_ELLIPSES:
        start, step = (spot - [x, y]) / [a, b], (ends - spot) / [a, b]
        square, mixed, rest = (step**2).sum(1), (step * start).sum(1), (start**2).sum() - 1
        total += value * length * 2 * np.sqrt(np.maximum(mixed**2 - square * rest, 0)) / square
    return total


def scan(geometry: CTGeometry = SCAN, rows: int = 1) -> NDArray[np.float32]:
    views = [_line_integrals(*_elements_in_patient(geometry, _phi(geometry, view))) for view in range(geometry.views)]
    return np.repeat(np.asarray(views, dtype=np.float32)[:, None], rows, axis=1)


def _truth(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Attenuation at points of the patient."""
    return sum(v * (((x - at) / a) ** 2 + ((y - to) / b) ** 2 <= 1.0) for at, to, a, b, v in PATIENT_ELLIPSES)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("fan_arc", False),
        ("fan_flat", True),
        pytest.param("fan_arc", True, marks=pytest.mark.slow),
        pytest.param("fan_flat", False, marks=pytest.mark.slow),
    ],
)
def test_a_scan_comes_back_and_can_be_reconstructed(tmp_path: Path, kind: str, raw: bool) -> None:
    geometry = SCAN.model_copy(update={"kind": kind})
    sinogram = scan(geometry)
    found = read_projections(write_projections(tmp_path / "pd", sinogram, geometry, raw=raw), size=(64, 64))
    assert found.sinogram.shape == (120, 1, 160)
    # The view of the least angle comes first.
    first = np.argmin((SCAN.start + 3 * np.arange(120)) % 360)
    expected = np.roll(sinogram, -first, axis=0)
    assert abs(found.sinogram - expected).max() < 1e-4
    assert found.geometry.start == pytest.approx((SCAN.start + 3 * first) % 360, abs=1e-3)
    for name in ("kind", "views", "bins"):
        assert getattr(found.geometry, name) == getattr(geometry, name)
    for name in ("bin", "offset", "source_distance", "detector_distance"):
        assert getattr(found.geometry, name) == pytest.approx(getattr(geometry, name), rel=1e-5)
    assert found.mu_water == pytest.approx(0.0195)
    assert found.photons is not None
    np.testing.assert_allclose(found.photons[7], 1e5 + np.arange(160))
    assert found.protocol.kvp == 120

    grid = found.row_geometry(0).model_copy(update={"size": (64, 64), "pixel": SCAN.pixel})
    image = FBP(grid, "hann")(torch.from_numpy(found.sinogram[:, 0])[None])[0].numpy()
    # As DICOM shows it: columns to the patient's left, rows to the back.
    at = (np.arange(64) - 31.5) * SCAN.pixel
    truth = _truth(at[None], at[:, None])
    error = np.sqrt(np.mean((image - truth) ** 2))
    assert error < 0.2 * np.sqrt(np.mean(truth**2))
    # Mirrored or turned it would not fit: the phantom is not symmetric.
    for wrong in (image[:, ::-1], image[::-1], np.rot90(image)):
        assert np.sqrt(np.mean((wrong - truth) ** 2)) > error


def test_rows_far_from_the_plane_of_the_source_are_refused(tmp_path: Path) -> None:
    found = read_projections(write_projections(tmp_path / "pd", scan(SHORT, rows=16), SHORT))
    assert found.sinogram.shape == (24, 16, 160)
    assert found.central_row == 7.5
    assert found.row_geometry(7) == found.row_geometry(8) == found.geometry
    for row, message in ((0, "cone beams are not supported"), (16, "no detector row 16")):
        with pytest.raises(DataError, match=message):
            found.row_geometry(row)


def _put(tag: tuple[int, int], value: object, view: int | None = None) -> Spoil:
    def spoil(number: int, header: FileDataset, elements: Elements) -> None:
        if view is None or number == view:
            elements[tag] = (elements[tag][0], value)

    return spoil


def _drop(tag: tuple[int, int]) -> Spoil:
    return lambda number, header, elements: elements.pop(tag) and None


def _climb(number: int, header: FileDataset, elements: Elements) -> None:
    elements[0x7031, 0x1002] = ("FL", 0.3 * number)


def _unscaled(number: int, header: FileDataset, elements: Elements) -> None:
    header.RescaleSlope = "1"


def _no_rescale(number: int, header: FileDataset, elements: Elements) -> None:
    del header.RescaleIntercept


FAULTS: dict[str, tuple[Spoil, str]] = {
    "helical": (_put((0x7037, 0x1009), "HELICAL"), "a helical scan is not supported yet"),
    "table moves": (_climb, "the table moves by .*helical"),
    "flying focal spot": (_put((0x7033, 0x100E), "FFSXY"), "a flying focal spot is not supported yet"),
    "focal spot shifts": (_put((0x7033, 0x100B), 0.002, 5), "a flying focal spot is not supported yet"),
    "cone": (_put((0x7037, 0x100A), "CONEBEAM"), "other than that of fan beams is not supported"),
    "sphere": (_put((0x7029, 0x100B), "SPHERICAL"), "neither cylindrical nor flat"),
    "mixed distance": (_put((0x7031, 0x1003), 541.0, 9), "differ in geometry"),
    "mixed water": (_put((0x7041, 0x1001), 0.0192, 9), "differ in geometry"),
    "doubled view": (_put((0x7031, 0x1001), 1.0, 9), "stand where another does|uneven"),
    "several turns": (_put((0x7033, 0x1013), 12), "2.00 turns"),
    "missing views": (_put((0x7033, 0x1013), 48), "24 of 48 views of a turn are missing"),
    "negative photons": (_put((0x7033, 0x1065), [-1.0] * 160), "photon statistics are not positive"),
    "few photons": (_put((0x7033, 0x1065), [1.0] * 3), "not one value a bin"),
    "unscaled": (_unscaled, "counts were not positive, or its rescale is wrong"),
    "no rescale": (_no_rescale, "wrong rescale"),
    "no angle": (_drop((0x7031, 0x1001)), r"lacks the element \(7031,1001\)"),
    "no centre": (_drop((0x7031, 0x1033)), "which detector element is central"),
    "other detector": (_put((0x7029, 0x1011), 80), "its detector 1 rows of 80 bins"),
    "distances": (_put((0x7031, 0x1031), 300.0), "no possible scanner"),
    "not a number": (_put((0x7031, 0x1001), math.nan, 3), "does not hold numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_scans_have_one_clear_error(tmp_path: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    folder = write_projections(tmp_path / PATIENT_ID, scan(SHORT), SHORT, raw=fault == "no angle", spoil=spoil)
    with pytest.raises(DataError, match=message) as caught:
        read_projections(folder)
    assert PATIENT_ID not in str(caught.value)


def test_a_view_that_is_lost_or_no_projection_is_noticed(tmp_path: Path) -> None:
    folder = write_projections(tmp_path / "pd", scan(SHORT), SHORT)
    (folder / "view_00003.dcm").unlink()
    with pytest.raises(DataError, match="1 of 24 views of a turn are missing"):
        read_projections(folder)
    ct_header().save_as(folder / "image.dcm", enforce_file_format=True)
    with pytest.raises(DataError, match="holds no CT projections"):
        read_projections(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no DICOM file"):
        read_projections(tmp_path / "empty")


def _released(folder: Path) -> Path:
    """An untrained model: filtered back projection."""
    study = load_study(ct_study(task={"size": [32, 32]}))
    tensors = {name: tensor.numpy() for name, tensor in build_model(study.model, "ct").state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": FORMAT, "study": study.model_dump_json()})
    return folder / "model.safetensors"


@pytest.mark.slow
def test_a_released_model_reconstructs_real_projections(tmp_path: Path) -> None:
    model = _released(tmp_path)
    folder = write_projections(tmp_path / "pd", scan())
    said = reconstruct(model, folder, tmp_path / "out.nii.gz")
    assert "1 detector row" in said
    image = nib.load(tmp_path / "out.nii.gz")  # type: ignore[attr-defined]
    assert image.shape == (32, 32, 1)
    field = read_projections(folder, size=(32, 32)).geometry
    assert image.header.get_zooms()[:2] == pytest.approx((field.pixel, field.pixel))
    # NIfTI's x runs to the right and its y to the front.
    where = np.einsum("ij,jrc->irc", image.affine[:2], [*np.indices((32, 32)), np.zeros((32, 32)), np.ones((32, 32))])
    truth = 1000 * (_truth(-where[0], -where[1]) / 0.0195 - 1)
    found = image.get_fdata()[..., 0]
    assert np.corrcoef(found.ravel(), truth.ravel())[0, 1] > 0.95
    # The bead is on the left and in front.
    row, column = np.unravel_index(np.argmax(found), found.shape)
    assert np.hypot(-where[0, row, column] - 45, -where[1, row, column] + 50) < 16
    assert "Mind: images lie as the convention of DICOM-CT-PD puts them" in said
    assert "HFS" not in said
    with pytest.raises(StudyError, match="written as NIfTI"):
        reconstruct(model, folder, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("thickness", ["0.6", None])
def test_rows_lie_as_far_apart_as_they_are_at_the_isocentre(tmp_path: Path, thickness: str | None) -> None:
    """Three rows of a phantom that gets thinner from row to row; the header's slice thickness is another thing."""
    sinogram = scan(rows=3) * np.array([1.0, 0.8, 0.6], dtype=np.float32)[:, None]
    folder = write_projections(
        tmp_path / "pd", sinogram, spoil=lambda view, header, elements: setattr(header, "SliceThickness", thickness)
    )
    reconstruct(_released(tmp_path), folder, tmp_path / "out.nii.gz")
    image = nib.load(tmp_path / "out.nii.gz")  # type: ignore[attr-defined]
    step = 1.0947 * 595.0 / (595.0 + 490.6)
    assert image.header.get_zooms()[2] == pytest.approx(step, rel=1e-5)
    # Heights fall from row to row, about that of the source, and the isocentre is the middle of each slice.
    middles = [image.affine @ [15.5, 15.5, slice_, 1.0] for slice_ in range(3)]
    np.testing.assert_allclose(middles, [[0, 0, -200 + step * n, 1] for n in (-1, 0, 1)], atol=1e-3)
    inside = (image.get_fdata()[12:20, 12:20].mean((0, 1)) + 1000) / 1000
    np.testing.assert_allclose(inside / inside[2], [0.6, 0.8, 1.0], atol=0.05)


@pytest.mark.parametrize(
    ("position", "told"),
    [
        ("FFS", "the patient lies FFS, not head first"),
        ("MUELLER", "it is not said how the patient lies"),
        (None, "not said"),
    ],
)
def test_where_the_patient_lies_otherwise_it_is_said(tmp_path: Path, position: str | None, told: str) -> None:
    spoil = setting(PatientPosition=position)
    folder = write_projections(tmp_path / "pd", scan(SHORT), SHORT, spoil=lambda view, header, elements: spoil(header))
    said = reconstruct(_released(tmp_path), folder, tmp_path / "out.nii.gz")
    (line,) = (line for line in said.split("\n") if "HFS" in line)
    assert told in line
    assert "MUELLER" not in said


@pytest.mark.slow
def test_a_measured_scan_is_reconstructed_at_a_simulated_dose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reconstructed has the noise of the formula, and its scanner as many photons less."""
    study = load_study(ct_study(task={"size": [32, 32]}))
    tensors = {name: tensor.numpy() for name, tensor in build_model(study.model, "ct").state_dict().items()}
    model = tmp_path / "model.safetensors"
    save_file(tensors, model, metadata={"format": FORMAT, "study": study.model_dump_json()})
    folder = write_projections(tmp_path / "pd", scan())
    seen: list[tuple[float, NDArray[np.float32]]] = []
    scaled = CTSystem.scaled

    def watched(self: CTSystem, sinogram: torch.Tensor) -> torch.Tensor:
        seen.append((self.acquisition.photons, sinogram.numpy()))
        return scaled(self, sinogram)

    monkeypatch.setattr(CTSystem, "scaled", watched)
    full, low = tmp_path / "full.nii.gz", tmp_path / "low.nii.gz"
    assert "dose" not in reconstruct(model, folder, full)
    of_full = len(seen)
    said = reconstruct(model, folder, low, dose=0.1)
    assert "The dose is simulated at 0.1 of the measured dose: noise was put into the projections." in said
    (before, clean), (after, noisy) = seen[0], seen[of_full]
    assert after == pytest.approx(0.1 * before)
    photons = 1e5 + np.arange(160)
    left = np.exp(clean) / (0.1 * photons)
    lacking = left * 0.9 + (3.2 * left) ** 2 * 0.99
    assert float(np.mean((noisy - clean) ** 2 / lacking)) == pytest.approx(1, rel=0.03)
    images = [nib.load(path) for path in (full, low)]  # type: ignore[attr-defined]
    assert bytes(images[0].header["descrip"]).strip(b"\0") == b""
    assert bytes(images[1].header["descrip"]).startswith(b"simulated at 0.1 of the measured dose")
    assert not np.array_equal(images[0].get_fdata(), images[1].get_fdata())


@pytest.mark.parametrize("dose", [0.0, 1.0, -0.5, 2.0, math.nan])
def test_a_dose_is_a_share(dose: float, tmp_path: Path) -> None:
    study = load_study(ct_study(task={"size": [32, 32]}))
    network = build_model(study.model, "ct")
    with pytest.raises(StudyError, match=r"--dose is the share of the measured dose .* above 0 and below 1"):
        reconstruct_ct(network, study, tmp_path, tmp_path / "out.nii.gz", None, dose=dose)


def test_a_dose_needs_projections_that_name_their_photons(tmp_path: Path) -> None:
    study = load_study(ct_study(task={"size": [32, 32]}))
    network = build_model(study.model, "ct")
    folder = write_projections(tmp_path / "pd", scan(SHORT), SHORT, spoil=_drop((0x7033, 0x1065)))
    with pytest.raises(DataError, match=r"do not say how many photons.*leave --dose out"):
        reconstruct_ct(network, study, folder, tmp_path / "out.nii.gz", None, dose=0.5)
    series = write_series(tmp_path / "series")
    with pytest.raises(StudyError, match="--dose lowers the dose of measured projections"):
        reconstruct_ct(network, study, series, tmp_path / "out.nii.gz", "A", dose=0.5)
    assert not (tmp_path / "out.nii.gz").exists()
