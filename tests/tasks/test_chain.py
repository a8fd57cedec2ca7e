"""The chain: which loss reaches which network, what is scanned, and a whole run in two phases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.devices import DEVICES, arm_specs_of, device_named, learner_of
from tests.dicom_series import as_dicom
from tests.laws.test_devices import _steps_and_evaluation
from tests.laws.test_stages import stage_of
from tests.outlines import SIZE, image_study, make_outlines

import wardround
from wardround.errors import DataError, StudyError
from wardround.learning.device import CPU
from wardround.runs.explain import explain
from wardround.site.evaluators import evaluators_of
from wardround.storage.store import NOTHING
from wardround.study.acquisition import MRIAcquisition
from wardround.study.hashes import written
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.tasks.chain import Chain, ChainTask
from wardround.tasks.chain_mri import standardised
from wardround.tasks.chained import ChainBatch, ChainDataset
from wardround.tasks.losses import l1
from wardround.tasks.reconstruction import evaluating
from wardround.tasks.segmentation import overlap_loss
from wardround.tasks.stages import Weighed, curriculum_of

BOTH = ["reconstruction", "diagnosis"]
PERFECT = {"noise": 0.0, "phase": 0.0, "maps": "true", "mask": {"acceleration": 1, "calibration": 1.0}}


def chain_study(**changes: Any) -> Study:
    """A study of the blobs; `changes` replace parts of the task (`task`), or of the study."""
    return image_study(
        {
            "kind": "chain",
            "size": [SIZE, SIZE],
            "segmenter": {"preset": "tiny"},
            "split": {"validation": 0.2, "test": 0.3},
        },
        changes,
        name="chain",
        sites={"A": {}, "B": {}},
        acquisition={"coils": 2, "mask": {"acceleration": 3, "calibration": 0.15}},
        model={"kind": "modl", "preset": "tiny"},
        local={"steps": 2, "batch": 3, "optimizer": "adam", "lr": 0.01, "optimizer_state": "keep"},
        schedule={"rounds": 2},
    )


def chain_of(root: Path, patients: int = 5, **changes: Any) -> tuple[Chain, ChainDataset]:
    sites = make_outlines(root, {"A": patients}, slices=3)
    study = chain_study(**changes)
    assert isinstance(study.task, ChainTask)
    made = study.task.build(study)
    return made, made.dataset("A", sites.of("A").data)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, ChainDataset]:
    return chain_of(tmp_path_factory.mktemp("one"))


def batch_of(data: ChainDataset) -> ChainBatch:
    return data.batch([0, 1, 2], np.random.default_rng(3))


# Losses ---------------------------------------------------------------------------------------------------------------


def reached(task: Chain, batch: ChainBatch, **phase: Any) -> set[str]:
    """The stages that the loss of a phase gives a gradient to."""
    torch.manual_seed(1)
    model = task.build_model()
    study = task.study.model_validate({**written(task.study), "schedule": {"rounds": 1, "phases": [phase]}})
    stint = curriculum_of(study.schedule.phases, task, model).at(1)
    assert stint is not None
    with stint.holding(model):
        Weighed(task, stint.weights).loss(model, batch).backward()  # type: ignore[no-untyped-call]
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    return {stage_of(name) for name in moved}


def test_the_loss_of_the_outlines_reaches_the_reconstruction_in_a_joint_phase_alone(
    one: tuple[Chain, ChainDataset],
) -> None:
    task, data = one
    batch = batch_of(data)
    no_images = {"reconstruction": 0.0, "diagnosis": 1.0}
    assert reached(task, batch, train=BOTH, weights=no_images) == set(BOTH)
    assert reached(task, batch, train=["reconstruction"], weights=no_images) == {"reconstruction"}
    assert reached(task, batch, train=["diagnosis"]) == {"diagnosis"}
    assert reached(task, batch, train=["reconstruction"]) == {"reconstruction"}


def test_the_joint_loss_is_its_equation(one: tuple[Chain, ChainDataset]) -> None:
    task, data = one
    batch, model = batch_of(data), task.build_model().eval()
    scans = batch.scans
    image = model.get_submodule("reconstruction")(scans.operator, scans.kspace).abs()
    logits = model.get_submodule("diagnosis")(standardised(image[:, None]))
    apart = l1(image, scans.target), overlap_loss(logits, batch.masks, batch.known, 1.0, 1.0)
    joint = Weighed(task, {"reconstruction": 20.0, "diagnosis": 0.5}).loss(model, batch)
    assert torch.isclose(joint, 20.0 * apart[0] + 0.5 * apart[1], rtol=1e-5)
    assert torch.isclose(task.loss(model, batch), apart[0] + apart[1], rtol=1e-5)


def test_each_part_of_the_losses_is_the_study_s(tmp_path: Path) -> None:
    losses = {"reconstruction": {"kind": "mse", "masked": True}, "diagnosis": {"dice": 0.0, "cross_entropy": 2.0}}
    task, data = chain_of(tmp_path, task={"losses": losses})
    batch, model = batch_of(data), task.build_model().eval()
    images, logits = model(batch.scans, 1)
    found = task.losses(model, batch)
    inside = batch.scans.head > 0
    error = (images[:, 0] - batch.scans.target).square()
    expected = torch.stack([e[i].mean() for e, i in zip(error, inside, strict=True)]).mean()
    assert torch.isclose(found["reconstruction"], expected, rtol=1e-5)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.masks)
    assert torch.isclose(found["diagnosis"], 2.0 * entropy, rtol=1e-5)


@pytest.mark.parametrize("learns", [["reconstruction"], ["diagnosis"], BOTH])
def test_a_round_moves_what_learns_and_nothing_else(learns: list[str], tmp_path: Path) -> None:
    """Weights and running statistics, bit for bit."""
    sites = make_outlines(tmp_path, {"A": 5}, slices=2)
    plans = arm_specs_of(chain_study(schedule={"rounds": 1, "phases": [{"train": learns}]}))
    learner = learner_of(plans, sites.of("A").data[0], CPU)
    public, _ = plans.initial(plans.arm_spec("federated"))
    learner.load(public, NOTHING)
    changes = learner.train(1, public, NOTHING).changes
    for stage in BOTH:
        moved = [change.any() for part in changes.values() for name, change in part.items() if stage_of(name) == stage]
        assert any(moved) == (stage in learns)


@pytest.mark.parametrize("role", ["frozen", "local"])
def test_a_stage_has_a_role_as_any_parameter_has(role: str) -> None:
    plans = arm_specs_of(chain_study(parts={role: ["reconstruction.*"]}))
    roles = plans.arm_spec("federated").policy.roles
    # Whole numbers stay at a site whatever a study says.
    found = {(stage_of(name), given) for name, given in roles.items() if not name.endswith("num_batches_tracked")}
    assert found == {("reconstruction", role), ("diagnosis", "shared")}


# What is scanned ------------------------------------------------------------------------------------------------------


def test_a_scan_that_misses_nothing_gives_the_image_back(tmp_path: Path) -> None:
    task, data = chain_of(tmp_path, acquisition={"coils": 3, **PERFECT}, task={"seen": "zero_filled"})
    batch = batch_of(data)
    assert torch.allclose(task.baseline("zero_filled", None, batch), batch.scans.target, atol=1e-5)
    assert float(batch.scans.target.max()) <= 1.0


def test_channels_are_scanned_with_the_mask_of_their_patient(tmp_path: Path) -> None:
    sites = make_outlines(tmp_path, {"A": 4}, slices=2)
    for folder in (tmp_path / "A").iterdir():
        image = nibabel.load(folder / "image.nii.gz")
        darker = np.asarray(image.dataobj) // 2
        nibabel.save(nibabel.Nifti1Image(darker, image.affine), folder / "other.nii.gz")
    study = chain_study(task={"images": ["image", "other"], "channels": 2})
    task = Chain(study, study.task)  # type: ignore[arg-type]
    data = task.dataset("A", sites.of("A").data)
    (_, batch), *_ = data.evaluation("test")
    assert (len(batch), batch.channels, len(batch.scans)) == (2, 2, 4)
    assert (batch.scans.mask == batch.scans.mask[0]).all()
    assert not torch.equal(batch.scans.maps[0], batch.scans.maps[1])
    # On its own scale, a darker channel is the same image.
    assert torch.allclose(batch.scans.target[0], batch.scans.target[1], atol=0.02)
    images, logits = task.build_model().eval()(batch.scans, batch.channels)
    assert images.shape == (2, 2, SIZE, SIZE)
    assert logits.shape == (2, 1, SIZE, SIZE)
    assert len(list(task.examples(data))) == len(list(task.turns(data))) == 2
    assert {name: tuple(value.shape) for name, value in task.score(task.build_model(), batch).items()} == {
        spec.name: (1,) for spec in task.metrics
    }


def test_training_scans_are_drawn_anew_and_those_of_evaluation_are_always_the_same(
    one: tuple[Chain, ChainDataset], tmp_path: Path
) -> None:
    _, data = one
    _, again = chain_of(tmp_path)
    same, other = (data.batch([0], np.random.default_rng(seed)).scans.kspace for seed in (3, 4))
    assert torch.equal(same, again.batch([0], np.random.default_rng(3)).scans.kspace)
    assert not torch.equal(same, other)
    for (patient, found), (known, expected) in zip(data.evaluation("test"), again.evaluation("test"), strict=True):
        assert patient == known
        assert torch.equal(found.scans.kspace, expected.scans.kspace)
    assert data.fingerprint() == again.fingerprint()


def test_an_image_and_its_mask_are_changed_alike_before_the_scan(tmp_path: Path) -> None:
    """The ball is the brightest, wherever it was moved to; nothing is brighter than before."""
    flip = {"name": "RandFlipd", "prob": 1.0, "spatial_axis": 0}
    plain, flipped = (
        chain_of(tmp_path / str(len(augment)), task={"augment": augment})[1] for augment in ("none", [flip])
    )
    a, b = (batch_of(data) for data in (plain, flipped))
    assert torch.equal(a.scans.target.flip(1), b.scans.target)
    assert torch.equal(a.masks.flip(2), b.masks)


def test_images_of_another_size_are_resampled_and_outlined_on_their_own_grid(tmp_path: Path) -> None:
    task, data = chain_of(tmp_path, task={"size": [24, 16]})
    assert batch_of(data).masks.shape == (3, 1, 24, 16)
    (_, batch), *_ = data.evaluation("test")
    assert batch.scans.target.shape == (3, 24, 16)
    assert batch.masks.shape == (3, 1, SIZE, SIZE)
    assert batch.spacing == (3.0, 1.0, 1.0)
    assert 0.0 <= float(task.score(task.build_model(), batch)["dice"]) <= 1.0


def test_outlines_do_not_depend_on_the_scale_of_the_image() -> None:
    image = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(standardised(image), standardised(0.5 * image), atol=1e-5)
    inside = standardised(image)[image > 0.05 * image.amax((-2, -1), keepdim=True)]
    assert float(inside.mean()) == pytest.approx(0.0, abs=1e-5)
    # A slice of noise is no anatomy: it stays small.
    assert float(standardised(0.001 * image).abs().max()) < 0.1
    assert torch.isfinite(standardised(torch.zeros(1, 1, 8, 8))).all()


def test_what_the_segmenter_sees_in_a_comparison(tmp_path: Path) -> None:
    for seen in ("zero_filled", "full"):
        task, data = chain_of(tmp_path / seen, task={"seen": seen})
        model, batch = task.build_model(), batch_of(data)
        assert task.stages == ("diagnosis",)
        assert {stage_of(name) for name in model.state_dict()} == {"diagnosis"}
        image = task.reconstruct(model, batch)
        expected = batch.scans.target if seen == "full" else task.baseline("zero_filled", None, batch)
        assert torch.equal(image, expected)
        assert task.losses(model, batch).keys() == {"diagnosis"}
        plans = arm_specs_of(chain_study(task={"seen": seen}, schedule={"phases": [{"train": BOTH}]}))
        with pytest.raises(StudyError, match="'reconstruction' is no stage of the task; choose from diagnosis"):
            plans.arm_spec("federated")


def test_the_weight_of_a_classical_image_is_chosen_by_the_metrics_it_has(tmp_path: Path) -> None:
    """There is no outline of it, so no Dice, which comes first: PSNR decides, and no weight wins by its place."""
    study = chain_study(task={"evaluation": {"baselines": ["tv"], "tv_weights": [0.3, 0.004, 0.4]}})
    learner = learner_of(arm_specs_of(study), make_outlines(tmp_path, {"A": 5}, slices=2).of("A").data[0], CPU)
    baseline, task = evaluators_of(tmp_path, tmp_path / "p.npz")["baseline"], learner.task
    found = baseline(learner, None, {"baseline": "tv"}, "test")
    assert isinstance(task, Chain)
    with torch.no_grad():
        best = learner.held_out.per_patient("test", lambda b: task.score_images(task.baseline("tv", 0.004, b), b))
    assert np.array_equal(found["psnr"], best["psnr"])
    assert np.isnan(found["dice"]).all()


def test_a_chain_compares_with_the_classical_methods_that_its_study_names() -> None:
    named = {"evaluation": {"baselines": ["zero_filled", "tv_real"]}}
    assert chain_study().baselines == ("zero_filled",)
    assert chain_study(task=named).baselines == ("zero_filled", "tv_real")
    assert chain_study(task=named | {"seen": "full"}).baselines == ()
    with pytest.raises(ValidationError, match="'fbp' is none of MRI; choose from"):
        chain_study(task={"evaluation": {"baselines": ["fbp"]}})
    with pytest.raises(ValidationError, match="there is no baseline 'magic'; choose from"):
        chain_study(task={"evaluation": {"baselines": ["magic"]}})
    phased = chain_study(task=named, acquisition={"maps": "true", "phase": 1.0})
    with pytest.raises(StudyError, match="the baseline tv_real needs coil maps that carry the phase"):
        Chain(phased, phased.task)  # type: ignore[arg-type]


def test_image_metrics_are_of_slices_that_show_a_head(one: tuple[Chain, ChainDataset]) -> None:
    task, data = one
    (_, batch), *_ = data.evaluation("test")
    scores = task.score_images(task.baseline("zero_filled", None, batch), batch)
    assert math.isnan(float(scores["dice"]))
    empty = torch.zeros_like(batch.scans.target[:1])
    scans = type(batch.scans)(
        *(torch.cat([getattr(batch.scans, n), getattr(batch.scans, n)[:1]]) for n in ("kspace", "maps", "mask")),
        torch.cat([batch.scans.target, empty]),
        torch.cat([batch.scans.head, empty]),
    )
    wider = ChainBatch(scans, torch.cat([batch.masks, batch.masks[:1]]), batch.known)
    more = task.score_images(torch.cat([task.baseline("zero_filled", None, batch), empty]), wider)
    assert float(more["psnr"]) == pytest.approx(float(scores["psnr"]), rel=1e-5)


def test_pooled_sites_may_have_unlike_coils(tmp_path: Path) -> None:
    sites = make_outlines(tmp_path, {"A": 4, "B": 4}, slices=2)
    study = chain_study(sites={"A": {"acquisition": {"coils": 4}}, "B": {}})
    task = Chain(study, study.task)  # type: ignore[arg-type]
    pooled = task.pooled([task.dataset(name, sites.of(name).data) for name in "AB"])
    batch = pooled.batch([0, len(pooled) - 1], np.random.default_rng(0))
    assert batch.scans.kspace.shape == (2, 4, SIZE, SIZE)
    assert torch.isfinite(task.loss(task.build_model(), batch))


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_and_an_evaluation_on_any_device(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds, the second from what the site kept; metrics, pictures, and the zero-filled images beside them."""
    compute = device_named(device, monkeypatch)
    local = {"steps": 1, "batch": 2, "optimizer": "adam", "optimizer_state": "keep", "clip_norm": 1.0}
    study, folder = chain_study(local=local), make_outlines(tmp_path / "data", {"A": 5}, slices=2).of("A").data[0]
    _steps_and_evaluation(study, folder, compute, tmp_path)
    learner = learner_of(arm_specs_of(study), folder, compute)
    rows = evaluators_of(tmp_path, tmp_path / "pictures.npz")["baseline"](
        learner, None, {"baseline": "zero_filled"}, "test"
    )
    assert len(rows["psnr"]) == learner.dataset.patients("test") > 0


