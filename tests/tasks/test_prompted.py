"""Prompted segmentation: how prompts are drawn, that they stay the same, what is measured, and whole runs on blobs."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.devices import DEVICES, device_named, step_and_evaluation
from tests.outlines import SIZE, blob, image_study, make_outlines

import wardround
from wardround.errors import DataError, StudyError
from wardround.imaging.readers.cases import Case
from wardround.imaging.readers.labelled import read_image
from wardround.learning.frozen import freeze
from wardround.models.prompts import FIRST_CORNER, INSIDE, LAST_CORNER
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.weights import file_sha256
from wardround.study.places import Places
from wardround.study.prompts import BoxPrompt, PointPrompt
from wardround.study.schema import Study
from wardround.tasks.images import resampled
from wardround.tasks.located import Located, LocatedSegmentation
from wardround.tasks.prompted import PromptedSegmentation
from wardround.tasks.prompts import PromptedDataset, Prompting, box_of, prompt_of, restored, seen, squared

NETWORK = 64
UNSEEN = {"A": {"role": "unseen"}, "B": {}}


def prompted_study(sites: Any, **changes: Any) -> Study:
    """A study of the blobs, enlarged twofold; `changes` replace parts of the task (`task`), or of the study."""
    task = {
        "kind": "prompted_segmentation",
        "prompt": {"kind": "box", "jitter": 4},
        "slices": 2,
        "least": 5,
        "enlarge": True,
        "split": {"validation": 0.2, "test": 0.3},
    }
    return image_study(
        task,
        changes,
        name="prompted",
        sites=dict(sites),
        model={"kind": "lite_medsam", "preset": "tiny"},
        parts={"frozen": ["image_encoder.*"]},
        local={"steps": 2, "batch": 2, "optimizer": "adam", "lr": 0.003},
        schedule={"rounds": 2},
    )


def task_of(study: Study) -> PromptedSegmentation:
    found = study.task.build(study, {})
    assert isinstance(found, PromptedSegmentation)
    return found


def opened(root: Path, patients: int = 4, site: str = "A", **changes: Any) -> tuple[PromptedSegmentation, Any]:
    """The task, and the data of a site of blobs."""
    sites = make_outlines(root, {site: patients})
    task = task_of(prompted_study({site: {}}, **changes))
    return task, task.dataset(site, sites.of(site).data)


def prompting(prompt: Any) -> Prompting:
    return Prompting(prompt, NETWORK, 1, None, 1, True, 0)


# Prompts --------------------------------------------------------------------------------------------------------------


def test_a_box_is_around_the_mask_and_moves_by_no_more_than_its_jitter() -> None:
    mask = np.zeros((32, 32), bool)
    mask[10:14, 5:9] = True
    exact = np.array([[10.0, 20.0], [18.0, 28.0]], np.float32)
    assert np.array_equal(box_of(mask, 2.0, NETWORK), exact)
    random = np.random.default_rng(0)
    boxes = np.stack([prompt_of(mask, 2.0, prompting(BoxPrompt(jitter=3)), random) for _ in range(200)])
    away = np.abs(boxes - exact)
    assert 2.5 < away.max() <= 3.0
    # The mean of 200 uniform numbers of deviation 3 / sqrt(3), at 5 deviations of itself.
    assert np.abs((boxes - exact).mean(axis=0)).max() < 5 * math.sqrt(3.0) / math.sqrt(200)
    small = np.zeros((32, 32), bool)
    small[0, 0] = True
    for _ in range(50):
        low, high = prompt_of(small, 2.0, prompting(BoxPrompt(jitter=8)), random)
        assert (low >= 0.0).all()
        assert (low <= high).all()
        assert (high <= NETWORK - 1).all()


def test_points_lie_inside_the_mask() -> None:
    mask = np.zeros((32, 32), bool)
    mask[3, 7], mask[20, 2] = True, True
    given = prompting(PointPrompt(kind="points", count=5))
    assert given.means == (INSIDE,) * 5
    random = np.random.default_rng(1)
    points = np.concatenate([prompt_of(mask, 2.0, given, random) for _ in range(20)])
    # The middle of pixel (3, 7) is between pixels 14 and 15, and 6 and 7, of the enlarged image.
    assert {tuple(point) for point in points.tolist()} == {(14.5, 6.5), (4.5, 40.5)}
    assert not prompt_of(np.zeros_like(mask), 2.0, given, random).any()


def test_a_jitter_of_nothing_is_an_oracle_and_no_prompt() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        prompted_study({"A": {}}, task={"prompt": {"kind": "box", "jitter": 0}})


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (30, 30), (70, 50)])
def test_a_picture_fills_a_square_and_comes_back(shape: tuple[int, int]) -> None:
    rows, columns = np.meshgrid(*map(np.arange, shape), indexing="ij")
    picture = seen((50.0 + rows + 2 * columns)[None], NETWORK)
    assert picture.shape == (1, NETWORK, NETWORK)
    assert (float(picture.min()), float(picture.max())) == (0.0, pytest.approx(1.0, abs=0.05))
    square = torch.from_numpy((rows * 1.0)[None].astype("f4"))
    there_and_back = restored(squared(square, NETWORK)[None], shape)[0]
    # Linear in between: off by less than a pixel of the coarser grid, at borders by half of one more.
    assert float((there_and_back - square).abs().max()) <= 1.5 * max(1.0, max(shape) / NETWORK)


# A site's data --------------------------------------------------------------------------------------------------------


def test_prompts_are_the_same_in_every_evaluation_and_for_every_name(tmp_path: Path) -> None:
    task, data = opened(tmp_path / "once")
    first = [batch for _, batch in data.evaluation("test")]
    again = [batch for _, batch in data.evaluation("test")]
    renamed = tmp_path / "twice" / "A"
    renamed.mkdir(parents=True)
    for folder in (tmp_path / "once" / "A").iterdir():
        (renamed / folder.name).symlink_to(folder)
    other = task.dataset("A", (renamed,))
    pooled = task.pooled([other])
    for batches in (again, [b for _, b in other.evaluation("test")], [b for _, b in pooled.evaluation("test")]):
        assert all(torch.equal(one.points, same.points) for one, same in zip(first, batches, strict=True))
    batch = first[0]
    assert isinstance(data, PromptedDataset)
    assert batch.images.shape[1:] == (1, NETWORK, NETWORK)
    assert batch.masks.shape[2:] == (SIZE, SIZE)
    assert 1 <= len(batch) <= 2
    away = (batch.points - batch.exact).abs()
    assert 0.0 < float(away.max()) <= 4.0
    another = task_of(prompted_study({"A": {}}, seed=6)).dataset("A", (tmp_path / "once" / "A",))
    points = {tuple(b.points.flatten().tolist()) for d in (data, another) for _, b in d.evaluation("validation")}
    assert len(points) == 2


def test_training_prompts_come_from_the_step_alone(tmp_path: Path) -> None:
    task, data = opened(tmp_path, task={"augment": "standard"})
    assert not task.repeats
    one, same, other = (data.batch([0, 1], np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.points, same.points)
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.points, other.points)
    # A prompt follows its mask where the example was turned.
    for mask, exact in zip(one.masks[:, 0], one.exact[:, 0], strict=True):
        rows, columns = torch.nonzero(mask.amax(1))[:, 0], torch.nonzero(mask.amax(0))[:, 0]
        assert exact[0].tolist() == [float(columns.min()), float(rows.min())]


def test_what_is_too_small_has_no_prompt_and_does_not_count(tmp_path: Path) -> None:
    image, _ = blob(0, 3)
    mask = np.zeros(image.shape, np.uint8)
    mask[8:16, 8:16, 0], mask[2, 2, 1], mask[20, 20:22, 0] = 1, 1, 2
    folder = tmp_path / "A" / "P"
    folder.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "image.nii.gz")
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folder / "mask.nii.gz")
    study = prompted_study(UNSEEN, task={"structures": {"one": [1], "two": [2]}, "slices": None})
    data = task_of(study).dataset("A", (tmp_path / "A",))
    ((_, batch),) = data.evaluation("test")
    assert batch.prompted.tolist() == [[1.0, 0.0]]
    assert batch.masks.flatten(2).sum(2).tolist() == [[64.0, 0.0]]
    assert data.pictures() == 1
    scores = task_of(study).score(Everything(), batch)
    assert float(scores["sensitivity_one"]) == 1.0
    assert math.isnan(float(scores["dice_two"]))
    assert float(scores["dice"]) == float(scores["dice_one"])


def test_a_patient_without_a_structure_is_counted_without_a_value(tmp_path: Path) -> None:
    sites = make_outlines(tmp_path, {"A": 3}, without=1)
    task = task_of(prompted_study(UNSEEN))
    found = [task.score(Everything(), batch) for _, batch in task.dataset("A", sites.of("A").data).evaluation("test")]
    assert [math.isnan(float(scores["dice"])) for scores in found] == [False, False, True]


class Everything(torch.nn.Module):
    """Marks the whole image for every prompt."""

    def forward(self, images: torch.Tensor, points: torch.Tensor, means: Any) -> torch.Tensor:
        return torch.ones(len(images), points.shape[1], *images.shape[2:])


class Inside(torch.nn.Module):
    """Marks what is inside the box that it is given."""

    def forward(self, images: torch.Tensor, points: torch.Tensor, means: Any) -> torch.Tensor:
        assert means == (FIRST_CORNER, LAST_CORNER)
        at = torch.arange(images.shape[-1]) + 0.5
        (low, high) = points.unbind(2)
        across = (at >= low[..., :1]) & (at < high[..., :1])
        down = (at >= low[..., 1:]) & (at < high[..., 1:])
        return (down[..., None] & across[..., None, :]).float() * 2.0 - 1.0


def test_the_oracle_box_is_measured_beside_and_the_filled_box_is_what_it_says(tmp_path: Path) -> None:
    task, data = opened(tmp_path)
    assert [spec.name for spec in task.metrics] == ["dice", "hd95", "sensitivity", "volume_error", "oracle_dice"]
    for _, batch in data.evaluation("test"):
        drawn = batch.masks[:, 0].numpy() > 0.5
        boxes = np.zeros_like(drawn)
        for number, mask in enumerate(drawn):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            boxes[number, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        oracle = 2 * (boxes & drawn).sum() / (boxes.sum() + drawn.sum())
        network, filled = task.score(Inside(), batch), task.score_untrained("filled_prompt", Inside(), batch)
        for scores in (network, filled):
            assert float(scores["oracle_dice"]) == pytest.approx(oracle)
            assert float(scores["dice"]) < oracle
        assert float(filled["dice"]) == pytest.approx(float(network["dice"]), abs=0.1)


def test_a_network_learns_to_fill_its_prompt(tmp_path: Path) -> None:
    task, data = opened(tmp_path)
    torch.manual_seed(0)
    model = task.build_model()
    freeze(model, ["image_encoder.*"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.03)
    losses = []
    for step in range(10):
        loss = task.loss(model, data.batch([0, 1], np.random.default_rng(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_a_step_and_an_evaluation_on_any_device(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = make_outlines(tmp_path, {"A": 5})
    step_and_evaluation(prompted_study({"A": {}}), sites.of("A").data[0], device_named(device, monkeypatch))


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_says_what_the_model_did_before_it_learned(tmp_path: Path) -> None:
    """It starts from weights in a file; the row `zero_shot` is that model's, though what is released learned."""
    sites = make_outlines(tmp_path / "data", {"A": 5, "B": 5})
    torch.manual_seed(3)
    path = tmp_path / "base.safetensors"
    save_file(task_of(prompted_study({"A": {}})).build_model().state_dict(), path)
    study = prompted_study(
        {"A": {}, "B": {}}, start={"kind": "weights", "file": path.name, "sha256": file_sha256(path)}
    )
    result = wardround.run(study, sites, tmp_path / "out", near=tmp_path, engine="local")
    assert result.baselines.keys() == {"zero_shot", "filled_prompt"}
    assert result.baselines["zero_shot"].description == "the model that the study starts from, before any training"
    specs = ArmSpecs(study, (), places=Places((path,)))
    model = specs.model_context.model.eval()
    task = task_of(study)
    for site in ("A", "B"):
        data = task.dataset(site, sites.of(site).data)
        known = {
            name: float(task.score(model, batch)["volume_error"])
            for split in ("train", "validation", "test")
            for name, (_, batch) in zip(data.names(split), data.evaluation(split), strict=True)
        }
        with (tmp_path / "out" / "sites" / site / "patients.csv").open() as file:
            rows = [r for r in csv.DictReader(file) if (r["row"], r["metric"]) == ("zero_shot", "volume_error")]
        assert rows
        # Before training, and of networks that mark anything or nothing: the error of the volume tells them apart.
        for row in rows:
            assert float(row["value"]) == pytest.approx(min(10.0, known[row["folder"]]), rel=1e-3)
    kept = list((tmp_path / "out" / "work" / "sites").glob("*/embeddings/*/*"))
    seen_by = sum(task.dataset(site, sites.of(site).data).pictures() for site in ("A", "B"))
    assert len(kept) == seen_by
    predicted = wardround.predict(
        tmp_path / "out" / "models" / "federated.safetensors", tmp_path / "data" / "A" / "DOE-00", tmp_path / "masks"
    )
    assert len(predicted.outlines) == 1


