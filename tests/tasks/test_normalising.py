"""Normalisation by percentiles and landmarks: the equations by hand, and a clinic that does what the sites did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.outlines import make_outlines, outline_study
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.imaging.readers.labelled import LabelledImage, VoxelSpace
from wardround.study.hashes import study_sha256
from wardround.study.normalise import PERCENTILES, STANDARD, Landmarks, PercentileScale, ZScore
from wardround.tasks.classification import ClassificationTask
from wardround.tasks.curves import Curve, curve_through, standardised
from wardround.tasks.distillation import check_scale
from wardround.tasks.images import CONTENT, NORMALISED, Harmonised, frame_of, scaled
from wardround.tasks.segmentation import Segmentation

LANDMARKS = {"kind": "landmarks", "percentiles": [1, 50, 99], "values": [[-2.0, 0.5, 2.0]]}


# The curve ------------------------------------------------------------------------------------------------------------


def test_a_curve_goes_through_its_knots_and_on_beyond_them() -> None:
    curve = Curve(torch.tensor([0.0, 10.0, 20.0]), torch.tensor([-2.0, 0.0, 4.0]))
    values = torch.tensor([[-5.0, 0.0, 5.0], [10.0, 15.0, 30.0]])
    # Slopes 0.2 and 0.4.
    assert torch.equal(curve(values), torch.tensor([[-3.0, -2.0, -1.0], [0.0, 2.0, 8.0]]))


def test_equal_landmarks_are_one_knot_at_the_mean_of_theirs() -> None:
    curve = curve_through(np.array([3.0, 3.0, 7.0]), (-2.0, 0.0, 2.0))
    assert curve.x.tolist() == [3.0, 7.0]
    assert curve.y.tolist() == [-1.0, 2.0]
    flat = curve_through(np.full(3, 3.0), (-2.0, 0.5, 2.0))
    assert flat(torch.tensor([3.0, 4.0])).tolist() == [0.5, 1.5]


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12, unique=True), st.data())
def test_a_curve_rises_and_is_numpy_s_between_its_ends(knots: list[float], data: st.DataObject) -> None:
    x = np.sort(np.array(knots, np.float32)).astype(np.float64)
    if np.diff(x).min() < 1e-2:
        return
    y = np.sort(data.draw(st.lists(st.floats(-5, 5), min_size=len(x), max_size=len(x))))
    curve = curve_through(x, tuple(y))
    inside = np.linspace(x[0], x[-1], 50).astype(np.float32)
    # In float32 a place is off by 100 x 2^-24, and so its value by the steepest slope times that, and by 5 x 2^-22.
    steepest = np.abs(np.diff(y) / np.diff(x)).max()
    assert np.allclose(curve(torch.from_numpy(inside)).numpy(), np.interp(inside, x, y), atol=2e-5 * steepest + 1e-5)
    beyond = curve(torch.linspace(float(x[0]) - 10, float(x[-1]) + 10, 80))
    assert (torch.diff(beyond) >= -1e-4 * (1 + steepest)).all()


def test_landmarks_of_an_image_have_its_ends_on_the_scale_whatever_its_units() -> None:
    found = np.array([10.0, 30.0, 90.0])
    wanted = standardised(found, STANDARD)
    assert wanted is not None
    assert np.allclose(wanted, [-2.0, -1.0, 2.0])
    other = standardised(7.0 * found - 300.0, STANDARD)
    assert other is not None
    assert np.allclose(other, wanted)
    assert standardised(np.full(3, 4.0), STANDARD) is None


# Images ---------------------------------------------------------------------------------------------------------------


def image(seed: int = 0, channels: int = 1) -> np.ndarray:
    """Tissue in air: a disc of bytes."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:24, :24]
    disc = (y - 12) ** 2 + (x - 12) ** 2 < 100
    return (disc * random.gamma(4.0, 20.0, (channels, 24, 24)).clip(20, 255)).astype(np.uint8)


def test_the_default_is_what_it_was_bit_for_bit() -> None:
    pixels = image(1, 2)
    assert frame_of(ZScore()) is NORMALISED
    found = scaled(pixels, NORMALISED.scales(pixels))
    for channel, values in zip(pixels, found, strict=True):
        values_in = torch.from_numpy(channel.astype(np.float32))
        inside = values_in[values_in > CONTENT * values_in.max()]
        assert torch.equal(values, values_in.sub(inside.mean()).div(inside.std().clamp_min(1e-6)))


def test_percentiles_of_what_is_shown_become_minus_2_and_2() -> None:
    pixels = image(2, 2)
    frame = frame_of(PercentileScale(kind="percentiles", low=10, high=80))
    found = scaled(pixels, frame.scales(pixels))
    for channel, values in zip(pixels.astype(np.float64), found.numpy(), strict=True):
        low, high = np.percentile(channel[channel > CONTENT * channel.max()], [10, 80])
        # Bytes and quotients of them in float32: 255 x 2^-24 over a range of some ten.
        assert np.allclose(values, -2.0 + 4.0 * (channel - low) / (high - low), atol=1e-4)


