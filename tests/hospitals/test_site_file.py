"""The site's own file: one ledger and one history for all its studies, also where the file names none."""

from __future__ import annotations

from pathlib import Path

from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.membership.site_file import over_all_studies
from wardround.study.sites import SiteData, SitesFile


def test_studies_share_a_ledger_and_a_history_where_the_file_names_none(tmp_path: Path) -> None:
    sites = SitesFile(sites={"A": SiteData(data=(tmp_path,))})
    found = over_all_studies(sites, SiteFolder(tmp_path)).of("A")
    assert (found.ledger, found.history) == (tmp_path / "ledger.jsonl", tmp_path / "history")


def test_places_that_the_file_names_stay(tmp_path: Path) -> None:
    own = SiteData(data=(tmp_path,), ledger=tmp_path / "a", history=tmp_path / "b")
    sites = SitesFile(sites={"A": own}).with_code()
    found = over_all_studies(sites, SiteFolder(tmp_path))
    assert found.of("A") == own
    assert found.allows_code
