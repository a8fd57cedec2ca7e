"""The lint: quiet about every network a study can have, loud about models that were made to leak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from tests.ct_hospitals import ct_study, make_ct_hospitals
from tests.examples import quickly
from tests.mri_hospitals import make_hospitals, write_study
from wardround.learning.model_context import ModelContext
from wardround.protection.lint import architecture_sha256, lint_against, lint_tensors
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.tasks.build import build_task

Tensors = dict[str, np.ndarray]


def _study(folder: Path, **changes: Any) -> Study:
    return load_study(write_study(folder, folder / "data", **changes)[0])


def _initial(study: Study) -> Tensors:
    return ModelContext(build_task(study), study.seed).initial_values()


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


ROWS = 100
SHARES = [0.02, 0.05, 0.12, 0.24]


def _classifier(seed: int = 0, inputs: int = 64, hidden: int = ROWS) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 5))
    return nn.Sequential(*layers)


def _values(network: nn.Module) -> Tensors:
    return {name: t.detach().numpy().copy() for name, t in network.state_dict().items()}


def _trap(tensors: Tensors, layer: str, rows: np.ndarray, noise: float) -> None:
    """Rows that all measure the brightness, and biases that cut it into bins; the other rows stay as they are."""
    random = np.random.default_rng(1)
    weight, bias = tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]
    inputs = weight.shape[1]
    weight[rows] = (1.0 + noise * random.standard_normal((len(rows), inputs))) / inputs
    bias[rows] = -np.linspace(0.2, 0.8, len(rows))


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("share", SHARES)
def test_a_few_rows_that_are_alike_are_enough(share: float, noise: float) -> None:
    """Two rows with other biases already tell apart the one image that lies between them."""
    approved = _values(_classifier())
    for layer in ("0", "2"):
        planted = {name: t.copy() for name, t in approved.items()}
        rows = np.random.default_rng(0).choice(ROWS, round(share * ROWS), replace=False)
        _trap(planted, layer, rows, noise)
        found = lint_against(planted, approved)
        assert [(f.check, f.tensor) for f in found] == [("imprint", f"{layer}.weight")]
        assert f"{share:.0%} of its rows are alike ({len(rows)})" in found[0].text


def test_a_trap_is_caught_that_its_author_spread_over_two_layers() -> None:
    approved = _values(_classifier())
    planted = {name: t.copy() for name, t in approved.items()}
    _trap(planted, "0", np.arange(12), 0.0)
    _trap(planted, "2", np.arange(20, 32), 0.05)
    assert {f.tensor for f in lint_against(planted, approved)} == {"0.weight", "2.weight"}


@pytest.mark.parametrize("inputs", [64, 400])
def test_a_trap_is_caught_whose_rows_are_alike_through_two_layers_only(inputs: int) -> None:
    """More hidden values than inputs: rows of the second layer differ by what the first one never says."""
    hidden, random = inputs + 60, np.random.default_rng(0)
    approved = _values(_classifier(inputs=inputs, hidden=hidden))
    planted = {name: t.copy() for name, t in approved.items()}
    first = planted["0.weight"].astype(np.float64)
    planted["0.bias"][:] = 10.0  # no hidden value is ever cut off
    silent = np.eye(hidden) - first @ np.linalg.pinv(first)
    rows = np.full((40, inputs), 1.0 / inputs) @ np.linalg.pinv(first)
    planted["2.weight"][:40] = rows + 0.3 * random.standard_normal((40, hidden)) @ silent
    found = lint_against(planted, approved)
    assert [(f.check, f.tensor) for f in found] == [("imprint", "2.weight")]
    assert "(40) behind 0.weight" in found[0].text


@pytest.mark.parametrize(("optimizer", "rate", "shift"), [("adam", 1e-2, 0.0), ("adam", 1e-2, 3.0), ("sgd", 0.1, 3.0)])
def test_a_classifier_that_learned_passes_with_dead_and_pruned_rows(optimizer: str, rate: float, shift: float) -> None:
    network, approved = _classifier(), _values(_classifier())
    kinds = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}
    steps = kinds[optimizer](network.parameters(), lr=rate, weight_decay=1e-2 if optimizer == "adam" else 1e-4)
    x = torch.randn(256, 64) + shift
    labels = (x @ torch.randn(64, 5)).argmax(1)
    for number in range(200):
        batch = torch.arange(32) + 32 * (number % 8)
        steps.zero_grad()
        nn.functional.cross_entropy(network(x[batch]), labels[batch]).backward()
        steps.step()
    learned = _values(network)
    assert np.linalg.norm(learned["0.weight"] - approved["0.weight"]) > 0.2 * np.linalg.norm(approved["0.weight"])
    if shift:
        assert float((network[1](network[0](x)).amax(0) == 0).float().mean()) > 0.1, "no row died"
    assert lint_against(learned, approved) == ()
    # Pruned, by whatever lay first.
    learned["0.weight"][::3], learned["0.bias"][::3] = 0.0, 0.0
    learned["2.weight"][:, ::3] = 0.0
    learned["2.weight"][1::2] = 0.0
    assert lint_against(learned, approved) == ()


def test_rows_that_start_at_zero_may_learn_one_direction_and_the_others_not() -> None:
    approved = _values(_classifier())
    approved["0.weight"][:30] = 0.0
    planted = {name: t.copy() for name, t in approved.items()}
    planted["0.weight"][:30] = 0.01 * np.outer(np.arange(1, 31), np.linspace(-1, 1, 64))
    assert lint_against(planted, approved) == ()
    planted["0.weight"][40:43] = 1.0
    assert [f.tensor for f in lint_against(planted, approved)] == ["0.weight"]


def test_twins_of_the_approved_network_are_counted_and_no_more_than_those_pass() -> None:
    approved = _values(_classifier())
    approved["0.weight"][:10] = approved["0.weight"][0]
    same = {name: t.copy() for name, t in approved.items()}
    assert lint_against(same, approved) == ()
    same["0.weight"][50:54] = same["0.weight"][50]
    assert [f.tensor for f in lint_against(same, approved)] == ["0.weight"]


MRI = [{"preset": "tiny"}, {"kind": "unet", "preset": "tiny"}, {"kind": "learn", "preset": "tiny"}]
MRI += [{"kind": kind, "preset": "tiny"} for kind in ("varnet", "e2e_varnet", "swin_denoiser")]
CT = [
    {"kind": "redcnn", "preset": "tiny", "conditioning": "every"},
    {"kind": "lpd", "preset": "tiny", "conditioned": True},
    {"kind": "iradonmap", "preset": "tiny"},
    {"kind": "two_band", "preset": "tiny"},
]


def _learned(study: Study, folder: Path, steps: int, rate: float) -> tuple[Tensors, Tensors]:
    """A network's values after training on a site's images, and before."""
    task = build_task(study)
    model_context, dataset = ModelContext(task, study.seed), task.dataset(next(iter(study.sites)), (folder,))
    optimiser = torch.optim.Adam([p for p in model_context.model.parameters() if p.requires_grad], lr=rate)
    random = np.random.default_rng(0)
    model_context.model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        task.loss(
            model_context.model, dataset.batch([int(i) for i in random.choice(len(dataset), 2)], random)
        ).backward()
        optimiser.step()
    return _values(model_context.model), model_context.initial_values()


@pytest.mark.parametrize(
    "model", quickly([*MRI, *CT], 0, 1, 2, 6, 7, 8, 9), ids=lambda model: model.get("kind", "modl")
)
def test_networks_that_learned_pass(tmp_path: Path, model: dict[str, Any]) -> None:
    mri = model in MRI
    folder = (make_hospitals(tmp_path) / "Alpha") if mri else make_ct_hospitals(tmp_path)["A"]
    study = _study(tmp_path / "study", model=model) if mri else load_study(ct_study(model=model))
    learned, initial = _learned(study, folder, 8, 1e-2)
    assert lint_against(learned, initial) == ()


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-3, 1e-2])
@pytest.mark.parametrize("model", [*MRI, *CT], ids=lambda model: model.get("kind", "modl"))
def test_larger_networks_that_learned_for_long_pass(tmp_path: Path, model: dict[str, Any], rate: float) -> None:
    mri, model = model in MRI, {**model, "preset": "small"}
    folder = (make_hospitals(tmp_path) / "Alpha") if mri else make_ct_hospitals(tmp_path)["A"]
    study = _study(tmp_path / "study", model=model) if mri else load_study(ct_study(model=model))
    learned, initial = _learned(study, folder, 60, rate)
    assert lint_against(learned, initial) == ()


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


def test_filters_of_public_weights_that_are_alike_may_stay_so_while_they_are_trained() -> None:
    """Filters of one channel, as of a depthwise convolution: many have one shape before anything is trained."""
    random = np.random.default_rng(0)
    shapes = random.standard_normal((40, 25))
    chosen = shapes[random.integers(0, 40, 600)] * random.uniform(0.5, 2.0, (600, 1))
    apart = random.standard_normal((600, 25))
    start = {"filters.weight": np.concatenate([chosen, apart]).reshape(-1, 1, 5, 5).astype(np.float32)}

    def alike(extra: int) -> bool:
        """Whether `extra` more filters that are alike are refused."""
        rows = start["filters.weight"].copy()
        rows[600 : 600 + extra] = rows[:extra]
        return bool(lint_against({"filters.weight": rows}, start))

    # Six deviations of a count of 600 are 146.
    assert not alike(100)
    assert alike(200)


@pytest.mark.parametrize("side", [6, 7, 16, 28])
def test_filters_of_whole_patches_of_a_grey_image_are_a_trap_however_many_were_alike(side: int) -> None:
    """One pair alike in a study's start weights bought eight rows more: each bin gave its image, to seven digits."""
    random = np.random.default_rng(0)
    start = {"patches.weight": random.standard_normal((64, 1, side, side)).astype(np.float32)}
    start["patches.weight"][1] = 1.3 * start["patches.weight"][0]
    planted = {"patches.weight": start["patches.weight"].copy()}
    assert lint_against(planted, start) == ()
    planted["patches.weight"][-8:] = 1.0 / side**2
    assert [(f.check, f.tensor) for f in lint_against(planted, start)] == [("imprint", "patches.weight")]
