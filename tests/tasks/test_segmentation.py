"""Segmentation: the loss and metrics against their equations, what is cropped, and a whole run on outlined blobs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.losses import DiceLoss
from monai.metrics import compute_hausdorff_distance
from pydantic import ValidationError
from tests.devices import DEVICES, device_named, step_and_evaluation
from tests.dicom_series import as_dicom, mr_series, seg_of
from tests.outlines import SIZE, blob, make_outlines, outline_study

import wardround
from wardround.errors import DataError, StudyError
from wardround.study.sites import SiteData, SitesFile
from wardround.tasks.augmentation import INTENSITY, SPATIAL, Augmentation, standard
from wardround.tasks.overlap import hd95, overlap_metrics, overlap_scores
from wardround.tasks.overlays import DRAWN, MARKED
from wardround.tasks.segmentation import Segmentation, SegmentationTask, overlap_loss

# The loss -------------------------------------------------------------------------------------------------------------


def drawn(seed: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random), (torch.rand(shape, generator=random) > 0.7).float()


@pytest.mark.parametrize("shape", [(3, 2, 8, 9), (2, 2, 4, 5, 6)])
def test_the_loss_is_monai_s_where_everything_is_drawn(shape: tuple[int, ...]) -> None:
    logits, masks = drawn(1, shape)
    known = torch.ones(shape[:2])
    dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)(logits, masks)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks)
    assert torch.isclose(overlap_loss(logits, masks, known, 1.0, 0.0), dice, rtol=1e-5)
    assert torch.isclose(overlap_loss(logits, masks, known, 0.0, 1.0), entropy, rtol=1e-5)
    assert torch.isclose(overlap_loss(logits, masks, known, 0.5, 2.0), 0.5 * dice + 2.0 * entropy, rtol=1e-5)


def test_a_structure_that_is_not_drawn_has_no_part_in_the_loss() -> None:
    logits, masks = drawn(2, (3, 2, 6, 6))
    known = torch.tensor([[1.0, 0.0]] * 3)
    logits.requires_grad_(True)
    loss = overlap_loss(logits, masks, known, 1.0, 1.0)
    assert torch.isclose(loss, overlap_loss(logits[:, :1], masks[:, :1], known[:, :1], 1.0, 1.0), rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[:, 1].any()
    assert gradient[:, 0].any()


def test_a_batch_of_two_sites_counts_each_structure_where_it_is_drawn() -> None:
    """Pooled data: the second structure is drawn in the second half alone."""
    logits, masks = drawn(3, (4, 2, 6, 6))
    known = torch.tensor([[1.0, 0.0]] * 2 + [[1.0, 1.0]] * 2)
    first = overlap_loss(logits[:, :1], masks[:, :1], known[:, :1], 1.0, 1.0)
    second = overlap_loss(logits[2:, 1:], masks[2:, 1:], known[2:, 1:], 1.0, 1.0)
    assert torch.isclose(overlap_loss(logits, masks, known, 1.0, 1.0), (first + second) / 2, rtol=1e-5)


# Metrics --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 11), (7, 10, 9)])
def test_hd95_is_monai_s(shape: tuple[int, ...]) -> None:
    for seed in range(4):
        random = np.random.default_rng(seed)
        a, b = (np.zeros(shape, bool) for _ in range(2))
        for mask in (a, b):
            corner = [int(random.integers(0, n // 2)) for n in shape]
            mask[tuple(slice(c, c + int(random.integers(2, n // 2))) for c, n in zip(corner, shape, strict=True))] = (
                True
            )
        spacing = [1.5, 2.0, 0.5][: len(shape)]
        batch = [torch.from_numpy(mask)[None, None].float() for mask in (a, b)]
        theirs = compute_hausdorff_distance(*batch, include_background=True, percentile=95, spacing=spacing)
        assert hd95(a, b, spacing) == pytest.approx(float(theirs), rel=1e-5)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_scores_follow_their_equations(one: int, other: int) -> None:
    a, b = (np.random.default_rng(seed).random((5, 6)) < 0.4 for seed in (one, other))
    scores = overlap_scores(torch.from_numpy(a)[None], torch.from_numpy(b)[None], [True], ["x"], (1.0, 1.0))
    found = {name: float(value) for name, value in scores.items()}
    assert set(found) == {spec.name for spec in overlap_metrics(["x"], "mm")}
    if not b.any():
        assert found.pop("false_alarm") == float(a.any())
        assert all(math.isnan(value) for value in found.values())
        return
    both = (a & b).sum()
    assert found["dice"] == pytest.approx(2 * both / (a.sum() + b.sum()))
    assert found["sensitivity"] == pytest.approx(both / b.sum())
    assert found["volume_error"] == pytest.approx(abs(int(a.sum()) - int(b.sum())) / b.sum())
    assert math.isnan(found["false_alarm"])
    assert found["hd95"] == pytest.approx(hd95(b, a, (1.0, 1.0)))
    assert (found["hd95"] == 0.0) >= bool((a == b).all())


def test_several_structures_have_a_mean_and_names() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, :2], masks[1, :1] = True, True
    scores = overlap_scores(masks, masks, [True, True, True], ["a", "b", "c"], (1.0, 1.0))
    assert set(scores) == {spec.name for spec in overlap_metrics(["a", "b", "c"], "mm")}
    assert float(scores["dice"]) == 1.0
    assert math.isnan(float(scores["dice_c"]))
    unknown = overlap_scores(masks, masks, [True, False, True], ["a", "b", "c"], (1.0, 1.0))
    assert math.isnan(float(unknown["dice_b"]))
    assert math.isnan(float(unknown["false_alarm_b"]))


def test_a_tumour_that_was_missed_is_as_far_as_the_image() -> None:
    true = np.zeros((4, 4), bool)
    true[1, 1] = True
    assert hd95(np.zeros_like(true), true, (3.0, 1.0)) == pytest.approx(math.hypot(12, 4))
    assert hd95(np.zeros_like(true), np.zeros_like(true), (3.0, 1.0)) == 0.0


# Augmentation ---------------------------------------------------------------------------------------------------------


def test_augmentation_is_of_its_random_numbers_alone_and_moves_both_alike() -> None:
    turn = {"name": "RandAffined", "prob": 1.0, "rotate_range": 0.4, "mode": ["nearest", "nearest"]}
    augmentation = Augmentation([{"name": "RandFlipd", "prob": 0.5, "spatial_axis": 0}, turn])
    image = torch.rand(1, 16, 16)
    for seed in range(3):
        once = augmentation(image, image, np.random.default_rng(seed))
        torch.rand(5), np.random.rand(5)
        again = augmentation(image, image, np.random.default_rng(seed))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        assert torch.equal(once[0], once[1])
        assert type(once[0]) is torch.Tensor


ARGUMENTS: dict[str, dict[str, Any]] = {
    "Rand2DElasticd": {"spacing": (4, 4), "magnitude_range": (0, 1), "rotate_range": 0.2},
    "Rand3DElasticd": {"sigma_range": (1, 2), "magnitude_range": (0, 1)},
    "RandCoarseDropoutd": {"holes": 2, "spatial_size": 3},
    "RandScaleIntensityd": {"factors": 0.3},
    "RandShiftIntensityd": {"offsets": 0.3},
    "RandHistogramShiftd": {"num_control_points": (3, 6)},
    "RandZoomd": {"min_zoom": 0.8, "max_zoom": 1.2},
    "RandRotated": {"range_x": 0.5},
    "RandAffined": {"rotate_range": 0.5, "translate_range": 2},
}


@pytest.mark.parametrize("name", [*SPATIAL, *INTENSITY])
def test_a_chain_draws_what_monai_draws_from_the_same_seed(name: str) -> None:
    """Seeded in place: whatever was drawn before, the transforms draw as after MONAI's own `set_random_state`."""
    torch.manual_seed(1)
    step = {"name": name, "prob": 0.7, **ARGUMENTS.get(name, {})}
    image = torch.rand(1, *[8] * (3 if "3D" in name else 2))
    mine, theirs = (Augmentation([step, {"name": "RandFlipd", "prob": 0.5}]) for _ in range(2))
    for seed in range(4):
        # Copies: some of MONAI's transforms write into what they are given.
        once = mine(image.clone(), image.clone(), np.random.default_rng(seed))
        theirs._chain.set_random_state(seed=int(np.random.default_rng(seed).integers(2**32)))
        again = theirs._chain({"image": image.clone(), "mask": image.clone()})
        assert torch.equal(once[0], torch.as_tensor(again["image"]))
        assert torch.equal(once[1], torch.as_tensor(again["mask"]))
        assert torch.equal(once[0], mine.of_image(image.clone(), np.random.default_rng(seed)))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_standard_chain_keeps_shapes_and_masks(dimensions: int) -> None:
    image, mask = torch.randn(2, *[8] * dimensions), (torch.rand(1, *[8] * dimensions) > 0.5).float()
    changed, moved = Augmentation(standard(dimensions))(image, mask, np.random.default_rng(1))
    assert changed.shape == image.shape
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert moved.sum() == mask.sum()


