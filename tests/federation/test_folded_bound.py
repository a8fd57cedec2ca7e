"""How far a round may move a layer that something is folded into: as far as the sites' own steps explain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.federation.rig import Rig
from tests.federation.test_parts import folding, rig_of
from wardround.federation.exchange import ERROR, UPDATE
from wardround.learning.methods.fedex_lora import FedExLoRA
from wardround.learning.methods.flora import FLoRA
from wardround.learning.methods.folded import Folded
from wardround.learning.methods.folding import Factors, Folding
from wardround.models.low_rank import folded_of, second_of
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.protection.lint import lint_against
from wardround.storage.journal import State
from wardround.wire.message import FileBody, Message
from wardround.wire.tensors import TensorFile, TensorWriter

ADAM = {"steps": 3, "batch": 2, "optimizer": "adam", "lr": 0.01}
FIRST = "0.lora.a.weight"


@settings(deadline=None, max_examples=examples(25))
@given(seed=st.integers(0, 2**32 - 1), method=st.sampled_from([FedExLoRA("equal"), FLoRA("equal")]))
def test_no_sites_fold_more_than_the_bound(seed: int, method: Folding) -> None:
    random = np.random.default_rng(seed)
    sites, rank, d, k = int(random.integers(1, 6)), 2, 5, 7
    reach = {FIRST: float(random.uniform(0, 2)), second_of(FIRST): float(random.uniform(0, 2))}
    drawn = isinstance(method, FLoRA)
    a = random.uniform(-1, 1, (rank, k)) / np.sqrt(k) if drawn else random.standard_normal((rank, k))
    b = np.zeros((d, rank)) if drawn else random.standard_normal((d, rank))

    def moved(size: tuple[int, ...], most: float) -> Any:
        change = random.standard_normal((sites, *size))
        lengths = np.linalg.norm(change.reshape(sites, -1), axis=1)
        return change * (most / lengths)[:, None, None]

    shares = random.dirichlet(np.full(sites, 0.3))
    found = Factors(shares, a + moved((rank, k), reach[FIRST]), b + moved((d, rank), reach[second_of(FIRST)]))
    folded = np.linalg.norm(method.left_over(found).whole())
    assert folded <= method.other_moves({FIRST: rank}, reach.__getitem__)[folded_of(FIRST)] * (1 + 1e-9)


def test_who_folds_otherwise_is_not_bounded() -> None:
    class Other(FedExLoRA):
        def left_over(self, found: Factors) -> Any:
            return found.mean_product()

    assert FedExLoRA("equal").update_bound(UpdateBound(1.0)) == UpdateBound(1.0)
    assert Other("equal").update_bound(UpdateBound(1.0)) == UNKNOWN


HONEST = {
    "adam": {"local": ADAM},
    "adam of a large rate": {"local": {**ADAM, "lr": 0.1, "optimizer_state": "keep"}},
    "sgd": {"local": {"steps": 3, "batch": 2, "optimizer": "sgd", "lr": 0.1}},
    "sgd with a clip": {"local": {"steps": 3, "batch": 2, "optimizer": "sgd", "lr": 0.5, "clip_norm": 0.5}},
    "few bits": {"local": ADAM, "protection": {"ring_bits": 16, "max_sites": 4}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("kind", ["fedex_lora", "flora"])
def test_honest_rounds_are_never_refused(kind: str, name: str, tmp_path: Path) -> None:
    study = folding(kind, 8, schedule={"rounds": 8, "min_sites": 3, "release": "last"}, **HONEST[name])
    rig = rig_of(tmp_path, study)
    rig.train()
    assert all(not report.missing for report in rig.journal.reports())


# The attack -----------------------------------------------------------------------------------------------------------


def planted(state: State, path: Path, weights: list[Any]) -> State:
    """The state with these weights folded in place of what was."""
    parts = Folded.of(state.public).begun_with(weights).parts
    with path.open("wb") as file:
        writer = TensorWriter(file)
        for name in state.public:
            if not name.startswith("adapters/"):
                writer.add(name, state.public[name])
        for name, part in parts.items():
            writer.add(name, part)
    return replace(state, public=TensorFile(path, writer.table), public_sha256=writer.sha256)


def asked(rig: Rig, state: State, number: int) -> Message:
    call = rig.coordinator._call("train", state, number, {"keep": [], "validate": False}, rig.arm_spec.layout)
    body = FileBody(state.public.path, state.public.nbytes)
    call = replace(call, scales=state.scales, tensors=state.public.table, body=body, absent=())
    return rig.sites["A"].handle(replace(call, body_sha256=state.public_sha256).message("A"))


@pytest.mark.parametrize("kind", ["fedex_lora", pytest.param("flora", marks=pytest.mark.slow)])
def test_a_layer_that_is_replaced_by_another_is_refused_where_the_look_finds_nothing(kind: str, tmp_path: Path) -> None:
    rig = rig_of(tmp_path, folding(kind, 4, local=ADAM))
    states = rig.states()
    next(states)
    state = next(states)
    learner = rig.learner("A")
    weight = learner.model.get_submodule("0").get_parameter("weight").detach().numpy()
    scale = learner.model.get_submodule("0.lora_folded").scale
    honest = [np.array(each) for each in Folded.of(state.public).weights()]
    random = np.random.default_rng(0)
    # Rows that keep images whole, and trap weights: half of a row weighs a little more, and less than zero (Boenisch et
    # al., EuroS&P 2023).
    whole = np.linalg.qr(random.standard_normal(weight.shape[::-1]))[0].T
    trap = np.abs(random.standard_normal(weight.shape)) * np.where(random.random(weight.shape) < 0.5, 1.0, -1.05)
    for number, rows in enumerate((whole, trap)):
        rows = rows * np.linalg.norm(weight) / np.linalg.norm(rows)
        lies = planted(state, tmp_path / f"lie{number}", [(rows - weight) / scale, honest[1]])
        assert not lint_against(learner.known.received(lies.public), learner.known.approved())
        reply = asked(rig, lies, 2)
        assert reply.header.kind == ERROR
        assert "0.lora_folded.weight moved by" in reply.header.meta["reason"]
    # As far as sites may go a coordinator may go, too: what is refused is how far, not where to.
    near = [each + 1e-4 * random.standard_normal(each.shape) for each in honest]
    assert asked(rig, planted(state, tmp_path / "near", near), 2).header.kind == UPDATE
