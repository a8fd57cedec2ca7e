"""A hospital of a federation: a patient withdraws while its worker is at work, and it reads what forgetting means."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.hospitals.joined import Consortium, resident
from tests.outlines import make_outlines, outline_study
from tests.toys import toy_study
from wardround.cli import app
from wardround.errors import DataError
from wardround.federation.exchange import Party
from wardround.federation.facts import FACTS, PLAN
from wardround.hospitals.membership.site_file import sites_at
from wardround.hospitals.site.decisions import Decisions
from wardround.hospitals.site.review import review
from wardround.hospitals.site.withdrawing import withdraw_here
from wardround.site.agreed import AgreedStudy, spec_of
from wardround.site.process import agents_of
from wardround.study.hashes import study_sha256
from wardround.wire.message import Header, Message

# Whole runs: `make test-all` has them.
pytestmark = pytest.mark.slow


@pytest.mark.slow
def test_a_patient_withdraws_at_a_hospital_whose_worker_is_at_work(tmp_path: Path) -> None:
    consortium, study = Consortium(tmp_path), outline_study({"A": {}, "B": {}})
    folder = consortium.of("A")
    make_outlines(folder.root / "more", {"A": 30}, slices=1)
    (folder.root / "data").rmdir()
    (folder.root / "more" / "A").rename(folder.root / "data")
    resident(folder).handle(consortium.propose("A", study))
    consortium.approve("A", study_sha256(study))
    found = Decisions(folder).get(study_sha256(study))
    assert found is not None
    found.folder.own.mkdir(parents=True)
    agreed = AgreedStudy(study, found.folder.own, found.proposal.compare, found.proposal.plan_sha256)

    def worker() -> Party:
        (agent,) = agents_of(spec_of("A", sites_at(folder), None, [agreed], identity=folder.identity))
        return agent

    def facts(agent: Party) -> dict[str, object]:
        header = Header(FACTS, study_sha256(study), "A", meta={PLAN: found.proposal.plan_sha256})
        said = dict(agent.handle(Message(header)).header.meta)
        assert "patients" in said, said
        return said

    at_work = worker()
    before = facts(at_work)
    with pytest.raises(DataError, match="a name is of no patient here"):
        withdraw_here(folder, ["DOE-99"])
    done = withdraw_here(folder, ["DOE-07"])
    assert (done.new, done.stuck) == (1, ())
    # A worker that was there before, and one that comes later: nothing of it is seen outside.
    assert facts(at_work) == before
    assert facts(worker()) == before
    names = at_work.names()  # type: ignore[attr-defined]
    assert len(names) == 29
    assert "DOE-07" not in names
    again = CliRunner().invoke(app, ["site", "withdraw", "DOE-07", "--sites", str(folder.root)])
    assert again.exit_code == 0, again.output
    assert "Was withdrawn before" in again.output


def test_what_a_hospital_reads_of_a_study_that_forgets_another(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    study = toy_study(
        ("A", "B"), forget={"site": "C", "release": "a" * 64, "how": "retrain", "approved_by": ["A", "B", "C"]}
    )
    resident(consortium.of("A")).handle(consortium.propose("A", study))
    decisions = Decisions(consortium.of("A"))
    found = decisions.get(study_sha256(study))
    assert found is not None
    text = " ".join(review(decisions, found, allow_code=True, floor=1).text.split())
    assert "hospital C, which left: trained anew without it" in text
    assert "together reveal what C contributed" in text