def test_only_listed_transforms_are_made() -> None:
    import monai.transforms

    assert all(hasattr(monai.transforms, name) for name in (*SPATIAL, *INTENSITY))
    with pytest.raises(StudyError, match=r"task\.augment: 'Lambdad' is none of RandFlipd"):
        Augmentation([{"name": "Lambdad", "func": "os.system"}])
    with pytest.raises(StudyError, match="RandFlipd cannot be made"):
        Augmentation([{"name": "RandFlipd", "likelihood": 1}])


# The task -------------------------------------------------------------------------------------------------------------


def task_of(root: Path, **task: Any) -> tuple[Segmentation, Any]:
    sites = make_outlines(root, {"A": 5}, without=1)
    study = outline_study({"A": {}}, task=task)
    assert isinstance(study.task, SegmentationTask)
    made = Segmentation(study, study.task)
    return made, made.dataset("A", sites.of("A").data)


def test_examples_are_slices_with_the_structure_and_some_of_the_rest(tmp_path: Path) -> None:
    _, data = task_of(tmp_path, split={"validation": 0.0, "test": 0.0}, empty_every=2)
    batch = data.batch(range(len(data)), np.random.default_rng(0))
    assert batch.images.shape == (len(data), 1, SIZE, SIZE)
    shown = batch.masks.amax(dim=(1, 2, 3)) > 0
    owners = np.array(data.owners())
    for patient in range(5):
        mine = shown[torch.from_numpy(owners == patient)]
        assert mine.any() == (patient < 4)
    assert (~shown).any()


