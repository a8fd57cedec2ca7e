"""Scans that look like scanners': phase that follows anatomy, unlike coils, noisy references, and what `vary` draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from wardround.errors import StudyError
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.mri.scanner import MRIScanner
from wardround.imaging.acquisition.mri.simulate import anatomical_phase, dipole_field, simulate
from wardround.imaging.acquisition.mri.variety import changed, drawn, toned, zoomed
from wardround.study import MRIAcquisition
from wardround.study.acquisition import MRIVariety
from wardround.study.load import load_study
from wardround.wire.random import public_generator

ALL = {
    "acceleration": [2, 6], "families": ["random", "equispaced"], "calibration": [0.05, 0.3], "coils": [1, 5],
    "coil_radius": [1.2, 2.0], "noise": [0.001, 0.02], "noise_correlation": [0, 0.4], "phase": [0, 4],
    "phase_detail": [0.1, 1.2],
    "zoom": [0.6, 1.7], "turns": True, "gamma": [0.6, 1.7], "tones": 0.5, "bias": 0.4,
}  # fmt: skip


def _image(shape: tuple[int, int] = (48, 48)) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    y, x = rows / shape[0] - 0.5, columns / shape[1] - 0.5
    head = 0.4 * (np.hypot(y, 1.3 * x) < 0.42) + 0.6 * (np.hypot(y - 0.1, x + 0.08) < 0.12)
    return head.astype(np.float32)


def _acquisition(**options: object) -> MRIAcquisition:
    return MRIAcquisition.model_validate({"coils": 4, "mask": {"calibration": 0.12}, **options})


def test_what_is_new_is_drawn_only_where_it_is_asked_for() -> None:
    """Studies of before see the same scans, whatever is written out."""
    before = simulate(_image(), _acquisition(), np.random.default_rng(3))
    said = _acquisition(phase_detail=0.0, coil_variety=0.0, reference="image", vary=None)
    now = simulate(_image(), said, np.random.default_rng(3))
    assert torch.equal(before.kspace, now.kspace)
    assert now.reference is None
    # The noise of other lines is drawn after that of the measured ones.
    with_reference = simulate(_image(), _acquisition(reference="scan"), np.random.default_rng(3))
    assert torch.equal(before.kspace, with_reference.kspace)
    for change in ({"phase_detail": 0.5}, {"coil_variety": 0.3}):
        other = simulate(_image(), _acquisition(**change), np.random.default_rng(3))
        assert not torch.equal(before.kspace, other.kspace)


def test_the_field_of_a_cylinder_has_its_numbers() -> None:
    """(a / r)^2 cos 2 theta outside a radius of 2, nothing inside: at (0, 4) 1/4, at (4, 0) -1/4, on the diagonal 0."""
    field = dipole_field((11, 11), (5.0, 5.0), 2.0, 0.0)
    assert field[5, 9] == pytest.approx(0.25)
    assert field[9, 5] == pytest.approx(-0.25)
    assert field[8, 8] == pytest.approx(0.0, abs=1e-7)
    assert (field[4:7, 4:7] == 0).all()
    # Turned by a quarter, it changes its sign.
    np.testing.assert_allclose(dipole_field((11, 11), (5.0, 5.0), 2.0, np.pi / 2), -field, atol=1e-6)


def test_local_phase_grows_with_its_strength_and_is_sharper_than_the_smooth_one() -> None:
    one, two = (anatomical_phase(_image(), strength, np.random.default_rng(1)) for strength in (1.0, 2.0))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-5, atol=1e-6)
    assert (anatomical_phase(_image(), 0.0, np.random.default_rng(1)) == 0).all()
    assert np.abs(np.diff(one, axis=0)).max() > 0.1
    assert (anatomical_phase(np.zeros((16, 16), np.float32), 1.0, np.random.default_rng(1)) == 0).all()


@pytest.mark.parametrize("coils", [1, 6])
def test_unlike_coils_still_have_a_root_sum_of_squares_of_one(coils: int) -> None:
    acquisition = _acquisition(coils=coils, coil_variety=0.5, maps="true")
    maps = simulate(_image(), acquisition, np.random.default_rng(0)).maps
    torch.testing.assert_close(maps.abs().square().sum(0), torch.ones(48, 48), rtol=1e-4, atol=1e-4)


def test_the_reference_of_a_full_scan_is_its_own_image_with_its_noise() -> None:
    options = {"maps": "true", "reference": "scan", "mask": {"acceleration": 1.0}, "phase_detail": 0.7}
    quiet = simulate(_image(), _acquisition(**options, noise=0.0), np.random.default_rng(0))
    assert quiet.reference is not None
    torch.testing.assert_close(quiet.reference, torch.from_numpy(_image()), atol=1e-5, rtol=1e-4)
    noisy = simulate(_image(), _acquisition(**options, noise=0.05), np.random.default_rng(0))
    assert noisy.reference is not None
    operator = CartesianMRI(noisy.maps[None], noisy.mask[None])
    torch.testing.assert_close(noisy.reference, operator.A_adjoint(noisy.kspace[None])[0].abs())
    # Air holds the length of complex noise: its mean square is twice the variance.
    assert float(noisy.reference[_image() == 0].square().mean()) == pytest.approx(2 * 0.05**2, rel=0.1)


def test_lines_that_are_not_measured_have_noise_of_their_own_in_the_reference() -> None:
    """Of air, all lines have noise of twice the variance; the measured quarter alone would have a quarter of that."""
    air = np.zeros((48, 48), np.float32)
    scan = simulate(air, _acquisition(reference="scan", noise=0.05, maps="true"), np.random.default_rng(0))
    assert scan.reference is not None
    assert float(scan.reference.square().mean()) == pytest.approx(2 * 0.05**2, rel=0.1)
    assert (scan.kspace[:, scan.mask == 0] == 0).all()


def test_draws_stay_in_their_ranges_and_reach_both_ends() -> None:
    acquisition = _acquisition(vary=ALL)
    variety = acquisition.vary
    assert variety is not None
    found = [drawn(acquisition, np.random.default_rng(seed)) for seed in range(150)]
    for name in ("coils", "coil_radius", "noise", "noise_correlation", "phase", "phase_detail"):
        low, high = getattr(variety, name)
        values = [getattr(each, name) for each in found]
        assert low <= min(values) < low + 0.1 * (high - low) + 1e-9, name
        assert high >= max(values) > high - 0.1 * (high - low) - 1e-9, name
    assert {each.mask.family for each in found} == {"random", "equispaced"}
    assert all(2 <= each.mask.acceleration <= 6 for each in found)
    # The calibration leaves a share of the measured lines to the rest, whatever was drawn.
    assert all(0.05 <= each.mask.calibration <= 0.6 / each.mask.acceleration + 1e-9 for each in found)
    assert all(each.vary is None for each in found)
    assert drawn(_acquisition(), np.random.default_rng(0)) == _acquisition()


def test_the_number_of_coils_is_drawn_evenly_in_logarithms() -> None:
    acquisition = _acquisition(vary={"coils": [1, 12]})
    found = [drawn(acquisition, np.random.default_rng(seed)).coils for seed in range(2000)]
    for coils in range(1, 13):
        share = np.log((coils + 1) / coils) / np.log(13)
        assert found.count(coils) / 2000 == pytest.approx(share, abs=4.5 * np.sqrt(share / 2000)), coils


def test_an_image_that_is_zoomed_by_one_is_itself_and_others_are_as_large_as_they_should_be() -> None:
    image = _image((64, 64))
    np.testing.assert_allclose(zoomed(image, 1.0, np.random.default_rng(0)), image, atol=1e-5)
    for factor in (0.6, 0.8):
        smaller = zoomed(image, factor, np.random.default_rng(0))
        assert smaller.sum() == pytest.approx(factor**2 * image.sum(), rel=0.03)
        assert 0 <= smaller.min() <= smaller.max() <= 1


def test_a_changed_image_repeats_with_its_random_numbers_and_keeps_its_range() -> None:
    variety = MRIVariety.model_validate(ALL)
    one, again, other = (changed(_image(), variety, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert one.dtype == np.float32
    assert 0 <= one.min() <= one.max() <= 1 + ALL["bias"]  # type: ignore[operator]
    only = MRIVariety.model_validate({"gamma": [2.0, 2.0]})
    np.testing.assert_allclose(changed(_image(), only, np.random.default_rng(0)), _image() ** 2, rtol=1e-6)
    turned = MRIVariety(turns=True)
    seen = {changed(_image(), turned, np.random.default_rng(seed)).tobytes() for seed in range(20)}
    assert seen == {np.ascontiguousarray(np.rot90(_image(), k)).tobytes() for k in range(4)}


def test_tones_follow_one_curve_for_all_pixels_and_leave_air_and_peak_alone() -> None:
    ramp = np.linspace(0, 0.8, 4096, dtype=np.float32).reshape(64, 64)
    falls = 0
    for seed in range(20):
        curve = toned(ramp, np.random.default_rng(seed)).ravel()
        assert curve[0] == 0
        assert curve.max() == pytest.approx(0.8)
        assert curve[1:].min() > 0
        shuffled = np.random.default_rng(9).permutation(ramp.ravel()).reshape(64, 64)
        of_shuffled = toned(shuffled, np.random.default_rng(seed)).ravel()
        np.testing.assert_array_equal(of_shuffled[np.argsort(shuffled.ravel(), kind="stable")], curve)
        falls += bool((np.diff(curve) < 0).any())
    assert falls > 10
    assert (toned(np.zeros((4, 4), np.float32), np.random.default_rng(0)) == 0).all()


def test_as_many_scans_have_new_tones_as_the_study_says() -> None:
    variety = MRIVariety(tones=0.3)
    new = sum(not np.array_equal(changed(_image(), variety, np.random.default_rng(k)), _image()) for k in range(400))
    assert 80 < new < 160  # 120, and 4.4 standard deviations


def test_a_varied_scan_is_its_random_numbers_alone() -> None:
    acquisition = _acquisition(vary=ALL, reference="scan", phase_detail=0.5)
    assert acquisition.vary is not None
    scans = []
    for site, seed, step in (("A", 0, 1), ("B", 9, 1), ("A", 0, 2)):
        random = public_generator(7, step)
        scans.append(MRIScanner(site, acquisition, seed).varied(_image(), acquisition.vary, random))
    assert torch.equal(scans[0][0].samples, scans[1][0].samples)
    np.testing.assert_array_equal(scans[0][1], scans[1][1])
    assert scans[0][0].samples.shape != scans[2][0].samples.shape or not torch.equal(
        scans[0][0].samples, scans[2][0].samples
    )
    assert scans[0][0].nbytes > scans[0][0].samples.nbytes + scans[0][0].measured.nbytes


@pytest.mark.parametrize(
    ("vary", "match"),
    [
        ({"noise": [0.02, 0.01]}, "a range rises: write"),
        ({"acceleration": [0.5, 2]}, "below 1"),
        ({"calibration": [0.1, 1.5]}, "above 1"),
        ({"coil_radius": [0.5, 2]}, "more than 1"),
        ({"noise_correlation": [0, 1]}, "one noise"),
        ({"coils": [4, 2]}, "a range rises"),
        ({"zoom": [0, 2]}, "greater than 0"),
    ],
)
def test_ranges_that_no_scanner_has_are_refused(vary: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        _acquisition(vary=vary)


@pytest.mark.parametrize("vary", [{"coils": [1, 8]}, {"calibration": [0.03, 0.1]}])
def test_training_scans_that_espirit_cannot_serve_are_refused(vary: dict[str, object]) -> None:
    study = {"name": "trial", "sites": {"A": {}}, "task": {"size": [96, 96]}}
    acquisition = {"maps": "espirit", "mask": {"calibration": 0.1}}
    load_study({**study, "acquisition": acquisition})
    with pytest.raises(StudyError, match="espirit"):
        load_study({**study, "acquisition": {**acquisition, "vary": vary}})
