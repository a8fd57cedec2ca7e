"""FedNova against equation 8 of its paper, and rounds that are passes over a site's own examples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.federation.alignment import Quadratics, descend, floats, gradients, plain, shared_in, unlike_study
from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.learning.examples import ExampleStream, SiteExamples, UnionExamples
from wardround.learning.methods.fednova import FedNova
from wardround.learning.methods.method import Facts, Method
from wardround.protection.drift import UNKNOWN, UpdateBound, local_bound
from wardround.runs.session import run
from wardround.study.hashes import study_sha256
from wardround.study.schema import Local

LR, BATCH, ROUNDS, PASSES = 0.1, 4, 3, 1.5
# Sites of 3, 7 and 11 training patients with two examples each.
EXAMPLES = {"A": 6, "B": 14, "C": 22}
STEPS = {site: math.ceil(PASSES * n / BATCH) for site, n in EXAMPLES.items()}


def rate(number: int, step: int, steps: int) -> float:
    """Of a half cosine over the site's own steps."""
    return LR * 0.5 * (1.0 + math.cos(math.pi * ((number - 1) * steps + step) / (ROUNDS * steps)))


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_it_follows_equation_8(tmp_path: Path, momentum: float) -> None:
    """With a_i as the sum of the weights that a site's gradients have in its change, found by unrolling its steps."""
    assert STEPS == {"A": 3, "B": 6, "C": 9}
    local = {"passes": PASSES, "batch": BATCH, "lr": LR, "momentum": momentum, "schedule": "cosine"}
    rig = Rig(unlike_study({"kind": "fednova"}, local, ROUNDS, options={"norm": True}), tmp_path)
    states = rig.states()
    x = shared_in(next(states).public)
    names = [name for name in x if "running" not in name]
    weight = {site: n / sum(EXAMPLES.values()) for site, n in EXAMPLES.items()}
    for number, state in enumerate(states, start=1):
        effective, slope, buffers, mean = (
            0.0,
            dict.fromkeys(names, 0.0),
            dict.fromkeys(x, 0.0),
            dict.fromkeys(names, 0.0),
        )
        for site, steps in STEPS.items():
            velocity: dict[str, Any] = {}
            # The weight of each gradient in the change: the rates of its own step and of all later ones, dying away.
            weights = [
                sum(rate(number, k, steps) * momentum ** (k - j) for k in range(j, steps)) / LR for j in range(steps)
            ]

            def step(
                model: Any, loss: Any, k: int, number: int = number, steps: int = steps, v: Any = velocity
            ) -> None:
                found = gradients(model, loss(model))
                for name, gradient in found.items():
                    v[name] = momentum * v.get(name, 0.0) + gradient
                descend(model, v, rate(number, k, steps))

            y = floats(plain(rig, site, number, x, step))
            effective += weight[site] * sum(weights)
            for n in x:
                buffers[n] = buffers[n] + weight[site] * y[n]
            for n in names:
                slope[n] = slope[n] + weight[site] * (y[n] - x[n]) / sum(weights)
                mean[n] = mean[n] + weight[site] * (y[n] - x[n])
        moved = {n: effective * slope[n] for n in names}
        # It is another update than FedAvg's.
        assert max(float(np.abs(moved[n] - mean[n]).max()) for n in names) > 1e-3
        x = {n: x[n] + moved[n] if n in names else buffers[n] for n in x}
        found = shared_in(state.public)
        for n in x:
            assert np.allclose(found[n], x[n], rtol=0, atol=1e-4), (number, n)
        x = found
    assert number == ROUNDS


def test_its_fixed_point_is_the_optimum_and_that_of_fedavg_is_not() -> None:
    """Losses a/2 (w - c)^2, of sites with 2 and 20 steps of rate r. What a site's change is of (c - w), its pull, is
    1 - (1 - r a)^steps: FedAvg ends where these weigh, FedNova where what they are a step does, which is a to the first
    order of r a steps."""
    rate, steps = 0.005, (2, 20)
    sites = Quadratics((0.5, 1.0), (3.0, -1.0), steps, rate, weights=(3.0, 1.0))
    pull = [1.0 - (1.0 - rate * a) ** k for a, k in zip(sites.curvature, steps, strict=True)]

    def balance(weights: Any) -> float:
        return float(np.average(sites.centre, weights=[w * p for w, p in zip(sites.weights, weights, strict=True)]))

    each = [p / k for p, k in zip(pull, steps, strict=True)]
    # (1 - r a)^k = 1 - k r a (1 - (k - 1) r a / 2 + ...): each a is off by this share at most; the centres are 4 apart,
    # and a balance of two moves by a quarter of that.
    error = max((k - 1) * rate * a / 2.0 for a, k in zip(sites.curvature, steps, strict=True))
    assert balance(each) == pytest.approx(sites.optimum, abs=error)
    assert abs(balance(pull) - sites.optimum) > 1.0
    effective = float(np.average(steps, weights=sites.weights))
    for method, weights, factor in ((FedNova(most=20.0), each, effective), (Method(), pull, 1.0)):
        fixed, closed = balance(weights), factor * float(np.average(weights, weights=sites.weights))
        assert sites.final(method, 1, start=fixed) == pytest.approx(fixed, abs=1e-12)
        # From elsewhere a round closes a share of the gap.
        assert sites.final(method, 10, start=fixed + 1.0) == pytest.approx(fixed + (1.0 - closed) ** 10, abs=1e-9)


