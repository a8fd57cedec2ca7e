"""The examples of plug-ins run as they are, are short, and each does what it says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices import arm_specs_of
from wardround.models.efficientnet_lite import EfficientNetLite
from wardround.study.load import load_study

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("own_task", "own_method", "own_operator")
Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports an example by its name, as python does for a script of that folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert f"python examples/{name}.py" in text
    assert all(line.split()[1].split(".")[0] != "tests" for line in text.splitlines() if line.startswith("from "))


def test_a_task_of_ones_own_learns(load: Load, tmp_path: Path) -> None:
    result = load("own_task").main(tmp_path)
    assert result.participants == ("Aachen", "Bergen", "Cadiz")
    # A model that knows nothing gives every label the probability 1/2.
    assert result.metric("federated", "mean", "error") < 0.4
    assert result.report.exists()


def test_a_tasks_pooled_data_are_those_of_all_sites(load: Load, tmp_path: Path) -> None:
    module = load("own_task")
    sites = module.hospitals(tmp_path)
    task = module.FindSpot()
    parts = [task.dataset(name, site.data) for name, site in sites.sites.items()]
    pooled = task.pooled(parts)
    assert len(pooled) == sum(map(len, parts))
    assert pooled.patients("test") == sum(part.patients("test") for part in parts)


def test_a_method_of_ones_own_trains_beside_averaging(load: Load, tmp_path: Path) -> None:
    results = load("own_method").main(tmp_path)
    assert results["FedAvg"].model_sha256 != results["Careful"].model_sha256
    assert all(result.metric("federated", "mean", "error") < 0.4 for result in results.values())


def test_with_settings_that_do_nothing_the_method_is_averaging(load: Load) -> None:
    method = load("own_method").Careful()
    mean = torch.ones(2, dtype=torch.float64).numpy()
    assert method.server_step("w", mean, {}, lambda name, value: None) == pytest.approx(mean)


def test_an_operator_of_ones_own_has_an_exact_adjoint_and_a_network_learns_to_invert_it(
    load: Load, tmp_path: Path
) -> None:
    module = load("own_operator")
    operator = module.Blur(torch.tensor([1.0, 2.0]))
    random = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, module.SIZE, module.SIZE, generator=random) for _ in range(2))
    left, right = ((a * b).sum((1, 2)) for a, b in ((operator.A(x), y), (x, operator.A_adjoint(y))))
    # Two FFTs of n values each err by a few log2(n) roundings of the product's length.
    bound = 64 * torch.finfo(x.dtype).eps * x.norm() * y.norm()
    assert (left - right).abs().max() < bound
    result = module.main(tmp_path)
    task = module.Deblur()
    blurred = [
        batch for site in result.participants for _, batch in task.dataset(site, (tmp_path / site,)).evaluation("test")
    ]
    errors = [float((data - images).square().mean().sqrt()) for _, data, images in blurred]
    assert result.metric("federated", "mean", "rmse") < sum(errors) / len(errors)


def test_the_adapted_study_of_skin_tumours_exchanges_adapters_and_the_classifier() -> None:
    study = load_study(EXAMPLES / "skin-lora.yaml", ["start={kind: fresh}"])
    plans = arm_specs_of(study)
    model = plans.model_context.model
    shared = [name.removeprefix("model/") for name in plans.initial(plans.arm_spec("federated"))[0]]
    assert isinstance(model, EfficientNetLite)
    parts = {name.rsplit(".", 2)[0] for name in shared}
    blocks = {f"blocks.{n}.layers.{layer}.1.lora" for n in range(11, 16) for layer in (0, 2)}
    assert parts == {*blocks, "head.1.lora", "classifier"}
    # The classifier has a weight and a bias; of an adapter the second factor alone travels.
    assert {name for name in shared if not name.endswith(".lora.b.weight")} == {
        "classifier.1.weight",
        "classifier.1.bias",
    }
    # What the frozen layers before the first adapter give of a picture is computed once: the stem and blocks 0 to 10.
    assert model.lead is not None
    assert len(model.lead) == 12


def test_the_study_that_measures_the_network_of_skin_tumours_deals_lesions_as_the_one_that_trained_it() -> None:
    trained, measured = (load_study(EXAMPLES / f"skin{name}.yaml") for name in ("", "-measure"))
    assert (measured.task, measured.model, measured.seed, measured.sites) == (
        trained.task,
        trained.model,
        trained.seed,
        trained.sites,
    )
    assert measured.start.kind == "release"
    assert (measured.trains, measured.training_sites, measured.averaged_sites) == (False, (), trained.training_sites)
