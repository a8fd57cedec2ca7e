"""CT projectors beyond the laws: symmetry, storage, dtypes and the cache on disk."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.ct import cache as ct_cache
from wardround.imaging.acquisition.ct import operator as ct
from wardround.imaging.acquisition.ct import projector
from wardround.imaging.acquisition.ct.cache import VARIABLE, MatrixCache, default_folder, user_cache
from wardround.imaging.acquisition.ct.operator import VARIABLE as LIMIT
from wardround.imaging.acquisition.ct.operator import CTProjector, StoredWeights, WeightsOnTheFly, matrix_limit
from wardround.imaging.acquisition.ct.projector import Model, estimate_bytes, weight_matrix
from wardround.study.ct import CTGeometry

GEOMETRIES = {
    "parallel": CTGeometry(kind="parallel", size=(48, 48), views=30, bins=80, bin=0.8, offset=0.25, start=7),
    "flat": CTGeometry(
        size=(48, 48), views=32, bins=80, bin=1.5, offset=-0.5, start=3, source_distance=60, detector_distance=45
    ),
    "curved": CTGeometry(
        kind="fan_arc", size=(48, 48), views=32, bins=80, bin=1.5, offset=1, source_distance=60, detector_distance=45
    ),
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
every_model = pytest.mark.parametrize("model", ["joseph", "strip", "fbp"])


def _images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@every_geometry
@every_model
def test_symmetry_changes_nothing(geometry: CTGeometry, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _images(2, 48, 48), _images(2, geometry.views, geometry.bins, seed=1)
    short = CTProjector(geometry, model=model)
    for module in (ct, projector):
        monkeypatch.setattr(module, "symmetry", lambda geometry: 1)
    full = CTProjector(geometry, model=model)
    assert isinstance(short.weights, StoredWeights)
    assert isinstance(full.weights, StoredWeights)
    assert short.weights.nbytes < 0.55 * full.weights.nbytes
    torch.testing.assert_close(short.A(x), full.A(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(short.A_adjoint(y), full.A_adjoint(y), rtol=1e-5, atol=1e-5)


@every_geometry
@every_model
def test_weights_on_the_fly_are_the_stored_ones(
    geometry: CTGeometry, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector, "_ENTRIES", 2**15)  # several blocks of views
    stored = CTProjector(geometry, model=model, storage="stored")
    light = CTProjector(geometry, model=model, storage="on_the_fly")
    x, y = _images(2, 48, 48), _images(2, geometry.views, geometry.bins, seed=1)
    torch.testing.assert_close(light.A(x), stored.A(x))
    torch.testing.assert_close(light.A_adjoint(y), stored.A_adjoint(y))
    torch.testing.assert_close(light.normal(x), stored.normal(x))


def test_parallel_strips_conserve_mass() -> None:
    """Every pixel well inside the field of view casts all its area on the detector, in every view."""
    geometry = GEOMETRIES["parallel"]
    x = torch.zeros(1, 48, 48, dtype=torch.float64)
    x[0, 20:31, 14:29] = _images(11, 15)
    area = CTProjector(geometry, model="strip").A(x).sum(2) * geometry.bin
    torch.testing.assert_close(area, x.sum().expand_as(area), rtol=1e-6, atol=0)


def test_rotating_by_a_view_is_rotating_the_image() -> None:
    """A view at 90 degrees sees what a view at 0 sees of an image turned back by 90 degrees."""
    geometry = GEOMETRIES["flat"].model_copy(update={"start": 0.0})
    x = _images(1, 48, 48)
    y = CTProjector(geometry).A(x)
    turned = CTProjector(geometry).A(x.rot90(-1, (1, 2)))
    torch.testing.assert_close(y.roll(-8, 1), turned)
    # And the first row of the image is far from the source of view 0, as the convention says.
    point = torch.zeros(1, 48, 48)
    point[0, 0, 30] = 1
    seen = CTProjector(geometry).A(point)[0, 0].argmax().item()
    expected = (30 - 23.5) * 105 / (60 + 23.5) / 1.5 + 39.5 + geometry.offset
    assert abs(seen - expected) <= 0.5


def test_float64_follows_float32() -> None:
    operator = CTProjector(GEOMETRIES["curved"])
    x = _images(3, 48, 48)
    torch.testing.assert_close(operator.A(x).float(), operator.A(x.float()), rtol=1e-5, atol=1e-4)
    assert torch.equal(operator.A(x.float()), operator.A(x.float()))


def test_estimates_are_close() -> None:
    for geometry in GEOMETRIES.values():
        for model in ("joseph", "strip", "fbp"):
            weights = weight_matrix(geometry, model).nnz * 8
            assert estimate_bytes(geometry, model, adjoint=False) == pytest.approx(weights, rel=0.05)
            assert estimate_bytes(geometry, model) == pytest.approx(2 * weights, rel=0.05)


def test_what_does_not_fit_is_computed_on_the_fly_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    geometry = GEOMETRIES["flat"]
    with pytest.raises(GeometryError, match=r"above the limit of 0\.0 GB; raise memory_limit"):
        CTProjector(geometry, storage="stored", memory_limit=1e5)
    operator = CTProjector(geometry, memory_limit=1e5)
    assert isinstance(operator.weights, WeightsOnTheFly)
    assert "much slower" in caplog.text
    assert isinstance(CTProjector(geometry).weights, StoredWeights)


@pytest.mark.parametrize("uses", ["forward", "adjoint"])
def test_a_projector_for_one_product_keeps_one_matrix(uses: Literal["forward", "adjoint"]) -> None:
    geometry = GEOMETRIES["flat"]
    both, one = CTProjector(geometry), CTProjector(geometry, uses=uses)
    x = _images(2, 48, 48).float()
    y = CTProjector(geometry).A(x)

    def wanted(operator: CTProjector) -> Tensor:
        return operator.A(x) if uses == "forward" else operator.A_adjoint(y)

    assert torch.equal(wanted(one), wanted(both))
    assert isinstance(one.weights, StoredWeights)
    assert isinstance(both.weights, StoredWeights)
    assert list(one.weights._copies) == [(uses == "adjoint", torch.float32, torch.device("cpu"))]
    held = one.weights._base
    assert (held.shape == weight_matrix(geometry, "joseph").shape) is (uses == "forward")
    assert one.weights.nbytes == pytest.approx(both.weights.nbytes / 2, rel=0.02)
    # The other product is there all the same.
    torch.testing.assert_close(one.A(x), both.A(x))
    torch.testing.assert_close(one.A_adjoint(y), both.A_adjoint(y))


def test_half_of_the_memory_stores_what_is_used_one_way() -> None:
    geometry = GEOMETRIES["flat"]
    enough = 1.1 * estimate_bytes(geometry, "joseph", adjoint=False)
    assert isinstance(CTProjector(geometry, memory_limit=enough).weights, WeightsOnTheFly)
    assert isinstance(CTProjector(geometry, memory_limit=enough, uses="adjoint").weights, StoredWeights)


def test_the_limit_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matrix_limit() == 4 * 2**30
    monkeypatch.setenv(LIMIT, "0.0001")
    assert matrix_limit() == 1e5
    assert isinstance(CTProjector(GEOMETRIES["flat"]).weights, WeightsOnTheFly)
    for wrong in ("many", "-1", "nan", "inf"):
        monkeypatch.setenv(LIMIT, wrong)
        with pytest.raises(StudyError, match="WARDROUND_CT_MATRIX_GB is no positive number of GB"):
            matrix_limit()


@pytest.mark.parametrize("x", [torch.ones(48, 48), torch.ones(1, 48, 47), torch.ones(1, 48, 48, dtype=torch.int64)])
def test_images_of_another_kind_are_refused(x: Tensor) -> None:
    with pytest.raises(GeometryError, match="images must be real floating point of shape"):
        CTProjector(GEOMETRIES["flat"]).A(x)


def test_a_geometry_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = MatrixCache(tmp_path / "cache")
    geometry = GEOMETRIES["flat"]
    x = _images(1, 48, 48)
    first = CTProjector(geometry, cache=cache).A(x)

    def refuse(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(ct_cache, "weight_matrix", refuse)
    assert torch.equal(CTProjector(geometry, cache=cache).A(x), first)
    # What does not change the weights does not change the key; what does, does.
    CTProjector(geometry.model_copy(update={"sweep": 360.0, "body_radius": 5.0}), cache=cache)
    with pytest.raises(AssertionError, match="built again"):
        CTProjector(geometry.model_copy(update={"offset": 0.75}), cache=cache)
    with pytest.raises(AssertionError, match="built again"):
        CTProjector(geometry, model="strip", cache=cache)
    assert [path.suffix for path in cache.folder.iterdir()] == [".npz"]


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_file_is_built_anew(tmp_path: Path, damage: bytes | None) -> None:
    cache = MatrixCache(tmp_path)
    geometry = GEOMETRIES["curved"]
    expected = cache.weights(geometry, "joseph")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    found = cache.weights(geometry, "joseph")
    assert (found != expected).nnz == 0
    assert (cache.weights(geometry, "joseph") != expected).nnz == 0


def test_the_oldest_goes_first_and_a_hit_makes_young(tmp_path: Path) -> None:
    geometries = [GEOMETRIES["flat"].model_copy(update={"offset": i / 8}) for i in range(4)]
    size = max(weight_matrix(g, "joseph").nnz * 8 for g in geometries) + 20_000
    cache = MatrixCache(tmp_path, limit_bytes=3 * size)
    names = []
    for age, geometry in enumerate(geometries[:3]):
        cache.weights(geometry, "joseph")
        (new,) = set(tmp_path.iterdir()) - set(names)
        os.utime(new, (1000 + age, 1000 + age))
        names.append(new)
    cache.weights(geometries[0], "joseph")
    cache.weights(geometries[3], "joseph")
    assert names[0].exists()
    assert not names[1].exists()
    assert len(list(tmp_path.iterdir())) == 3
    MatrixCache(tmp_path, limit_bytes=1000).weights(GEOMETRIES["parallel"], "joseph")  # larger than the cache
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_worked_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    weights = MatrixCache(tmp_path / "file").weights(GEOMETRIES["flat"], "joseph")
    assert (weights != weight_matrix(GEOMETRIES["flat"], "joseph")).nnz == 0


def test_a_found_matrix_is_not_estimated_and_still_has_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, geometry = MatrixCache(tmp_path), GEOMETRIES["flat"]
    CTProjector(geometry, cache=cache)
    with pytest.raises(GeometryError, match="above the limit"):
        CTProjector(geometry, cache=cache, storage="stored", memory_limit=1e5)

    def refuse(*_: Any) -> None:
        raise AssertionError("estimated")

    monkeypatch.setattr(ct, "estimate_bytes", refuse)
    assert isinstance(CTProjector(geometry, cache=cache).weights, StoredWeights)


def test_a_folder_of_somebody_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MatrixCache(tmp_path).weights(GEOMETRIES["flat"], "joseph")

    def refuse(*_: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "utime", refuse)
    assert MatrixCache(tmp_path).find(GEOMETRIES["flat"], "joseph") is not None


def test_other_code_and_arithmetic_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MatrixCache(tmp_path).weights(GEOMETRIES["flat"], "joseph")
    monkeypatch.setattr(ct_cache, "_builder", lambda: ["another", "numpy"])
    assert MatrixCache(tmp_path).find(GEOMETRIES["flat"], "joseph") is None


def test_the_disk_is_left_to_the_run_and_what_nobody_finished_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    old.touch()
    new.touch()
    os.utime(old, (1000, 1000))
    monkeypatch.setattr(ct_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    MatrixCache(tmp_path).weights(GEOMETRIES["flat"], "joseph")
    assert list(tmp_path.iterdir()) == [new]


def test_processes_that_build_at_once_disturb_nobody(tmp_path: Path) -> None:
    expected = weight_matrix(GEOMETRIES["flat"], "joseph")
    # Room for one file only: each throws out what another may be reading.
    size = int(expected.nnz * 8 * 1.1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: MatrixCache(tmp_path, size).weights(GEOMETRIES["flat"], "joseph"), range(24)))
    assert all((each != expected).nnz == 0 for each in found)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache() == MatrixCache(Path("/somewhere/wardround/projectors"))
    home = Path.home() / ".cache" / "wardround" / "projectors"
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_folder() == home
    monkeypatch.setenv(VARIABLE, "/elsewhere")
    assert user_cache() == MatrixCache(Path("/elsewhere/projectors"))
    monkeypatch.setenv(VARIABLE, "off")
    assert user_cache() is None


def test_weights_of_a_strip_through_the_middle_are_exact() -> None:
    """A view along the rows sees columns; a bin of 1.5 pixels covers one and a half of them."""
    geometry = CTGeometry(kind="parallel", size=(4, 4), views=1, bins=4, bin=1.5)
    weights = weight_matrix(geometry, "strip").toarray().reshape(4, 4, 4)
    expected = np.array([[0, 0, 0, 0], [0.5 / 1.5, 1 / 1.5, 0, 0], [0, 0, 1 / 1.5, 0.5 / 1.5], [0, 0, 0, 0]])
    expected[0, 0], expected[3, 3] = 0.5 / 1.5, 0.5 / 1.5
    np.testing.assert_allclose(weights, np.repeat(expected[:, None], 4, 1), atol=1e-6)
