"""A site's record of which patients were in which released model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.living.ward import admit, ward_sites, ward_study
from wardround.errors import DataError
from wardround.runs.session import run
from wardround.site.lineage import KEY, LINEAGE, Lineage

ONE, TWO, THREE, STUDY = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
PARTS = {"train": ("ANN", "BEN"), "validation": ("CAT",), "test": ("DAN",)}


def test_a_release_and_its_ancestors(tmp_path: Path) -> None:
    record = Lineage(tmp_path)
    assert record.uses_of("ANN") == ()
    assert record.trained(ONE, ["ANN"]) == frozenset()
    assert not list(tmp_path.iterdir()), "looking writes nothing"
    record.record(ONE, None, STUDY, PARTS)
    record.record(TWO, ONE, STUDY, {"train": ("EVA",), "validation": (), "test": ("DAN", "CAT")})
    record.record(THREE, TWO, STUDY, {})
    assert record.ancestors(THREE) == (TWO, ONE)
    assert record.ancestors(ONE) == ()
    assert record.trained(ONE, ["ANN", "EVA", "ZOE"]) == {"ANN"}
    assert record.trained(THREE, ["ANN", "EVA", "CAT"]) == {"ANN", "EVA"}
    assert record.parts(THREE, ["ANN", "CAT", "DAN", "ZOE"]) == {"ANN": "train", "CAT": "validation", "DAN": "test"}
    assert [(use.release, use.parent, use.study, use.part) for use in record.uses_of("CAT")] == [
        (ONE, None, STUDY, "validation"),
        (TWO, ONE, STUDY, "test"),
    ]
    assert record.knows(ONE)
    assert not record.knows("e" * 64)


def test_what_is_on_record_is_not_written_twice(tmp_path: Path) -> None:
    for parts in (PARTS, {**PARTS, "train": ("BEN", "ANN")}, {**PARTS, "train": ("BEN",)}):
        Lineage(tmp_path).record(ONE, None, STUDY, parts)
    # Of the same release, others are in another line: of a study that measures it, say.
    assert len((tmp_path / LINEAGE).read_bytes().splitlines()) == 2


def test_a_release_that_was_measured_is_not_its_own_parent(tmp_path: Path) -> None:
    record = Lineage(tmp_path)
    record.record(ONE, ONE, STUDY, PARTS)
    assert record.ancestors(ONE) == ()
    # A record that goes round in a circle is no endless search.
    record.record(ONE, TWO, STUDY, PARTS)
    record.record(TWO, ONE, STUDY, PARTS)
    assert record.ancestors(ONE) == (TWO,)


def test_no_name_is_in_it_and_a_cut_off_line_is_forgotten(tmp_path: Path) -> None:
    Lineage(tmp_path).record(ONE, None, STUDY, PARTS)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(name.encode() in written for part in PARTS.values() for name in part)
    whole = (tmp_path / LINEAGE).read_bytes()
    (tmp_path / LINEAGE).write_bytes(whole + whole[: len(whole) // 2])
    assert Lineage(tmp_path).trained(ONE, ["ANN"]) == {"ANN"}
    Lineage(tmp_path).record(TWO, ONE, STUDY, PARTS)
    assert Lineage(tmp_path).ancestors(TWO) == (ONE,)


@pytest.mark.parametrize("damage", ["line", "part", "parent", "key", "gone"])
def test_a_damaged_record_is_an_error(tmp_path: Path, damage: str) -> None:
    record = Lineage(tmp_path)
    record.record(ONE, None, STUDY, PARTS)
    lines, key = tmp_path / LINEAGE, tmp_path / KEY
    match damage:
        case "line":
            lines.write_bytes(b"{}\n")
        case "part":
            lines.write_bytes(lines.read_bytes().replace(b'"test"', b'"rest"'))
        case "parent":
            lines.write_bytes(lines.read_bytes().replace(b'"parent": null', b'"parent": 3'))
        case "key":
            key.write_text("00")
        case "gone":
            key.unlink()
    for look in (lambda: record.uses_of("ANN"), lambda: record.record(TWO, ONE, STUDY, PARTS)):
        with pytest.raises(DataError, match=r"damaged|gone"):
            look()


def test_a_site_records_who_was_in_what_it_is_delivered(tmp_path: Path) -> None:
    sites = ward_sites(tmp_path, {"A": 10, "B": 10})
    result = run(ward_study(), sites, tmp_path / "out", engine="local", quiet=True)
    record = Lineage(tmp_path / "history-A")
    names = [f"A-DOE-{number:02d}" for number in range(10)]
    found = record.parts(result.model_sha256, names)
    assert {part: list(found.values()).count(part) for part in PARTS} == {"train": 4, "validation": 2, "test": 4}
    # The run again, to its end: nothing new.
    before = (tmp_path / "history-A" / LINEAGE).read_bytes()
    run(ward_study(), sites, tmp_path / "out", engine="local", quiet=True)
    assert (tmp_path / "history-A" / LINEAGE).read_bytes() == before
    assert json.loads(before)["study"] == result.study_sha256

    admit(tmp_path / "A", ["A-ROE-01", "A-ROE-02", "A-ROE-03", "A-ROE-04", "A-ROE-05"])
    start = {"kind": "release", "file": "out", "sha256": result.model_sha256}
    child = run(ward_study(start=start), sites, tmp_path / "child", engine="local", quiet=True, near=tmp_path)
    assert record.ancestors(child.model_sha256) == (result.model_sha256,)
    known = record.parts(child.model_sha256, names)
    assert known == found, "who was in the parent keeps the part"
    assert record.uses_of("A-ROE-01")[0].parent == result.model_sha256
