"""The sites file: folders found, faults named by key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wardround.errors import StudyError
from wardround.study.sites import load_sites


def write(folder: Path, text: str) -> Path:
    path = folder / "sites.yaml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file_and_know_variables_and_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "three", "four"):
        (tmp_path / "data" / name).mkdir(parents=True)
    monkeypatch.setenv("WR_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    sites = load_sites(
        write(
            tmp_path,
            "sites:\n"
            "  A: {data: data/one}\n"
            "  B: {data: '${WR_ROOT}/two'}\n"
            "  C: {data: ~/data/three, egress: {per_site_results: false}}\n"
            f"  D: {{data: {tmp_path}/data/four}}\n",
        )
    )
    folders = [folder for name in "ABCD" for folder in sites.of(name).data]
    assert folders == [tmp_path / "data" / name for name in ("one", "two", "three", "four")]
    assert sites.of("A").egress.per_site_results
    assert not sites.of("C").egress.per_site_results


def test_a_missing_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WR_ABSENT", raising=False)
    with pytest.raises(StudyError, match=r"sites\.A\.data: the environment variable WR_ABSENT is not set"):
        load_sites(write(tmp_path, "sites: {A: {data: '${WR_ABSENT}/x'}}"))


def test_a_missing_folder_is_named_by_its_key_only(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"sites\.A\.data: the folder does not exist") as caught:
        load_sites(write(tmp_path, "sites: {A: {data: private/mueller}}"))
    assert "mueller" not in str(caught.value)
    assert "mueller" in caught.value.detail


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sites: {A: {dat: x}}", "sites.A.dat: unknown key; did you mean `data`?"),
        ("sites: {A: {data: x, egress: {per_site: true}}}", "sites.A.egress.per_site: unknown key"),
        ("sites: {A: {}}", "sites.A.data: is missing; add it"),
        ("site: {}", "site: unknown key; did you mean `sites`?"),
        ("sites: {A: {data: 3}}", "sites.A.data"),
        ("sites: {A: {data: x}, A: {data: y}}", "key 'A' is given twice"),
    ],
)
def test_wrong_keys_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(StudyError) as caught:
        load_sites(write(tmp_path, text))
    assert expected in str(caught.value)


def test_a_site_the_file_does_not_name(tmp_path: Path) -> None:
    sites = load_sites(write(tmp_path, "sites: {A: {data: .}}"))
    with pytest.raises(StudyError, match=r"no entry for site B; add `sites\.B\.data`"):
        sites.of("B")


def test_groups_are_read_with_their_table(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "clinic.csv").write_text("patient,gender\n")
    sites = load_sites(
        write(
            tmp_path,
            "sites:\n  A:\n    data: x\n    groups:\n      file: clinic.csv\n      columns:\n"
            "        sex: {column: gender, values: {female: [2, w], male: [1]}}\n"
            "        arm: {values: [left, right]}\n"
            "        age: {bands: [40, 60.5]}\n",
        )
    )
    groups = sites.of("A").groups
    assert groups is not None
    assert groups.file == tmp_path / "clinic.csv"
    sex, arm, age = groups.columns.values()
    assert [sex.label(cell) for cell in ("2", "w", "1", "W", "")] == ["female", "female", "male", "other", "other"]
    assert arm.labels == ("left", "right")
    assert age.labels == ("below 40", "40 to below 60.5", "60.5 or more")
    assert [age.label(cell) for cell in ("39.9", "40", "60.5", "nan", "old")] == [*age.labels, "other", "other"]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("{}", "give `values` or `bands`, one of them"),
        ("{values: [a], bands: [1]}", "give `values` or `bands`, one of them"),
        ("{values: {a: [x], b: [x]}}", "a cell that means two groups"),
        ("{values: [a, other]}", "call the group otherwise"),
        ("{values: ['<b>']}", "sites.A.groups.columns.sex.values"),
        ("{bands: [60, 40]}", "each number must be larger than the one before"),
        ("{values: [a, b, c, d, e, f, g, h, i]}", "sites.A.groups.columns.sex.values"),
    ],
)
def test_a_column_that_makes_no_groups_is_an_error_with_its_key(tmp_path: Path, column: str, said: str) -> None:
    (tmp_path / "x").mkdir()
    text = f"sites: {{A: {{data: x, groups: {{file: t.csv, columns: {{sex: {column}}}}}}}}}"
    with pytest.raises(StudyError, match=re.escape(said)):
        load_sites(write(tmp_path, text))


def test_a_table_of_groups_that_is_missing_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    text = "sites: {A: {data: x, groups: {file: mueller.csv, columns: {sex: {values: [F, M]}}}}}"
    with pytest.raises(StudyError, match=r"sites\.A\.groups\.file: the file does not exist") as caught:
        load_sites(write(tmp_path, text))
    assert "mueller" not in str(caught.value)
