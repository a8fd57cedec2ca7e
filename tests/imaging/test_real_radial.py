"""A real radial scan of a heart goes through the same operator as the simulated ones, and beside BART's."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.real_images import root_folder

from wardround.imaging.acquisition.solvers import cg_sense

pytestmark = [pytest.mark.data("kspace"), pytest.mark.slow]


@pytest.fixture
def benchmark_(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("real_radial")


def _spokes(benchmark_: Any) -> Any:
    spokes = benchmark_.Spokes.load(root_folder() / benchmark_.FILE)
    assert spokes.kspace.shape == (12, 25, 256)
    # The echo is where the readout passes the centre.
    assert 126 <= int(spokes.kspace.abs().sum((0, 1)).argmax()) <= 129
    return spokes


def test_least_squares_predicts_spokes_that_it_never_saw_better_than_gridding(benchmark_: Any) -> None:
    spokes = _spokes(benchmark_)
    numbers = np.arange(25)
    held, seen = spokes.some(numbers[::5]), spokes.some(numbers[numbers % 5 > 0])
    maps = seen.maps()
    operator = seen.operator(maps)
    data = operator.weighed(seen.data())
    errors = [
        benchmark_.held_out_error(image, maps, held, 0.03)
        for image in (operator.initial(data), cg_sense(operator, data, 0.1, iterations=10))
    ]
    assert errors[1] < errors[0]


@pytest.mark.skipif(shutil.which("bart") is None, reason="bart, which these images are compared with, is not installed")
def test_transform_and_least_squares_are_those_of_bart(benchmark_: Any) -> None:
    """BART grids with an error of 1e-3 or so; five steps of conjugate gradients take the same path from there."""
    torch.manual_seed(0)
    spokes = _spokes(benchmark_)
    beside = benchmark_.beside_bart(spokes, spokes.maps(), iterations=5)
    assert beside["forward"] < 5e-3
    assert beside["adjoint"] < 5e-3
    assert beside["cg_sense"] < 0.02
