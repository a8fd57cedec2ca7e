"""The law of the centre: one site is a plain training loop with a codec; one step each is one step on all."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.federation.rig import Rig
from tests.toys import Regression, toy_study
from wardround.protection.rounding import rounding, study_root
from wardround.wire.random import public_generator, public_seed
from wardround.wire.ring import ExactSum, levels
from wardround.wire.scales import next_scales
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import WEIGHT_BITS, Aggregate, Group, Layout, encode

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.01},
    "adamw kept": {"optimizer": "adamw", "lr": 0.01, "optimizer_state": "keep", "schedule": "cosine", "warmup": 2},
}
ROUNDS, STEPS, BATCH, SEED = 5, 4, 3, 11


def _order(round_: int, size: int) -> list[int]:
    """The examples of a round: positions of one endless shuffled pass."""
    positions = range((round_ - 1) * STEPS * BATCH, round_ * STEPS * BATCH)
    shuffles = {e: public_generator(SEED, "A", e, "shuffle").permutation(size) for e in {p // size for p in positions}}
    return [int(shuffles[p // size][p % size]) for p in positions]


def _optimizer(model: torch.nn.Module, local: dict[str, Any]) -> torch.optim.Optimizer:
    decay = local.get("weight_decay", 0.0)
    if local["optimizer"] == "sgd":
        return torch.optim.SGD(model.parameters(), lr=local["lr"], momentum=local["momentum"])
    kind = torch.optim.Adam if local["optimizer"] == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=local["lr"], weight_decay=decay)


def _rate(local: dict[str, Any], step: int) -> float:
    if step < local.get("warmup", 0):
        return local["lr"] * (step + 1) / local["warmup"]
    if "schedule" not in local:
        return local["lr"]
    done = (step - local["warmup"]) / (ROUNDS * STEPS - local["warmup"])
    return local["lr"] * 0.5 * (1.0 + np.cos(np.pi * done))


@pytest.mark.parametrize("ring_bits", [16, 32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_site_is_a_plain_training_loop(tmp_path: Path, name: str, ring_bits: int) -> None:
    local = OPTIMIZERS[name]
    study = toy_study(
        ("A",),
        seed=SEED,
        local={"steps": STEPS, "batch": BATCH, **local},
        schedule={"rounds": ROUNDS, "keep": ROUNDS + 1},
        protection={"ring_bits": ring_bits, "max_sites": 4, "max_weight": 16.0, "initial_scale": 0.1},
    )
    rig = Rig(study, tmp_path)
    federated = [{n.removeprefix("model/"): t for n, t in s.public.items()} for s in rig.states()]

    # The plain loop: nothing of the federation, only torch and the codec.
    torch.manual_seed(public_seed(SEED, "initialisation") % 2**63)
    task = Regression()
    model = task.build_model()
    data = task.dataset("A", (tmp_path,))
    infos = tuple(TensorInfo(n, "float32", tuple(p.shape)) for n, p in model.state_dict().items())
    layout = Layout((Group("model", infos, ring_bits),), (), max_sites=4, max_weight=16.0)
    scales = {f"model/{n}": 0.1 for n in model.state_dict()}
    optimizer = _optimizer(model, local)
    for number in range(1, ROUNDS + 1):
        anchor = {n: p.detach().clone() for n, p in model.state_dict().items()}
        if local.get("optimizer_state") != "keep":
            optimizer = _optimizer(model, local)
        model.train()
        order = _order(number, len(data))
        for step in range(STEPS):
            x, y = data.batch(order[step * BATCH : (step + 1) * BATCH], np.random.default_rng(0))
            for group in optimizer.param_groups:
                group["lr"] = _rate(local, (number - 1) * STEPS + step)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        changes = {"model": {n: (p.detach() - anchor[n]).numpy() for n, p in model.state_dict().items()}}
        total = ExactSum(layout.segments)
        start = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in anchor.values())).hexdigest()
        draws = rounding(study_root(SEED), "A", number, scales, start)
        update = encode(layout, scales, {"model": float(len(data))}, changes, {}, draws)
        total.add(b"".join(bytes(c) for c in update), 0)
        aggregate = Aggregate(layout, total, scales)
        with torch.no_grad():
            for n, p in model.state_dict().items():
                p.copy_(torch.from_numpy((anchor[n].double().numpy() + aggregate.mean("model", n)).astype(np.float32)))
        scales, _ = next_scales(aggregate, first=number == 1)
        for n, p in model.state_dict().items():
            assert p.numpy().tobytes() == federated[number][n].tobytes(), (number, n)
    assert rig.journal.state(ROUNDS).scales == scales


@pytest.mark.parametrize("sites", [1, 2, 5])
@pytest.mark.parametrize("ring_bits", [24, 32])
def test_one_step_at_every_site_is_one_step_on_all_data(tmp_path: Path, sites: int, ring_bits: int) -> None:
    names = tuple("ABCDE"[:sites])
    study = toy_study(
        names,
        method={"kind": "fedavg", "weights": "equal"},
        local={"steps": 1, "batch": 4, "optimizer": "sgd", "lr": 0.1},
        schedule={"rounds": 3, "validate_every": 0, "keep": 4},
        protection={"ring_bits": ring_bits, "max_sites": 8, "initial_scale": 1.0},
    )
    rig = Rig(study, tmp_path)
    states = list(rig.states())
    for before, after in pairwise(states):
        model = Regression().build_model()
        model.load_state_dict({n.removeprefix("model/"): torch.from_numpy(t) for n, t in before.public.items()})
        batches = []
        for site in names:
            learner = rig.learner(site)
            batches.append(learner.dataset.batch(learner._examples.of_round(after.round, 4), np.random.default_rng()))
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        (model(x) - y).square().mean().backward()
        bits = rig.arm_spec.layout.bits_of(rig.arm_spec.layout.groups[0])
        for n, p in model.named_parameters():
            assert p.grad is not None
            expected = p.detach().double().numpy() - 0.1 * p.grad.double().numpy()
            # Each site is off by less than one step of the codec; the mean of sites is too. The rest is float32.
            step = before.scales[f"model/{n}"] / levels(bits)
            error = np.abs(after.public[f"model/{n}"] - expected).max()
            assert error <= step * (1 + 2**-WEIGHT_BITS) + 5e-7, (n, error, step)
