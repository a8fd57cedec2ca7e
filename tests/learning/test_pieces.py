"""A batch in pieces (`local.accumulate`): the gradient of the whole, in the memory of one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.diagnoses import diagnosis_study
from tests.examples import examples
from tests.federation.rig import Rig
from tests.learning.test_footprint import BATCH, FLOAT, HIDDEN, INPUT, OUTPUT, context
from tests.toys import toy_study
from wardround.errors import StudyError
from wardround.learning.footprint import footprint
from wardround.plan.arm_specs import ArmSpecs
from wardround.runs.outlook import outlook
from wardround.study.plugins import Plugins
from wardround.study.schema import Local, Study

IN_PIECES = ["fedavg", "fedprox", "feddyn", "scaffold", "moon", "harmofl"]
# A sum of some ten terms of order one in another order, in each of the steps of a round, and divided by the rate.
CLOSE = 100 * torch.finfo(torch.float32).eps


def study(batch: int, accumulate: int, **changes: Any) -> Study:
    local = {"steps": 2, "batch": batch, "optimizer": "sgd", "lr": 0.1, "accumulate": accumulate}
    return toy_study(("A",), local=local, **changes)


def changes(study: Study, folder: Path) -> tuple[dict[str, Any], float]:
    """What a round of a site changes, and its loss."""
    rig = Rig(study, folder)
    state = next(rig.states())
    learner, memory = rig.learner("A"), rig.sites["A"].store.memory(0)
    learner.load(state.public, memory)
    found = learner.train(1, state.public, memory)
    return found.changes["model"], found.loss


@settings(deadline=None, max_examples=examples(6))
@given(batch=st.integers(2, 7), pieces=st.integers(2, 7), method=st.sampled_from(IN_PIECES))
def test_a_step_in_pieces_is_a_step(
    batch: int, pieces: int, method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Pieces of unlike sizes too, and with what a method adds to the loss."""
    kind = {"kind": method, **({"layer": "1"} if method == "moon" else {})}
    whole, loss = changes(study(batch, 1, method=kind), tmp_path_factory.mktemp("whole"))
    found, mean = changes(study(batch, min(pieces, batch), method=kind), tmp_path_factory.mktemp("pieces"))
    assert mean == pytest.approx(loss, rel=CLOSE)
    for name, value in whole.items():
        np.testing.assert_allclose(found[name], value, atol=CLOSE * float(np.abs(value).max()))
    assert any(np.abs(value).max() > 1e-3 for value in whole.values())


def test_batch_norm_sees_pieces(tmp_path: Path) -> None:
    """Which is why it is said: another gradient, and statistics that move once a piece."""
    task = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}}
    whole, _ = changes(study(4, 1, task=task), tmp_path / "whole")
    found, _ = changes(study(4, 2, task=task), tmp_path / "pieces")
    assert any(np.abs(found[name] - whole[name]).max() > 1e-3 for name in whole)


@given(batch=st.integers(1, 50), pieces=st.integers(1, 50))
def test_pieces_are_a_batch(batch: int, pieces: int) -> None:
    found = Local(batch=batch, accumulate=min(batch, pieces)).pieces
    assert sum(found) == batch
    assert len(found) == min(batch, pieces)
    assert found[0] - found[-1] <= 1
    assert found[-1] >= 1
    assert list(found) == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"local": {"batch": 2, "accumulate": 3}}, "a batch of 2 has no 3 pieces; set it to 2 or less"),
        (
            {"local": {"batch": 2, "accumulate": 2}, "protection": {"privacy": {"patients_per_step": 2}}},
            "local.accumulate: with protection.privacy gradients are those of single patients",
        ),
        (
            {"local": {"checkpoint": True}, "protection": {"privacy": {"patients_per_step": 2, "gradients": "opacus"}}},
            "local.checkpoint: Opacus keeps what layers see, which checkpointing forgets",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], reason: str) -> None:
    private = {"method": {"kind": "fedavg", "weights": "equal"}, "schedule": {"rounds": 2, "release": "last"}}
    with pytest.raises((ValidationError, ValueError), match=reason):
        toy_study(("A", "B", "C"), **{**private, **given})


def test_a_network_without_blocks_is_named() -> None:
    found = toy_study(local={"checkpoint": True})
    with pytest.raises(StudyError, match=r"local\.checkpoint: this network has no blocks .* set local\.accumulate"):
        _ = ArmSpecs(found, (), plugins=Plugins(code=True)).model_context


@pytest.mark.slow
def test_memory_is_that_of_one_piece_and_the_gradients() -> None:
    """Activations of a network whose every tensor is known: the ReLU's output of a piece, once."""

    def step(batch: int) -> Any:
        return lambda model, device: model(torch.ones(batch, INPUT, device=device)).square().mean()

    found = context()
    names = [p.name for p in found.parameters]
    many = 64 * BATCH
    whole = footprint(found, names, Local(batch=many), step(many))
    pieces = footprint(found, names, Local(batch=many, accumulate=64), step(BATCH))
    assert whole.step is not None
    assert pieces.step is not None
    assert whole.total - pieces.total > FLOAT * (many - BATCH) * (HIDDEN + OUTPUT) / 2
    # The gradients of the first piece are there while the second one passes.
    assert pieces.step >= pieces.gradients + pieces.optimizer + FLOAT * BATCH * HIDDEN


@pytest.mark.slow
def test_plan_says_what_they_save(tmp_path: Path) -> None:
    """Two blocks of a transformer, 32 images at once."""
    given = {
        "model": {"kind": "vit", "preset": "tiny"},
        "local": {"batch": 32},
        "task": {"size": [64, 64]},
    }
    path = tmp_path / "study.yaml"
    path.write_text(diagnosis_study({"A": {}}, **given).model_dump_json())
    steps = {}
    for said in ((), ("local.accumulate=8",), ("local.checkpoint=true",)):
        found = outlook(path, None, ["1Gbit/s"], (), said)
        ((seen, _),) = found.memory.values()
        assert seen.how == "meta"
        steps[said] = seen.step
        assert ("pieces of 4 examples" in found.text) == (said == ("local.accumulate=8",))
    assert steps[("local.accumulate=8",)] < 0.4 * steps[()]
    assert steps[("local.checkpoint=true",)] < 0.8 * steps[()]


@pytest.mark.slow
def test_the_model_of_a_study_is_checkpointed() -> None:
    found = diagnosis_study({"A": {}}, model={"kind": "vit", "preset": "tiny"}, local={"checkpoint": True})
    model = ArmSpecs(found, ()).model_context.model
    assert model.get_submodule("encoder").use_checkpoint is True