def test_where_all_take_as_many_steps_it_is_fedavg(tmp_path: Path) -> None:
    states = [
        Rig(unlike_study({"kind": kind}, {"steps": 3}), tmp_path / kind).train() for kind in ("fedavg", "fednova")
    ]
    for name in states[0].public:
        # Its changes are a third as large, so the scales are others: rounding is what differs.
        assert np.allclose(states[0].public[name], states[1].public[name], rtol=0, atol=1e-5)


def test_what_is_no_step_of_sgd_from_rest_is_refused() -> None:
    for local, error in (
        ({"optimizer": "adam"}, r"local\.optimizer: .*steps of adam do not; set it to sgd"),
        (
            {"optimizer": "sgd", "momentum": 0.9, "optimizer_state": "keep"},
            r"local\.optimizer_state: .*set it to `reset`",
        ),
    ):
        with pytest.raises(ValidationError, match=error):
            toy_study(method={"kind": "fednova"}, local=local)
    with pytest.raises(ValidationError, match="fednova is made of sums"):
        toy_study(method={"kind": "fednova"}, local={"optimizer": "sgd"}, protection={"robust": {}},
                  schedule={"release": "last"})  # fmt: skip


def test_a_site_knows_how_far_a_round_goes_only_where_all_take_as_many_steps() -> None:
    one = UpdateBound(1.0, 2.0)
    same = FedNova().within(toy_study(local={"steps": 3, "optimizer": "sgd"}), 3, torch.nn.Module())
    assert same.update_bound(one) == one
    passing = FedNova().within(toy_study(local={"passes": 1, "optimizer": "sgd"}), 3, torch.nn.Module())
    assert passing.update_bound(one) == local_bound(Local(passes=1.0)) == UNKNOWN


def test_weights_before_a_round_are_those_of_a_constant_rate() -> None:
    method = FedNova().within(toy_study(local={"passes": 2, "batch": 5, "optimizer": "sgd"}), 3, torch.nn.Module())
    weights = method.group_weights(Facts(12), ("model", "steps"))
    assert weights == {"model": 12.0, "steps": pytest.approx(12.0 * 5 / math.ceil(2 * 4096 / 5))}


# Passes ---------------------------------------------------------------------------------------------------------------


def test_passes_are_steps_of_whole_batches() -> None:
    assert [Local(passes=p, batch=4).steps_of(n) for p, n in ((1, 8), (1, 9), (0.5, 8), (3, 9), (0.01, 4))] == [
        2, 3, 1, 7, 1,
    ]  # fmt: skip
    assert Local(passes=0.1, batch=1).steps_of(30) == 3
    assert Local(steps=7).steps_of(1000) == 7
    with pytest.raises(ValidationError, match="`steps` and `passes` both say how long a round is"):
        Local(steps=3, passes=1)
    with pytest.raises(ValidationError, match=r"local\.passes: with protection\.privacy"):
        toy_study(method={"weights": "equal"}, local={"passes": 1}, protection={"privacy": {}},
                  schedule={"release": "last"})  # fmt: skip


def test_a_study_of_steps_is_known_by_what_it_was() -> None:
    study = toy_study(local={"steps": 3})
    assert study_sha256(study) != study_sha256(toy_study(local={"passes": 3}))
    assert "passes" not in study.local.model_fields_set


def test_the_pooled_arm_processes_what_the_sites_process() -> None:
    local = Local(passes=PASSES, batch=BATCH)
    streams = tuple(ExampleStream(n, 3, site) for site, n in EXAMPLES.items())
    offsets = (0, 6, 20)
    stretches = tuple(local.steps_of(n) * BATCH for n in EXAMPLES.values())
    pooled = UnionExamples(streams, offsets, 3, stretches)
    union = local.model_copy(update={"batch": 3 * BATCH})
    steps = pooled.steps(union)
    assert steps == sum(STEPS.values()) / 3 == 6
    for number in (1, 2):
        own = sorted(
            offset + i
            for stream, offset, stretch in zip(streams, offsets, stretches, strict=True)
            for i in SiteExamples(stream).of_round(number, stretch)
        )
        assert sorted(pooled.of_round(number, steps * 3 * BATCH)) == own
    # Where the last batch is not full, the first examples fill it.
    uneven = UnionExamples(streams[:2], offsets[:2], 3, stretches[:2])
    twice = local.model_copy(update={"batch": 2 * BATCH})
    assert uneven.steps(twice) == 5
    taken = uneven.of_round(1, 5 * 2 * BATCH)
    assert taken[36:] == taken[:4]


def test_a_run_of_passes_says_what_it_knows(tmp_path: Path) -> None:
    from tests.toys import toy_sites

    study = unlike_study({"kind": "fednova"}, {"passes": 1}, 2)
    sites = toy_sites(tmp_path / "data")
    result = run(study, sites, tmp_path / "out", compare=("pooled",), engine="local", quiet=True, allow_code=True)
    # How many examples a site has stays there.
    assert result.steps == result.examples == {}
    assert "by passes" in (tmp_path / "out" / "report.html").read_text()
