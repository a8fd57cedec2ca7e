"""SCAFFOLD against algorithm 1 of its paper, and what it promises of unlike sites."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.federation.alignment import (
    Away,
    Lost,
    Quadratics,
    descend,
    floats,
    gradients,
    plain,
    shared_in,
    unlike_study,
)
from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.federation.expected import expected
from wardround.learning.methods.method import Method
from wardround.learning.methods.scaffold import Scaffold
from wardround.wire.ring import levels

LR, STEPS, ROUNDS = 0.1, 3, 4


def rate(number: int, step: int) -> float:
    """Of a half cosine over all steps."""
    return LR * 0.5 * (1.0 + math.cos(math.pi * ((number - 1) * STEPS + step) / (ROUNDS * STEPS)))


def option_two(rig: Rig, away: dict[str, tuple[int, ...]], server_lr: float) -> list[float]:
    """Follows the rounds with the equations written out in double precision; the largest misses of x, c and c_i."""
    states, sites, worst = rig.states(), tuple(rig.sites), [0.0, 0.0, 0.0]
    unit = LR * STEPS
    x = shared_in(next(states).public)
    names = [name for name in x if "running" not in name]
    c = {n: np.zeros_like(x[n]) for n in names}
    own = {site: {n: np.zeros_like(x[n]) for n in names} for site in sites}
    for number, state in enumerate(states, start=1):
        present = [site for site in sites if number not in away.get(site, ())]
        moved, changed, buffers = [], [], []
        for site in present:
            correction = {n: torch.from_numpy(c[n] - own[site][n]) for n in names}

            def step(model: Any, loss: Any, k: int, number: int = number, by: Any = correction) -> None:
                found = gradients(model, loss(model))
                descend(model, {n: found[n] + by[n] for n in found}, rate(number, k))

            y = floats(plain(rig, site, number, x, step))
            rates = sum(rate(number, k) for k in range(STEPS))
            new = {n: own[site][n] - c[n] + (x[n] - y[n]) / rates for n in names}
            moved.append({n: y[n] - x[n] for n in names})
            changed.append({n: new[n] - own[site][n] for n in names})
            buffers.append({n: y[n] for n in x if n not in names})
            own[site] = new
        share = len(present) / len(sites)
        x = {n: x[n] + server_lr * np.mean([m[n] for m in moved], axis=0) for n in names} | {
            n: np.mean([b[n] for b in buffers], axis=0) for n in x if n not in names
        }
        c = {n: c[n] + share * np.mean([d[n] for d in changed], axis=0) for n in names}
        found = shared_in(state.public)
        for n in x:
            worst[0] = max(worst[0], float(np.abs(found[n] - x[n]).max()))
        for n in names:
            worst[1] = max(worst[1], float(np.abs(state.public[f"control/{n}"] / unit - c[n]).max()))
            for site in present:
                kept = rig.sites[site].store.memory(number).tensors[f"method/own/{n}"] / unit
                worst[2] = max(worst[2], float(np.abs(kept - own[site][n]).max()))
    assert number == ROUNDS
    assert max(float(np.abs(c[n]).max()) for n in names) > 1e-2
    assert max(float(np.abs(own["A"][n] - own["B"][n]).max()) for n in names) > 1e-2
    return worst


@pytest.mark.parametrize(
    ("away", "server_lr"), [({}, 1.0), ({"C": (2,), "A": (3,)}, 0.7)], ids=["all take part", "some are away"]
)
def test_it_follows_option_two_with_a_rate_for_every_step(
    tmp_path: Path, away: dict[str, tuple[int, ...]], server_lr: float
) -> None:
    study = unlike_study(
        {"kind": "scaffold", "server_lr": server_lr},
        {"steps": STEPS, "lr": LR, "schedule": "cosine"},
        ROUNDS,
        options={"norm": True},
        schedule={"min_sites": 2},
    )
    rig = Rig(study, tmp_path)
    for site, rounds in away.items():
        rig.sites[site] = Away(rig.sites[site], rounds)  # type: ignore[assignment]
    x, c, own = option_two(rig, away, server_lr)
    # Float32 sums in another order, over a few steps of values of order one; c divides by the sum of rates.
    assert x < 2e-5
    assert c < 2e-4
    assert own < 2e-4


@pytest.mark.parametrize("compression", ["none", "subspace"])
@pytest.mark.parametrize("scale", [4.0, 1e-3], ids=["as they are", "cut off at first"])
def test_the_control_variates_of_all_sites_add_up_to_n_times_c(tmp_path: Path, scale: float, compression: str) -> None:
    """Also where the first scales cut most of them off; with compression what still waits at a site is counted."""
    kind = {"kind": compression, "ratio": 0.5} if compression == "subspace" else {"kind": compression}
    study = unlike_study(
        {"kind": "scaffold"}, {"steps": 2, "optimizer": "adam", "lr": 0.01}, ROUNDS,
        options={"features": 20}, protection={"compression": kind, "initial_scale": scale},
    )  # fmt: skip
    rig, bound = Rig(study, tmp_path), 0.0
    states = rig.states()
    before = next(states)
    for number, state in enumerate(states, start=1):
        bits = rig.arm_spec.layout.bits_of(rig.arm_spec.layout.groups[0])
        # Each round each site's change is rounded to a step of the scale; a rotation spreads them over a tensor.
        steps = [before.scales[f"control/{n}"] / levels(bits) for n in rig.learner("A").known.trained]
        bound += 3.0 * max(steps) * (32.0**0.5) * len(rig.sites)
        for name in rig.learner("A").known.trained:
            own = np.zeros_like(state.public[f"control/{name}"], dtype=np.float64)
            for site in rig.sites.values():
                memory, waiting = site.store.memory(number).tensors, f"residual/control/{name}"
                own += memory[f"method/own/{name}"]
                own -= memory.get(waiting, 0.0)
            missed = np.abs(own - 3.0 * state.public[f"control/{name}"]).max()
            assert missed < bound + 1e-6 * (1.0 + np.abs(own).max()), (number, name)
        before = state
    assert max(float(np.abs(before.public[f"control/{n}"]).max()) for n in rig.learner("A").known.trained) > 1e-5


#: Rate, rounds, and how near they come: steps of Adam are as long as the rate however near it is, here three of them.
def test_a_site_whose_update_was_lost_goes_on_with_what_the_sum_knows(tmp_path: Path) -> None:
    """Twice in a row, and from the first round on: else the corrections of all sites would have a common error."""
    study = unlike_study({"kind": "scaffold"}, {"steps": 2}, 6, schedule={"min_sites": 2})
    rig = Rig(study, tmp_path)
    rig.sites["A"] = Lost(rig.sites["A"], (1, 3, 4))  # type: ignore[assignment]
    states = list(rig.states())
    names = rig.learner("A").known.trained
    own = {site: {n: rig.sites[site].store.memory(6).tensors[f"method/own/{n}"] for n in names} for site in rig.sites}
    assert [len(report.participants) for report in rig.journal.reports()] == [2, 3, 2, 2, 3, 3]
    for name in names:
        added = sum(own[site][name].astype(np.float64) for site in rig.sites)
        assert np.allclose(added, 3.0 * states[-1].public[f"control/{name}"], rtol=0, atol=1e-5), name
    assert max(float(np.abs(own["A"][n]).max()) for n in names) > 1e-2


OPTIMIZERS: dict[str, tuple[Any, float, int, float]] = {
    "sgd": (torch.optim.SGD, 0.3, 25, 1e-3),
    "momentum": (partial(torch.optim.SGD, momentum=0.5), 0.15, 25, 1e-3),
    "adam": (torch.optim.Adam, 0.05, 40, 0.15),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unlike_sites_end_at_the_common_optimum_and_without_it_they_do_not(name: str) -> None:
    optimizer, lr, rounds, near = OPTIMIZERS[name]
    sites = Quadratics((0.4, 2.0), (3.0, -1.0), (8, 8), lr, optimizer=lambda tensors, rate: optimizer(tensors, lr=rate))
    assert abs(sites.final(Method("equal"), rounds) - sites.optimum) > 0.3
    assert sites.final(Scaffold("equal"), rounds) == pytest.approx(sites.optimum, abs=near)


def test_control_variates_travel_with_the_model_and_the_plan_says_so(tmp_path: Path) -> None:
    local = {"steps": 2, "optimizer": "sgd", "lr": 0.1}
    bills = [
        expected(Rig(toy_study(method={"kind": kind}, local=local), tmp_path / kind).host)
        for kind in ("fedavg", "scaffold")
    ]
    for way in ("up", "down"):
        once, twice = (getattr(bill.training, way).model for bill in bills)
        assert twice == 2 * once > 0
    # A hospital that did not train is served the model alone.
    assert bills[0].validation.down.model == bills[1].validation.down.model


def test_what_a_site_is_told_to_keep_of_a_change_is_what_was_said() -> None:
    change = {"control": {"w": np.array([0.5, -2.0, 3.0])}}
    kept = Scaffold().heard({"own/w": np.array([1.0, 1.0, 1.0])}, change, {"control/w": 1.5})
    assert np.allclose(kept["own/w"], [1.0, 1.5, -0.5])


def test_a_robust_mean_and_privacy_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"scaffold is made of sums over sites.*leave out protection\.robust"):
        toy_study(method={"kind": "scaffold"}, protection={"robust": {}}, schedule={"release": "last"})
    with pytest.raises(ValidationError, match=r"method\.kind=scaffold cannot be combined with protection\.privacy"):
        toy_study(method={"kind": "scaffold"}, protection={"privacy": {}}, schedule={"release": "last"})
