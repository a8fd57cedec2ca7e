"""Attacks that must work do, noise stops them, and what finds nothing is never called safe unless it could find."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.mri_hospitals import head
from wardround.audit.inversion import (
    ATTACKS,
    Attack,
    Objective,
    Victim,
    distance,
    gradient,
    invert,
    one_hot,
    sent_after,
    statistics_of,
)
from wardround.audit.scores import Trial, row, score, traffic_light, worst_light
from wardround.audit.victims import Noise, control_victim, protected


def _image(seed: int = 0) -> Tensor:
    return torch.from_numpy(head(seed)[:, :, 1].astype(np.float32) / 255.0)


def _ssim(attack: Attack, victim: Victim) -> float:
    return float(score(invert(attack, victim, 1).images, victim.images, None, victim.images).ssim.min())


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_every_attack_recovers_the_control(attack: Attack) -> None:
    victim = control_victim(_image(), 2)
    found = invert(replace(attack, iterations=min(attack.iterations, 60), restarts=1), victim, 0)
    assert float(score(found.images, victim.images, None, victim.images).ssim[0]) > 0.8
    assert found.labels is not None
    assert found.labels.tolist() == [2]


def test_an_attack_is_deterministic() -> None:
    victim, attack = control_victim(_image(), 0), replace(ATTACKS[2], iterations=10)
    assert torch.equal(invert(attack, victim, 3).images, invert(attack, victim, 3).images)
    assert not torch.equal(invert(attack, victim, 3).images, invert(attack, victim, 4).images)


@pytest.mark.slow
def test_noise_stops_the_attack() -> None:
    victim = control_victim(_image(), 1)
    noisy = Victim(**{**vars(victim), "sent": protected(victim.sent, Noise(1.0, 1.0), 5)})
    assert _ssim(ATTACKS[1], victim) > 0.8
    assert _ssim(ATTACKS[1], noisy) < 0.2


def test_protection_clips_all_parameters_together() -> None:
    sent = (torch.full((3,), 4.0), torch.full((4,), 6.0))
    clipped = protected(sent, Noise(2.0, 0.0), 0)
    assert torch.cat(clipped).norm() == pytest.approx(2.0)
    assert torch.allclose(torch.cat(clipped) / torch.cat(sent), torch.cat(clipped)[0] / 4.0)


def _smooth(inputs: int = 8) -> Objective:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs * inputs, 32), nn.Softplus(), nn.Linear(32, 3)).double()
    return Objective(network, lambda net, _, x, y: nn.functional.cross_entropy(net(x), y))


def test_several_steps_equal_a_loop_of_sgd() -> None:
    objective, images = _smooth(), torch.rand(4, 8, 8, dtype=torch.float64)
    labels = one_hot(torch.tensor([0, 1, 2, 0]), 3, images)
    sent = sent_after(objective, 2, 0.5, images, labels)
    before = [p.detach().clone() for p in objective.parameters()]
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.5)
    for part in (slice(0, 2), slice(2, 4)):
        optimizer.zero_grad()
        objective(0, images[part], labels[part]).backward()
        optimizer.step()
    for old, new, told in zip(before, objective.parameters(), sent, strict=True):
        assert torch.allclose((old - new.detach()) / (0.5 * 2), told)


@pytest.mark.slow
def test_unrolling_recovers_images_of_two_steps() -> None:
    objective = _smooth()
    images = torch.nn.functional.interpolate(torch.stack([_image(0), _image(3)])[:, None].double(), (8, 8))[:, 0]
    labels = torch.tensor([0, 1])
    sent = sent_after(objective, 2, 0.5, images, one_hot(labels, 3, images))
    victim = Victim(objective, images, sent, labels, 3, steps=2, rate=0.5)
    attack = Attack("unrolled", "squared", "lbfgs", iterations=150, restarts=2, labels="joint", unroll=True)
    found = score(invert(attack, victim, 0).images, images, None, images)
    assert found.ssim.mean() > 0.8


def test_batch_statistics_are_those_of_the_images() -> None:
    network = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2)).double()
    before = network[1].running_mean.clone()  # type: ignore[union-attr,operator]
    objective = Objective(network, lambda net, _, x, __: net(x).square().mean())
    images = torch.rand(3, 8, 8, dtype=torch.float64)
    ((mean, variance),) = statistics_of(objective, images)
    assert mean.item() == pytest.approx(images.mean().item())
    assert variance.item() == pytest.approx(images.var(unbiased=False).item())
    assert torch.equal(network[1].running_mean, before)  # type: ignore[arg-type]


def test_only_what_is_shared_leaves() -> None:
    objective = _smooth()
    partly = Objective(objective.network, objective._loss, frozenset({"3.weight"}))
    images = torch.rand(1, 8, 8, dtype=torch.float64)
    labels = one_hot(torch.tensor([1]), 3, images)
    whole, some = gradient(objective, images, labels), gradient(partly, images, labels)
    assert [g.shape for g in some] == [(3, 32)]
    assert torch.equal(some[0], whole[2])


def test_distances() -> None:
    sent = (torch.tensor([3.0, 4.0]),)
    assert float(distance("squared", sent, sent)) == 0.0
    assert float(distance("cosine", (torch.tensor([6.0, 8.0]),), sent)) == pytest.approx(0.0, abs=1e-6)
    assert float(distance("cosine", (torch.tensor([-4.0, 3.0]),), sent)) == pytest.approx(1.0)


# Scores and lights -------------------------------------------------------------------------------------------------


def test_scores_find_the_order_and_the_neighbour() -> None:
    pool = torch.stack([_image(seed) for seed in range(6)])
    found = score(pool[[2, 4]], pool[[4, 2]], None, pool)
    assert found.ssim == pytest.approx([1.0, 1.0], abs=1e-5)
    assert found.found.all()
    wrong = score(pool[[0, 1]], pool[[4, 2]], None, pool)
    assert not wrong.found.any()
    assert (wrong.null_ssim < 1.0).all()


@pytest.mark.parametrize(
    ("ssim", "null", "retrieved", "light"),
    [
        (0.6, 0.2, 0, "red"),
        (0.6, 0.7, 0, "green"),  # the mean image alone is nearer
        (0.3, 0.2, 0, "amber"),
        (0.2, 0.2, 0, "green"),
        (0.1, 0.2, 3, "red"),
        (0.1, 0.2, 1, "amber"),  # one of eight among 40 happens by chance
    ],
)
def test_the_traffic_light(ssim: float, null: float, retrieved: int, light: str) -> None:
    assert traffic_light(ssim, null, 0.02, retrieved, 8, 1 / 80 if retrieved == 1 else 1 / 40)[0] == light


def test_few_images_cannot_hide_that_all_are_recognised() -> None:
    """Among 6 images no rate is 10 times chance; both of 2 recognised are still more than chance."""
    assert traffic_light(0.1, 0.2, 0.02, 2, 2, 1 / 6)[0] == "amber"
    assert traffic_light(0.1, 0.2, 0.02, 1, 2, 1 / 6)[0] == "green"


def test_an_attack_that_fails_its_control_is_never_green() -> None:
    nothing = Trial(*(np.array([value]) for value in (0.0, 10.0, 0.4, 0.5)), np.array([False]))
    assert row("lone", "a", [nothing], 20, works=True).light == "green"
    broken = row("lone", "a", [nothing], 20, works=False)
    assert broken.light == "attack not working"
    assert worst_light(["green", "attack not working"]) == "attack not working"
    assert worst_light(["attack not working", "red"]) == "red"
