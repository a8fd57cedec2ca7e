"""The reconstruction task on a made-up hospital: what a batch holds, what is repeatable, what is never shared."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from tests.real_images import root_folder

from wardround.errors import DataError, StudyError
from wardround.models.unrolled import MoDL
from wardround.study import Study
from wardround.study.plugins import Plugins
from wardround.tasks.build import build_task
from wardround.tasks.metrics import RECONSTRUCTION_METRICS
from wardround.tasks.mri import MRIBatch, MRIDataset, MRIReconstruction
from wardround.tasks.reconstruction import PooledDataset

SIZE = 64


ANY = Plugins(code=True)


def _volume(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    y, x, z = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j, -0.4:0.4:4j]
    head = 90.0 * (x**2 + (y / 1.2) ** 2 + z**2 < 0.5)
    for centre in random.uniform(-0.4, 0.4, (5, 3)):
        head += 25.0 * (((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2) < 0.02)
    return head.astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hospitals")
    for site, count in (("A", 5), ("B", 4), ("C", 3)):
        for number in range(count):
            folder = root / site / f"patient-{number}"
            folder.mkdir(parents=True)
            image = nib.Nifti1Image(_volume(10 * ord(site) + number), np.eye(4))  # type: ignore[no-untyped-call]
            nib.save(image, folder / "flair.nii.gz")
    return {site: root / site for site in "ABC"}


def _study(**changes: Any) -> Study:
    study: dict[str, Any] = {
        "name": "test",
        "seed": 5,
        "sites": {
            "A": {},
            "B": {"acquisition": {"coils": 4, "mask": {"family": "equispaced", "calibration": 0.12}}},
            "C": {"role": "unseen"},
        },
        "acquisition": {"coils": 4, "mask": {"calibration": 0.12}},
        "task": {"kind": "reconstruction", "contrasts": ["flair"], "size": [SIZE, SIZE]},
        "model": {"kind": "modl", "preset": "tiny"},
    }
    return Study.model_validate(study | changes)


def _task(**changes: Any) -> MRIReconstruction:
    task = build_task(_study(**changes))
    assert isinstance(task, MRIReconstruction)
    return task


def _same(one: MRIBatch, other: MRIBatch) -> bool:
    return all(torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(MRIBatch))


@pytest.fixture
def dataset(folders: dict[str, Path]) -> MRIDataset:
    return _task().dataset("A", (folders["A"],))


def test_a_batch_holds_scans_that_fit_their_target(dataset: MRIDataset) -> None:
    batch = dataset.batch([0, 1, 2], np.random.default_rng(0))
    assert len(batch) == 3
    assert batch.kspace.shape == batch.maps.shape == (3, 4, SIZE, SIZE)
    assert batch.mask.shape == batch.target.shape == batch.head.shape == (3, SIZE, SIZE)
    assert batch.kspace.dtype == batch.maps.dtype == torch.complex64
    assert float(batch.target.max()) <= 1.0
    assert batch.mask[0].mean().item() == pytest.approx(0.25, abs=0.02)
    assert not batch.kspace[batch.mask[:, None].expand_as(batch.kspace) == 0].any()
    signal = batch.operator.A(batch.target.to(torch.complex64)).abs().square().sum()
    assert batch.kspace.abs().square().sum().item() == pytest.approx(signal.item(), rel=0.2)


def test_the_same_random_state_gives_the_same_batch_in_every_arm(folders: dict[str, Path]) -> None:
    one, other = (_task().dataset("A", (folders["A"],)) for _ in range(2))
    first = one.batch([3, 1], np.random.default_rng(2))
    assert _same(first, other.batch([3, 1], np.random.default_rng(2)))
    assert _same(first, one.batch([3, 1], np.random.default_rng(2)))  # from the memory of scans


def test_a_memory_too_small_for_scans_changes_nothing(folders: dict[str, Path]) -> None:
    roomy = _task().dataset("A", (folders["A"],))
    tight = MRIDataset(roomy._index, roomy.acquisition, _task().config, seed=5, cache_bytes=1000)
    for _ in range(2):
        assert _same(roomy.batch([0], np.random.default_rng(1)), tight.batch([0], np.random.default_rng(1)))


def test_flips_come_before_the_scan_and_only_in_training(folders: dict[str, Path]) -> None:
    dataset = _task().dataset("A", (folders["A"],))
    seen = [dataset.batch([0], np.random.default_rng(seed)) for seed in range(8)]
    plain = next(b for b in seen if torch.equal(b.target, seen[0].target))
    flipped = next(b for b in seen if not torch.equal(b.target, seen[0].target))
    assert torch.equal(flipped.target.flip(-1), plain.target)
    assert torch.equal(flipped.head.flip(-1), plain.head)
    assert torch.equal(flipped.mask, plain.mask)  # the patient's, whichever way round
    never = _task(task={"kind": "reconstruction", "contrasts": ["flair"], "size": [SIZE, SIZE], "flips": False})
    still = never.dataset("A", (folders["A"],))
    assert len({still.batch([0], np.random.default_rng(s)).target.sum().item() for s in range(4)}) == 1


@pytest.mark.parametrize("fixed", [True, False])
def test_masks_belong_to_patients_or_to_the_site(folders: dict[str, Path], fixed: bool) -> None:
    mask = {"calibration": 0.12, "fixed": fixed}
    dataset = _task(acquisition={"coils": 4, "mask": mask}).dataset("A", (folders["A"],))
    batch = dataset.batch(range(len(dataset)), np.random.default_rng(0))
    patients = [example.patient for example in dataset._train]
    masks = {(patient, batch.mask[i].numpy().tobytes()) for i, patient in enumerate(patients)}
    assert len(masks) == len(set(patients))
    assert len({key for _, key in masks}) == (1 if fixed else len(set(patients)))


def test_evaluation_goes_patient_by_patient_and_counts_agree(dataset: MRIDataset) -> None:
    for split in ("train", "validation", "test"):
        numbers = [patient for patient, _ in dataset.evaluation(split)]  # type: ignore[arg-type]
        assert numbers == sorted(numbers)
        assert len(set(numbers)) == dataset.patients(split)  # type: ignore[arg-type]
    tuned = [len(batch) for _, batch in dataset.evaluation("validation")]
    assert sum(tuned) == 2 * dataset.patients("validation")


def test_an_unseen_site_is_only_tested(folders: dict[str, Path]) -> None:
    dataset = _task().dataset("C", (folders["C"],))
    assert len(dataset) == 0
    assert (dataset.patients("train"), dataset.patients("test")) == (0, 3)


def test_every_site_scans_with_its_own_protocol(folders: dict[str, Path]) -> None:
    task = _task()
    masks = {site: task.dataset(site, (folders[site],)).batch([0], np.random.default_rng(0)).mask for site in "AB"}
    gaps = {site: np.diff(np.flatnonzero(mask[0, 0].numpy())) for site, mask in masks.items()}
    # Away from the calibration lines, equispaced lines keep one distance, give or take the grid; random ones do not.
    outer = {site: np.ptp([*between[:2], *between[-2:]]) for site, between in gaps.items()}
    assert outer["B"] <= 1 < outer["A"]


def test_pooled_examples_run_over_all_sites_in_order(folders: dict[str, Path]) -> None:
    task = _task()
    parts = [task.dataset(site, (folders[site],)) for site in "AB"]
    pooled = task.pooled(parts)
    assert isinstance(pooled, PooledDataset)
    assert len(pooled) == len(parts[0]) + len(parts[1])
    batch = pooled.batch([len(parts[0]), 0], np.random.default_rng(0))
    targets = [parts[1]._index.image(parts[1]._train[0]), parts[0]._index.image(parts[0]._train[0])]
    for found, target in zip(batch.target.numpy(), targets, strict=True):
        assert np.array_equal(found, target) or np.array_equal(found, target[:, ::-1])
    numbers = [patient for patient, _ in pooled.evaluation("test")]
    assert sorted(set(numbers)) == list(range(pooled.patients("test")))
    assert pooled.fingerprint() != task.pooled(parts[:1]).fingerprint()
    with pytest.raises(IndexError):
        pooled.batch([len(pooled)], np.random.default_rng(0))


def test_sites_with_other_coils_share_a_batch_and_nothing_changes(folders: dict[str, Path]) -> None:
    task = _task(sites={"A": {}, "B": {"acquisition": {"coils": 5, "mask": {"calibration": 0.12}}}})
    parts = [task.dataset(site, (folders[site],)) for site in ("A", "B")]
    flips = np.random.default_rng(0)
    alone = [part.batch([0], flips) for part in parts]
    together = task.pooled(parts).batch([0, len(parts[0])], np.random.default_rng(0))
    assert together.maps.shape[:2] == (2, 5)
    for number, batch in enumerate(alone):
        image = batch.operator.normal(batch.operator.A_adjoint(batch.kspace))
        joint = together.operator.normal(together.operator.A_adjoint(together.kspace))[number : number + 1]
        torch.testing.assert_close(joint, image, rtol=1e-5, atol=1e-6)


def test_scoring_leaves_the_model_as_it_was(folders: dict[str, Path]) -> None:
    task = _task(model={"kind": "modl", "preset": "tiny", "norm": "batch"})
    model = task.build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = task.dataset("A", (folders["A"],)).batch([0, 1], np.random.default_rng(0))
    scores = task.score(model, batch)
    assert tuple(scores) == tuple(spec.name for spec in RECONSTRUCTION_METRICS)
    assert all(values.shape == (2,) and not values.requires_grad for values in scores.values())
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_training_beats_where_it_began(folders: dict[str, Path]) -> None:
    torch.manual_seed(0)
    task = _task()
    dataset = task.dataset("A", (folders["A"],))
    model = task.build_model()
    assert isinstance(model, MoDL)
    (_, held_out), *_ = dataset.evaluation("test")
    before = task.score(model, held_out)["psnr"].mean()
    optimizer, random = torch.optim.Adam(model.parameters(), lr=3e-3), np.random.default_rng(0)
    for _ in range(40):
        optimizer.zero_grad()
        task.loss(model, dataset.batch(random.integers(len(dataset), size=2).tolist(), random)).backward()
        optimizer.step()
    zero_filled = task.score_images(task.baseline("zero_filled", None, held_out), held_out)["psnr"].mean()
    after = task.score(model, held_out)["psnr"].mean()
    assert after > before + 0.3
    assert after > zero_filled + 1.0


def test_baselines_have_weights_to_choose_from(dataset: MRIDataset) -> None:
    task = _task()
    batch = dataset.batch([0], np.random.default_rng(0))
    best = {}
    for name in ("zero_filled", "cg_sense", "tv", "tv_real"):
        images = [task.baseline(name, weight, batch) for weight in task.baseline_parameters(name)]
        best[name] = max(task.score_images(image, batch)["psnr"].item() for image in images)
    assert best["tv"] > best["cg_sense"] > best["zero_filled"]
    assert best["tv_real"] > best["zero_filled"]
    with pytest.raises(ValueError, match="needs a weight"):
        task.baseline("tv", None, batch)


def test_a_real_image_is_no_baseline_unless_asked_for_and_needs_maps_that_carry_the_phase() -> None:
    assert _study().baselines == ("zero_filled", "cg_sense", "tv")
    evaluation = {"baselines": ["zero_filled", "tv_real"]}
    task = {"kind": "reconstruction", "size": [SIZE, SIZE], "evaluation": evaluation}
    MRIReconstruction(_study(task=task))
    true_maps = {"maps": "true", "phase": 0.5}
    with pytest.raises(StudyError, match=r"tv_real needs coil maps that carry the phase.*take it out of task"):
        MRIReconstruction(_study(task=task, acquisition=true_maps))


def test_a_real_image_has_half_the_unknowns(folders: dict[str, Path]) -> None:
    """Where it is one: true maps, and no phase of its own."""
    task = _task(acquisition={"coils": 4, "noise": 0.02, "maps": "true", "phase": 0.0, "mask": {"calibration": 0.12}})
    batch = task.dataset("A", (folders["A"],)).batch([0], np.random.default_rng(0))
    real, any_image = (task.baseline(name, 0.002, batch) for name in ("tv_real", "tv"))
    psnr = [float(task.score_images(image, batch)["psnr"]) for image in (real, any_image)]
    assert psnr[0] > psnr[1]


def test_examples_are_single_test_slices_of_every_contrast(dataset: MRIDataset) -> None:
    task = _task()
    examples = list(task.examples(dataset))
    assert len(examples) == len(task.config.contrasts)
    assert all(task.reference(batch).shape == (1, SIZE, SIZE) for batch in examples)


def test_wrong_sites_and_folders_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no site 'Z'"):
        _task().dataset("Z", (folders["A"],))
    with pytest.raises(DataError, match="site A"):
        _task().dataset("A", (tmp_path / "nowhere",))


@pytest.mark.parametrize("patient", range(3))
def test_a_bad_image_of_any_patient_is_found_before_training(patient: int, tmp_path: Path) -> None:
    for number in range(3):
        image = _volume(number).astype(np.float32)
        image[5, 5, 1] = np.nan if number == patient else 0.0
        (tmp_path / f"patient-{number}").mkdir()
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"patient-{number}" / "flair.nii.gz")  # type: ignore[no-untyped-call]
    with pytest.raises(DataError, match="site A, contrast flair: an image holds NaN") as raised:
        _task().dataset("A", (tmp_path,))
    assert "patient-" not in str(raised.value)


def test_a_custom_task_comes_from_its_factory() -> None:
    study = _study(task={"kind": "custom", "factory": "types:SimpleNamespace", "options": {"metrics": ()}})
    with pytest.raises(StudyError, match="build_model, dataset"):
        build_task(study, plugins=ANY)
    with pytest.raises(StudyError, match=r"task\.options.*cannot be called"):
        build_task(_study(task={"kind": "custom", "factory": "textwrap:dedent", "options": {"depth": 3}}), plugins=ANY)
    for factory in ("no_such_package:make", "types:no_such_name"):
        with pytest.raises(StudyError, match="cannot be imported"):
            build_task(_study(task={"kind": "custom", "factory": factory}), plugins=ANY)


@pytest.mark.data("lgg")
def test_real_images_come_back_better_than_zero_filled() -> None:
    task = _task(
        sites={"CS": {}},
        task={"kind": "reconstruction", "contrasts": ["flair"], "evaluation": {"slices": {"per_patient": 1}}},
        acquisition={},
    )
    dataset = task.dataset("CS", (root_folder() / "lgg" / "CS",))
    scans = [batch for _, batch in dataset.evaluation("test")]

    def mean_psnr(name: str, weight: float | None) -> float:
        scores = [task.score_images(task.baseline(name, weight, batch), batch)["psnr"].mean() for batch in scans]
        return float(np.mean(scores))

    zero_filled = mean_psnr("zero_filled", None)
    assert zero_filled > 20
    assert mean_psnr("tv", 0.001) > zero_filled + 4


def test_training_scans_vary_and_all_others_are_the_scanners(folders: dict[str, Path]) -> None:
    acquisition = {"coils": 4, "mask": {"calibration": 0.12}, "reference": "scan"}
    vary = {"acceleration": [2, 5], "noise": [0.001, 0.02], "zoom": [0.7, 1.5], "turns": True}
    plain = _task(acquisition=acquisition).dataset("A", (folders["A"],))
    varied = _task(acquisition={**acquisition, "vary": vary}).dataset("A", (folders["A"],))
    for (_, one), (_, other) in zip(plain.evaluation("test"), varied.evaluation("test"), strict=True):
        assert _same(one, other)
    first, again, other = (varied.batch([0, 1], np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert _same(first, again)
    assert not _same(first, other)
    # Each scan has lines and a noise of its own; what is learned is the scan's own image, noise in the air included.
    assert not torch.equal(first.mask[0], first.mask[1])
    assert (first.target[first.head == 0] != 0).all()
    assert {mask.mean().item() for mask in plain.batch([0, 1], np.random.default_rng(1)).mask} == {0.25}
