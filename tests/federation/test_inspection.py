"""A site looks at a model before it trains on it: planted ones are refused in a round, honest ones never."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.federation.rig import Rig
from tests.toys import toy_sites, toy_study
from wardround.federation.exchange import ERROR, TRAIN, UPDATE
from wardround.learning.methods.cost_weighted import CostWeighted
from wardround.learning.methods.fedadam import FedAdam
from wardround.learning.methods.fedavgm import FedAvgM
from wardround.learning.methods.fedbn import FedBN
from wardround.learning.methods.harmofl import HarmoFL
from wardround.learning.methods.hyperfed import HyperFed
from wardround.learning.methods.method import Method
from wardround.learning.methods.moon import MOON
from wardround.learning.methods.scaffold import Scaffold
from wardround.learning.optimizer import build_optimizer
from wardround.protection.drift import UNKNOWN, Seen, Sketcher, UpdateBound, adam_ratio, drift, local_bound
from wardround.protection.lint import lint_against
from wardround.runs.machine import Machine
from wardround.site.site import Site
from wardround.storage.journal import State
from wardround.study.schema import Local
from wardround.wire.message import Message
from wardround.wire.tensors import TensorWriter

ADAM = {"steps": 3, "batch": 2, "optimizer": "adam", "lr": 0.01}
Tensors = dict[str, np.ndarray]


def study(**changes: Any) -> Any:
    return toy_study(**{"local": ADAM, "schedule": {"rounds": 3}, **changes})


def planted(rig: Rig, state: State, change: Callable[[Tensors], None]) -> State:
    """The state with some tensors changed, in a file of its own."""
    tensors = {name: state.public[name].copy() for name in state.public}
    change(tensors)
    path = rig.host.out / "planted"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = TensorWriter(file)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return replace(state, public=type(state.public)(path, writer.table), public_sha256=writer.sha256)


def ask(rig: Rig, state: State, number: int, site: str = "A") -> Message:
    """One site's answer to a request to train on a state."""
    call = rig.coordinator._call(TRAIN, state, number, {"keep": [], "validate": False}, rig.arm_spec.layout)
    return rig.sites[site].handle(call.message(site))


def imprint(tensors: Tensors) -> None:
    tensors["model/0.weight"][:] = 1.0 / 6


def loud(tensors: Tensors) -> None:
    tensors["model/2.weight"][0, 0] = 2e3


def moved(tensors: Tensors) -> None:
    tensors["model/2.weight"] += 0.3


def no_number(tensors: Tensors) -> None:
    tensors["model/2.bias"][0] = np.nan


def missing(tensors: Tensors) -> None:
    del tensors["model/2.bias"]


def broadcast(tensors: Tensors) -> None:
    tensors["model/0.bias"] = np.ones(1, np.float32)


def junk(tensors: Tensors) -> None:
    tensors["model/junk"] = np.zeros(3, np.float32)


def turned(tensors: Tensors) -> None:
    items = list(tensors.items())[::-1]
    tensors.clear()
    tensors.update(items)


@pytest.mark.parametrize("change", [junk, turned])
def test_a_model_has_one_start(tmp_path: Path, change: Callable[[Tensors], None]) -> None:
    """The record of masked sums knows a start by its hash: the same model must not have two."""
    rig = Rig(study(), tmp_path)
    state = rig.start()
    reply = ask(rig, planted(rig, state, change), 1)
    assert reply.header.kind == ERROR
    assert "other tensors than the study's, or in another order" in reply.header.meta["reason"]
    assert ask(rig, state, 1).header.kind == UPDATE


def test_many_requests_of_one_round_walk_no_further_than_one(tmp_path: Path) -> None:
    rig = Rig(study(), tmp_path)
    state = rig.start()

    def grown(times: int) -> State:
        def change(tensors: Tensors) -> None:
            for name in tensors:
                tensors[name] = (tensors[name] * 1.0009**times).astype(np.float32)

        return planted(rig, state, change)

    kinds = [ask(rig, grown(times), 1).header.kind for times in range(6)]
    assert kinds[:2] == [UPDATE, UPDATE]
    assert set(kinds[3:]) == {ERROR}


