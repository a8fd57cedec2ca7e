"""CG-SENSE and total variation against BART's, and what happens without BART."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from wardround.imaging.acquisition.mri.coils import birdcage_maps
from wardround.imaging.acquisition.mri.operator import fft2c

FOLDER = Path(__file__).parents[2] / "benchmarks"
BART = pytest.mark.skipif(shutil.which("bart") is None, reason="BART is not installed")


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("bart_oracle", FOLDER / "bart_oracle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _scan() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    maps = torch.from_numpy(birdcage_maps(4, (48, 40)))
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 40), indexing="ij")
    image = ((x / 0.7) ** 2 + (y / 0.8) ** 2 < 1) * (1 + 0.5 * torch.cos(9 * x)) * torch.exp(1j * x)
    mask = torch.zeros(48, 40)
    mask[:, ::3] = 1
    mask[:, 16:24] = 1
    random = torch.Generator().manual_seed(0)
    noise = 0.005 * torch.randn(4, 48, 40, generator=random, dtype=torch.complex64)
    return (fft2c(maps * image) + noise) * mask, mask, maps


@pytest.mark.slow
@BART
def test_bart_makes_the_same_images(oracle: ModuleType) -> None:
    kspace, mask, maps = _scan()
    found = oracle.nrmse_to_bart(kspace, mask, maps)
    assert found["cg_sense"] < 1e-3
    assert found["tv"] < 0.02
    twice = oracle.nrmse_to_bart(2 * kspace[None], mask[None], maps[None])
    assert twice == pytest.approx(found, rel=0.05)


def test_files_of_bart_hold_their_arrays(oracle: ModuleType, tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4) * (1 + 2j)
    oracle._write(str(tmp_path / "x"), array)
    assert (tmp_path / "x.hdr").read_text().splitlines()[1] == "2 3 4"
    assert np.array_equal(oracle._read(str(tmp_path / "x")), array.astype(np.complex64))


def test_without_bart_and_where_it_fails_one_error_says_so(oracle: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kspace, mask, maps = _scan()
    monkeypatch.setattr(oracle.shutil, "which", lambda _: None)
    with pytest.raises(oracle.NoBart, match="`bart` is not on the PATH: install BART"):
        oracle.pics(kspace, mask, maps, ["-l2"])
    monkeypatch.setattr(oracle.shutil, "which", lambda _: "/bin/false")
    with pytest.raises(oracle.NoBart, match="`bart pics -l2` failed"):
        oracle.pics(kspace, mask, maps, ["-l2"])

    def late(command: list[str], **settings: Any) -> None:
        raise subprocess.TimeoutExpired(command, settings["timeout"])

    monkeypatch.setattr(oracle.subprocess, "run", late)
    with pytest.raises(oracle.NoBart, match="did not end within 3 seconds"):
        oracle.pics(kspace, mask, maps, ["-l2"], timeout=3)
