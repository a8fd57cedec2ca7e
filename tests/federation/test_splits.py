"""A site's record of who trains and who tests: nobody changes sides because others joined."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.outlines import make_outlines, outline_study
from wardround.errors import DataError
from wardround.imaging.datasets.split import Role
from wardround.plan.arm_specs import ArmSpecs
from wardround.site.datasets import Datasets
from wardround.site.splits import KEY, SPLITS, KnownParts
from wardround.study.sites import SiteData, SitesFile
from wardround.study.tasks import Split

RULE = Split(validation=0.2, test=0.3)
NAMES = [f"DOE-{number:02d}" for number in range(10)]


def dealt(folder: Path, names: list[str], seed: int = 1, settle: bool = True) -> dict[str, str]:
    """Each patient's part, as a run of its own deals them."""
    record = KnownParts(folder)
    parts = record.deal("A", names, RULE, seed, "train")
    if settle:
        record.settle()
    return {names[i]: part for part, numbers in parts.items() for i in numbers}


def test_patients_keep_their_parts_when_others_join_and_leave(tmp_path: Path) -> None:
    first = dealt(tmp_path, NAMES)
    more = ["ADAM", *NAMES[:4], "ZOE", *NAMES[5:], "MOE"]
    second = dealt(tmp_path, more)
    assert {name: second[name] for name in NAMES if name in second} == {n: p for n, p in first.items() if n in second}
    assert {first[name] for name in NAMES} == {"train", "validation", "test"}
    # Without a record one more patient deals all of them out anew.
    assert dealt(tmp_path / "other", more) != second


def test_another_rule_deals_anew(tmp_path: Path) -> None:
    assert dealt(tmp_path, NAMES, seed=1) != dealt(tmp_path, NAMES, seed=2)
    assert dealt(tmp_path, NAMES, seed=1) == dealt(tmp_path / "fresh", NAMES, seed=1)


def test_looking_writes_nothing_and_the_record_names_no_patient(tmp_path: Path) -> None:
    dealt(tmp_path, NAMES, settle=False)
    assert not list(tmp_path.iterdir())
    dealt(tmp_path, NAMES)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(name.encode() in written for name in NAMES)


def test_two_runs_that_deal_patients_at_once(tmp_path: Path) -> None:
    """The second to come to the record would have trained on a patient whom the first tests."""
    one, other = KnownParts(tmp_path), KnownParts(tmp_path)
    one.deal("A", NAMES, RULE, 1, "train")
    other.deal("A", [*NAMES, "ZOE"], RULE, 1, "train")
    one.settle()
    with pytest.raises(DataError, match="another run has dealt out this site's new patients"):
        other.settle()


@pytest.mark.parametrize("damage", ["line", "part", "key", "gone"])
def test_a_damaged_record_is_an_error(tmp_path: Path, damage: str) -> None:
    dealt(tmp_path, NAMES)
    record, key = tmp_path / SPLITS, tmp_path / KEY
    match damage:
        case "line":
            record.write_bytes(b"{}\n")
        case "part":
            record.write_bytes(record.read_bytes().replace(b'"test"', b'"rest"'))
        case "key":
            key.write_text("00")
        case "gone":
            key.unlink()
    with pytest.raises(DataError, match=r"damaged|gone"):
        dealt(tmp_path, NAMES)


def test_a_later_study_at_a_site_tests_whom_the_first_tested(tmp_path: Path) -> None:
    def names_of(sites: SitesFile, out: Path) -> dict[str, set[str]]:
        datasets = Datasets(ArmSpecs(outline_study({"A": {}}), ()), sites, folder=out)
        data = datasets.of("A")
        datasets.settle("A")
        return {split: set(data.names(split)) for split in ("train", "validation", "test")}

    make_outlines(tmp_path / "data", {"A": 10}, slices=1)
    entry = SiteData(data=tmp_path / "data" / "A", history=tmp_path / "history")
    before = names_of(SitesFile(sites={"A": entry}), tmp_path / "one")
    for number in range(4):
        (tmp_path / "data" / "A" / f"DOE-0{number}").rename(tmp_path / "data" / "A" / f"ROE-0{number}")
    make_outlines(tmp_path / "more", {"A": 4}, slices=1)
    for folder in (tmp_path / "more" / "A").iterdir():
        folder.rename(tmp_path / "data" / "A" / folder.name)
    after = names_of(SitesFile(sites={"A": entry}), tmp_path / "two")
    for split, names in before.items():
        assert names <= after[split]
    # A run in a folder of its own, without a history, is as it always was.
    alone = SitesFile(sites={"A": SiteData(data=tmp_path / "data" / "A")})
    assert names_of(alone, tmp_path / "three") == names_of(alone, tmp_path / "four")


@pytest.mark.parametrize("role", ["train", "evaluate", "unseen"])
def test_who_was_in_a_release_keeps_the_part_whatever_the_study_says(tmp_path: Path, role: Role) -> None:
    """With another seed, other shares and another role; who trained tests in none of them."""
    before = dealt(tmp_path, NAMES)
    names = [*NAMES, *(f"ROE-{number:02d}" for number in range(5))]
    record = KnownParts(tmp_path)
    parts = record.deal("A", names, Split(validation=0.3, test=0.3), 77, role, before)  # type: ignore[arg-type]
    record.settle()
    now = {names[number]: part for part, numbers in parts.items() for number in numbers}
    for name, part in before.items():
        if role == "train" or (role == "evaluate" and part != "train"):
            assert now[name] == part
        else:
            assert now.get(name) == ("test" if part == "test" else None)
    assert (not parts["train"]) == (role != "train")
    assert set(now) >= {name for name in names if name.startswith("ROE")} or role == "evaluate"
    # Again: what was settled stands, and those of the release are dealt by it alone.
    again = KnownParts(tmp_path).deal("A", names, Split(validation=0.3, test=0.3), 77, role, before)  # type: ignore[arg-type]
    assert again == parts


def test_a_site_whose_patients_all_trained_can_measure_nothing(tmp_path: Path) -> None:
    everyone = dict.fromkeys(NAMES, "train")
    for role in ("evaluate", "unseen"):
        with pytest.raises(DataError, match=r"all of its patients trained the release|was held out before|now tested"):
            KnownParts(tmp_path).deal("A", NAMES, RULE, 1, role, everyone)  # type: ignore[arg-type]
