"""HarmoFL's flat step against a plain loop: the gradient at w + alpha g / |g|, taken from w."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.federation.alignment import descend, floats, gradients, plain, shared_in, unlike_study
from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.learning.device import CPU
from wardround.learning.flat_step import stepped

LR, ALPHA = 0.1, 0.3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_follows_equation_6(tmp_path: Path, momentum: float) -> None:
    """With batch norm, whose statistics are those of the values that the step is taken from."""
    study = unlike_study({"kind": "harmofl", "alpha": ALPHA}, {"steps": 3, "lr": LR, "momentum": momentum},
                         2, options={"norm": True})  # fmt: skip
    rig = Rig(study, tmp_path)
    states = rig.states()
    x, far = shared_in(next(states).public), 0.0
    for number, state in enumerate(states, start=1):
        ends, plainly = [], []
        for site in rig.sites:
            velocity: dict[str, Any] = {}

            def step(model: Any, loss: Any, k: int, v: Any = velocity) -> None:
                first = gradients(model, loss(model))
                statistics = {n: b.clone() for n, b in model.named_buffers()}
                length = torch.sqrt(sum((g.square().sum() for g in first.values()), start=torch.zeros(())))
                before = {n: p.detach().clone() for n, p in model.named_parameters()}
                descend(model, {n: -ALPHA * g / length for n, g in first.items()}, 1.0)
                second = gradients(model, loss(model))
                with torch.no_grad():
                    for n, p in model.named_parameters():
                        p.copy_(before[n])
                    for n, b in model.named_buffers():
                        b.copy_(statistics[n])
                for n, g in second.items():
                    v[n] = momentum * v.get(n, 0.0) + g
                descend(model, v, LR)

            def simple(model: Any, loss: Any, k: int) -> None:
                descend(model, gradients(model, loss(model)), LR)

            ends.append(floats(plain(rig, site, number, x, step)))
            plainly.append(floats(plain(rig, site, number, x, simple)))
        far = max(far, *(float(np.abs(a[n] - b[n]).max()) for a, b in zip(ends, plainly, strict=True) for n in a))
        x = {n: np.mean([e[n] for e in ends], axis=0) for n in x}
        found = shared_in(state.public)
        for n in x:
            assert np.allclose(found[n], x[n], rtol=0, atol=3e-5), (number, n)
        for site in rig.sites.values():
            assert int(site.store.memory(number).tensors["local/1.num_batches_tracked"]) == 3 * number
    assert far > 1e-3


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))


def test_both_passes_draw_the_same_and_the_values_are_as_they_were() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(5, 3, dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    drawn: list[torch.Tensor] = []

    def backward() -> torch.Tensor:
        loss = model(x).square().mean()
        drawn.append(torch.rand(1))
        loss.backward()
        return loss.detach()

    stepped(model, 0.2, backward, CPU)
    assert torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    # The generator is one pass further, not two.
    after = torch.rand(1)
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(5, 3, dtype=torch.float64)
    stepped(model, 0.0, backward, CPU)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("broken", ["nan", "none"])
def test_a_gradient_that_says_no_direction_leaves_the_values_where_they_are(broken: str) -> None:
    model = nn.Linear(2, 1)
    seen = []

    def backward() -> torch.Tensor:
        seen.append(model.weight.detach().clone())
        loss = (model(torch.ones(1, 2)) * (torch.nan if broken == "nan" else 0.0)).sum()
        loss.backward()
        return loss.detach()

    stepped(model, 0.5, backward, CPU)
    assert torch.equal(seen[0], seen[1])
    assert torch.isfinite(model.weight).all()
    # It is the optimiser's part to leave such a step out.
    assert model.weight.grad is not None
    assert bool(torch.isnan(model.weight.grad).any()) == (broken == "nan")


def test_scaled_gradients_look_the_same_way() -> None:
    """A GradScaler multiplies the loss: the direction is its own, and the gradient that is left is scaled once."""
    found = []
    for scale in (1.0, 4096.0):
        torch.manual_seed(1)
        model, x = nn.Linear(3, 1).double(), torch.arange(6.0, dtype=torch.float64).reshape(2, 3)

        def backward(model: Any = model, x: Any = x, scale: float = scale) -> torch.Tensor:
            loss = model(x).square().mean()
            (scale * loss).backward()
            return loss.detach()

        stepped(model, 0.1, backward, CPU)
        assert model.weight.grad is not None
        found.append(model.weight.grad / scale)
    assert torch.allclose(*found, rtol=1e-12)


def test_privacy_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"method\.kind=harmofl cannot be combined with protection\.privacy"):
        toy_study(method={"kind": "harmofl"}, protection={"privacy": {}}, schedule={"release": "last"})
