"""Every patient in exactly one split, the same one every time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wardround.errors import DataError
from wardround.imaging.datasets.split import split_patients
from wardround.study.tasks import Split

SHARES = st.tuples(st.floats(0, 0.95, allow_nan=False), st.floats(0, 0.95, allow_nan=False)).filter(
    lambda shares: sum(shares) < 1
)


@given(st.integers(2, 60), SHARES, st.integers(0, 2**62), st.sampled_from(["CS", "DU"]))
def test_splits_partition_the_patients(count: int, shares: tuple[float, float], seed: int, site: str) -> None:
    split = Split(validation=shares[0], test=shares[1])
    parts = split_patients(count, split, seed, site)
    assert sorted(i for part in parts.values() for i in part) == list(range(count))
    assert all(list(part) == sorted(part) for part in parts.values())
    assert parts["train"]
    assert parts == split_patients(count, split, seed, site)
    if count >= 3:
        assert bool(parts["validation"]) == (shares[0] > 0)
        assert bool(parts["test"]) == (shares[1] > 0)


def test_sizes_follow_the_shares() -> None:
    parts = split_patients(40, Split(validation=0.15, test=0.2), 0, "CS")
    assert {name: len(part) for name, part in parts.items()} == {"train": 26, "validation": 6, "test": 8}


def test_seed_and_site_decide_the_draw() -> None:
    draws = {split_patients(30, Split(), seed, site)["test"] for seed in range(3) for site in ("CS", "DU")}
    assert len(draws) == 6


def test_the_draw_is_the_same_tomorrow() -> None:
    assert split_patients(10, Split(), 7, "CS")["test"] == (2, 4)


def test_every_patient_of_an_unseen_site_tests() -> None:
    assert split_patients(1, Split(), 0, "EZ", "unseen") == {"train": (), "validation": (), "test": (0,)}


def test_two_patients_train_and_test() -> None:
    parts = split_patients(2, Split(), 0, "EZ")
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [1, 0, 1]


def test_one_patient_cannot_train_and_be_held_out() -> None:
    with pytest.raises(DataError, match="site EZ trains but has 1 patient"):
        split_patients(1, Split(), 0, "EZ")
    assert split_patients(1, Split(validation=0, test=0), 0, "EZ")["train"] == (0,)
