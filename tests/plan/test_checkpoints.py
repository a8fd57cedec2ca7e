"""Checkpoints of others: read without running code, found where they hide, written whole or not at all."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from wardround.cli import app
from wardround.errors import DataError
from wardround.plan.checkpoints import import_checkpoint
from wardround.plan.weights import file_sha256


class Code:
    """What no checkpoint should hold."""


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return OrderedDict({"0.weight": torch.randn(3, 2), "0.bias": torch.randn(3), "1.steps": torch.tensor(5)})


def saved(path: Path, held: Any, **options: Any) -> Path:
    torch.save(held, path, **options)
    return path


ADAM = {"state": {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    ("held", "part", "left_out"),
    [
        (tensors(), "", ()),
        ({"model": tensors(), "optimizer": ADAM, "epoch": 3}, "model", ("epoch", "optimizer")),
        ({"state_dict": tensors()}, "state_dict", ()),
        ({"checkpoint": {"net": tensors(), "epoch": 1}, "seed": 0}, "checkpoint.net", ("seed",)),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_tensors_are_found_and_written_once(
    tmp_path: Path, held: Any, part: str, left_out: tuple[str, ...], zipped: bool
) -> None:
    path = saved(tmp_path / "base.pth", held, _use_new_zipfile_serialization=zipped)
    found = import_checkpoint(path)
    assert found.path == tmp_path / "base.safetensors"
    assert (found.part, found.left_out, found.made_whole) == (part, left_out, ())
    assert (found.tensors, found.values, found.nbytes) == (3, 10, 4 * 9 + 8)
    written = load_file(found.path)
    assert written.keys() == tensors().keys()
    assert all(torch.equal(written[name], value) for name, value in tensors().items())
    assert found.sha256 == file_sha256(found.path)
    # The same checkpoint gives the same file, and one that is a .safetensors is only looked at.
    again = import_checkpoint(path, tmp_path / "again.safetensors")
    assert again.sha256 == found.sha256 == import_checkpoint(found.path).sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "base.pth", "base.safetensors"]


def test_of_several_sets_one_is_chosen(tmp_path: Path) -> None:
    path = saved(tmp_path / "base.pth", {"model": tensors(), "ema": tensors(1)})
    with pytest.raises(DataError, match="several sets of tensors; choose one with --part: model, ema"):
        import_checkpoint(path)
    with pytest.raises(DataError, match=r"--part net: base.pth has model, ema"):
        import_checkpoint(path, part="net")
    found = import_checkpoint(path, part="ema")
    assert torch.equal(load_file(found.path)["0.weight"], tensors(1)["0.weight"])
    assert (found.part, found.left_out) == ("ema", ("model",))


def test_tensors_that_share_memory_are_made_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    path = saved(tmp_path / "base.pt", {"tied": base, "same": base, "turned": base.T, "own": torch.ones(2, 3).T})
    found = import_checkpoint(path)
    assert found.made_whole == ("same", "tied", "turned")
    written = load_file(found.path)
    assert torch.equal(written["turned"], base.T)
    assert torch.equal(written["same"], base)
    assert written["own"].shape == (3, 2)


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    path, out = saved(tmp_path / "base.pth", tensors()), tmp_path / "base.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"base.safetensors exists already; add --force"):
        import_checkpoint(path)
    assert out.read_bytes() == b"mine"
    assert import_checkpoint(path, overwrite=True).sha256 == file_sha256(out)


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"model": Code()}, r"holds more than tensors \(tests.plan.test_checkpoints.Code\), which could be code"),
        ([torch.zeros(2)], "holds a list and no tensors by name"),
        ({"w": torch.zeros(2), "epoch": 3}, "holds no tensors by name, or other values among them"),
        ({"optimizer": ADAM}, "holds no tensors by name"),
        ({}, "holds no tensors by name"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "w is sparse or quantised"),
    ],
)
def test_what_is_no_checkpoint_of_tensors_is_one_clear_error(tmp_path: Path, held: Any, reason: str) -> None:
    refused(saved(tmp_path / "base.pth", held), reason)


@pytest.mark.parametrize("data", [b"", b"no pickle", b"PK\x03\x04 and no zip", b"\x80\x02}q\x00X\x01\x00"])
def test_other_files_are_one_clear_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "base.pth"
    path.write_bytes(data)
    refused(path, "is damaged, or no file that `torch.save` wrote")
    path = path.rename(tmp_path / "base.safetensors")
    refused(path, r"is damaged, or no .safetensors file")


def test_half_a_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "base.pth", tensors())
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "is damaged, or no file that `torch.save` wrote")


def test_places_that_are_no_file_are_one_clear_error(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder; name a file in it")
    refused(tmp_path / "absent.pth", "does not exist; correct the path")
    path = saved(tmp_path / "base.pth", tensors())
    with pytest.raises(DataError, match="give it that ending"):
        import_checkpoint(path, tmp_path / "base.bin")
    made = import_checkpoint(path)
    with pytest.raises(DataError, match="needs no conversion"):
        import_checkpoint(made.path, tmp_path / "other.safetensors")


def test_a_disk_too_small_has_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "base.pth", tensors())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 50))  # type: ignore[attr-defined]
    refused(path, "the disk has 50 bytes free and base.safetensors needs 1,")


def test_the_command_prints_what_a_study_says(tmp_path: Path) -> None:
    path = saved(tmp_path / "base.pth", {"model": tensors(), "epoch": 3})
    done = CliRunner().invoke(app, ["weights", "import", str(path)])
    assert done.exit_code == 0
    sha256 = file_sha256(tmp_path / "base.safetensors")
    assert "3 tensors, 10 values, 44 B, from `model` of base.pth" in done.stdout
    assert "Left out: epoch" in done.stdout
    assert done.stdout.endswith(f"start:\n  kind: weights\n  file: base.safetensors\n  sha256: {sha256}\n")
    assert CliRunner().invoke(app, ["weights", "import", str(path)]).exit_code == 2


def refused(path: Path, reason: str) -> None:
    before = sorted(p.name for p in path.parent.iterdir())
    with pytest.raises(DataError, match=reason):
        import_checkpoint(path)
    assert sorted(p.name for p in path.parent.iterdir()) == before