def test_landmarks_bring_images_of_other_contrast_onto_one_scale() -> None:
    """A rising change of an image's values moves its percentiles: at the landmarks nothing of it is left."""
    one = np.linspace(60, 200, 1001, dtype=np.float32)[None]
    other = (one / 200) ** 2 * 900
    values = tuple(np.linspace(-2, 2, len(PERCENTILES)) ** 3)
    frame = Harmonised(PERCENTILES, (values,))
    places = (np.array(PERCENTILES) * 10).astype(int)
    a, b = (scaled(each, frame.scales(each))[0].numpy() for each in (one, other))
    # A percentile of 1001 values is one of them; float32 of values up to 900 with slopes up to 0.5.
    assert np.allclose(a[places], values, atol=1e-4)
    assert np.allclose(b[places], values, atol=1e-4)
    plain = [scaled(each, NORMALISED.scales(each))[0].numpy() for each in (one, other)]
    assert np.abs(plain[0][places] - plain[1][places]).max() > 0.3


def test_a_channel_that_shows_nothing_stays_as_it_is() -> None:
    empty = np.zeros((1, 8, 8), np.uint8)
    frame = frame_of(Landmarks.model_validate(LANDMARKS))
    assert frame.scales(empty) == (None,)
    assert not scaled(empty, frame.scales(empty)).any()


# A study and a clinic -------------------------------------------------------------------------------------------------


class Seen(nn.Module):
    """A network that remembers what it saw and marks nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.images.append(images.clone())
        return images[:, :1] * 0.0 - 1.0


@pytest.mark.parametrize("normalise", [LANDMARKS, {"kind": "percentiles", "low": 5, "high": 95}])
def test_a_clinic_sees_what_the_site_saw(tmp_path: Path, normalise: dict[str, Any]) -> None:
    sites = make_outlines(tmp_path / "data", {"A": 4})
    study = outline_study({"A": {}}, task={"normalise": normalise})
    task = Segmentation(study, study.task)  # type: ignore[arg-type]
    dataset = task.dataset("A", sites.of("A").data)
    (_, batch), *_ = dataset.evaluation("test")
    stored = dataset._read(dataset.tested_patient(0), 0)
    network = Seen()
    task.predict(network, LabelledImage(stored.channels, None, VoxelSpace((1.0, 1.0, 3.0))))
    seen = torch.cat(network.images)
    assert torch.equal(seen, batch.images)
    plain = Segmentation(outline_study({"A": {}}), outline_study({"A": {}}).task)  # type: ignore[arg-type]
    (_, other), *_ = plain.dataset("A", sites.of("A").data).evaluation("test")
    assert not torch.allclose(seen, other.images, atol=0.05)


def test_a_study_without_the_key_keeps_its_hash() -> None:
    # As the version before `task.normalise` gave it.
    study = outline_study({"A": {}})
    assert study_sha256(study) == "b086dc679cf6d647976c097810319e279dee15b75d760a67e9734623ca0d227c"
    assert study_sha256(outline_study({"A": {}}, task={"normalise": LANDMARKS})) != study_sha256(study)
    assert study.task.describe() == "segmentation of structure in 2-D"
    assert "3 landmarks" in outline_study({"A": {}}, task={"normalise": LANDMARKS}).task.describe()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kind": "percentiles", "low": 60, "high": 40}, "`low` must be below `high`"),
        ({**LANDMARKS, "percentiles": [1, 99, 50]}, "must rise, from 0 to 100"),
        ({**LANDMARKS, "percentiles": [1, 50, 101]}, "must rise, from 0 to 100"),
        ({**LANDMARKS, "values": [[-2.0, 2.0]]}, "channel 0 has 2 of 3 landmarks"),
        ({**LANDMARKS, "values": [[-2.0, -2.0, 2.0]]}, "those of channel 0 must rise"),
        ({**LANDMARKS, "values": [[-2.0, 0.0, 2.0]] * 2}, "landmarks of 2 channels, and the images have 1"),
    ],
)
def test_landmarks_that_mean_nothing_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        outline_study({"A": {}}, task={"normalise": changed})


def test_a_teacher_of_another_scale_is_refused() -> None:
    plain = ClassificationTask(kind="classification", classes=("a", "b"))
    other = plain.model_copy(update={"normalise": PercentileScale(kind="percentiles")})
    check_scale(plain, plain)
    with pytest.raises(StudyError, match="normalised otherwise"):
        check_scale(plain, other)
