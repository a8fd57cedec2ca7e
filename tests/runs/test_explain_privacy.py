"""What `wardround check` says of a private study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.toys import toy_sites, toy_study
from wardround.errors import JournalError
from wardround.protection.ledger import Charge, Ledger
from wardround.runs.explain import explain
from wardround.storage.store import SiteStore


def _files(folder: Path, *, ledger: Path | None = None, **privacy: Any) -> tuple[Path, Path]:
    """A study of three sites with eight training patients each, and where their data lie."""
    study = toy_study(
        protection={"privacy": {"patients_per_step": 2, **privacy}},
        method={"kind": "fedavg", "weights": "equal"},
        schedule={"rounds": 6, "release": "last"},
        task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"patients": 12}},
    )
    sites = toy_sites(folder).model_dump(mode="json")
    if ledger is not None:
        sites["sites"]["B"]["ledger"] = str(ledger)
    for name, values in (("study", study.model_dump(mode="json")), ("sites", sites)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "study.yaml", folder / "sites.yaml"


def _row(said: str, site: str) -> list[str]:
    section = said[said.index("Privacy of patients") :]
    return next(line.split() for line in section.splitlines() if line.split()[:1] == [site])


def _spend(path: Path, folder: Path, *, noise: float, steps: int) -> None:
    entry = Charge("another", "federated", 1, steps, 0.25, noise, "cohort", "inputs", "2026-01-01T00:00:00+00:00")
    assert Ledger(path, SiteStore(folder / "store")).spend(entry, lambda _: None)


@pytest.mark.slow
def test_every_site_s_terms_and_cost_are_named(tmp_path: Path) -> None:
    study, sites = _files(tmp_path)
    said = explain(study, sites, ("local",), (), allow_code=True)
    site, patients, rate, noise, delta, epsilon, ledger = _row(said, "B")
    assert (site, patients, rate, delta, ledger) == ("B", "8", "0.25", "0.013", "-")
    assert float(noise) > 0.3
    assert 7.8 < float(epsilon) <= 8.0, "the noise is the least with which all rounds of both arms fit"
    assert "would stop" not in said
    assert "its seconds, and sums over validation" in said, "the training loss does not leave"


@pytest.mark.slow
def test_a_ledger_that_others_wrote_ends_the_study_early(tmp_path: Path) -> None:
    path = tmp_path / "ledgers" / "B.jsonl"
    study, sites = _files(tmp_path, ledger=path)
    assert _row(explain(study, sites, (), (), allow_code=True), "B")[-1] == "0.00"
    assert not path.exists(), "a look writes nothing"
    _spend(path, tmp_path, noise=1.0, steps=9)
    said = explain(study, sites, (), (), allow_code=True)
    assert float(_row(said, "B")[-1]) > 1.0
    stops = [line for line in said.splitlines() if "would stop" in line]
    assert len(stops) == 1
    number = int(stops[0].partition("after about round ")[2].split()[0])
    assert "- B would stop" in stops[0]
    assert 1 <= number < 6
    path.write_bytes(path.read_bytes().replace(b'"steps": 9', b'"steps": 1'))
    with pytest.raises(JournalError, match="chain of hashes is broken"):
        explain(study, sites, (), (), allow_code=True)


@pytest.mark.slow
def test_a_spent_ledger_lets_no_round_begin(tmp_path: Path) -> None:
    path = tmp_path / "B.jsonl"
    study, sites = _files(tmp_path, ledger=path)
    _spend(path, tmp_path, noise=0.5, steps=300)
    assert "B would stop before its first round" in " ".join(explain(study, sites, (), (), allow_code=True).split())


@pytest.mark.slow
def test_the_guard_does_not_promise_what_it_does_not_hold(tmp_path: Path) -> None:
    study, sites = _files(tmp_path, preset="reconstruction-guard")
    said = " ".join(explain(study, sites, (), (), allow_code=True).split())
    assert "promises nothing against other attacks" in said
    assert float(_row(explain(study, sites, (), (), allow_code=True), "A")[3]) == 0.3
    without = explain(study, None, (), (), allow_code=True)
    assert "promises nothing" in " ".join(without.split())
    assert "add --sites" in without