def test_scales_of_a_refused_request_excuse_none_later(tmp_path: Path) -> None:
    rig = Rig(study(), tmp_path)
    state = rig.start()
    loudest = replace(state, scales={key: 4096.0 * scale for key, scale in state.scales.items()})

    def immense(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor[:] = 1e30

    assert ask(rig, loudest, 1).header.kind == ERROR
    assert ask(rig, planted(rig, loudest, immense), 3).header.kind == ERROR
    reply = ask(rig, loudest, 1)
    assert reply.header.kind == ERROR
    assert "comes with a scale of" in reply.header.meta["reason"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (imprint, "0.weight 100% of its rows are alike"),
        (loud, "2.weight amplifies by 2e+03"),
        (moved, "2.weight moved by"),
        (no_number, "2.bias holds values that are not finite"),
        (missing, "2.bias is missing"),
        (broadcast, "0.bias has another shape"),
    ],
)
def test_a_planted_model_is_refused_before_training_and_on_record(
    tmp_path: Path, change: Callable[[Tensors], None], words: str
) -> None:
    rig = Rig(study(), tmp_path)
    state = rig.start()
    assert ask(rig, state, 1).header.kind == UPDATE
    reply = ask(rig, planted(rig, state, change), 2)
    assert reply.header.kind == ERROR
    reason = reply.header.meta["reason"]
    assert "site A does not train on the model of round 2" in reason
    assert words in reason
    assert reason.count(".") <= 8  # one sentence, and what to do
    last = list(rig.sites["A"].minutes.record.entries())[-1]
    assert (last.event, last.payload["reason"]) == ("security", reason)
    # The honest model of the same round is still welcome.
    assert ask(rig, state, 2).header.kind == UPDATE


def test_the_model_of_round_1_must_be_the_one_that_the_study_starts_with(tmp_path: Path) -> None:
    rig = Rig(study(), tmp_path)
    reply = ask(rig, planted(rig, rig.start(), moved), 1)
    assert "moved by 0.849 since round 1, and no round lies in between" in reply.header.meta["reason"]


def test_a_number_beyond_the_study_is_refused_and_a_long_absence_explains_nothing(tmp_path: Path) -> None:
    rig = Rig(study(schedule={"rounds": 40}), tmp_path)
    site = rig.sites["A"]
    object.__setattr__(site.rules, "rounds", 40)
    state = rig.start()
    assert ask(rig, state, 1).header.kind == UPDATE
    far = planted(rig, state, moved)
    assert "the study ends with round 40" in ask(rig, far, 10**9).header.meta["reason"]
    assert "moved by" in ask(rig, far, 5).header.meta["reason"]
    # That rounds went by without the site is the coordinator's word: its operator has to agree.
    reason = ask(rig, far, 40).header.meta["reason"]
    assert "38 without this site are said to lie in between, and none is believed" in reason
    assert "set catch_up: 38 in its sites file" in reason
    away(site, 5)
    assert "the site lets 5 explain a move" in ask(rig, far, 40).header.meta["reason"]
    away(site, 38)
    assert ask(rig, far, 40).header.kind == UPDATE
    events = [e for e in site.minutes.record.entries() if e.event == "security"]
    assert "in 1 round; 39 are said to lie" in events[-1].payload["reason"]


def away(site: Site, rounds: int) -> None:
    """The site's operator lets so many missed rounds explain a move."""
    assert site._inspector is not None
    site._inspector._catch_up = rounds


def test_what_a_sites_file_agrees_to_reaches_its_inspector(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path)
    agreed = sites.of("B").model_copy(update={"catch_up": 7})
    host = Machine(study(), sites.model_copy(update={"sites": {**sites.sites, "B": agreed}}), tmp_path / "out", ())
    found = {name: host.agent(name).arms.site("federated")._inspector for name in ("A", "B")}
    assert [0 if each is None else each._catch_up for each in found.values()] == [0, 7]
    host.close()


def test_an_honest_site_that_missed_rounds_is_welcome(tmp_path: Path) -> None:
    """One round's limit is far above what honest rounds do together."""
    rig = Rig(study(local={**ADAM, "steps": 10}, schedule={"rounds": 12, "min_sites": 2}), tmp_path)
    honest = rig.sites["A"].handle

    def absent(request: Message) -> Message:
        if request.header.round in range(4, 9):
            return request.reply(ERROR, meta={"reason": "away"})
        return honest(request)

    rig.sites["A"].handle = absent  # type: ignore[method-assign]
    rig.train()
    missing = {report.round: set(report.missing) for report in rig.journal.reports()}
    assert missing == {number: {"A"} if number in range(4, 9) else set() for number in range(1, 13)}


