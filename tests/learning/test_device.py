"""Where a site computes: what its file may say, how a batch moves, what a run says of it afterwards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.devices import META
from tests.toys import toy_sites, toy_study
from wardround.errors import StudyError
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.acquisition.wrapped import Prompted, RealImage
from wardround.learning.device import CPU, as_arrays, compute_of, moved
from wardround.plan.versions import placed
from wardround.runs.folder import add_devices, mixed
from wardround.runs.machine import Machine
from wardround.runs.session import run
from wardround.study.sites import SitesFile, load_sites
from wardround.wire.host import on_host


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


@dataclass(frozen=True, eq=False)
class Sub:
    values: Tensor
    name: str
    twice: Tensor | None = field(default=None, init=False)

    @cached_property
    def doubled(self) -> Tensor:
        return 2 * self.values


def _tensors(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, LinearOperator | Sub):
        return _tensors(list(vars(part).values()))
    if isinstance(part, dict):
        return _tensors(list(part.values()))
    return [t for each in part for t in _tensors(each)] if isinstance(part, list | tuple) else []


def test_a_batch_moves_as_one_whatever_holds_its_tensors() -> None:
    x = torch.arange(4.0)
    operator = CartesianMRI(torch.ones(1, 2, 4, 4, dtype=torch.complex64), torch.ones(4, 4))
    _ = operator.normal(torch.ones(1, 4, 4, dtype=torch.complex64))  # what it keeps of it moves, too
    sub = Sub(x, "A")
    _ = sub.doubled
    batch = {
        "pair": Pair(x, x),
        "list": [x, (x, None, 3, "text")],
        "sub": sub,
        "operator": Prompted(RealImage(operator), x),
        "array": np.arange(3),
    }
    found = moved(batch, META.device)
    assert found.keys() == batch.keys()
    assert type(found["pair"]) is Pair
    assert type(found["operator"]) is Prompted
    assert len(_tensors(found)) >= 9
    assert all(t.is_meta for t in _tensors(found))
    assert not any(t.is_meta for t in _tensors(batch))
    assert CPU.moved(batch) is batch


def test_what_would_stay_behind_is_refused() -> None:
    class Odd:
        pass

    with pytest.raises(StudyError, match=r"holds a Odd.*`to\(device\)`"):
        META.moved((torch.ones(1), Odd()))


def test_an_operator_on_a_device_is_the_same_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.ones(2, 3, 4, 4, dtype=torch.complex64)
    operator = RealImage(CartesianMRI(maps, torch.ones(4, 4)))
    there = operator.to(torch.device("cpu"))
    x = torch.rand(2, 4, 4)
    assert torch.equal(there.A(x), operator.A(x))
    assert operator.to(META.device).A(x.to("meta")).is_meta


def test_sixteen_bits_reach_the_host_as_numbers_that_it_knows() -> None:
    assert on_host(torch.tensor([1.5], dtype=torch.bfloat16)).tolist() == [1.5]
    assert on_host(torch.ones(2, dtype=torch.complex64).conj()).dtype == np.complex64


def test_what_a_hook_gives_does_not_follow_the_model_afterwards() -> None:
    live = torch.zeros(3, requires_grad=True)
    arrays = as_arrays({"view": live.detach()[1:], "new": live.detach() + 1, "array": np.ones(2)}, [live])
    with torch.no_grad():
        live.fill_(7.0)
    assert arrays["view"].tolist() == [0.0, 0.0]
    assert arrays["new"].tolist() == [1.0, 1.0, 1.0]


# What a file may say -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "device", "found"),
    [(0, "auto", "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda:0"), (2, "cuda", "cuda:0"), (2, "cuda:1", "cuda:1")],
)
def test_a_device_is_found(cuda: int, device: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, cuda)
    assert compute_of(device, "fp32", "A").device == torch.device(found)


@pytest.mark.parametrize(
    ("cuda", "device", "why"),
    [
        (0, "cuda", "CUDA.*set `device: cpu`, or `auto`"),
        (2, "cuda:2", "there are 2 CUDA devices here, numbered from 0"),
        (0, "mps", "torch finds no Apple GPU here"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(
    cuda: int, device: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, cuda)
    with pytest.raises(StudyError, match=rf"^sites\.A\.device: {device}: .*{why}"):
        compute_of(device, "fp32", "A")


def _pretend(monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    # Both are set where a CUDA device is found.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)


@pytest.mark.parametrize("line", ["device: gpu", "device: 'cuda:'", "device: cuda:-1", "precision: tf32"])
def test_a_sites_file_names_devices_that_there_can_be(line: str, tmp_path: Path) -> None:
    (tmp_path / "A").mkdir()
    file = tmp_path / "sites.yaml"
    file.write_text(f"sites:\n  A:\n    data: A\n    {line}\n", encoding="utf-8")
    with pytest.raises(StudyError, match=rf"sites\.A\.{line.partition(':')[0]}"):
        load_sites(file)


# What a run says of it -----------------------------------------------------------------------------------------------


def test_a_missing_device_stops_a_run_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, 0)
    sites = toy_sites(tmp_path / "data")
    sites = sites.model_copy(
        update={"sites": {**sites.sites, "B": sites.sites["B"].model_copy(update={"device": "cuda:0"})}}
    )
    machine = Machine(toy_study(), sites, tmp_path / "out", ())
    with pytest.raises(StudyError, match=r"sites\.B\.device"):
        machine.preflight()


@pytest.mark.slow
def test_the_result_names_device_precision_and_threads(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path / "data")
    entry = sites.sites["C"].model_copy(update={"precision": "bf16", "threads": 2})
    sites = sites.model_copy(update={"sites": {**sites.sites, "C": entry}})
    study, out = toy_study(schedule={"rounds": 1}), tmp_path / "out"
    result = run(study, sites.with_code(), out, quiet=True, allow_code=True)
    assert result.fingerprint["device"] == "cpu"
    assert result.fingerprint["precision"] == "fp32: A, B; bf16: C"
    assert result.fingerprint["threads"] == "1: A, B; 2: C"
    assert json.loads((out / "work" / "fingerprint.json").read_text())[-1] == dict(result.fingerprint)
    again = run(study, sites.with_code(), out, quiet=True, allow_code=True)
    assert again.fingerprint == result.fingerprint
    assert not [note for note in again.notes if "resumed" in note]


def test_a_site_computes_on_the_threads_of_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    sites = toy_sites(tmp_path / "data")
    wide = {name: entry.model_copy(update={"threads": 3 if name == "B" else 2}) for name, entry in sites.sites.items()}
    machine = Machine(toy_study(), SitesFile(sites=wide).with_code(), tmp_path / "out", ("pooled",))
    for arm, site, threads in (("federated", "A", 2), ("federated", "B", 3), ("pooled", "pooled", 2)):
        machine.learner(machine.arm_spec(arm), site).held_out.evaluate("test")
        assert (taken.pop(), taken) == (threads, [])
        assert machine.agent(site).held.compute.facts()["threads"] == str(threads)
    machine.close()


def test_a_run_that_goes_on_elsewhere_says_so(tmp_path: Path) -> None:
    versions, cpu = {"torch": "2"}, placed({"A": {"device": "cpu", "precision": "fp32"}})
    (tmp_path / "work").mkdir()
    first = add_devices(tmp_path, [versions], cpu)
    # A process that was killed before its sites answered says nothing of devices.
    then = add_devices(tmp_path, [*first, versions], cpu)
    assert then == first == [{"torch": "2", "device": "cpu", "precision": "fp32"}]
    moved_on = add_devices(tmp_path, [*first, versions], placed({"A": {"device": "cuda:0 (X)", "precision": "fp32"}}))
    assert "device cpu and cuda:0 (X)" in mixed(moved_on)[0]
