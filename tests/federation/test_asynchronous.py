"""Rounds that do not wait: who is in which, what a late update counts, and the same bits after the process died."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.federation.arrivals import SITES, AsyncRig, asynchronous, trained
from tests.federation.rig import Rig
from tests.toys import toy_sites, toy_study
from wardround.errors import Interrupted, NotEnoughSites, Rejected
from wardround.federation.exchange import ERROR, TRAIN
from wardround.results.files import read_rounds
from wardround.runs.session import evaluate, run
from wardround.storage.journal import RoundReport
from wardround.wire.message import Message

#: D is slow: it answers its first request in round 3 and its second in round 5; C once comes a round late.
ORDER = [*"ABC", *"ABC", *"DAB", *"CAB", *"DAB"]
STUDY = asynchronous(3, rounds=5)
PERSONAL = asynchronous(3, rounds=5, method={"kind": "fedbn"}, task={
    "kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True},
})  # fmt: skip


def said(report: RoundReport) -> tuple[Any, ...]:
    """What of a round must be the same after it was done again."""
    return (
        report.state_sha256,
        report.participants,
        dict(report.staleness),
        report.validation,
        report.validated,
        report.loss,
        dict(report.missing),
    )


def test_who_is_in_which_round_with_which_age(tmp_path: Path) -> None:
    rig, state = trained(STUDY, tmp_path, ORDER)
    reports = rig.journal.reports()
    assert [dict(r.staleness) for r in reports] == [
        {"A": 0, "B": 0, "C": 0},
        {"A": 0, "B": 0, "C": 0},
        {"A": 0, "B": 0, "D": 2},
        {"A": 0, "B": 0, "C": 1},
        {"A": 0, "B": 0, "D": 1},
    ]
    assert [dict(r.at_work) for r in reports] == [{"D": 1}, {"D": 1}, {"C": 3}, {"D": 4}, {"C": 5}]
    assert all(set(r.participants) == set(r.staleness) for r in reports)
    # A site is asked again once its update is in a committed round, and from the newest state then.
    assert sorted(rig.line.asked) == sorted(
        [("A", n) for n in range(1, 6)]
        + [("B", n) for n in range(1, 6)]
        + [("C", n) for n in (1, 2, 3, 5)]
        + [("D", n) for n in (1, 4)]
    )
    # A state is validated by all that trained from it, also by those that came later; the last one by all sites.
    assert [r.validated for r in reports] == [
        ("A", "B", "C"),
        ("A", "B", "C"),
        ("A", "B", "D"),
        ("A", "B"),
        ("A", "B", "C", "D"),
    ]
    assert state.round == 5
    assert rig.coordinator.release().number == 2


def test_the_step_is_the_mean_by_weight_and_age(tmp_path: Path) -> None:
    """Round 3 of a study, computed again from what the sites sent, in double precision."""
    rig, _ = trained(STUDY, tmp_path, ORDER)
    again = Rig(toy_study(SITES, schedule={"rounds": 5, "keep": 9}), tmp_path / "plain")
    # Rounds 1 and 2 have A, B and C alone; then each of the three trains from the state that it had.
    changes: dict[str, dict[str, np.ndarray]] = {}
    states = {n: rig.journal.state(n) for n in (0, 2, 3)}
    for site, base in {"A": 2, "B": 2, "D": 0}.items():
        learner, public = again.learner(site), states[base].public
        learner.load(public, again.sites[site].store.memory(0))
        changes[site] = learner.train(base + 1, public, again.sites[site].store.memory(0)).changes["model"]
    weights = {"A": 8.0, "B": 8.0, "D": 8.0 * 3**-0.5}
    for name in changes["A"]:
        mean = sum(weights[s] * changes[s][name].astype(float) for s in changes) / sum(weights.values())
        moved = states[3].public[f"model/{name}"].astype(float) - states[2].public[f"model/{name}"]
        # What fixed point and the multiplier's 16 bits round away.
        np.testing.assert_allclose(moved, mean, atol=1e-4 * max(np.abs(c[name]).max() for c in changes.values()))


def test_with_every_site_in_step_it_is_the_synchronous_run(tmp_path: Path) -> None:
    rig, state = trained(asynchronous(4), tmp_path / "asynchronous")
    plain = Rig(toy_study(SITES, schedule={"rounds": 6}), tmp_path / "plain")
    assert state.public_sha256 == plain.train().public_sha256
    for one, other in zip(rig.journal.reports(), plain.journal.reports(), strict=True):
        assert set(one.staleness.values()) == {0}
        assert said(replace(one, staleness={})) == said(other)
    assert rig.coordinator.release().number == plain.coordinator.release().number


@pytest.mark.parametrize("order", [[*"CAB", *"BCA", *"ADB", *"BAC", *"BDA"], [*"BCA", *"CBA", *"BAD", *"ABC", *"ABD"]])
def test_within_a_round_the_order_of_arrival_changes_no_bit(tmp_path: Path, order: Sequence[str]) -> None:
    rig, _ = trained(STUDY, tmp_path / "one", ORDER)
    other, _ = trained(STUDY, tmp_path / "other", order)
    assert [said(r) for r in rig.journal.reports()] == [said(r) for r in other.journal.reports()]


@pytest.fixture(scope="module", params=[STUDY, PERSONAL], ids=["fedavg", "fedbn"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, AsyncRig]:
    """A study, and a run of it that nothing interrupted."""
    return request.param, trained(request.param, tmp_path_factory.mktemp("whole"), ORDER)[0]


@pytest.mark.parametrize(
    "count", [pytest.param(n, marks=[] if n in (7, 8) else [pytest.mark.slow]) for n in range(len(ORDER))]
)
def test_killed_with_some_updates_in_it_ends_the_same(tmp_path: Path, whole: tuple[Any, AsyncRig], count: int) -> None:
    study, expected = whole
    rig = AsyncRig(study, tmp_path, ORDER, limit=count)
    with pytest.raises(Interrupted):
        rig.train()
    # Those that are in the round under way answer from their stores; whichever comes first, they are its beginning.
    before = ORDER[3 * len(rig.journal.reports()) : count]
    again = AsyncRig(study, tmp_path, [*reversed(before), *ORDER[count:]])
    again.train()
    assert [said(r) for r in again.journal.reports()] == [said(r) for r in expected.journal.reports()]
    assert again.coordinator.release().number == expected.coordinator.release().number
    for name, site in again.sites.items():
        kept, other = site.store.memory(5).tensors, expected.sites[name].store.memory(5).tensors
        assert {n: t.tobytes() for n, t in kept.items()} == {n: t.tobytes() for n, t in other.items()}


def test_updates_that_had_come_are_in_the_round_whichever_site_is_quicker_now(tmp_path: Path) -> None:
    rig = AsyncRig(STUDY, tmp_path, ORDER, limit=2)
    with pytest.raises(Interrupted):
        rig.train()
    again = AsyncRig(STUDY, tmp_path, [*"DCBA"])
    report = next(again.coordinator.rounds(again.start()))
    assert report.participants == ("A", "B", "D")
    assert dict(report.at_work) == {"C": 1}


def test_an_update_that_is_too_old_is_left_out_and_its_site_asked_anew(tmp_path: Path) -> None:
    study = asynchronous(3, rounds=5, asynchronous={"max_staleness": 1})
    rig, _ = trained(study, tmp_path, [*"ABC", *"ABC", *"DABC", *"DAB"])
    reports = rig.journal.reports()
    assert "2 rounds old, more than schedule.asynchronous.max_staleness (1)" in reports[2].missing["D"]
    assert reports[2].participants == ("A", "B", "C")
    assert dict(reports[2].at_work) == {"D": 3}
    assert dict(reports[3].staleness) == {"A": 0, "B": 0, "D": 1}
    assert [n for site, n in rig.line.asked if site == "D"][:2] == [1, 3]
    # Nothing of what it sent is in a sum.
    assert not any("D" in rig.journal.receipts(n) for n in (1, 2, 3))


class Declining:
    """An engine whose sites decline requests that the test names."""

    def __init__(self, rig: AsyncRig, declined: set[tuple[str, int]]) -> None:
        self.handle, self.declined = {name: site.handle for name, site in rig.sites.items()}, declined

    def __call__(self, site: str, message: Message) -> Message:
        if message.header.kind == TRAIN and (site, message.header.round) in self.declined:
            return message.reply(ERROR, meta={"reason": "not now"})
        return self.handle[site](message)


def declining(rig: AsyncRig, declined: set[tuple[str, int]]) -> None:
    engine = Declining(rig, declined)
    for name, site in rig.sites.items():
        site.handle = lambda message, name=name: engine(name, message)  # type: ignore[method-assign]


def test_a_site_that_declines_is_named_and_asked_in_the_next_round(tmp_path: Path) -> None:
    rig = AsyncRig(asynchronous(3, rounds=2), tmp_path, [*"ABCD"])
    declining(rig, {("B", 1)})
    rig.train()
    reports = rig.journal.reports()
    assert dict(reports[0].missing) == {"B": "not now"}
    assert reports[0].participants == ("A", "C", "D")
    assert ("B", 2) in rig.line.asked


def test_a_round_that_cannot_fill_goes_on_with_those_that_answered_or_stops(tmp_path: Path) -> None:
    rig = AsyncRig(asynchronous(3, rounds=1, schedule={"min_sites": 2}), tmp_path / "two")
    declining(rig, {("A", 1), ("B", 1)})
    rig.train()
    assert rig.journal.reports()[0].participants == ("C", "D")
    rig = AsyncRig(asynchronous(3, rounds=1, schedule={"min_sites": 3}), tmp_path / "three")
    declining(rig, {("A", 1), ("B", 1)})
    with pytest.raises(NotEnoughSites, match=r"2 of 4 sites answered and schedule.min_sites is 3 \(A: not now"):
        rig.train()


def test_a_site_believes_in_rounds_without_it_and_in_no_more(tmp_path: Path) -> None:
    local = {"steps": 3, "batch": 2, "optimizer": "adam", "lr": 0.01}
    rig = AsyncRig(asynchronous(3, asynchronous={"max_staleness": 2}, local=local), tmp_path)
    assert rig.sites["A"].rules.catch_up == 2
    assert Rig(toy_study(SITES), tmp_path / "plain").sites["A"].rules.catch_up == 0
    state = rig.start()
    # A model as far away as three rounds go, said to be that of round 4: without asynchronous rounds it is refused.
    site = rig.sites["A"]
    inspector, learner = site._inspector, site.learner
    assert inspector is not None
    bound = learner.known.own_bound
    far = {}
    for name in state.public:
        values, short = np.array(state.public[name]), name.removeprefix("model/")
        most = bound.of(values.size, float(np.linalg.norm(values))) if short in learner.known.trained else 0.0
        far[name] = values + np.float32(2.5 * most / np.sqrt(values.size))
    inspector.check(4, far, learner.known)
    with pytest.raises(Rejected, match="optimisers reach"):
        inspector.check(4, {n: values + (values - state.public[n]) for n, values in far.items()}, learner.known)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protection": {"secure": True}}, "cannot be combined with protection.secure: masks cancel"),
        ({"protection": {"robust": {"rule": "median"}}, "schedule": {"release": "last"}}, "protection.robust"),
        ({"method": {"kind": "feddyn"}}, "method.kind=feddyn cannot .* choose fedadam, fedavg, fedavgm, fedbn"),
        ({"method": {"kind": "flora"}}, "method.kind=flora"),
        ({"method": {"kind": "fedex_lora"}}, "method.kind=fedex_lora"),
        ({"schedule": {"min_sites": 4}}, "buffer=3: 4 sites train and schedule.min_sites is 4; set it to 4 to 4"),
        ({"asynchronous": {"buffer": 5}}, "buffer=5: 4 sites train .* set it to 1 to 4"),
        ({"asynchronous": {"exponent": 6.0}}, "so nothing; lower `exponent`"),
        ({"rounds": 0, "start": {"kind": "weights", "file": "w"}}, "nothing is trained; leave it out"),
        ({"schedule": {"phases": [{"rounds": 6, "train": ["a"]}]}}, "schedule.phases"),
        ({"sites": {"A": {}, "B": {}, "C": {}, "D": {}, "E": {"role": "evaluate"}}}, "sites.E.role: `evaluate` cannot"),
    ],
)
def test_what_needs_updates_of_one_round_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        asynchronous(3, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fedprox", "fedavgm", "fedadam"])
def test_methods_of_sums_resume(tmp_path: Path, kind: str) -> None:
    study = asynchronous(
        2, rounds=3, sites="ABC", method={"kind": kind}, protection={"compression": {"kind": "rotation"}}
    )
    order = [*"AB", *"CA", *"BA"]
    rig, state = trained(study, tmp_path / "whole", order)
    killed = AsyncRig(study, tmp_path / "killed", order, limit=3)
    with pytest.raises(Interrupted):
        killed.train()
    again = AsyncRig(study, tmp_path / "killed", order[2:])
    assert again.train().public_sha256 == state.public_sha256
    assert [r.state_sha256 for r in again.journal.reports()] == [r.state_sha256 for r in rig.journal.reports()]


def test_a_whole_run_on_one_machine(tmp_path: Path) -> None:
    study = asynchronous(2, sites={"A": {}, "B": {}, "C": {}, "U": {"role": "unseen"}}, rounds=3)
    sites = toy_sites(tmp_path / "data", ("A", "B", "C", "U"))
    result = run(study, sites, tmp_path / "out", compare=["local"], engine="local", quiet=True)
    lines = [line for line in read_rounds(tmp_path / "out") if line.arm == "federated"]
    assert all(len(line.staleness) == len(line.participants) == 2 for line in lines)
    assert result.examples["federated"] == 3 * 2 * 2 * 3
    # An arm of one site waits for no other.
    assert all(not line.staleness for line in read_rounds(tmp_path / "out") if line.arm != "federated")
    assert "U" in result.metrics["federated"]
    assert evaluate(tmp_path / "out", sites, engine="local", quiet=True).metrics == result.metrics
    again = run(study, sites, tmp_path / "out", compare=["local"], engine="local", quiet=True, resume=True)
    assert again.model_sha256 == result.model_sha256


@pytest.mark.slow
def test_a_site_pays_for_the_rounds_that_it_trained_and_never_more_than_was_planned(tmp_path: Path) -> None:
    """Also for the one whose update came too late: what was trained was spent."""
    privacy = {"patients_per_step": 2, "epsilon": 50.0, "noise_multiplier": 1.0, "delta": 1e-3}
    method = {"kind": "fedavg", "weights": "equal"}
    study = asynchronous(
        2, sites=("A", "B", "C"), rounds=4, method=method, protection={"privacy": privacy}, schedule={"release": "last"}
    )
    sites = toy_sites(tmp_path / "data", ("A", "B", "C"))
    result = run(study, sites, tmp_path / "out", engine="local", quiet=True)
    lines = [line for line in read_rounds(tmp_path / "out") if line.arm == "federated"]
    assert result.privacy is not None
    for site, found in result.privacy.sites.items():
        joined = sum(site in line.participants for line in lines)
        rounds, rest = divmod(found.steps, study.local.steps)
        assert rest == 0
        assert joined <= rounds <= min(joined + 1, study.schedule.rounds)
        assert 0.0 < found.epsilon <= 50.0
    again = run(study, sites, tmp_path / "out", engine="local", quiet=True, resume=True)
    assert again.privacy == result.privacy