UNLIMITED = {"steps": 3, "batch": 2, "optimizer": "sgd", "lr": 0.1}


def test_where_the_optimiser_has_no_limit_the_sites_own_training_is_one(tmp_path: Path) -> None:
    rig = Rig(study(local=UNLIMITED), tmp_path)
    state = rig.start()
    assert ask(rig, state, 1).header.kind == UPDATE
    known = json.loads(rig.sites["A"].store.fact("lint/seen") or "{}")["own"]
    assert known.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(length > 0 for length in known.values())

    def by(factor: float) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            tensors["model/0.weight"][0, 0] += factor * known["0.weight"]

        return change

    assert ask(rig, planted(rig, state, by(10.0)), 2).header.kind == UPDATE
    rig = Rig(study(local=UNLIMITED), tmp_path / "other")
    state = rig.start()
    assert ask(rig, state, 1).header.kind == UPDATE
    reason = ask(rig, planted(rig, state, by(100.0)), 2).header.meta["reason"]
    assert "0.weight moved by" in reason
    assert "what the site saw makes it" in reason
    momentum = Rig(study(local=UNLIMITED, method={"kind": "fedavgm", "momentum": 0.9}), tmp_path / "momentum")
    state = momentum.start()
    assert ask(momentum, state, 1).header.kind == UPDATE
    assert ask(momentum, planted(momentum, state, by(100.0)), 2).header.kind == UPDATE


def test_a_site_that_never_saw_a_round_believes_in_none(tmp_path: Path) -> None:
    rig = Rig(study(local=UNLIMITED, schedule={"rounds": 60}), tmp_path)
    state = rig.start()
    trained = planted(rig, state, moved)
    reason = ask(rig, trained, 60).header.meta["reason"]
    assert "how far a round of this study goes cannot be said" in reason
    assert "set catch_up: 58" in reason
    away(rig.sites["A"], 58)
    assert ask(rig, trained, 60).header.kind == UPDATE


def test_scales_that_no_honest_round_comes_to_allow_nothing(tmp_path: Path) -> None:
    rig = Rig(study(protection={"ring_bits": 24, "max_sites": 4}, schedule={"rounds": 40}), tmp_path)
    state = rig.start()
    assert ask(rig, state, 1).header.kind == UPDATE
    # As large as scales may ever be, and far larger than what such steps come to: their rounding would excuse the move.
    huge = replace(state, scales=rig.coordinator._commits.scales.capped(dict.fromkeys(state.scales, 1e9), state.public))
    assert ask(rig, huge, 10).header.kind == UPDATE
    assert "2.weight moved by" in ask(rig, planted(rig, state, moved), 11).header.meta["reason"]


def test_a_site_that_joins_late_is_not_misled_by_a_coarse_ring(tmp_path: Path) -> None:
    """Small steps, and a sum that is coarser by far: most of what the first round did is rounding."""
    wide = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"features": 200}}
    small = {"local": {**ADAM, "lr": 1e-4}, "protection": {"ring_bits": 16}, "task": wide}
    rig = Rig(study(**small, schedule={"rounds": 4, "min_sites": 2}), tmp_path)
    honest = rig.sites["A"].handle

    def late(request: Message) -> Message:
        if request.header.round <= 2:
            return request.reply(ERROR, meta={"reason": "away"})
        return honest(request)

    rig.sites["A"].handle = late  # type: ignore[method-assign]
    rig.train()
    reports = {report.round: report for report in rig.journal.reports()}
    assert [set(reports[number].missing) for number in (1, 2, 3, 4)] == [{"A"}, {"A"}, set(), set()]


def test_a_round_goes_on_without_the_site_that_refuses(tmp_path: Path) -> None:
    rig = Rig(study(schedule={"rounds": 3, "min_sites": 2}), tmp_path)
    honest = rig.sites["B"].handle
    spoilt = planted(rig, rig.start(), imprint)

    def deceived(request: Message) -> Message:
        if request.header.kind == TRAIN and request.header.round == 2:
            header = replace(
                request.header,
                tensors=spoilt.public.table,
                body_nbytes=spoilt.public.nbytes,
                body_sha256=spoilt.public_sha256,
            )
            answer = honest(Message(header, type(request.body)(spoilt.public.path, spoilt.public.nbytes)))
            return Message(replace(answer.header, reply_to=request.id), answer.body)
        return honest(request)

    rig.sites["B"].handle = deceived  # type: ignore[method-assign]
    rig.train()
    reports = {report.round: report for report in rig.journal.reports()}
    assert reports[2].participants == ("A", "C")
    assert "does not train on the model of round 2" in reports[2].missing["B"]
    assert reports[3].participants == ("A", "B", "C")