def test_a_patch_is_around_the_structure_as_often_as_asked(tmp_path: Path) -> None:
    _, data = task_of(tmp_path, patch=[8, 8], foreground=1.0, split={"validation": 0.0, "test": 0.0}, empty_every=100)
    drawn = [i for i, owner in enumerate(data.owners()) if owner < 4]
    for seed in range(3):
        batch = data.batch(drawn, np.random.default_rng(seed))
        shown = (batch.masks.amax(dim=(1, 2, 3)) > 0).float().mean()
        assert shown >= 1.0 - 2 * 4 / len(drawn)  # the few slices without it


def test_3d_patches_and_whole_volumes_in_the_image_s_own_grid(tmp_path: Path) -> None:
    task, data = task_of(
        tmp_path, dimensions=3, patch=[16, 16, 8], spacing=[2.0, 2.0, 3.0], patches_per_image=2,
        split={"validation": 0.0, "test": 0.4},
    )  # fmt: skip
    batch = data.batch([0, 1], np.random.default_rng(0))
    assert batch.images.shape == batch.masks.shape == (2, 1, 16, 16, 8)
    (_, whole), *_ = data.evaluation("test")
    assert whole.images.shape == (1, 1, 16, 16, 4)
    assert whole.masks.shape == (1, 1, SIZE, SIZE, 4)
    assert whole.spacing == (1.0, 1.0, 3.0)
    scores = task.score(task.build_model(), whole)
    assert {name: tuple(value.shape) for name, value in scores.items()} == {m.name: (1,) for m in task.metrics}


