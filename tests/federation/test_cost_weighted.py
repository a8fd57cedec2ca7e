"""FedCostWAvg and FedPIDAvg against their formula: whole weights of whole models, made of sums with weights each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.federation.alignment import shared_in, unlike_study
from tests.federation.rig import Rig
from tests.federation.test_methods import told
from tests.toys import toy_study
from wardround.federation.expected import expected
from wardround.learning.methods.cost_weighted import CostWeighted
from wardround.learning.methods.method import MODEL

ROUNDS = 4
METHODS: dict[str, tuple[dict[str, Any], tuple[float, float, float]]] = {
    "fedcostwavg": ({"kind": "fedcostwavg", "alpha": 0.3}, (0.3, 0.7, 0.0)),
    "fedpidavg": ({"kind": "fedpidavg"}, (0.45, 0.45, 0.1)),
}


def shares(kind: str, losses: list[list[float]], terms: tuple[float, float, float]) -> Any:
    """The weight of each site by its examples and its losses of all rounds so far, by hand."""
    alpha, beta, gamma = terms
    examples = np.array([6.0, 14.0, 22.0])
    weights = alpha * examples / examples.sum()
    if len(losses[0]) < 2:
        fall = examples
    elif kind == "fedcostwavg":
        fall = np.array([of_site[-2] / of_site[-1] for of_site in losses])
    else:
        fall = np.array([max(0.0, of_site[-2] - of_site[-1]) for of_site in losses])
    level = np.array([sum(of_site[-5:]) for of_site in losses])
    fall = fall if fall.sum() > 0.0 else examples
    return weights + beta * fall / fall.sum() + gamma * level / level.sum()


@pytest.mark.parametrize("kind", METHODS)
def test_the_model_is_the_mean_with_the_weights_of_the_paper(tmp_path: Path, kind: str) -> None:
    method, terms = METHODS[kind]
    rig = Rig(unlike_study(method, {"steps": 2}, ROUNDS, options={"norm": True}), tmp_path)
    states = rig.states()
    before, losses = next(states), [[], [], []]  # type: ignore[var-annotated]
    plain = 0.0
    for number in range(1, ROUNDS + 1):
        said = told(rig, number, before.public)
        for of_site, trained in zip(losses, said, strict=True):
            of_site.append(trained.loss)
        state, found = next(states), None
        weights = shares(kind, losses, terms)
        assert weights.sum() == pytest.approx(1.0)
        own = np.array([6.0, 14.0, 22.0]) / 42.0
        start, found = shared_in(before.public), shared_in(state.public)
        for name in said[0].changes[MODEL]:
            sites = [trained.changes[MODEL][name].astype(np.float64) for trained in said]
            wanted = start[name] + np.average(sites, axis=0, weights=weights)
            # Weights of 30 bits, and each copy of a change in steps of its scale.
            assert np.allclose(found[name], wanted, rtol=0, atol=2e-5), (number, name)
            plain = max(plain, float(np.abs(np.average(sites, axis=0, weights=own) - (wanted - start[name])).max()))
        for name in said[0].changes["buffers"]:
            sites = [trained.changes["buffers"][name].astype(np.float64) for trained in said]
            assert np.allclose(found[name], start[name] + np.average(sites, axis=0, weights=own), rtol=0, atol=2e-5)
        before = state
    assert plain > 1e-3
    kept = rig.sites["A"].store.memory(ROUNDS).tensors["method/losses"]
    assert np.allclose(kept, losses[0][-5:])
    assert set(rig.method.release_for(None, before.public, before.private)) == set(shared_in(before.public))


def test_what_a_loss_comes_to() -> None:
    ratio, difference = CostWeighted(), CostWeighted(fall="difference")
    assert ratio._fall([3.0, 4.0, 2.0]) == 2.0
    assert difference._fall([3.0, 4.0, 2.5]) == 1.5
    assert ratio._fall([1.0]) == difference._fall([1.0]) == 0.0
    assert ratio._fall([1.0, -0.5]) == 0.0
    # A loss that rose, and one beyond what a weight can say.
    assert CostWeighted(most=4096.0)._stretched(-1.0) == 0.0
    assert CostWeighted(most=4096.0)._stretched(1e9) == 4096.0
    assert CostWeighted(most=4096.0)._stretched(1.0) == 64.0


@pytest.mark.parametrize(("kind", "copies"), [("fedcostwavg", 2), ("fedpidavg", 3)])
def test_sites_send_a_copy_for_every_term_and_get_one(tmp_path: Path, kind: str, copies: int) -> None:
    bills = [expected(Rig(toy_study(method={"kind": k}), tmp_path / k).host).training for k in ("fedavg", kind)]
    assert bills[1].up.model == copies * bills[0].up.model
    assert bills[1].down.model == bills[0].down.model


def test_what_would_part_a_change_from_its_weight_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"parts of it rounds later; set it to rotation or none"):
        toy_study(method={"kind": "fedpidavg"}, protection={"compression": {"kind": "subspace"}})
    with pytest.raises(ValidationError, match=r"add up to 0\.9; make it 1"):
        toy_study(method={"kind": "fedpidavg", "alpha": 0.35})
    with pytest.raises(ValidationError, match="fedcostwavg is made of sums"):
        toy_study(method={"kind": "fedcostwavg"}, protection={"robust": {}}, schedule={"release": "last"})