def test_a_site_can_turn_it_off(tmp_path: Path) -> None:
    rig = Rig(study(), tmp_path)
    for site in rig.sites.values():
        object.__setattr__(site.rules, "lint", False)
        site._inspector = None
    state = rig.start()
    assert ask(rig, planted(rig, state, imprint), 1).header.kind == UPDATE


def test_what_is_remembered_survives_a_restart_and_says_nothing_of_the_model(tmp_path: Path) -> None:
    rig = Rig(study(), tmp_path)
    state = rig.start()
    ask(rig, state, 1)
    again = Rig(study(), tmp_path)
    fact = again.sites["A"].store.fact("lint/seen")
    assert fact is not None
    assert json.loads(fact)["round"] == 1
    assert "moved by" in ask(again, planted(again, state, moved), 2).header.meta["reason"]


also = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"local": {**ADAM, "optimizer_state": "keep", "lr": 0.1}},
        also({"local": {**ADAM, "optimizer": "adamw", "weight_decay": 0.1}}),
        also({"local": {"steps": 3, "batch": 2, "optimizer": "sgd", "lr": 0.5, "momentum": 0.9, "clip_norm": 0.5}}),
        also({"local": {"steps": 3, "batch": 2, "optimizer": "sgd", "lr": 0.1}}),
        also({"method": {"kind": "fedavgm"}}),
        {"method": {"kind": "fedadam", "server_lr": 0.1}},
        also({"protection": {"ring_bits": 16, "max_sites": 4}}),
        also({"protection": {"compression": {"kind": "rotation"}}}),
        {"protection": {"compression": {"kind": "top_k", "ratio": 0.05}}},
        also(
            {
                "method": {"kind": "fedbn"},
                "task": {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}},
            }
        ),
    ],
)
def test_honest_rounds_are_never_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    rig = Rig(study(schedule={"rounds": 8, "min_sites": 3}, **changes), tmp_path)
    rig.train()
    assert all(not report.missing for report in rig.journal.reports())


# How far optimisers reach ------------------------------------------------------------------------------------------


@given(
    gradients=st.lists(st.floats(-1e3, 1e3, allow_nan=False).filter(lambda g: abs(g) > 1e-3), min_size=1, max_size=30),
    optimizer=st.sampled_from(["adam", "adamw", "sgd"]),
)
def test_no_gradients_move_further_than_the_reach(gradients: list[float], optimizer: str) -> None:
    local = Local(steps=len(gradients), optimizer=optimizer, lr=0.01, momentum=0.5, clip_norm=1.0, weight_decay=0.01)
    network = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(1.0)
    steps = build_optimizer((network,), local)
    for gradient in gradients:
        network.weight.grad = torch.full((1, 1), gradient)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        steps.step()
    far = abs(float(network.weight.detach()) - 1.0)
    # Weight decay works on what the weight is on the way.
    assert far <= local_bound(local).of(1, 1.0 + far) * (1 + 1e-3) + 1e-6


def test_the_largest_ratio_of_adam_is_reached_by_the_gradients_that_cauchy_names() -> None:
    gradients = [(0.9 / 0.999) ** k for k in range(40)][::-1]
    m = v = 0.0
    for gradient in gradients:
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    found = (m / (1 - 0.9**40)) / math.sqrt(v / (1 - 0.999**40))
    assert found == pytest.approx(adam_ratio(40), rel=1e-6)
    assert adam_ratio(1) == pytest.approx(1.0)
    assert adam_ratio() == pytest.approx(7.27, abs=0.01)
    assert adam_ratio(None, 0.99, 0.9) == math.inf
    for betas in ((0.9, 0.999), (0.5, 0.25), (0.9, 0.5)):
        q = betas[0] ** 2 / betas[1]
        total = math.sqrt(sum(q**k for k in range(7)) / (1.0 - betas[1])) * (1.0 - betas[0])
        corrected = total * math.sqrt(1.0 - betas[1] ** 7) / (1.0 - betas[0] ** 7)
        assert adam_ratio(7, *betas) == pytest.approx(corrected, rel=1e-12)