# Boxes that a network finds -------------------------------------------------------------------------------------------

AUTOMATIC = {"prompt": {"kind": "automatic", "preset": "tiny", "size": 32}, "slices": 1}
FROZEN = {"frozen": ["prompted.image_encoder.*"]}


class Bright(torch.nn.Module):
    """Finds what an image shows as bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.75


def test_found_boxes_prompt_the_network_and_healthy_slices_are_seen_too(tmp_path: Path) -> None:
    task, data = opened(tmp_path, task=AUTOMATIC, parts=FROZEN)
    assert isinstance(task, LocatedSegmentation)
    assert task.config.compares_with == ()
    model = Located(Bright(), Inside(), 32)
    batches = [batch for split in ("train", "test") for _, batch in data.evaluation(split)]
    assert {tuple(batch.prompted[:, 0].tolist()) for batch in batches} <= {(1.0,), (0.0, 1.0), (1.0, 0.0)}
    assert any(len(batch) == 2 for batch in batches)
    for batch in batches:
        marked = task.marked(model, batch)
        bright = resampled(batch.images, (32, 32)) > 0.75
        assert torch.equal(marked.flatten(2).any(2), bright.flatten(2).any(2))
        drawn = batch.masks > 0.5
        # Whatever is bright is the ball, and noise now and then; the largest part of it fills the ball's middle.
        shown = drawn.flatten(2).sum(2) > 20
        assert (marked & drawn).flatten(2).any(2)[shown].all()
        scores = task.score(model, batch)
        assert float(scores["oracle_dice"]) >= float(scores["dice"])
    read = read_image(Case("a", "", (next((tmp_path / "A").iterdir()) / "image.nii.gz",)))
    found = task.predict(model, read)
    assert read.labels is None
    assert found.marked.shape == (1, *read.channels.shape[1:])
    assert found.marked.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_both_stages_learn_on_any_device(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = make_outlines(tmp_path, {"A": 5})
    study = prompted_study({"A": {}}, task=AUTOMATIC, parts=FROZEN)
    step_and_evaluation(study, sites.of("A").data[0], device_named(device, monkeypatch))
    task = task_of(study)
    model, batch = task.build_model(), task.dataset("A", sites.of("A").data).batch([0], np.random.default_rng(0))
    assert isinstance(task, LocatedSegmentation)
    for stage, loss in task.losses(model, batch).items():
        model.zero_grad()
        loss.backward()
        moved = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert moved == {stage}


# What cannot be used --------------------------------------------------------------------------------------------------


def test_an_image_smaller_than_the_network_s_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"32 pixels .* sees 64 \(model\.size\); set `task\.enlarge: true`"):
        opened(tmp_path, task={"enlarge": False})


def test_an_image_without_a_mask_has_no_prompt(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((NETWORK, NETWORK), 9, np.uint8))
    image.save(tmp_path / "a.png")
    task = task_of(prompted_study({"A": {}}, task={"prompt": {"kind": "points"}}))
    read = read_image(Case("a", "", (tmp_path / "a.png",)))
    with pytest.raises(DataError, match=r"task\.prompt\.kind: points.*has none; give .* named 'mask'"):
        task.predict(task.build_model(), read)


def test_a_network_that_needs_prompts_is_not_exported() -> None:
    with pytest.raises(StudyError, match="a network that takes a prompt beside an image is not exported"):
        task_of(prompted_study({"A": {}})).input_shape()


def test_a_network_that_takes_no_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"monai_unet does not fit .*prompted_segmentation; take lite_medsam"):
        prompted_study({"A": {}}, model={"kind": "monai_unet", "preset": "tiny"})


def test_a_colour_picture_is_outlined_at_its_rough_mask(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(4):
        pixels = (random.random((40, 70, 3)) * 255).astype(np.uint8)
        mask = np.zeros((40, 70), np.uint8)
        mask[10:25, 20:50] = 255
        folder = tmp_path / "A" / f"P{number}"
        folder.mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "image.png")
        Image.fromarray(mask).save(folder / "mask.png")
    study = prompted_study({"A": {}}, task={"channels": 3, "distances": "pixels", "prompt": {"kind": "points"}})
    task = task_of(study)
    data = task.dataset("A", (tmp_path / "A",))
    batch = data.batch([0], np.random.default_rng(0))
    assert batch.images.shape == (1, 3, NETWORK, NETWORK)
    assert batch.points.shape == (1, 1, 1, 2)
    folder = tmp_path / "A" / "P0"
    found = task.predict(Everything(), read_image(Case("P0", "", (folder / "image.png",), folder / "mask.png")))
    assert found.marked.shape == (1, 40, 70)
    assert found.marked.all()


def test_a_disk_too_small_for_the_embeddings_is_one_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = make_outlines(tmp_path / "data", {"A": 5})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match="the disk is too small for what the frozen encoder gives") as error:
        wardround.run(prompted_study({"A": {}}), sites, tmp_path / "out")
    assert "GB are needed" in str(error.value.detail)
    assert not list(tmp_path.glob("out/**/embeddings"))
