"""MOON against equations 3 and 4 of its paper, with copies of the network where the method has none."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.federation.alignment import descend, gradients, make_unlike, unlike_study
from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.errors import StudyError
from wardround.learning.methods.moon import MOON, contrast
from wardround.learning.places import pooled
from wardround.plan.arm_specs import ArmSpecs
from wardround.study.models import Layer
from wardround.study.plugins import Plugins
from wardround.study.registry import builtin

LR, MU, TAU = 0.1, 0.8, 0.5


def test_the_term_by_hand() -> None:
    said, near, far = (torch.tensor([[a, b]]) for a, b in ((1.0, 0.0), (3.0, 4.0), (0.0, 2.0)))
    # Cosines 0.6 and 0, over a temperature of 0.5: -log(e^1.2 / (e^1.2 + e^0)).
    assert float(contrast(said, near, far, 0.5)) == pytest.approx(-np.log(np.exp(1.2) / (np.exp(1.2) + 1.0)))


def hidden(model: nn.Module, x: Tensor) -> Tensor:
    """What comes before the last layer of the toy network."""
    assert isinstance(model, nn.Sequential)
    found: Tensor = model[:-1](x)
    return found


@pytest.mark.parametrize("norm", [False, True])
def test_it_follows_equations_3_and_4(tmp_path: Path, norm: bool) -> None:
    """A plain loop with three networks; statistics of batch norm are those of the trained one, once a step."""
    layer = "2" if norm else "1"
    method = {"kind": "moon", "mu": MU, "tau": TAU, "layer": layer}
    rig = Rig(unlike_study(method, {"steps": 3, "lr": LR}, 3, options={"norm": norm}), tmp_path)
    states, previous = rig.states(), {}
    before = next(states)
    terms = []
    for number in (1, 2, 3):
        for site in rig.sites:
            learner, memory = rig.learner(site), rig.sites[site].store.memory(number - 1)
            learner.load(before.public, memory)
            model = deepcopy(learner.model).double()
            reference, older = deepcopy(model), previous.get(site)
            for net in filter(None, (model, reference, older)):
                net.train()
            indices = learner._examples.of_round(number, 12)
            for k in range(3):
                x, y = (t.double() for t in learner.dataset.batch(indices[4 * k : 4 * k + 4], np.random.default_rng()))
                z = hidden(model, x)
                loss = (model[-1](z) - y).square().mean()
                if older is not None:
                    near, far = hidden(reference, x).detach(), hidden(older, x).detach()
                    a, b = (torch.cosine_similarity(z, other, dim=1) / TAU for other in (near, far))
                    term = -torch.log(torch.exp(a) / (torch.exp(a) + torch.exp(b))).mean()
                    terms.append(float(term.detach()))
                    loss = loss + MU * term
                descend(model, gradients(model, loss), LR)
            trained = learner.train(number, before.public, memory)
            merged = {n: c for group in trained.changes.values() for n, c in group.items()}
            after = model.state_dict()
            for name, change in merged.items():
                wanted = after[name].numpy() - learner_start(before.public, name)
                assert np.allclose(change, wanted, rtol=0, atol=2e-5), (number, site, name)
            if norm:
                assert int(trained.memory["local/1.num_batches_tracked"]) == 3 * number
            previous[site] = model
        before = next(states)
    # Networks that are alike have the term log 2.
    assert max(abs(term - np.log(2.0)) for term in terms) > 0.005
    released = rig.method.release_for(None, before.public, before.private)
    assert set(released) <= set(rig.host.model_context.model.state_dict())


def learner_start(public: Any, name: str) -> Any:
    key = f"model/{name}" if f"model/{name}" in public else f"buffers/{name}"
    return np.asarray(public[key], np.float64)


def test_random_numbers_of_training_go_on_as_without_the_other_networks(tmp_path: Path) -> None:
    """Dropout: with a weight of nearly 0 the same comes out, to the rounding of what is added."""
    found = []
    for method in ({"kind": "moon", "mu": 1e-9, "layer": "1"}, {"kind": "fedavg"}):
        rig = Rig(unlike_study(method, {"steps": 3}, 2, options={"dropout": 0.5}), tmp_path / str(method["kind"]))
        found.append({name: np.asarray(t) for name, t in dict(rig.train().public).items()})
    for name, tensor in found[0].items():
        assert np.allclose(tensor, found[1][name], rtol=0, atol=1e-6)


def test_no_hook_is_left_behind(tmp_path: Path) -> None:
    rig = Rig(unlike_study({"kind": "moon", "layer": "1"}, {"steps": 1}, 2), tmp_path)
    rig.train()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rig.host.model_context.model.modules())


@pytest.mark.parametrize(
    ("shape", "place", "value"), [((2, 5), 3, 0.0), ((2, 4, 5), 3, 1.5), ((2, 5, 2, 2), 3, 1.5)], ids=str
)
def test_what_is_compared_is_the_mean_over_places(shape: tuple[int, ...], place: int, value: float) -> None:
    found = torch.zeros(shape)
    if len(shape) == 3:
        found[:, :, place] = torch.arange(4.0)
    elif len(shape) == 4:
        found[:, place] = torch.arange(4.0).reshape(2, 2)
    got = pooled(found, "x")
    assert got.shape == (2, 5)
    assert float(got[1, place]) == value
    with pytest.raises(StudyError, match=r"method\.layer: 'x' of the network does not give a tensor"):
        pooled([found], "x")


NETWORKS = {
    "densenet": ("build_classifier", (2, 1, 3)),
    "resnet": ("build_classifier", (2, 1, 3)),
    "vit": ("build_classifier", (2, 1, 3)),
    "efficientnet_lite": ("build_classifier", (2, 1, 3)),
    "monai_unet": ("build_network", (2, 1, 2)),
    "segresnet": ("build_network", (2, 1, 2)),
    "dynunet": ("build_network", (2, 1, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_says_where_it_has_what_it_makes_of_an_image(kind: str) -> None:
    """One value or more for each image, which depend on it, and reach a gradient."""
    settings = builtin("model", kind).model_validate({"kind": kind, "preset": "tiny"})
    build, given = NETWORKS[kind]
    torch.manual_seed(0)
    network = getattr(settings, build)(*given)
    layer = settings.represents  # type: ignore[attr-defined]
    assert isinstance(layer, Layer)
    seen: list[Any] = []
    part = network.get_submodule(layer.name)
    if layer.side == "input":
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    else:
        part.register_forward_hook(lambda _, __, found: seen.append(found))
    network(torch.randn(2, 1, 32, 32))
    said = pooled(seen[0], layer.name)
    assert said.shape[0] == 2
    assert said.shape[1] > 3
    assert float((said[0] - said[1]).detach().abs().max()) > 1e-4
    assert said.requires_grad


def test_a_network_without_such_a_layer_is_refused_with_the_key_to_set() -> None:
    study = toy_study(method={"kind": "moon"})
    with pytest.raises(StudyError, match=r"model\.kind=own_network does not say where.*as method\.layer"):
        ArmSpecs(study, (), plugins=Plugins(code=True)).arm_spec("federated")
    with pytest.raises(StudyError, match=r"method\.layer: the network has no module 'none'"):
        MOON(layer=Layer("none")).within(study, 3, make_unlike().build_model())
