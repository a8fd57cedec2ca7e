"""Every patient in exactly one split, the same one every time."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wardround.errors import DataError
from wardround.imaging.datasets.split import SplitName, by_seed, deal_in, split_patients
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


@given(st.integers(2, 60), SHARES, st.integers(0, 2**62))
def test_an_evaluate_site_validates_and_tests_by_the_two_shares(
    count: int, shares: tuple[float, float], seed: int
) -> None:
    split = Split(validation=shares[0], test=shares[1])
    if not shares[0]:
        with pytest.raises(DataError, match=r"evaluates and split\.validation is 0"):
            split_patients(count, split, seed, "EZ", "evaluate")
        return
    parts = split_patients(count, split, seed, "EZ", "evaluate")
    assert parts["train"] == ()
    assert sorted(parts["validation"] + parts["test"]) == list(range(count))
    assert parts["validation"]
    assert bool(parts["test"]) == (shares[1] > 0)
    # Within one patient of the proportion, where neither part is empty for it.
    wanted = min(max(count * shares[1] / sum(shares), bool(shares[1])), count - 1)
    assert abs(len(parts["test"]) - wanted) <= 1


def test_patients_of_an_evaluate_site_stay_where_they_were_when_others_are_added() -> None:
    names = [f"p{number}" for number in range(12)]
    split, known = Split(validation=0.15, test=0.15), dict[str, SplitName]()
    for count in (4, 7, 12):
        parts = deal_in("EZ", names[:count], split, 3, "evaluate", known)
        now: dict[str, SplitName] = {names[i]: part for part, numbers in parts.items() for i in numbers}
        assert now.items() >= known.items()
        assert parts["train"] == ()
        assert abs(len(parts["validation"]) - len(parts["test"])) <= 1
        known = now


def test_one_patient_cannot_validate_and_test() -> None:
    with pytest.raises(DataError, match="site EZ evaluates and has 1 patient"):
        split_patients(1, Split(), 0, "EZ", "evaluate")
    assert split_patients(1, Split(validation=0.2, test=0), 0, "EZ", "evaluate")["validation"] == (0,)


def test_two_patients_train_and_test() -> None:
    parts = split_patients(2, Split(), 0, "EZ")
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [1, 0, 1]


def test_one_patient_cannot_train_and_be_held_out() -> None:
    with pytest.raises(DataError, match="site EZ trains but has 1 patient"):
        split_patients(1, Split(), 0, "EZ")
    assert split_patients(1, Split(validation=0, test=0), 0, "EZ")["train"] == (0,)


# Patients who join --------------------------------------------------------------------------------------------------


def _dealt(names: list[str], known: dict[str, SplitName], split: Split, seed: int = 3) -> dict[str, SplitName]:
    parts = deal_in("CS", names, split, seed, "train", known)
    assert sorted(i for part in parts.values() for i in part) == list(range(len(names)))
    assert all(list(part) == sorted(part) for part in parts.values())
    return {names[i]: part for part, numbers in parts.items() for i in numbers}


@given(
    st.integers(2, 12), st.lists(st.integers(1, 7), max_size=8), SHARES, st.integers(0, 2**62), st.randoms()
)  # fmt: skip
def test_no_patient_changes_part_and_shares_stay_within_one_patient_when_others_join(
    first: int, waves: list[int], shares: tuple[float, float], seed: int, random: Random
) -> None:
    split = Split(validation=shares[0], test=shares[1])
    pool = [f"patient {number}" for number in range(first + sum(waves))]
    random.shuffle(pool)
    names, known = sorted(pool[:first]), dict[str, SplitName]()
    for wave in [0, *waves]:
        names = sorted([*names, *pool[len(names) : len(names) + wave]])
        found = _dealt(names, known, split, seed)
        assert {name: found[name] for name in known} == known
        # Dealt again, whether or not it was put on record in between: the same.
        assert _dealt(names, found, split, seed) == _dealt(names, known, split, seed) == found
        rule = split_patients(len(names), split, seed, "CS")
        for part, numbers in rule.items():
            assert abs(sum(one == part for one in found.values()) - len(numbers)) <= 1
        known = found


def test_patients_of_whom_none_is_known_are_dealt_as_ever() -> None:
    names = [f"p{number:02}" for number in range(17)]
    ever = split_patients(17, Split(), 9, "CS")
    assert deal_in("CS", names, Split(), 9, "train", {}) == by_seed("CS", names, Split(), 9, "train") == ever
    assert deal_in("CS", names, Split(), 9, "train", {"somebody else": "test"}) == ever
    assert deal_in("CS", names, Split(), 9, "unseen", {"p00": "train"})["test"] == tuple(range(17))


def test_a_site_that_lost_all_who_trained_says_so() -> None:
    with pytest.raises(DataError, match="every patient that it has now was held out before; add patients"):
        deal_in("CS", ["a", "b"], Split(), 0, "train", {"a": "test", "b": "validation"})
    with pytest.raises(DataError, match="has 1 patient"):
        deal_in("CS", ["a"], Split(), 0, "train", {"a": "train"})
