"""Outlines in pictures: where they lie, what a colour says, and which slice of a volume is shown."""

from __future__ import annotations

import numpy as np

from wardround.tasks.overlays import DRAWN, MARKED, coloured, fullest, overlay, upright


def outlined(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.asarray((picture == np.array(colour, np.uint8)).all(axis=-1))


def test_equal_outlines_lie_side_by_side() -> None:
    mask = np.zeros((1, 32, 32), bool)
    mask[0, 8:24, 12:20] = True
    picture = overlay(np.random.default_rng(0).random((32, 32)), mask, mask)
    assert picture.shape == (320, 320, 3)
    inside = np.repeat(np.repeat(mask[0], 10, axis=0), 10, axis=1)
    drawn, marked = outlined(picture, DRAWN), outlined(picture, MARKED)
    assert drawn.any()
    assert marked.any()
    assert not (drawn & ~inside).any()
    assert not (marked & inside).any()
    # Two lines of 3 pixels around 160 x 80: the area of both frames.
    assert drawn.sum() == 160 * 80 - 154 * 74
    alone = overlay(np.zeros((32, 32)), mask)
    assert not outlined(alone, MARKED).any()


def test_pixels_are_square_whatever_their_size() -> None:
    assert overlay(np.zeros((16, 16)), np.zeros((1, 16, 16), bool), None, (1.0, 4.0)).shape == (80, 320, 3)


def test_the_slice_with_most_of_the_structures_is_shown() -> None:
    masks = np.zeros((2, 6, 6, 5), bool)
    assert fullest(masks) == 2
    masks[0, :2, :2, 1], masks[1, :3, :3, 4] = True, True
    assert fullest(masks) == 4


def test_front_is_on_top_and_the_patient_s_left_on_the_right() -> None:
    """Axes of a slice run to the patient's right and front."""
    slice_ = np.zeros((4, 6), int)
    slice_[3, 5] = 1  # right, front
    shown = upright(slice_)
    assert shown.shape == (6, 4)
    assert shown[0, 0] == 1


def test_colours_stay_and_one_channel_is_grey() -> None:
    image = np.random.default_rng(1).random((3, 5, 5)).astype(np.float32)
    assert coloured(image).shape == (5, 5, 3)
    grey = coloured(image[:2])
    assert (grey[..., 0] == grey[..., 2]).all()
