"""Base weights found by their hash, on this machine alone, when they are not where a study says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.toys import make_task, toy_sites, toy_study
from wardround.errors import StudyError
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.found import VARIABLE, by_content, file_sha256, hub_cache
from wardround.runs.session import open_host, run
from wardround.study.places import Places
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile, load_sites


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def values(seed: int = 1) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {name: tensor.numpy() for name, tensor in make_task().build_model().state_dict().items()}


def base(path: Path, seed: int = 1) -> str:
    """A weights file of the toy network; its hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(values(seed), path)
    return file_sha256(path)


def in_hub(cache: Path, seed: int = 1) -> str:
    """A repository in the hub's cache, as its own library lays it out."""
    repository = cache / "models--someone--network"
    sha256 = base(repository / "blobs" / "draft", seed)
    (repository / "blobs" / "draft").rename(repository / "blobs" / sha256)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / sha256)
    return sha256


def study_from(sha256: str, **changes: Any) -> Study:
    return toy_study(start={"kind": "weights", "file": "elsewhere/model.safetensors", "sha256": sha256}, **changes)


def begun(study: Study, places: Places) -> dict[str, Any]:
    return ArmSpecs(study, (), plugins=Plugins(code=True), places=places).model_context.initial_values()


@pytest.mark.parametrize("where", ["weights", "variable", "HF_HUB_CACHE", "HF_HOME", "default"])
def test_a_study_starts_from_a_file_of_its_hash(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores: tuple[Path, ...] = ()
    shelf = tmp_path / "shelf"
    base(shelf / "a.safetensors", seed=2)
    if where in ("weights", "variable"):
        sha256 = base(shelf / "deep" / "another name.safetensors")
        stores = (shelf,) if where == "weights" else ()
        monkeypatch.setenv(VARIABLE, os.pathsep.join([str(tmp_path / "none"), str(shelf)]) * (where == "variable"))
    else:
        hub = {"HF_HUB_CACHE": shelf, "HF_HOME": shelf / "hub", "default": tmp_path / "cache" / "huggingface" / "hub"}
        if where != "default":
            monkeypatch.setenv(where, str(shelf))
        assert hub_cache() == hub[where]
        sha256 = in_hub(hub[where])
    study = study_from(sha256)
    found = begun(study, study.places(tmp_path, [SiteData(data=(tmp_path,), weights=stores)]))
    assert all(np.array_equal(found[name], value) for name, value in values().items())


def test_files_by_the_studys_name_or_hash_are_read_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        base(tmp_path / f"a{number}.safetensors", seed=number + 5)
    sha256 = base(tmp_path / "z" / "model.safetensors")
    read: list[str] = []

    def recorded(path: Path) -> str:
        read.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("wardround.plan.found.file_sha256", recorded)
    assert by_content(sha256, "model.safetensors", [tmp_path]) == tmp_path / "z" / "model.safetensors"
    (tmp_path / "z" / "model.safetensors").rename(tmp_path / f"{sha256}.safetensors")
    assert by_content(sha256, "model.safetensors", [tmp_path]) == tmp_path / f"{sha256}.safetensors"
    assert read == ["model.safetensors", f"{sha256}.safetensors"]


def test_the_error_says_where_was_looked_and_no_path(tmp_path: Path) -> None:
    base(tmp_path / "shelf" / "a.safetensors")
    sha256 = "cd" * 32
    study = study_from(sha256)
    with pytest.raises(StudyError) as caught:
        begun(study, study.places(tmp_path / "near", [SiteData(data=(tmp_path,), weights=(tmp_path / "shelf",))]))
    said = str(caught.value)
    assert f"no .safetensors file of sha256 {sha256} was found in this machine's folders of weights (1: " in said
    assert "nor in its Hugging Face cache; put it there, below the study's folder" in said
    assert str(tmp_path) not in said
    assert all(str(tmp_path / name) in caught.value.detail for name in ("near", "shelf", "cache"))


def test_another_file_at_its_place_is_not_passed_by(tmp_path: Path) -> None:
    """What lies where the study says is what was meant: to take another in silence would hide a mistake."""
    sha256 = base(tmp_path / "shelf" / "a.safetensors")
    base(tmp_path / "elsewhere" / "model.safetensors", seed=2)
    with pytest.raises(StudyError, match="is another file than the study's, or it changed"):
        begun(
            study_from(sha256),
            study_from(sha256).places(tmp_path, [SiteData(data=(tmp_path,), weights=(tmp_path / "shelf",))]),
        )


def test_a_file_called_by_the_hash_of_another_is_refused(tmp_path: Path) -> None:
    """A damaged cache: the name of a blob is a place to look, not a proof."""
    hub = tmp_path / "cache" / "huggingface" / "hub"
    sha256 = in_hub(hub)
    save_file(values(2), next(hub.glob("*/blobs/*")))
    with pytest.raises(StudyError, match="is another file than the study's, or it changed"):
        begun(study_from(sha256), study_from(sha256).places(tmp_path))


def test_a_sites_file_names_folders(tmp_path: Path) -> None:
    sha256 = base(tmp_path / "models" / "a.safetensors")
    (tmp_path / "data").mkdir()
    (tmp_path / "sites.yaml").write_text("sites: {A: {data: data, weights: models}, B: {data: data}, C: {data: data}}")
    sites = load_sites(tmp_path / "sites.yaml")
    assert sites.of("A").weights == (tmp_path / "models",)
    host = open_host(study_from(sha256), sites.with_code(), tmp_path / "out", (), (), None, near=tmp_path)
    assert np.array_equal(host.model_context.initial_values()["0.weight"], values()["0.weight"])
    (tmp_path / "models" / "a.safetensors").unlink()
    (tmp_path / "models").rmdir()
    with pytest.raises(StudyError, match=r"sites\.A\.weights: the folder does not exist"):
        load_sites(tmp_path / "sites.yaml")


@pytest.mark.slow
def test_worker_processes_find_the_same(tmp_path: Path) -> None:
    sha256 = base(tmp_path / "models" / "a.safetensors")
    sites = toy_sites(tmp_path / "data")
    entries = {n: e.model_copy(update={"weights": (tmp_path / "models",)}) for n, e in sites.sites.items()}
    stocked = SitesFile(sites=entries).with_code()
    hashes = {
        run(study_from(sha256), stocked, tmp_path / engine, engine=engine, near=tmp_path, quiet=True).model_sha256
        for engine in ("local", "workers")
    }
    assert len(hashes) == 1