def test_a_perfect_network_scores_one(tmp_path: Path) -> None:
    """The truth as logits, through windows and resampling: slices, windows and axes are put together rightly."""

    class Truth(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    for task in ({}, {"patch": [16, 16]}, {"dimensions": 3, "patch": [16, 16, 4]}):
        made, data = task_of(tmp_path / str(len(str(task))), **task, split={"validation": 0.0, "test": 0.6})
        for _, batch in data.evaluation("test"):
            seen = type(batch)(batch.masks * 2 - 1, batch.masks, batch.known, batch.spacing)
            scores = {name: float(value) for name, value in made.score(Truth(), seen).items()}
            if math.isnan(scores["dice"]):
                assert scores["false_alarm"] == 0.0
            else:
                assert (scores["dice"], scores["hd95"], scores["volume_error"]) == (1.0, 0.0, 0.0)


def test_a_volume_of_one_slice_is_measured_in_its_plane(tmp_path: Path) -> None:
    sites = make_outlines(tmp_path, {"A": 3}, slices=1)
    study = outline_study({"A": {}}, task={"split": {"validation": 0.0, "test": 0.6}})
    assert isinstance(study.task, SegmentationTask)
    task = Segmentation(study, study.task)
    (_, batch), *_ = task.dataset("A", sites.of("A").data).evaluation("test")
    assert batch.spacing == (3.0, 1.0, 1.0)
    seen = type(batch)(batch.masks * 2 - 1, batch.masks, batch.known, batch.spacing)
    scores = task.score(torch.nn.Identity(), seen)
    assert (float(scores["dice"]), float(scores["hd95"])) == (1.0, 0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dimensions", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_and_an_evaluation_on_any_device(
    tmp_path: Path, device: str, dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = device_named(device, monkeypatch)
    sites = make_outlines(tmp_path, {"A": 5})
    task = {"dimensions": dimensions, "patch": [16, 16, 4][:dimensions], "augment": "none"}
    study = outline_study({"A": {}}, task=task, local={"steps": 1, "batch": 2})
    assert step_and_evaluation(study, sites.of("A").data[0], compute)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"patch": [16]}, "task.patch needs 2 numbers"),
        ({"dimensions": 3, "patch": [8, 8, 8], "resize": [16, 16]}, "task.resize is for 2-D"),
        ({"spacing": [1.0]}, "task.spacing needs 2 positive numbers"),
        ({"annotated": {"A": ["brain"]}}, "task.annotated.A: 'brain' is not in task.structures"),
    ],
)
def test_a_section_that_does_not_fit_together(task: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        outline_study({"A": {}}, task=task)


def test_a_value_that_is_not_declared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a mask holds the value 1, which task\.structures does not list"):
        task_of(tmp_path, structures={"tumour": [2]})


def test_other_data_have_another_fingerprint(tmp_path: Path) -> None:
    _, one = task_of(tmp_path / "1")
    _, same = task_of(tmp_path / "2")
    assert one.fingerprint() == same.fingerprint()
    _, other = task_of(tmp_path / "3", structures={"tumour": "any"})
    assert one.fingerprint() != other.fingerprint()


# A whole run ----------------------------------------------------------------------------------------------------------


def test_a_run_outlines_blobs_and_counts_patients_without_one_apart(tmp_path: Path) -> None:
    made = make_outlines(tmp_path / "data", {"A": 9, "B": 8}, slices=2, without=2)
    (tmp_path / "data" / "A" / "DOE-00" / "image.nii.gz").write_bytes(b"damaged")
    sites = SitesFile(sites={**made.sites, "A": made.of("A").model_copy(update={"quarantine": 0.2})})
    study = outline_study({"A": {}, "B": {}}, task={"split": {"validation": 0.1, "test": 0.5}, "augment": "none"})
    result = wardround.run(study, sites, tmp_path / "out", engine="local")
    mean = result.metrics["federated"]["mean"]
    dice, alarms = mean["dice"], mean["false_alarm"]
    assert dice is not None
    assert dice.value > 0.5
    assert alarms is not None
    assert result.set_aside == {"A": 1, "B": 0}
    assert "Patients set aside at their site, for their files cannot be used: A (1)." in result.report.read_text()


def test_a_run_on_dicom_is_the_run_on_nifti_of_the_same_voxels(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    made = make_outlines(tmp_path / "nifti", {"A": 4, "B": 4}, slices=2)
    as_dicom(tmp_path / "nifti", tmp_path / "dicom")
    as_they_are = SitesFile(sites={s: SiteData(data=tmp_path / "dicom" / s) for s in made.sites})  # type: ignore[arg-type]
    local = {"steps": 2, "batch": 2, "optimizer": "adam", "lr": 0.02}
    study = outline_study({"A": {}, "B": {}}, local=local, schedule={"rounds": 1})
    nifti, dicom = (
        wardround.run(study, sites, tmp_path / name, engine="local")
        for name, sites in (("one", made), ("two", as_they_are))
    )
    assert dicom.set_aside == {"A": 0, "B": 0}
    assert dicom.model_sha256 == nifti.model_sha256
    assert dicom.metrics == nifti.metrics
    page = dicom.report.read_text()
    assert not any(secret in page for secret in ("MUELLER", "PAT-7731", "DOE-"))


def test_segments_that_overlap_are_structures_that_overlap(tmp_path: Path) -> None:
    """As `wardround predict` writes them: the whole and its core, both of voxels of the core."""
    pytest.importorskip("highdicom")
    image, ball = blob(3, 4)
    core = ball.astype(bool) & (np.indices(ball.shape)[0] % 2 == 0)
    for patient in range(3):
        folder = tmp_path / f"DOE-{patient}"
        seg_of(mr_series(folder / "image", image), np.stack([ball > 0, core]), folder / "mask.dcm", ["whole", "core"])
    study = outline_study({"A": {}}, task={"structures": {"whole": [1], "core": [2], "any": "any"}})
    assert isinstance(study.task, SegmentationTask)
    data = Segmentation(study, study.task).dataset("A", tmp_path)
    (_, batch), *_ = data.evaluation("test")
    counts = batch.masks.sum(dim=(0, 2, 3)).tolist()
    assert counts == [ball.sum(), core.sum(), ball.sum()]
    less = outline_study({"A": {}}, task={"structures": {"whole": [1]}})
    assert isinstance(less.task, SegmentationTask)
    with pytest.raises(DataError, match=r"a mask holds the value 2, which task\.structures does not list"):
        Segmentation(less, less.task).dataset("A", tmp_path)


def test_a_volume_is_trained_on_tested_and_shown(tmp_path: Path) -> None:
    """Nothing outside a task takes an image for a slice: 3-D from the first round to the picture in the report."""
    sites = make_outlines(tmp_path / "data", {"A": 6, "B": 6}, slices=16)
    split = {"validation": 0.0, "test": 0.5}
    task = {"dimensions": 3, "patch": [16] * 3, "spacing": [2.0, 2.0, 3.0], "split": split, "augment": "none"}
    local = {"steps": 2, "batch": 1, "optimizer": "adam", "lr": 0.02}
    study = outline_study({"A": {}, "B": {}}, task=task, local=local, schedule={"rounds": 2})
    result = wardround.run(study, sites, tmp_path / "out", engine="local")
    dice = result.metrics["federated"]["mean"]["dice"]
    assert dice is not None
    assert dice.n == 6
    page = result.report.read_text()
    assert "Worst test patient" in page
    assert "drawn at the site" in page
    assert "DOE-" not in page
    with np.load(tmp_path / "out" / "sites" / "A" / "pictures.npz") as pictures:
        drawn = {key for key in pictures if key.startswith(("reference/", "federated/"))}
        assert len(drawn) == 6
        assert {pictures[key].shape for key in drawn} == {(320, 320, 3)}


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_picture_shows_the_fullest_slice_under_both_outlines(tmp_path: Path, dimensions: int) -> None:
    """A network that marks what the image shows as bright."""
    patch = [SIZE, SIZE, 4][:dimensions]
    sites = make_outlines(tmp_path, {"A": 4})
    study = outline_study({"A": {}}, task={"dimensions": dimensions, "patch": patch})
    assert isinstance(study.task, SegmentationTask)
    task = Segmentation(study, study.task)
    (batch,) = task.pictured(task.dataset("A", sites.of("A").data), [0])

    class Bright(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :1] - 1.7

    truth, found = task.illustrate(None, batch).picture, task.illustrate(Bright(), batch).picture
    masks = batch.masks.numpy() > 0.5
    volume = np.moveaxis(masks[:, 0], 0, -1) if dimensions == 2 else masks[0, 0]
    largest = volume.sum(axis=(0, 1)).argmax()
    filled = np.repeat(np.repeat(volume[..., largest].T[::-1, ::-1], 10, axis=0), 10, axis=1)
    blue = (truth == DRAWN).all(axis=-1)
    assert blue.any()
    assert not (blue & ~filled).any()
    assert not (truth == MARKED).all(axis=-1).any()
    assert (found == MARKED).all(axis=-1).any()
    assert np.array_equal((found == DRAWN).all(axis=-1), blue)