def test_a_chain_sees_the_same_in_dicom_as_in_nifti(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    task, data = chain_of(tmp_path / "nifti", patients=3)
    as_dicom(tmp_path / "nifti", tmp_path / "dicom")
    other = task.dataset("A", tmp_path / "dicom" / "A")
    assert other.fingerprint() == data.fingerprint()
    one, same = (each.batch([0, 1], np.random.default_rng(3)) for each in (data, other))
    assert torch.equal(one.scans.kspace, same.scans.kspace)
    assert torch.equal(one.masks, same.masks)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"segmenter": {"kind": "modl"}}, "modl outlines nothing; take monai_unet"),
        ({"size": [32, 4]}, "slices must have at least 7 x 7 pixels"),
        ({"augment": [{"name": "RandGaussianNoised"}]}, "'RandGaussianNoised' does not only move voxels"),
        ({"annotated": {"A": ["brain"]}}, r"task\.annotated\.A: 'brain' is not in task\.structures"),
        ({"dimensions": 3}, "dimensions"),
    ],
)
def test_a_section_that_does_not_fit_together(task: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        chain_study(task=task)


def test_a_wrong_key_of_the_segmenter_is_an_error_that_knows_the_right_ones() -> None:
    segmenter = {"kind": "monai_unet", "presett": "tiny"}
    study = {"name": "s", "sites": {"A": {}}, "task": {"kind": "chain", "segmenter": segmenter}}
    with pytest.raises(StudyError, match=r"task\.segmenter\.presett: unknown key; did you mean `preset`\?"):
        load_study(study)


def test_scans_that_no_chain_begins_with_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MRIAcquisition, "chain", "")
    with pytest.raises(StudyError, match=r"task\.kind: no chain begins with scans of acquisition\.kind mri"):
        arm_specs_of(chain_study()).task  # noqa: B018
    with pytest.raises(ValidationError, match="redcnn is for CT"):
        chain_study(model={"kind": "redcnn"})
    with pytest.raises(ValidationError, match="needs one"):
        chain_study(acquisition=None)


