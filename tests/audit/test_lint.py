"""The lint: quiet about every network a study can have, loud about models that were made to leak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from tests.hospitals import write_study
from wardround.federation.training import Workbench
from wardround.protection.lint import architecture_sha256, lint_against, lint_tensors
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.tasks.build import build_task

Tensors = dict[str, np.ndarray]


def _study(folder: Path, **changes: Any) -> Study:
    return load_study(write_study(folder, folder / "data", **changes)[0])


def _initial(study: Study) -> Tensors:
    return Workbench(build_task(study), study.seed).initial_values()


def _linear(rows: int = 64, inputs: int = 128) -> Tensors:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(inputs, rows), nn.ReLU(), nn.Linear(rows, 5))
    return {name: t.detach().numpy().copy() for name, t in network.state_dict().items()}


@pytest.mark.parametrize(
    "model",
    [
        {"preset": "tiny"},
        {"preset": "small"},
        {"preset": "paper"},
        {"kind": "unet", "preset": "tiny"},
        {"kind": "unet", "preset": "small", "norm": "batch"},
        {"kind": "unet", "preset": "paper", "norm": "none"},
    ],
)
def test_the_networks_of_a_study_pass(tmp_path: Path, model: dict[str, str]) -> None:
    study = _study(tmp_path, model=model)
    assert lint_against(_initial(study), _initial(study)) == ()


def test_an_innocent_classifier_passes() -> None:
    assert lint_tensors(_linear()) == ()


@pytest.mark.parametrize("quantiles", ["uniform", "normal"])
def test_an_imprint_layer_is_caught(quantiles: str) -> None:
    """Robbing the Fed: every row measures the brightness, and the biases cut it into bins."""
    planted = _linear()
    planted["0.weight"][:] = 1.0 / 128
    grid = (np.arange(64) + 0.5) / 64
    planted["0.bias"][:] = -grid if quantiles == "uniform" else -(0.5 + 0.1 * norm.ppf(grid))
    found = lint_tensors(planted)
    assert {(f.check, f.tensor) for f in found} == {("imprint", "0.weight"), ("imprint", "0.bias")}


def test_half_an_imprint_is_caught_with_noise_on_its_rows() -> None:
    planted = _linear()
    planted["0.weight"][:32] = 0.1 + 1e-4 * np.random.default_rng(0).standard_normal((32, 128))
    assert [(f.check, f.tensor) for f in lint_tensors(planted)] == [("imprint", "0.weight")]


def test_fishing_is_caught() -> None:
    planted = _linear()
    planted["2.weight"][3] *= 100.0
    assert ("fishing", "2.weight") in {(f.check, f.tensor) for f in lint_tensors(planted)}
    planted = _linear()
    planted["2.bias"][[0, 1, 2, 4]] = 50.0
    assert ("fishing", "2.bias") in {(f.check, f.tensor) for f in lint_tensors(planted)}


def test_gains_and_values_that_are_not_finite_are_caught(tmp_path: Path) -> None:
    study = _study(tmp_path, model={"preset": "tiny"})
    tensors = _initial(study)
    tensors["denoiser.stack.0.weight"] = tensors["denoiser.stack.0.weight"].copy()
    tensors["denoiser.stack.0.weight"][0, 0, 0, 0] = 2e3
    assert [f.check for f in lint_against(tensors, _initial(study))] == ["gain"]
    tensors["denoiser.stack.0.weight"][0, 0, 0, 0] = np.nan
    assert [f.check for f in lint_against(tensors, _initial(study))] == ["finite"]


def test_a_normalisation_that_amplifies_is_caught() -> None:
    norm_layer = {
        "n.weight": np.ones(4, np.float32),
        "n.bias": np.zeros(4, np.float32),
        "n.running_mean": np.zeros(4, np.float32),
        "n.running_var": np.ones(4, np.float32),
    }
    assert lint_tensors(norm_layer) == ()
    norm_layer["n.weight"] = np.full(4, 50.0, np.float32)
    norm_layer["n.running_var"] = np.zeros(4, np.float32)
    assert [(f.check, f.tensor) for f in lint_tensors(norm_layer)] == [("gain", "n.weight")]


def test_another_architecture_is_caught(tmp_path: Path) -> None:
    study = _study(tmp_path, model={"preset": "tiny"})
    tensors = _initial(study)
    other = {**tensors, "imprint.weight": np.zeros((4, 4), np.float32)}
    del other["log_weight"]
    assert architecture_sha256(other) != architecture_sha256(tensors)
    found = {(f.tensor, f.text) for f in lint_against(other, _initial(study))}
    assert found == {("imprint.weight", "is no tensor of the study's network"), ("log_weight", "is missing")}
    wider = {**tensors, "log_weight": np.zeros(3, np.float32)}
    assert [f.check for f in lint_against(wider, _initial(study))] == ["architecture"]