def test_a_long_round_is_bounded_at_once() -> None:
    began = time.process_time()
    many = local_bound(Local(steps=20_000, optimizer="adam", lr=1.0)).value
    assert time.process_time() - began < 1.0
    # Far from the start every step has the ratio that it can have ever.
    further = local_bound(Local(steps=20_001, optimizer="adam", lr=1.0)).value
    assert further - many == pytest.approx(adam_ratio(), rel=1e-6)


def test_a_method_that_cannot_say_is_not_asked() -> None:
    class Own(Method):
        def server_step(self, *_: Any) -> Any:
            return 0.0

    one = UpdateBound(1.0, 2.0)
    assert Method().update_bound(one) == FedBN().update_bound(one) == one
    assert FedAvgM(momentum=0.5).update_bound(one) == one.times(2.0)
    assert FedAdam(server_lr=0.1).update_bound(UNKNOWN).value == pytest.approx(0.1 * adam_ratio(None, 0.9, 0.99))
    assert Own().update_bound(one) == UNKNOWN
    assert Scaffold(server_lr=0.5).update_bound(one) == one.times(0.5)
    for method in (FedBN, HyperFed, FedAvgM, FedAdam, Scaffold, CostWeighted, MOON, HarmoFL):
        assert method().update_bound(one) != UNKNOWN
        for hook in ("server_step", "apply", "apply_group", "changes"):
            plugged = type("Plugged", (method,), {hook: lambda *_: None})
            assert plugged().update_bound(one) == UNKNOWN
    assert local_bound(Local(optimizer="sgd")) == UNKNOWN


def test_a_sketch_tells_lengths_and_hides_where_it_looks() -> None:
    random = np.random.default_rng(0)
    mine, other = Sketcher(b"a"), Sketcher(b"b")
    for size in (1, 100, 5000):
        change = random.standard_normal(size)
        told = float(np.linalg.norm(mine.sketch("t", change)))
        assert told == pytest.approx(float(np.linalg.norm(change)), rel=0.35)
    big = random.standard_normal(5000)
    assert not np.allclose(mine.sketch("t", big), other.sketch("t", big))
    assert not np.allclose(mine.sketch("t", big), mine.sketch("u", big))
    seen = Seen(3, {"t": mine.sketch("t", big)}, {"t": 0.5})
    assert Seen.from_json(seen.to_json()).sketches["t"] == pytest.approx(seen.sketches["t"], rel=1e-5)

    def found(tensor: np.ndarray, number: int, bound: UpdateBound = UNKNOWN) -> list[str]:
        return [f.check for f in drift(seen, {"t": tensor}, number, bound, lambda name: mine.sketch(name, tensor))]

    assert found(big, 3) == []
    assert found(big + 0.2, 3) == ["drift"]
    # Three rounds of 0.1, and rounding, explain a move of 0.2; one round does not.
    seen = replace(seen, rounding={})
    assert found(big + 0.2, 6, UpdateBound(0.1)) == []
    assert found(big + 0.2, 4, UpdateBound(0.1)) == ["drift"]


# Honest rows -------------------------------------------------------------------------------------------------------


def test_rows_of_two_values_are_alike_by_chance_and_pass() -> None:
    rows = {"a.weight": np.random.default_rng(0).standard_normal((128, 2)).astype(np.float32)}
    assert lint_against(rows, rows) == ()
    grown = {"a.weight": rows["a.weight"] * 2}
    assert lint_against(grown, rows) == ()


def test_what_starts_at_zero_may_learn_one_direction_and_what_the_study_starts_with_is_known() -> None:
    zero = {"out.weight": np.zeros((32, 16), np.float32)}
    first = {"out.weight": np.outer(np.arange(1, 33), np.ones(16)).astype(np.float32)}
    assert lint_against(first, zero) == ()
    alike = {"a.weight": np.ones((32, 16), np.float32)}
    assert lint_against(alike, alike) == ()
    random = {"a.weight": np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)}
    assert [f.check for f in lint_against(alike, random)] == ["imprint"]