def test_a_size_that_the_segmenter_cannot_halve_is_refused() -> None:
    with pytest.raises(StudyError, match=r"task\.size: .* does not take 30 x 32 pixels"):
        arm_specs_of(chain_study(task={"size": [30, 32]})).arm_spec("federated")


def test_images_that_are_no_magnitudes_are_refused_without_a_name(tmp_path: Path) -> None:
    sites = make_outlines(tmp_path, {"A": 4}, slices=2)
    path = tmp_path / "A" / "DOE-01" / "image.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj, np.float32) - 50, image.affine), path)
    study = chain_study()
    with pytest.raises(DataError, match="site A: a channel has negative values") as caught:
        Chain(study, study.task).dataset("A", sites.of("A").data)  # type: ignore[arg-type]
    assert "DOE" not in str(caught.value)


# A whole run ----------------------------------------------------------------------------------------------------------


def write_study(path: Path, study: Study) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(written(study)), encoding="utf-8")
    return path


def test_check_says_what_is_scanned_what_learns_and_when(tmp_path: Path) -> None:
    phases = [{"rounds": 1, "train": ["reconstruction"]}, {"train": BOTH, "weights": {"reconstruction": 10}}]
    study = chain_study(schedule={"rounds": 2, "phases": phases})
    text = " ".join(explain(write_study(tmp_path / "study.yaml", study), None, (), ()).split())
    for said in (
        "chain: simulated scans of image -> image of 32 x 32 pixels -> outlines of structure by monai_unet",
        "simulated scanner",
        "2 coils",
        "from round 1: reconstruction; loss 1 reconstruction; idle: diagnosis",
        "from round 2: reconstruction, diagnosis; loss 10 reconstruction, 1 diagnosis",
        "Compared with, nothing learned: zero_filled.",
    ):
        assert said in text


