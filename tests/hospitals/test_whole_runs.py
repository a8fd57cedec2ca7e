"""Everything a run on one machine does, a federation does with the same study file and to the same last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.apart import comparable, give_root
from tests.hospitals.whole import Whole, whole
from tests.laws.test_apart import QUICK, SLOW, Case, study_of
from tests.mri_hospitals import make_hospitals, write_study
from tests.runs.test_raw_run import hospitals as raw_hospitals
from tests.runs.test_raw_run import settings as raw_settings
from tests.toys import toy_sites
from wardround.results.schema import Result
from wardround.runs.folder import reserve
from wardround.runs.session import run
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile

CASES = {"personal": QUICK["personal"], **SLOW}


def here(folder: Path, study: Study, sites: SitesFile, case: Case) -> Result:
    """The same study on one machine; where sites draw secrets, they have those of `roots_of`."""
    if study.protection.privacy is not None:
        reserve(folder)
        for site, root in roots_of(study).items():
            give_root(folder, site, root)
    return run(study, sites, folder, compare=case.compare, engine="local", quiet=True, allow_code=True)


def roots_of(study: Study) -> dict[str, str]:
    return {site: f"{number + 1:064x}" for number, site in enumerate(study.sites)}


def data_of(folder: Path, study: Study) -> tuple[SitesFile, dict[str, Path]]:
    sites = toy_sites(folder, tuple(study.sites))
    return sites, {site: folder / site for site in study.sites}


def assert_same(made: Whole, study: Study, alone: Result, together: Result) -> None:
    """Every number, every model, and what has come to each hospital."""
    assert together.model_sha256 == alone.model_sha256
    assert together.local_sha256 == alone.local_sha256
    assert comparable(together.values) == comparable(alone.values)
    for model in alone.out.glob("models/*.safetensors"):
        assert model.read_bytes() == (together.out / "models" / model.name).read_bytes()
    for site in study.sites:
        own = made.own(site, study)
        for private in alone.out.glob(f"models/{site}/*/*.safetensors"):
            assert private.read_bytes() == (own / private.relative_to(alone.out)).read_bytes()
        for name in ("models/federated.safetensors", "model_card.md"):
            assert (own / name).read_bytes() == (together.out / name).read_bytes()
        page = (own / "report.html").read_text(encoding="utf-8")
        assert f"shows patients of {site}" in page
        assert "Model card" in page
    assert (together.out / "report.html").is_file()


@pytest.mark.slow
def test_two_studies_at_once_come_to_the_models_of_one_machine(tmp_path: Path) -> None:
    """In the clear with a hospital that is only tested, and under masks: at the same time, in one federation."""
    cases = {name: QUICK[name] for name in ("clear", "secure")}
    studies = {name: study_of(case.changes) for name, case in cases.items()}
    sites, data = data_of(tmp_path / "data", studies["clear"])
    alone = {name: here(tmp_path / name, studies[name], sites, case) for name, case in cases.items()}
    with whole(tmp_path / "federation", data) as made:
        for name, case in cases.items():
            made.submit(studies[name], case.compare, name)
        for study in studies.values():
            made.approve(study)
        for name, study in studies.items():
            assert_same(made, study, alone[name], made.finish(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_any_study_comes_to_the_same_result_across_hospitals(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of a large model: first values lie in files, here and at the sites, and models are read tensor by tensor.
    monkeypatch.setattr("wardround.learning.laid_aside._SMALL", 0)
    monkeypatch.setattr("wardround.plan.weights._LARGE", 0)
    case = CASES[name]
    study = study_of(case.changes)
    sites, data = data_of(tmp_path / "data", study)
    alone = here(tmp_path / "alone", study, sites, case)
    with whole(tmp_path / "federation", data) as made:
        if study.protection.privacy is not None:
            for site, root in roots_of(study).items():
                own = made.own(site, study)
                own.mkdir(parents=True)
                give_root(own, site, root)
        together = made.run(study, case.compare)
        assert_same(made, study, alone, together)
    if study.protection.privacy is not None:
        assert together.values["privacy"]["epsilon"] > 0.0


@pytest.mark.slow
def test_workers_in_processes_of_their_own_come_to_the_same_model(tmp_path: Path) -> None:
    case = QUICK["secure"]
    study = study_of(case.changes)
    sites, data = data_of(tmp_path / "data", study)
    alone = here(tmp_path / "alone", study, sites, case)
    with whole(tmp_path / "federation", data, processes=True) as made:
        assert_same(made, study, alone, made.run(study, case.compare))


@pytest.mark.slow
def test_each_hospital_has_a_page_with_its_pictures_and_the_coordinator_has_none(tmp_path: Path) -> None:
    path, _ = write_study(tmp_path, make_hospitals(tmp_path / "data"))
    study = load_study(path)
    data = {site: tmp_path / "data" / site for site in study.sites}
    sites = SitesFile(sites={site: SiteData(data=where) for site, where in data.items()}).with_code()
    alone = here(tmp_path / "alone", study, sites, Case({}))
    with whole(tmp_path / "federation", data) as made:
        together = made.run(study)
        assert_same(made, study, alone, together)
        pages = {site: (made.own(site, study) / "report.html").read_text(encoding="utf-8") for site in data}
    for site, page in pages.items():
        assert page.count("data:image/png") >= 4
        others = set(data) - {site}
        assert not any(f"shows patients of {other}" in page for other in others)
    report = (together.out / "report.html").read_text(encoding="utf-8")
    assert "data:image/png" not in report
    assert not list(together.out.rglob("pictures.npz"))


@pytest.mark.slow
def test_files_of_scanners_train_across_hospitals(tmp_path: Path) -> None:
    """fastMRI's at one, ISMRMRD's at the other, each in its hospital's own folder."""
    root = raw_hospitals(tmp_path / "data")
    study = load_study(raw_settings(root)[0])
    data = {site: root / site for site in study.sites}
    sites = SitesFile(sites={site: SiteData(data=where) for site, where in data.items()}).with_code()
    alone = here(tmp_path / "alone", study, sites, Case({}))
    with whole(tmp_path / "federation", data) as made:
        assert_same(made, study, alone, made.run(study))
