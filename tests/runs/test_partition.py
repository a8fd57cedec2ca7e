"""One folder of patients, parted among sites: laws of the parts, and a study on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.outlines import make_outlines, outline_study
from wardround.cli import app
from wardround.errors import DataError, StudyError
from wardround.imaging.datasets.partition import part
from wardround.plan.arm_specs import ArmSpecs
from wardround.runs.partition import partition
from wardround.site.datasets import Datasets
from wardround.study.sites import load_sites

SITES = ("A", "B", "C")


@given(
    count=st.integers(9, 60),
    how=st.sampled_from(["even", "quantity", "labels"]),
    alpha=st.sampled_from([0.3, 1.0, 100.0]),
    seed=st.integers(0, 9),
)
def test_every_patient_is_at_one_site_whatever_the_order(count: int, how: str, alpha: float, seed: int) -> None:
    names = [f"p{number}" for number in range(count)]
    labels = {name: str(number % 2) for number, name in enumerate(names)}
    found = part(names, SITES, how, seed=seed, alpha=alpha, least=1, labels=labels)
    assert sorted(name for own in found.values() for name in own) == sorted(names)
    assert found == part(names[::-1], SITES, how, seed=seed, alpha=alpha, least=1, labels=labels)
    sizes = [len(own) for own in found.values()]
    assert min(sizes) >= 1
    if how == "even":
        assert max(sizes) - min(sizes) <= 1


def test_a_small_alpha_makes_sites_unlike_and_a_large_one_alike() -> None:
    names = [f"p{number:04d}" for number in range(1000)]
    labels = {name: str(number % 2) for number, name in enumerate(names)}

    def spread(alpha: float) -> float:
        found = part(names, SITES, "labels", seed=1, alpha=alpha, labels=labels)
        shares = [sum(labels[name] == "1" for name in own) / len(own) for own in found.values()]
        return max(shares) - min(shares)

    # Of a Dirichlet's share the deviation is sqrt((1/3)(2/3)/(3 alpha + 1)): 0.41 at 0.1, 0.009 at 1000.
    assert spread(0.1) > 0.2
    assert spread(1000.0) < 0.1


def test_what_cannot_be_parted_is_refused() -> None:
    with pytest.raises(StudyError, match="cannot be parted among 3 sites of at least 3"):
        part(["a"] * 8, SITES, "even", seed=0)
    with pytest.raises(StudyError, match="alpha"):
        part([f"{n}" for n in range(9)], SITES, "quantity", seed=0, alpha=0.0)
    with pytest.raises(StudyError, match="1 of 9 patients have no label"):
        part([f"{n}" for n in range(9)], SITES, "labels", seed=0, labels={f"{n}": "x" for n in range(8)})
    with pytest.raises(StudyError, match="larger alpha"):
        part([f"{n}" for n in range(30)], SITES, "quantity", seed=0, alpha=1e-4)


def test_a_folder_is_parted_by_the_command_and_its_sites_have_no_patient_in_common(tmp_path: Path) -> None:
    make_outlines(tmp_path, {"all": 9}, slices=1)
    study = tmp_path / "study.yaml"
    loaded = outline_study({"A": {}, "B": {}})
    study.write_text(yaml.safe_dump(loaded.model_dump(mode="json", exclude_unset=True)))
    command = ["partition", str(study), str(tmp_path / "all"), "--out", str(tmp_path / "parts"), "--by", "quantity"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    sites = load_sites(tmp_path / "parts" / "sites.yaml")
    lists = [set((tmp_path / "parts" / f"{site}.txt").read_text().split()) for site in ("A", "B")]
    assert not lists[0] & lists[1]
    assert len(lists[0] | lists[1]) == 9
    arm_specs = ArmSpecs(loaded, ())
    opened = Datasets(arm_specs, sites)
    for site, own in zip(("A", "B"), lists, strict=True):
        dataset = opened.of(site)
        names = [name for split in ("train", "validation", "test") for name in dataset.names(split)]
        assert sorted(names) == sorted(own)
    again = CliRunner().invoke(app, command)
    assert again.exit_code != 0
    (tmp_path / "parts" / "A.txt").write_text("DOE-99\n")
    with pytest.raises(DataError, match=r"sites\.A\.patients: 1 of 1 names are of no patient"):
        Datasets(arm_specs, sites).of("A")


def test_a_column_names_the_sites(tmp_path: Path) -> None:
    make_outlines(tmp_path, {"all": 8}, slices=1)
    table = tmp_path / "all" / "labels.csv"
    rows = [f"DOE-{number:02d},{'A' if number < 3 else 'B'}" for number in range(8)]
    table.write_text("\n".join(["patient,ward", *rows]))
    study = outline_study({"A": {}, "B": {}})
    assert partition(study, tmp_path / "all", tmp_path / "parts", column="ward") == {"A": 3, "B": 5}
    with pytest.raises(StudyError, match="name the sites as the column does"):
        partition(outline_study({"A": {}, "C": {}}), tmp_path / "all", tmp_path / "x", column="ward")
    table.write_text("\n".join(["patient,ward", *rows[1:]]))
    with pytest.raises(DataError, match="1 of 8 patients have no ward"):
        partition(study, tmp_path / "all", tmp_path / "x", column="ward")
    with pytest.raises(DataError, match="there is no column 'room'"):
        partition(study, tmp_path / "all", tmp_path / "x", column="room")
    assert not (tmp_path / "x").exists()