def test_a_run_in_two_phases_outlines_blobs_in_images_that_it_reconstructed(tmp_path: Path) -> None:
    sites = make_outlines(tmp_path / "data", {"A": 8, "B": 8}, slices=2)
    study = chain_study(
        task={"split": {"validation": 0.1, "test": 0.4}, "augment": "none"},
        local={"steps": 6, "batch": 4, "optimizer": "adam", "lr": 0.02, "optimizer_state": "keep"},
        schedule={
            "rounds": 6,
            "validate_every": 6,
            "phases": [
                {"rounds": 2, "train": ["reconstruction"]},
                {"train": BOTH, "weights": {"reconstruction": 10.0, "diagnosis": 1.0}},
            ],
        },
    )
    result = wardround.run(study, sites, tmp_path / "out", engine="local")
    federated, zero_filled = result.metrics["federated"]["mean"], result.metrics["zero_filled"]["mean"]
    assert federated["dice"].value > 0.4
    assert federated["psnr"].value > zero_filled["psnr"].value
    assert zero_filled.get("dice") is None
    card = (tmp_path / "out" / "model_card.md").read_text(encoding="utf-8")
    assert "Simulated acquisitions, not raw data measured by a scanner." in card
    assert "- Task: " in card
    assert "- Model: kind modl, preset tiny" in card
    page = result.report.read_text(encoding="utf-8")
    # Images with their errors, and outlines in the same images.
    assert "Example reconstructions" in page
    assert "Worst test patient" in page
    with np.load(tmp_path / "out" / "sites" / "A" / "pictures.npz") as pictures:
        drawn = {key for key in pictures if pictures[key].shape == (320, 320, 3)}
    assert drawn == {f"{label}/{number}" for label in ("reference", "federated") for number in (1000, 1001, 1002)}


def test_a_network_that_gives_the_truth_is_right_on_whole_volumes(one: tuple[Chain, ChainDataset]) -> None:
    """Slices, parts of a volume and axes are put together rightly."""
    task, data = one

    class Truth(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.masks = iter(())

        def forward(self, scans: Any, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
            return scans.target[:, None], next(self.masks)

    network = Truth()
    for _, batch in data.evaluation("test"):
        network.masks = iter(torch.split(batch.masks * 2 - 1, 8))
        with evaluating(network):
            scores = task.score(network, batch)
        assert (float(scores["dice"]), float(scores["hd95"])) == (1.0, 0.0)
        assert float(scores["nmse"]) == 0.0
