"""What a site remembers of masked sums over rounds, runs and studies, and refuses for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.protection.test_secure_rounds import SecureRig, losing, study_of
from tests.toys import toy_sites, toy_study
from wardround.errors import JournalError, NotEnoughSites, Rejected
from wardround.federation.exchange import ERROR, EVALUATE, TRAIN
from wardround.federation.secure import ADVERTISE, REVEAL, SIGN
from wardround.runs.session import Result, run
from wardround.site.history import MASKED, Joined, MaskedHistory
from wardround.storage.journal import Journal
from wardround.study.sites import SitesFile

START = "5" * 64


def joined(roster: str, survivors: str | None = None, threshold: int = 3, **changes: Any) -> Joined:
    known = Joined(START, "A", tuple(roster), tuple(roster if survivors is None else survivors), threshold)
    return replace(known, **changes)


@pytest.fixture
def history(tmp_path: Path) -> MaskedHistory:
    return MaskedHistory(tmp_path / "history" / MASKED)


@pytest.mark.parametrize(
    ("asked", "gives_away"),
    [
        (joined("ABC"), "D"),
        (joined("ABCDE"), "E"),
        (joined("ABCE"), "D, E"),
        (joined("ABCD", "ABC"), "D"),
        # What one study calls enough does not lower what another was promised.
        (joined("ABEF", threshold=2), None),
        (joined("ABCD"), None),
        (joined("ABEF"), None),
        (joined("AEFG"), None),
        (joined("ABC", start="6" * 64), None),
    ],
)
def test_sums_from_one_start_differ_by_no_site_or_by_a_threshold(
    history: MaskedHistory, asked: Joined, gives_away: str | None
) -> None:
    history.join(joined("ABCD"))
    if gives_away is None:
        history.check(asked)
        history.join(asked)
        return
    with pytest.raises(Rejected, match=f"the difference would be what {gives_away} sent"):
        history.join(asked)
    assert len(history.path.read_bytes().splitlines()) == 1


def test_the_larger_threshold_of_two_studies_counts(history: MaskedHistory) -> None:
    history.join(joined("ABCDEFG", threshold=5))
    with pytest.raises(Rejected, match="what E, F, G sent"):
        history.check(joined("ABCD", threshold=3))


def test_a_site_under_another_name_cannot_tell_who_the_others_are(history: MaskedHistory) -> None:
    history.join(joined("ABCD"))
    with pytest.raises(Rejected, match="under the name A, and sites by other names cannot be compared"):
        history.check(joined("WXYZ", site="W"))


def test_the_record_lasts_and_says_each_sum_once(history: MaskedHistory) -> None:
    history.check(joined("ABC"))
    assert not history.path.exists()
    for _ in range(3):
        history.join(joined("ABCD", study="x", round=2))
    again = MaskedHistory(history.path)
    again.join(joined("ABCD", study="y", round=9))
    (line,) = history.path.read_bytes().splitlines()
    assert json.loads(line)["survivors"] == ["A", "B", "C", "D"]
    with pytest.raises(Rejected):
        again.check(joined("ABC"))


def test_a_torn_last_line_was_never_consented_to_and_any_other_damage_stops_the_site(history: MaskedHistory) -> None:
    history.join(joined("ABCD"))
    whole = history.path.read_bytes()
    history.path.write_bytes(whole + whole[: len(whole) // 2])
    history.join(joined("ABCD", start="6" * 64))
    assert history.path.read_bytes().startswith(whole)
    assert len(history.path.read_bytes().splitlines()) == 2
    for damage in (b"{}\n", b"no json\n", b"[1]\n"):
        history.path.write_bytes(damage + whole)
        with pytest.raises(JournalError, match="history of masked rounds was changed"):
            history.check(joined("ABCD", start="7" * 64))


def test_a_record_is_synced_before_the_site_consents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = SecureRig(study_of(rounds=1, schedule={"validate_every": 0}), tmp_path)
    order: list[str] = []
    join = MaskedHistory.join
    monkeypatch.setattr(MaskedHistory, "join", lambda self, asked: (order.append("join"), join(self, asked))[1])
    synced: list[int] = []
    import os

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(len(order)), fsync(handle))[1])
    rig.line.before = lambda m: order.append(m.header.kind) if m.header.kind in (SIGN, REVEAL) else None
    rig.train()
    # Each site is asked to sign, and writes; the next one is asked after that.
    assert order[:4] == [SIGN, "join", SIGN, "join"]
    assert {2, 4, 6, 8} <= set(synced)


# Through runs ------------------------------------------------------------------------------------------------------


def sites_with_history(folder: Path, names: str) -> SitesFile:
    sites = toy_sites(folder / "data", tuple(names))
    entries = {n: s.model_copy(update={"history": folder / "history" / n}) for n, s in sites.sites.items()}
    return sites.model_copy(update={"sites": entries})


def masked_run(folder: Path, out: str, names: str, **changes: Any) -> Result:
    study = toy_study(
        tuple(names), protection={"secure": True, "initial_scale": 8.0}, **{"schedule": {"rounds": 2}, **changes}
    )
    return run(study, sites_with_history(folder, names), folder / out, engine="local")


def test_two_studies_whose_rosters_differ_by_one_site_are_not_both_trained(tmp_path: Path) -> None:
    """The attack: from one seed, the sum of the first round of ABCD minus that of ABC is D's update."""
    masked_run(tmp_path, "four", "ABCD")
    with pytest.raises(NotEnoughSites, match="the difference would be what D sent") as caught:
        masked_run(tmp_path, "three", "ABC")
    assert "another seed" in str(caught.value)
    # Other settings of training do not make it another start.
    with pytest.raises(NotEnoughSites, match="the difference would be what D sent"):
        masked_run(tmp_path, "longer", "ABC", local={"steps": 5, "batch": 2, "optimizer": "sgd", "lr": 0.1})
    assert masked_run(tmp_path, "seed", "ABC", seed=4).participants == ("A", "B", "C")


