"""Reading CT slices and series in DICOM, and refusing what is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from tests.ct_files import PATIENT_ID, body, ct_header, set_pixels, setting, write_series, write_slice
from tests.examples import examples
from tests.real_images import root_folder

from wardround.errors import DataError
from wardround.imaging.readers.ct_protocol import CTProtocol, acquisition_from_header, protocol_of
from wardround.imaging.readers.dicom import read_series, read_slice
from wardround.imaging.readers.places import Place
from wardround.study.ct import CTAcquisition, CTGeometry


def test_a_slice_is_in_hounsfield_units(tmp_path: Path) -> None:
    hu = body((48, 64))
    found = read_slice(write_slice(tmp_path / "a.dcm", hu, position=-164.5))
    assert found.hu.dtype == np.float32
    np.testing.assert_array_equal(found.hu, hu)
    assert found.spacing == (0.8, 0.6)
    assert found.place == Place(-164.5, 1)
    assert found.protocol == CTProtocol("SIEMENS", "Sensation 16", 120, 251, 5, "B20f", 570, 470, 352)


def test_headers_of_many_vendors_are_understood(tmp_path: Path) -> None:
    odd = setting(
        KVP="000140",
        SliceThickness="008.000000E+00",
        PixelSpacing=["006.445312e-01", "06.464844E-01"],
        RescaleSlope="001.000000E+00",
        RescaleIntercept="-01.024000E+03",
        ConvolutionKernel=["B30f", "3"],
        GantryDetectorTilt="-0.000000",
        XRayTubeCurrent="0",
        DistanceSourceToPatient=None,
    )
    found = read_slice(write_slice(tmp_path / "a.dcm", change=odd))
    assert found.spacing == (0.6445312, 0.6464844)
    assert found.protocol.kernel == "B30f/3"
    assert (found.protocol.kvp, found.protocol.slice_thickness) == (140, 8)
    assert found.protocol.stated == ("vendor", "model", "kvp", "slice_thickness", "kernel", "reconstruction_diameter")


@pytest.mark.parametrize("padding", [-2000, 63536, None])
@pytest.mark.parametrize("value", [-2000, -1024])
def test_padding_of_ge_becomes_air(tmp_path: Path, padding: int | None, value: int) -> None:
    hu = body()
    outside = np.hypot(*(np.indices(hu.shape) - 31.5)) > 32
    padded = np.where(outside, value - 1024, hu).astype(np.int16)
    header = ct_header()
    set_pixels(header, padded, signed=True)
    if padding is not None:
        header.add_new(0x00280120, "SS" if padding < 0 else "US", padding)
    header.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    found = read_slice(tmp_path / "a.dcm").hu
    np.testing.assert_array_equal(found, np.where(outside, -1024, hu))


def _compress(path: Path, syntax: UID) -> None:
    """Compress a file in place, RLE by pydicom, else by GDCM's encoder."""
    if syntax == RLELossless:
        header = pydicom.dcmread(path)
        header.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        header.save_as(path)
        return
    gdcm = pytest.importorskip("gdcm", reason="no encoder at hand")
    kinds = {
        JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
        JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
        JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
    }
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(kinds[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_lossless_compression_changes_nothing(tmp_path: Path, syntax: UID) -> None:
    hu = body()
    path = write_slice(tmp_path / "a.dcm", hu)
    _compress(path, syntax)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_slice(path).hu, hu)
    assert not read_series([path]).lossy
    whole = path.read_bytes()
    for missing in (12, 600):
        path.write_bytes(whole[: len(whole) - missing])
        with pytest.raises(DataError, match="damaged"):
            read_slice(path)


def test_a_missing_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compress(header: pydicom.FileDataset) -> None:
        header.PixelData = encapsulate([b"\xff\xd8 not read \xff\xd9 "])
        header["PixelData"].is_undefined_length = True
        header.file_meta.TransferSyntaxUID = JPEGLosslessSV1

    path = write_slice(tmp_path / "a.dcm", change=compress)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gdcm" else find(name, *rest))
    with pytest.raises(DataError, match=r"pip install 'wardround\[compressed\]'"):
        read_slice(path)


def _colour(header: pydicom.FileDataset) -> None:
    header.SamplesPerPixel, header.PhotometricInterpretation, header.PlanarConfiguration = 3, "RGB", 0
    header.PixelData = header.PixelData * 3


def _scale(factor: float, shift: float) -> object:
    def change(header: pydicom.FileDataset) -> None:
        header.RescaleSlope, header.RescaleIntercept = str(factor), str(shift)

    return change


BAD_SLICES = {
    "not CT": (setting(Modality="MR"), "not CT .its modality is MR"),
    "a modality that is a name": (setting(Modality="Mueller"), "missing or unknown"),
    "no modality": (setting(Modality=None), "missing or unknown"),
    "raw data": (setting(SOPClassUID="1.2.840.10008.5.1.4.1.1.66"), "no CT image"),
    "enhanced": (setting(SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1"), "enhanced multi-frame CT"),
    "localizer": (setting(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
    "tilt": (setting(GantryDetectorTilt="-12.5"), "gantry tilt of -12.5 degrees"),
    "frames": (setting(NumberOfFrames=2), "2 frames"),
    "colour": (_colour, "in colour"),
    "no slope": (setting(RescaleSlope=None), "wrong rescale"),
    "no intercept": (setting(RescaleIntercept=None), "wrong rescale"),
    "empty intercept": (setting(RescaleIntercept=""), "wrong rescale"),
    "intercept 0": (_scale(1, 0), "wrong rescale.*no air"),
    "intercept twice": (_scale(1, -2048), "wrong rescale.*below -1100"),
    "slope 0": (_scale(0, -1024), "wrong rescale.*slope is 0"),
    "slope 20": (_scale(20, -1024), "wrong rescale.*reach 3"),
    "other units": (setting(RescaleType="US"), "wrong rescale.*something else"),
    "no pixels": (setting(PixelData=None), "no pixels"),
    "no place": (setting(ImagePositionPatient=None), "lacks ImagePositionPatient"),
    "no orientation": (setting(ImageOrientationPatient=None), "lacks ImageOrientationPatient"),
    "short place": (setting(ImagePositionPatient=[1, 2]), "ImagePositionPatient is not 3 finite numbers"),
    "skewed axes": (setting(ImageOrientationPatient=[1, 0, 0, 0.5, 1, 0]), "not perpendicular"),
    "no spacing": (setting(PixelSpacing=None), "lacks PixelSpacing"),
    "spacing 0": (setting(PixelSpacing=[0, 0.7]), "not positive"),
    "distances": (setting(DistanceSourceToDetector="400"), "nearer to the source"),
    "negative kVp": (setting(KVP="-120"), "KVP is negative"),
}


@pytest.mark.parametrize("fault", BAD_SLICES)
def test_bad_slices_have_one_clear_error(tmp_path: Path, fault: str) -> None:
    change, message = BAD_SLICES[fault]
    path = write_slice(tmp_path / "MUELLER" / f"{PATIENT_ID}.dcm", change=change)
    with pytest.raises(DataError, match=message) as caught:
        read_slice(path)
    for secret in ("MUELLER", PATIENT_ID, "19510423", str(tmp_path)):
        assert secret not in str(caught.value)
    assert PATIENT_ID in caught.value.detail


def test_air_subtracted_twice_is_no_padding(tmp_path: Path) -> None:
    clean = np.full((64, 64), -1000, np.int16)
    clean[12:52, 8:56] = 0
    clean[20:30, 20:30] = 1000
    assert read_slice(write_slice(tmp_path / "a.dcm", clean)).hu.min() == -1000
    with pytest.raises(DataError, match="wrong rescale"):
        read_slice(write_slice(tmp_path / "b.dcm", clean, change=_scale(1, -2024)))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("spread", [70, 120])
def test_air_as_a_sharp_kernel_shows_it_is_air(tmp_path: Path, spread: int, padding: bool) -> None:
    noisy = body().astype(float) + np.random.default_rng(0).normal(0, spread, (64, 64))
    if padding:
        noisy[np.hypot(*(np.indices((64, 64)) - 31.5)) > 32] = -2000
    for intercept, fine in ((-1024, True), (-2048, False), (-1224, False)):
        header = ct_header()
        set_pixels(header, np.rint(noisy).astype(np.int16), signed=True)
        header.RescaleIntercept = str(intercept)
        header.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        if fine:
            np.testing.assert_array_equal(read_slice(tmp_path / "a.dcm").hu, np.maximum(np.rint(noisy), -1024))
        else:
            with pytest.raises(DataError, match=r"wrong rescale.*below -1100"):
                read_slice(tmp_path / "a.dcm")


def test_files_that_are_no_dicom(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_slice(tmp_path / "absent.dcm")
    for content in (b"", b"hello", b"\0" * 200):
        (tmp_path / "x.dcm").write_bytes(content)
        with pytest.raises(DataError, match="not DICOM"):
            read_slice(tmp_path / "x.dcm")


@pytest.mark.parametrize("implicit", [False, True])
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, implicit: bool) -> None:
    change = (lambda h: setattr(h.file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian)) if implicit else id
    whole = write_slice(tmp_path / "a.dcm", change=change).read_bytes()
    for length in [*range(0, len(whole) - 8192, 97), len(whole) - 4000, len(whole) - 2]:
        (tmp_path / "cut.dcm").write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_slice(tmp_path / "cut.dcm")


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(132, 1800), value=st.integers(0, 255))
def test_a_spoiled_byte_gives_a_slice_or_one_clear_error(tmp_path: Path, place: int, value: int) -> None:
    source = tmp_path / "a.dcm"
    if not source.exists():
        write_slice(source)
    spoiled = bytearray(source.read_bytes())
    spoiled[place] = value
    (tmp_path / "b.dcm").write_bytes(spoiled)
    message = ""
    try:
        assert np.isfinite(read_slice(tmp_path / "b.dcm").hu).all()
    except DataError as error:
        message = str(error)
    assert "MUELLER" not in message


def test_pixels_of_an_unknown_kind_are_damaged(tmp_path: Path) -> None:
    path = write_slice(tmp_path / "a.dcm")
    whole = path.read_bytes()
    assert whole.count(b"\xe0\x7f\x10\0OW") == 1
    path.write_bytes(whole.replace(b"\xe0\x7f\x10\0OW", b"\xe0\x7f\x10\0O\0"))
    with pytest.raises(DataError, match="pixels are damaged or cut short"):
        read_slice(path)


def test_a_series_is_sorted_and_placed_as_nifti_does(tmp_path: Path) -> None:
    series = read_series(write_series(tmp_path / "s", (10.0, 0.0, 5.0)))
    assert series.data.shape == (64, 64, 3)
    assert series.spacing == (0.8, 0.6, 5.0)
    np.testing.assert_array_equal(series.data[..., 0], body(seed=2))
    # Row 3, column 2, slice 1 in LPS, then x and y turned.
    np.testing.assert_allclose(series.affine @ [3, 2, 1, 1], [100 - 2 * 0.6, 120 - 3 * 0.8, 5, 1])
    assert [int(header.InstanceNumber) for header in series.headers] == [2, 3, 1]
    assert all("PixelData" not in header for header in series.headers)
    assert series.volume.data is series.data


def test_a_coronal_series_goes_along_its_own_normal(tmp_path: Path) -> None:
    for number, y in enumerate((0, 2, 4)):
        change = setting(ImageOrientationPatient=[1, 0, 0, 0, 0, -1], ImagePositionPatient=[-10, y, 40])
        write_slice(tmp_path / "s" / f"{number}", body(seed=number), change=change)
    series = read_series(tmp_path / "s")
    np.testing.assert_array_equal(series.data[..., 0], body(seed=0))
    np.testing.assert_allclose(series.affine @ [1, 0, 1, 1], [10, -2, 40 - 0.8, 1], atol=1e-9)


def test_one_slice_is_as_thick_as_its_header_says(tmp_path: Path) -> None:
    assert read_series(write_series(tmp_path / "s", (3.0,))).spacing == (0.8, 0.6, 5.0)


BAD_POSITIONS = {
    "gap": ((0, 5, 15, 20), "1 of 5 slices of a series are missing"),
    "many gaps": ((0, 5, 15, 25), "2 of 6 slices of a series are missing"),
    "doubled": ((0, 5, 5, 10), "1 of 4 slices of a series lie where another does"),
    "uneven": ((0, 5, 10, 17), "unevenly spaced"),
}


@pytest.mark.parametrize("fault", BAD_POSITIONS)
def test_series_with_wrong_positions_are_refused(tmp_path: Path, fault: str) -> None:
    positions, message = BAD_POSITIONS[fault]
    with pytest.raises(DataError, match=message):
        read_series(write_series(tmp_path / "s", positions))


def _slanted(header: pydicom.FileDataset) -> None:
    x, y, z = header.ImagePositionPatient
    header.ImagePositionPatient = [x, y + 0.2 * z, z]


def test_series_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder does not exist"):
        read_series(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no DICOM file"):
        read_series(tmp_path / "empty")
    mixed = write_series(tmp_path / "mixed")
    write_slice(mixed / "other", position=20.0, change=setting(SeriesInstanceUID="1.2.826.0.1.99"))
    with pytest.raises(DataError, match="2 series are mixed"):
        read_series(mixed)
    sizes = write_series(tmp_path / "sizes")
    write_slice(sizes / "other", body((32, 64)), position=20.0)
    with pytest.raises(DataError, match="differ in size"):
        read_series(sizes)
    foreign = write_series(tmp_path / "foreign")
    (foreign / "DICOMDIR").write_text("ignored")
    (foreign / ".DS_Store").write_text("ignored")
    assert read_series(foreign).data.shape[2] == 4
    (foreign / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="not DICOM"):
        read_series(foreign)
    with pytest.raises(DataError, match="gantry tilt"):
        read_series(write_series(tmp_path / "slanted", change=_slanted))
    two = write_series(tmp_path / "two")
    write_slice(two / "other", position=20.0, change=setting(PatientID="PAT-9"))
    with pytest.raises(DataError, match="slices of one series are of 2 patients") as error:
        read_series(two)
    assert "PAT" not in str(error.value)


@pytest.mark.parametrize(
    ("where", "typed"),
    [("PatientName", "Meier^Hans"), ("PatientID", "H-7731-Meier"), ("OperatorsName", "MEIER^Anna")],
)
def test_no_device_is_called_as_a_person_in_its_own_header(where: str, typed: str) -> None:
    header = ct_header()
    setattr(header, where, typed)
    header.Manufacturer, header.ManufacturerModelName, header.ConvolutionKernel = "Siemens", "Dr. Meier's", "meier"
    found = protocol_of(header)
    assert (found.vendor, found.model, found.kernel) == ("Siemens", None, None)
    header.ManufacturerModelName, header.ConvolutionKernel = "Definition AS+", "B30f"
    assert protocol_of(header).scanner == "Siemens Definition AS+"


def test_the_header_fills_an_acquisition_and_the_study_the_rest(tmp_path: Path) -> None:
    protocol = read_slice(write_slice(tmp_path / "a.dcm")).protocol
    default = CTAcquisition(
        geometry=CTGeometry(views=90, source_distance=500.0, detector_distance=400.0), photons=3e4, kvp=80.0
    )
    found = acquisition_from_header(protocol, default)
    assert (found.kvp, found.slice_thickness, found.kernel) == (120, 5, "B20f")
    assert (found.geometry.source_distance, found.geometry.detector_distance) == (570, 470)
    assert (found.geometry.views, found.photons) == (90, 3e4)
    empty = pydicom.Dataset()
    assert protocol_of(empty) == CTProtocol()
    assert acquisition_from_header(empty, default) == default
    parallel = CTAcquisition(geometry=CTGeometry(kind="parallel"))
    assert acquisition_from_header(protocol, parallel).geometry == parallel.geometry
    with pytest.raises(DataError, match="no real scanner: see kvp"):
        acquisition_from_header(CTProtocol(kvp=12.0))


@pytest.mark.data("luad-ct")
def test_every_real_slice_is_read() -> None:
    paths = sorted((root_folder() / "luad-ct").glob("*/*/*.dcm"))
    assert paths
    models = set()
    for path in paths:
        found = read_slice(path)
        assert found.hu.shape == (512, 512)
        assert found.hu.min() >= -1024
        assert 0.5 < found.spacing[0] < 1
        assert abs(found.protocol.reconstruction_diameter or found.spacing[0] * 512) == pytest.approx(
            found.spacing[0] * 512, rel=0.01
        )
        acquisition = acquisition_from_header(found.protocol)
        assert acquisition.geometry.source_distance == (found.protocol.source_distance or 595.0)
        models.add(found.protocol.model)
    assert len(models) >= 15
