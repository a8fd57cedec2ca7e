"""The CT task on made-up hospitals: what a batch holds, whose patients a new scanner sees, what a run reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.ct_hospitals import GEOMETRY, OTHER, SIZE, ct_study, make_ct_hospitals

import wardround
from wardround.errors import StudyError
from wardround.imaging.acquisition.ct import cache as ct_cache
from wardround.imaging.acquisition.ct.cache import VARIABLE
from wardround.imaging.datasets.ct import CTFolder
from wardround.results.files import read_result
from wardround.runs.machine import Machine
from wardround.study.load import load_study
from wardround.study.sites import Egress, SiteData, SitesFile, load_sites
from wardround.tasks.build import build_task
from wardround.tasks.ct import CTBatch, CTDataset, CTReconstruction
from wardround.tasks.ct_metrics import ct_scores
from wardround.tasks.task import Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_ct_hospitals(tmp_path_factory.mktemp("hospitals"))


def _task(**changes: Any) -> CTReconstruction:
    task = build_task(load_study(ct_study(**changes)))
    assert isinstance(task, CTReconstruction)
    return task


def _augmenting(augment: bool) -> CTReconstruction:
    return _task(task={**ct_study()["task"], "augment": augment})


def _same(one: CTBatch, other: CTBatch) -> bool:
    parts = zip(one.parts, other.parts, strict=True)
    return all(torch.equal(p.data, q.data) and torch.equal(p.target, q.target) for p, q in parts)


def _random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_batch_holds_scans_that_fit_their_target(folders: dict[str, Path]) -> None:
    dataset = _task().dataset("A", (folders["A"],))
    batch = dataset.batch([0, 1, 2], _random())
    (part,) = batch.parts
    assert len(batch) == 3
    assert part.data.shape == (3, 24, 48)
    assert batch.target.shape == batch.body.shape == (3, SIZE, SIZE)
    assert {part.data.dtype, batch.target.dtype, batch.body.dtype} == {torch.float32}
    noise = (part.operator.A(batch.target) - part.data).norm() / part.data.norm()
    assert 0.005 < noise < 0.1
    tissue = batch.target[batch.body > 0]
    assert 0.5 < float(tissue.mean()) < 1.0
    assert float(batch.target[batch.body == 0].mean()) < 0.1


def test_the_same_random_state_gives_the_same_batch_in_every_arm(folders: dict[str, Path]) -> None:
    for augment in (False, True):
        one, other = (_augmenting(augment).dataset("A", (folders["A"],)) for _ in range(2))
        first = one.batch([2, 1], _random(2))
        assert _same(first, other.batch([2, 1], _random(2)))
        assert _same(first, one.batch([2, 1], _random(2)))


def test_a_memory_too_small_for_scans_changes_nothing(folders: dict[str, Path]) -> None:
    task = _task()
    roomy = task.dataset("A", (folders["A"],))
    tight = CTDataset(roomy._index, task.scanner("A"), task.config, seed=5, cache_bytes=100)
    for _ in range(2):
        assert _same(roomy.batch([0], _random(1)), tight.batch([0], _random(1)))


def test_augmentation_turns_the_patient_and_draws_new_noise_in_training_only(folders: dict[str, Path]) -> None:
    plain, turning = (_augmenting(augment).dataset("A", (folders["A"],)) for augment in (False, True))
    draws = [turning.batch([0], _random(seed)) for seed in range(12)]
    still = plain.batch([0], _random(1))
    # Turned by quarters, so that nothing is blurred: the values are the patient's own, in another order.
    for draw in draws:
        torch.testing.assert_close(draw.target.flatten().sort().values, still.target.flatten().sort().values)
        assert draw.body.sum() == still.body.sum()
    assert len({draw.target.numpy().tobytes() for draw in draws}) > 2
    sinograms = {draw.parts[0].data.numpy().tobytes() for draw in draws}
    assert len(sinograms) == len(draws)
    for split in ("validation", "test"):
        pairs = zip(plain.evaluation(split), turning.evaluation(split), strict=True)  # type: ignore[arg-type]
        assert all(_same(a, b) for (_, a), (_, b) in pairs)


def test_pooled_batches_mix_geometries_and_keep_the_order(folders: dict[str, Path]) -> None:
    task = _task()
    parts = [task.dataset(site, (folders[site],)) for site in "AB"]
    pooled = task.pooled(parts)
    first_of_b = len(parts[0])
    order = [0, first_of_b, first_of_b + 1, 1]
    batch = pooled.batch(order, _random(3))
    assert [len(part) for part in batch.parts] == [1, 2, 1]
    assert [tuple(part.data.shape[1:]) for part in batch.parts] == [(24, 48), (16, 56), (24, 48)]
    random = _random(3)
    alone = [parts[i >= first_of_b].batch([i - first_of_b * (i >= first_of_b)], random) for i in order]
    torch.testing.assert_close(batch.target, torch.cat([b.target for b in alone]))
    model = task.build_model()
    together = task.reconstruct(model, batch)
    torch.testing.assert_close(together, torch.cat([task.reconstruct(model, b) for b in alone]), rtol=1e-4, atol=1e-5)
    task.loss(model, batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("model", [{"kind": "unet", "preset": "tiny"}, {"kind": "modl", "preset": "tiny"}])
def test_every_model_trains_on_real_images(folders: dict[str, Path], model: dict[str, Any]) -> None:
    torch.manual_seed(0)
    task = _task(model=model)
    dataset = task.dataset("B", (folders["B"],))
    network = task.build_model()
    batch = dataset.batch(range(len(dataset)), _random())
    before = task.loss(network, batch).item()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        task.loss(network, batch).backward()
        optimizer.step()
    assert task.loss(network, batch).item() < 0.99 * before
    image = task.reconstruct(network, batch)
    assert not image.is_complex()
    assert float(image.min()) >= 0


def test_an_untrained_unet_is_the_filtered_back_projection(folders: dict[str, Path]) -> None:
    task = _task()
    batch = task.dataset("A", (folders["A"],)).batch([0], _random())
    torch.testing.assert_close(task.reconstruct(task.build_model(), batch), task.baseline("fbp", None, batch))


def test_total_variation_beats_filtered_back_projection(folders: dict[str, Path]) -> None:
    task = _task()
    batch = task.dataset("A", (folders["A"],)).batch([0, 1], _random())
    fbp = task.score_images(task.baseline("fbp", None, batch), batch)["psnr"].mean()
    weights = task.baseline_parameters("tv")
    best = max(float(task.score_images(task.baseline("tv", w, batch), batch)["psnr"].mean()) for w in weights)
    assert best > float(fbp) + 2
    with pytest.raises(StudyError, match="choose from fbp, tv, weighted_tv"):
        task.baseline("zero_filled", None, batch)


def test_a_new_scanner_sees_test_patients_of_the_members_and_nobody_else(folders: dict[str, Path]) -> None:
    task = _task()
    visits = task.visits("New", {site: (folders[site],) for site in "AB"})
    members = [task.dataset(site, (folders[site],)) for site in "AB"]
    assert (len(visits), visits.patients("train"), visits.patients("validation")) == (0, 0, 0)
    assert visits.patients("test") == sum(member.patients("test") for member in members)
    seen = [image for _, batch in visits.evaluation("test") for image in batch.target]
    # Same grid, so the very images: each is a test image of a member, and none is seen in training or validation.
    own = {
        split: [image for member in members for _, batch in member.evaluation(split) for image in batch.target]
        for split in SPLITS
    }
    assert len(seen) == len(own["test"]) > 1
    for image, expected in zip(seen, own["test"], strict=True):
        torch.testing.assert_close(image, expected)
    others = own["train"] + own["validation"]
    assert not any(torch.allclose(image, other) for image in seen for other in others)
    (_, first), *_ = visits.evaluation("test")
    (_, home), *_ = members[0].evaluation("test")
    assert first.parts[0].operator is not home.parts[0].operator or not _same(first, home)


def test_a_new_scanner_reads_test_patients_alone(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    task, read = _task(), []
    slices = CTFolder.slices
    monkeypatch.setattr(CTFolder, "slices", lambda self, p: read.append((self.site, p)) or slices(self, p))
    visits = task.visits("New", {site: (folders[site],) for site in "AB"})
    assert len(read) == visits.patients("test")
    # A site's own data are looked at as a whole, before anything is trained.
    task.dataset("A", (folders["A"],))
    assert {p for site, p in read if site == "A"} == set(range(len(CTFolder(folders["A"], "A"))))


def test_a_host_asks_no_entry_for_a_new_scanner_and_follows_all_members(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    study = load_study(ct_study())
    for withheld in ((), ("A",)):
        entries = {s: SiteData(data=(folders[s],), egress=Egress(per_site_results=s not in withheld)) for s in "AB"}
        host = Machine(study, SitesFile(sites=entries), tmp_path, ())
        assert host.dataset("New").patients("test") == sum(host.dataset(s).patients("test") for s in "AB")
        assert host.egress("New").per_site_results is not bool(withheld)
        assert host.egress("B").per_site_results


def test_metrics_know_their_ranges() -> None:
    water = torch.ones(1, 16, 16)
    body = torch.zeros(1, 16, 16)
    body[:, :8] = 1
    off = water.clone()
    off[:, :8] += 0.1  # 100 HU in half of the image, all of it body
    scores = {name: float(value) for name, value in ct_scores(off, water, body).items()}
    assert scores["rmse_hu"] == pytest.approx(100 / np.sqrt(2), rel=1e-4)
    assert scores["rmse_hu_body"] == pytest.approx(100, rel=1e-4)
    assert scores["psnr"] == pytest.approx(20 * np.log10(4096 * np.sqrt(2) / 100), abs=1e-3)
    assert scores["psnr_soft"] == pytest.approx(20 * np.log10(400 * np.sqrt(2) / 100), abs=1e-3)
    assert scores["psnr_lung"] == pytest.approx(20 * np.log10(1500 * np.sqrt(2) / 100), abs=1e-3)
    assert scores["ssim"] < 1
    same = ct_scores(torch.full((1, 16, 16), 9.0), torch.full((1, 16, 16), 5.0), body)
    assert float(same["rmse_hu"]) == 0  # both lie above what 12 bits hold


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {"size": [64, 64]}}, r"size \[32, 32\] and the task \[64, 64\]"),
        ({"task": {"size": [32, 32], "evaluation": {"baselines": ["zero_filled"]}}}, "'zero_filled' is none of CT"),
        ({"acquisition": {"kind": "ct", "geometry": GEOMETRY | {"bins": 20}}}, "field of view misses the patient"),
        ({"acquisition": {"coils": 4}}, "one modality"),
    ],
)
def test_studies_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        build_task(load_study(ct_study(**change)))


def test_mri_takes_neither_ct_baselines_nor_augmentation() -> None:
    for task, message in (({"evaluation": {"baselines": ["fbp"]}}, "none of MRI"), ({"augment": True}, "only for CT")):
        with pytest.raises(StudyError, match=message):
            load_study({"name": "mri", "sites": {"A": {}}, "task": task})


def test_a_run_of_two_hospitals_ends_in_a_report(folders: dict[str, Path], tmp_path: Path) -> None:
    sites = SitesFile(sites={site: SiteData(data=(folders[site],)) for site in "AB"})
    out = tmp_path / "run"
    result = wardround.run(load_study(ct_study()), sites, out, compare=("local", "pooled"), engine="local")
    metrics = read_result(out).metrics
    assert set(metrics) == {"fbp", "tv", "weighted_tv", "local", "federated", "pooled", "baseline"}
    assert metrics["tv"]["mean"]["psnr"].value > metrics["fbp"]["mean"]["psnr"].value
    assert metrics["federated"]["New"]["rmse_hu_body"].n == sum(result.patients[site]["test"] for site in "AB")
    page = (out / "report.html").read_text()
    assert "FBP" in page
    assert "soft tissue" in page
    assert "Doe" not in page


def test_other_geometries_are_other_scanners() -> None:
    task = _task()
    assert task.scanner("A") is not task.scanner("B")
    assert task.scanner("B").acquisition.geometry.views == OTHER["views"]
    assert task.scanner("A") is task.scanner("A")


def test_scanners_are_built_once_on_a_machine(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def images() -> CTBatch:
        return _task().dataset("A", (folders["A"],)).batch([0], _random())

    def refuse(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setenv(VARIABLE, "off")
    expected = images()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    assert _same(images(), expected)
    assert len(list((tmp_path / "cache" / "projectors").glob("*.npz"))) == 3  # projector, back projection, simulation
    monkeypatch.setattr(ct_cache, "weight_matrix", refuse)
    assert _same(images(), expected)
    assert all(path.is_dir() or path.suffix == ".npz" for path in (tmp_path / "cache").rglob("*"))


@pytest.mark.data("luad-ct")
def test_the_example_of_real_hospitals_opens() -> None:
    examples = Path(__file__).parents[2] / "examples"
    sites = load_sites(examples / "luad-sites.yaml")
    study = load_study(examples / "luad-ct.yaml")
    host = Machine(study, sites, Path(), ())
    counts = {site: [host.dataset(site).patients(split) for split in SPLITS] for site in study.sites}
    assert {site: sum(of) for site, of in counts.items()} == {
        "WashU": 22,
        "Pittsburgh": 7,
        "UNC": 2,
        "Roswell": 7,
        "NewScanner": sum(counts[site][2] for site in study.training_sites),
    }
    assert counts["UNC"] == [1, 0, 1]
    batch = host.dataset("UNC").batch([0], _random())
    fbp = host.task.score_images(host.task.baseline("fbp", None, batch), batch)  # type: ignore[attr-defined]
    assert 30 < float(fbp["psnr"]) < 40
