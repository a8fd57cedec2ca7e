"""`wardround site lint`, and a site that takes no part in a study while its files tell who patients are."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.hospitals.fake_archive import encoded, image
from tests.toys import toy_sites, toy_study
from wardround.cli import app
from wardround.errors import StudyError
from wardround.federation.exchange import ERROR
from wardround.federation.facts import FACTS
from wardround.plan.arm_specs import ArmSpecs
from wardround.site.identifiers import check_identifiers, rule_of
from wardround.site.process import AgreedStudy, agent_finder, spec_of
from wardround.study.hashes import plan_sha256, study_sha256
from wardround.study.sites import SiteData, SitesFile, load_sites
from wardround.wire.message import Header, Message

SECRETS = ("MUELLER", "PAT-7731", "19510423", "Elsewhere", "Doe_John", "ACC77")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A hospital's folder, as it came from the scanner."""
    folder = tmp_path / "data"
    (folder / "Doe_John" / "t1").mkdir(parents=True)
    (folder / "Doe_John" / "t1" / "1.dcm").write_bytes(encoded(image("PAT-7731", "1.2.999.1", "1.2.999.1.1", 1)))
    (folder / "patients.csv").write_text("folder;last name\nDoe_John;MUELLER\n")
    return folder


@pytest.mark.parametrize("place", ["folder", "file", "joined"])
def test_kinds_and_counts_are_printed_and_places_go_into_a_file_of_the_users_own(
    tmp_path: Path, data: Path, place: str
) -> None:
    written = yaml.safe_dump({"sites": {"A": {"data": str(data)}}})
    (tmp_path / "site.yaml").write_text(written)
    where = {"folder": data, "file": tmp_path / "site.yaml", "joined": tmp_path}[place]
    detail = tmp_path / "places.txt"
    detail.write_text("old")
    detail.chmod(0o644)
    result = CliRunner().invoke(app, ["site", "lint", str(where), "--detail", str(detail)])
    assert result.exit_code == 1, result.output
    for said in ("2 of 2 files", "PatientName is filled", "a column of persons' names", "faces in pixels"):
        assert said in result.output
    for secret in SECRETS:
        assert secret not in result.output
    assert stat.S_IMODE(detail.stat().st_mode) == 0o600
    assert "Doe_John/t1/1.dcm" in detail.read_text()
    assert "MUELLER" not in detail.read_text()


def test_a_clean_folder_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    result = CliRunner().invoke(app, ["site", "lint", str(tmp_path / "data")])
    assert result.exit_code == 0
    assert "nothing found" in result.output


def test_a_hospital_refuses_and_one_machine_does_not_look(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = SiteData.model_validate({"data": data})
    assert rule_of(entry, 5) == "refuse"
    assert rule_of(entry, 1) == "allow"
    check_identifiers("A", entry, 1)
    assert not caplog.records
    caplog.set_level(logging.WARNING)
    check_identifiers("A", entry.model_copy(update={"identifiers": "warn"}), 5)
    (record,) = caplog.records
    assert "tell who patients are" in record.getMessage()


def test_a_site_with_identifiers_gives_no_facts_and_trains_nothing(tmp_path: Path, data: Path) -> None:
    study = toy_study(("A", "B"))
    known = toy_sites(tmp_path / "toys", ("A", "B"))

    def answers(**rule: str) -> list[Message]:
        entry = SiteData.model_validate({"data": data, **rule})
        sites = SitesFile(sites={**known.sites, "A": entry}).with_code()
        folder = tmp_path / str(len(rule))
        agent = agent_finder(spec_of("A", sites, folder / "spool", [AgreedStudy(study, folder)]))
        facts = Header(FACTS, study_sha256(study), "A", meta={"plan": plan_sha256(study)})
        return [agent(facts).handle(Message(facts))]

    (refused,) = answers()
    assert refused.header.kind == ERROR
    reason = refused.header.meta["reason"]
    assert "its files still tell who patients are" in reason
    assert "wardround site lint" in reason
    for secret in (*SECRETS, str(tmp_path), "1 files"):
        assert secret not in reason
    (allowed,) = answers(identifiers="allow")
    assert allowed.header.kind == FACTS


def test_no_data_are_opened_where_identifiers_are_refused(tmp_path: Path, data: Path) -> None:
    from wardround.errors import DataError
    from wardround.site.datasets import Datasets
    from wardround.study.plugins import Plugins

    study = toy_study(("A", "B"))
    entry = SiteData.model_validate({"data": data, "identifiers": "refuse"})
    sites = SitesFile(sites={"A": entry}).with_code()
    datasets = Datasets(ArmSpecs(study, (), {}, Plugins(code=True)), sites)
    with pytest.raises(DataError, match="tell who patients are"):
        datasets.of("A")


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        ({"url": "http://pacs.example.org/dicom-web"}, "in clear"),
        ({"url": "https://user:hunter2@pacs.example.org/x"}, "holds a login"),
        ({"url": "ftp://pacs.example.org"}, "not of the form"),
        ({"query": {}}, "all patients of the archive"),
        ({"query": {"Modalty": "MR"}}, "not a DICOM keyword"),
        ({"series": {"../x": {"Modality": "MR"}}}, "series"),
        ({"series": {}}, "series"),
        ({"login": "${A}", "token": "${B}"}, "not both"),
        ({"query": {"Modality": "MR\\CT"}}, "backslash"),
    ],
)
def test_an_archive_that_cannot_be_meant_is_an_error_of_the_file(
    tmp_path: Path, archive: dict[str, object], said: str
) -> None:
    whole = {
        "url": "https://pacs.example.org/dicom-web",
        "folder": "cache",
        "query": {"Modality": "MR"},
        "series": {"flair": {"Modality": "MR"}},
    }
    path = tmp_path / "sites.yaml"
    path.write_text(yaml.safe_dump({"sites": {"A": {"archive": {**whole, **archive}}}}))
    with pytest.raises(StudyError, match=said) as raised:
        load_sites(path, fetching=True)
    assert "hunter2" not in str(raised.value)


def test_a_folder_of_an_archive_need_not_be_there_before_the_first_fetch(tmp_path: Path) -> None:
    archive = {"url": "https://p.org/x", "folder": "cache", "query": {"Modality": "MR"}, "series": {"a": {}}}
    path = tmp_path / "sites.yaml"
    path.write_text(yaml.safe_dump({"sites": {"A": {"archive": archive}}}))
    entry = load_sites(path, fetching=True).of("A")
    assert entry.archive is not None
    assert entry.data == (entry.archive.folder,) == (tmp_path.resolve() / "cache",)
    assert entry.archive.keys_folder == tmp_path.resolve() / "cache.keys"
    with pytest.raises(StudyError, match="run `wardround site fetch` first"):
        load_sites(path)
    (tmp_path / "cache").mkdir()
    assert SiteData.model_validate(load_sites(path).of("A").model_dump(mode="json")) == load_sites(path).of("A")
