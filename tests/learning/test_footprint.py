"""Memory of training, counted without any: the same on the device that has no numbers as where there are some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wardround.learning.footprint import Footprint, Live, footprint, stand_in
from wardround.learning.model_context import ModelContext
from wardround.study.schema import Local

INPUT, HIDDEN, OUTPUT, BATCH = 100, 200, 50, 8
FIRST, SECOND = INPUT * HIDDEN + HIDDEN, HIDDEN * OUTPUT + OUTPUT
FLOAT = 4


@dataclass(frozen=True)
class Layers:
    """A network whose every tensor is known."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(INPUT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUT))


def context(*frozen: str) -> ModelContext:
    return ModelContext(Layers(), 1, frozen=frozen)  # type: ignore[arg-type]


def step(model: nn.Module, device: torch.device, batch: int = BATCH) -> Tensor:
    found: Tensor = model(torch.ones(batch, INPUT, device=device)).square().mean()
    return found


def asking(model: nn.Module, device: torch.device) -> Tensor:
    """Reads a number in the middle of a step."""
    loss = step(model, device)
    return loss * (2.0 if loss.item() > 0 else 1.0)


def taken(*frozen: str, step: Any = step, **local: Any) -> Footprint:
    found = context(*frozen)
    shared = [p.name for p in found.parameters if p.trainable]
    return footprint(found, shared, Local.model_validate(local), step)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_lives_is_counted_and_what_is_gone_is_not(device: str) -> None:
    model, x = Layers().build_model().to(device), torch.ones(BATCH, INPUT, device=device)
    with Live() as live:
        out = model(x)
        # The activation behind the ReLU is kept, the one before it is not; views are no memory of their own.
        assert live.peak == FLOAT * BATCH * 2 * HIDDEN
        kept = live._now
        assert kept == FLOAT * BATCH * (HIDDEN + OUTPUT)
        part = out.reshape(-1)[:3]
        assert live._now == kept
        out.sum().backward()
        del out, part
    assert live._now == FLOAT * (FIRST + SECOND)


@pytest.mark.slow
def test_the_parts_are_those_of_the_formula() -> None:
    model = FLOAT * (FIRST + SECOND)
    found = taken(optimizer="adam")
    assert (found.model, found.frozen, found.copies) == (model, 0, 2 * model)
    assert (found.gradients, found.optimizer, found.how) == (model, 2 * model, "meta")
    # Gradients, two moments and what the optimiser computes on the way; at most as much as these again.
    assert found.step is not None
    assert 3 * model <= found.step <= 6 * model
    assert found.total == found.model + found.copies + found.step
    assert taken(optimizer="sgd", momentum=0.0).optimizer == 0
    assert taken(optimizer="sgd", momentum=0.9).optimizer == model
    unknown = taken(optimizer="adam", step=None)
    assert (unknown.step, unknown.how, unknown.total) == (None, None, 6 * model)


def test_what_is_frozen_counts_once() -> None:
    found = taken("0.*", optimizer="adam")
    trained = FLOAT * SECOND
    assert (found.frozen, found.gradients, found.optimizer) == (FLOAT * FIRST, trained, 2 * trained)
    assert found.copies == 2 * trained
    assert found.step is not None
    assert found.step < FLOAT * FIRST + 6 * trained


@pytest.mark.slow
def test_a_larger_batch_takes_more_by_what_it_is_larger() -> None:
    def of(batch: int) -> int:
        # So many examples that activations are the peak.
        found = taken(optimizer="sgd", momentum=0.0, step=lambda model, device: step(model, device, batch))
        assert found.step is not None
        return found.step

    assert of(3000) - of(2000) == of(4000) - of(3000) >= 1000 * FLOAT * (INPUT + HIDDEN + OUTPUT)


@pytest.mark.slow
def test_a_task_that_reads_numbers_is_measured_on_the_cpu_with_the_same_result() -> None:
    found, plain = taken(optimizer="adam", step=asking), taken(optimizer="adam")
    assert (found.how, plain.how) == ("cpu", "meta")
    assert found.step is not None
    assert plain.step is not None
    # The one more scalar, and the counters of steps, which the optimiser keeps on the CPU in both.
    assert abs(found.step - plain.step) <= 64


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_matrices_are_no_part_of_a_step() -> None:
    """Their memory has no place that torch would name; a projector's is what `check` says."""

    def projected(model: nn.Module, device: torch.device) -> Tensor:
        matrix = torch.eye(INPUT).to_sparse_csr()
        found: Tensor = model((matrix @ torch.ones(INPUT, BATCH)).T.to(device)).square().mean()
        return found

    found, plain = taken(optimizer="adam", step=projected), taken(optimizer="adam")
    assert found.how == "meta"
    assert found.step is not None
    assert plain.step is not None
    assert found.step >= plain.step


def test_the_model_itself_is_left_as_it_is() -> None:
    found = context("0.*")
    before = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    random = torch.get_rng_state()
    footprint(found, (), Local(), asking)
    assert all(torch.equal(before[name], tensor) for name, tensor in found.model.state_dict().items())
    assert all(p.grad is None for p in found.model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    copied = stand_in(found, torch.device("cpu")).state_dict()
    assert [copied[n].data_ptr() == t.data_ptr() for n, t in found.model.state_dict().items()] == [True] * 2 + [
        False
    ] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_on_a_gpu_its_own_counter_is_read() -> None:
    found = footprint(context(), (), Local.model_validate({"optimizer": "adam"}), step, torch.device("cuda"))
    assert found.how == "cuda"
    assert found.step is not None
    assert found.step >= 3 * FLOAT * (FIRST + SECOND)