def test_the_same_run_again_comes_to_the_same_model(tmp_path: Path) -> None:
    first = masked_run(tmp_path, "out", "ABC").model_sha256
    records = (tmp_path / "history" / "A" / MASKED).read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert masked_run(tmp_path, "out", "ABC").model_sha256 == first
    assert (tmp_path / "history" / "A" / MASKED).read_bytes() == records


@pytest.mark.parametrize("honest", [True, False])
def test_a_void_round_is_done_again_with_the_same_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: bool
) -> None:
    """Whether its sum was read is the coordinator's word. An honest one waits; from any other the sites refuse."""
    if not honest:
        monkeypatch.setattr(Journal, "standing", lambda self, kind: None)
    secure = SecureRig(study_of(rounds=2), tmp_path)
    secure.line.lose = lambda m: (
        (m.header.kind == REVEAL and m.header.site in "AB" and m.header.round == 2)
        or (m.header.site == "D" and m.header.round > 2)
    )
    told = "without D the difference of the two would" if honest else "the difference would be what D sent"
    with pytest.raises(NotEnoughSites, match=told):
        secure.train()
    assert bool(secure.journal.aborted(TRAIN) - {2}) == (not honest)
    # With D back, the sum is over the same sites: the run goes on.
    secure.line.lose = lambda m: False
    secure.restart_coordinator()
    secure.train()
    assert len(secure.journal.reports()) == 2


def test_a_validation_and_a_training_round_from_one_model_have_the_same_survivors(tmp_path: Path) -> None:
    """Two sums of one model's metrics would differ by what one site measured."""
    secure = SecureRig(study_of(rounds=3, schedule={"validate_every": 1}), tmp_path)
    states = secure.states()
    next(states)
    state = next(states)
    call = secure.coordinator._call(EVALUATE, state, 1, {"split": "validation"}, secure.arm_spec.metrics_layout)
    secure.coordinator._asking.run(call, secure.coordinator._protocol)
    secure.line.lose = losing("D", TRAIN, 2)
    with pytest.raises(NotEnoughSites, match="the difference would be what D sent"):
        next(states)


def test_a_site_that_was_not_in_a_void_round_waits_for_the_next_that_counts(tmp_path: Path) -> None:
    """It is back, and with it the sum would differ by what it sends: the others would not consent."""
    secure = SecureRig(study_of(rounds=3), tmp_path)
    # D sends no update in round 2, and the sum of the others is aborted.
    secure.line.lose = lambda m: m.header.round == 2 and (m.header.kind, m.header.site) in ((TRAIN, "D"), (REVEAL, "A"))
    secure.train()
    assert [(r.round, "".join(r.participants)) for r in secure.journal.reports()] == [
        (1, "ABCD"),
        (3, "ABC"),
        (4, "ABCD"),
    ]
    assert "only the sites of the aborted round before it were asked: A, B, C" in secure.journal.reports()[1].notes


def test_a_site_says_no_before_it_trains(tmp_path: Path) -> None:
    secure = SecureRig(study_of(rounds=1), tmp_path)
    secure.train()
    request = next(m for m in secure.sent_to("A", ADVERTISE) if m.header.meta["kind"] == TRAIN)
    store = secure.sites["A"].store
    path = store.root / MASKED
    known = json.loads(path.read_bytes().splitlines()[0])
    path.write_text(json.dumps({**known, "roster": ["A", "B", "C"], "survivors": ["A", "B", "C"]}) + "\n")
    fresh = SecureRig(study_of(rounds=1), tmp_path / "fresh")
    (fresh.sites["A"].store.root / MASKED).write_bytes(path.read_bytes())
    fresh.start()
    fresh.line.lose = lambda m: m.header.kind != ADVERTISE
    with pytest.raises(NotEnoughSites):
        fresh.train()
    (reply,) = [s.message for s in fresh.engine.sent if s.message.header.kind == ERROR and s.message.header.site == "A"]
    assert "with A, B, C on the roster" in reply.header.meta["reason"]
    assert fresh.sent_to("A", TRAIN) == []
    assert request.header.round == 1
