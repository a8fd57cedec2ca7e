"""Learning without true images: measured samples are split, and the loss is of those that the network did not see."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from tests.mri_hospitals import SIZE, head, make_hospitals, save, write_study
from torch import Tensor, nn

from wardround.errors import Interrupted, StudyError
from wardround.imaging.acquisition.mri.operator import CartesianMRI, fft2c
from wardround.imaging.acquisition.mri.split import centre, of_lines
from wardround.learning.device import moved
from wardround.results.files import read_rounds
from wardround.runs.explain import explain
from wardround.runs.session import run
from wardround.study import Study
from wardround.study.acquisition import MRIAcquisition
from wardround.tasks.build import build_task
from wardround.tasks.metrics import RECONSTRUCTION_METRICS
from wardround.tasks.mri import MRIBatch, MRIDataset, MRIReconstruction, SampleDivision, SplitBatch

SPLIT = {"kind": "split", "share": 0.4}
TASK = {"contrasts": ["flair"], "size": [SIZE, SIZE]}


def whole(batch: MRIBatch) -> list[Tensor]:
    """What a batch holds whose samples are not split."""
    return [getattr(batch, field.name) for field in fields(MRIBatch)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hospitals(tmp_path_factory.mktemp("hospitals"))


def _task(**changes: Any) -> MRIReconstruction:
    study = {
        "name": "test",
        "sites": {"Alpha": {"supervision": SPLIT}, "Beta": {"acquisition": {"coils": 3, "mask": {"calibration": 0.1}}}},
        "acquisition": {"coils": 4, "mask": {"calibration": 0.1}},
        "task": {"kind": "reconstruction", **TASK},
        "model": {"preset": "tiny"},
    }
    task = build_task(Study.model_validate(study | changes))
    assert isinstance(task, MRIReconstruction)
    return task


@pytest.fixture(scope="module")
def task() -> MRIReconstruction:
    """Alpha has no true images, Beta has."""
    return _task()


@pytest.fixture(scope="module")
def batch(task: MRIReconstruction, folders: Path) -> SplitBatch:
    """Two training slices of Alpha."""
    found = _dataset(task, folders, "Alpha").batch([0, 1], _random())
    assert isinstance(found, SplitBatch)
    return found


def _random() -> np.random.Generator:
    return np.random.default_rng(7)


def _dataset(task: MRIReconstruction, folders: Path, site: str) -> MRIDataset:
    dataset = task.dataset(site, (folders / site,))
    assert isinstance(dataset, MRIDataset)
    return dataset


class Seen(nn.Module):
    """Zero-filled times one parameter; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, operator: CartesianMRI, data: Tensor) -> Tensor:
        self.inputs.append((operator.mask.clone(), operator.maps.clone(), data.clone()))
        return self.scale * operator.A_adjoint(data)


def test_a_site_without_true_images_never_needs_them(task: MRIReconstruction, batch: SplitBatch) -> None:
    assert batch.alone.tolist() == [True, True]
    poisoned = replace(batch, target=batch.target * torch.nan, head=batch.head * torch.nan)
    torch.manual_seed(0)
    model = task.build_model()
    loss, poisoned_loss = task.loss(model, batch), task.loss(model, poisoned)
    assert torch.isfinite(loss)
    assert torch.equal(loss, poisoned_loss)
    poisoned_loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_network_is_given_nothing_of_what_is_held_out(task: MRIReconstruction, batch: SplitBatch) -> None:
    """Neither in its input nor in its data consistency: both come from operator and data."""
    model = Seen()
    changed = replace(batch, kspace=batch.kspace + 3.0 * batch.held[:, None])
    losses = [task.loss(model, one) for one in (batch, changed)]
    for first, second in zip(*model.inputs, strict=True):
        assert torch.equal(first, second)
    mask, _, data = model.inputs[0]
    assert torch.equal(mask, batch.mask - batch.held)
    assert not (data * batch.held[:, None]).any()
    assert not torch.equal(*losses)


def test_the_loss_is_of_the_samples_held_out_and_tells_how_bright_an_image_is(
    task: MRIReconstruction, batch: SplitBatch
) -> None:
    model, expected, theta = Seen(), 0.0, batch.mask - batch.held
    image = model(CartesianMRI(batch.maps, theta), batch.kspace * theta[:, None])
    for item in range(2):
        predicted = fft2c(batch.maps * image[:, None])[item].detach().numpy().astype(np.complex128)
        asked = batch.held[item].numpy() > 0
        y, u = (values[:, asked].ravel() for values in (batch.kspace[item].numpy().astype(np.complex128), predicted))
        both = (np.sqrt((np.abs(y - u) ** 2).sum() / (np.abs(y) ** 2).sum()), np.abs(y - u).sum() / np.abs(y).sum())
        dark = np.clip(1 - (np.abs(batch.maps[item].numpy().astype(np.complex128)) ** 2).sum(0), 0, None) ** 0.5
        shown = np.abs(image[item].detach().numpy().astype(np.complex128))
        share = np.sqrt(((dark * shown) ** 2).sum() / (shown**2).sum())
        assert 0.001 < share < 0.5
        middle = centre(batch.mask[item].numpy()) > 0
        y, u = (values[:, middle].ravel() for values in (batch.kspace[item].numpy().astype(np.complex128), predicted))
        left = np.linalg.norm(y - u) / np.linalg.norm(y)
        assert not batch.held[item].numpy()[middle].any()
        expected += (sum(both) + share + left) / 2
        assert task.score(model, batch)["kspace_residual"][item].item() == pytest.approx(sum(both) / 2, rel=1e-4)
    assert task.loss(model, batch).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_each_step_divides_anew_and_each_validation_alike(folders: Path) -> None:
    dataset = _dataset(_task(), folders, "Alpha")
    one, again, other = (dataset.batch([0], np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.held, again.held)
    assert not torch.equal(one.held, other.held)
    first, second = (
        [batch.held for _, batch in _dataset(_task(), folders, "Alpha").evaluation("validation")] for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    # Of the samples outside the centre (6 of 64 columns, or a few more that happen to lie beside it) two fifths.
    assert one.held.sum() <= round(0.4 * (16 - 6) * SIZE)


def test_whole_lines_are_held_out_where_the_study_says_so(folders: Path) -> None:
    lines = _task(task={**TASK, "supervision": {**SPLIT, "held": "lines"}}, sites={"Alpha": {}, "Beta": {}})
    batch = _dataset(lines, folders, "Alpha").batch([0], _random())
    assert isinstance(batch, SplitBatch)
    assert of_lines(batch.held[0].numpy())
    assert 0 < batch.held.sum() < batch.mask.sum()
    assert torch.isfinite(lines.loss(lines.build_model(), batch))


@pytest.mark.slow
def test_sites_with_true_images_learn_from_them(task: MRIReconstruction, folders: Path) -> None:
    model = Seen()
    alone, taught = (_dataset(task, folders, site) for site in ("Alpha", "Beta"))
    plain = taught.batch([0], _random())
    assert type(plain) is MRIBatch
    # With the bits of a study that splits nothing.
    beta = {"Beta": {"acquisition": {"coils": 3, "mask": {"calibration": 0.1}}}}
    usual = _dataset(_task(sites=beta), folders, "Beta")
    assert all(torch.equal(getattr(plain, f.name), getattr(usual.batch([0], _random()), f.name)) for f in fields(plain))
    split = alone.batch([1], _random())
    joined = task.joined([plain, split, plain])
    assert isinstance(joined, SplitBatch)
    assert joined.alone.tolist() == [False, True, False]
    apart = [task.loss(model, batch).item() for batch in (plain, split, plain)]
    assert task.loss(model, joined).item() == pytest.approx(sum(apart) / 3, rel=1e-5)
    pooled = task.pooled([alone, taught]).batch([0, len(alone)], _random())
    assert isinstance(pooled, SplitBatch)
    assert pooled.alone.tolist() == [True, False]
    # Their validation is of held-out samples too, so that all sites have the metric that selects; their loss is not.
    (_, measured), *_ = taught.evaluation("validation")
    assert isinstance(measured, SplitBatch)
    assert measured.held.any()
    assert not measured.alone.any()
    assert task.loss(model, measured).item() == task.loss(model, MRIBatch(*whole(measured))).item()
    assert isinstance(moved(split, torch.device("meta")), SplitBatch)
    assert split.part(0, 1).held.shape == (1, SIZE, SIZE)


@pytest.mark.slow
def test_held_out_samples_select_and_images_count_where_they_are_known(
    task: MRIReconstruction, batch: SplitBatch
) -> None:
    model = Seen()
    assert [spec.name for spec in task.metrics] == ["kspace_residual", *(s.name for s in RECONSTRUCTION_METRICS)]
    assert not task.metrics[0].larger_is_better
    assert [spec.may_be_absent for spec in task.metrics] == [False] + 6 * [True]
    known = task.score(model, batch)
    unknown = replace(batch, target=torch.zeros_like(batch.target), head=torch.zeros_like(batch.head))
    scores = task.score(model, task.joined([unknown.part(0, 1), batch.part(1, 2)]))
    for name, values in known.items():
        assert torch.equal(scores[name][1], values[1])
        assert torch.equal(scores[name][0], values[0]) if name == "kspace_residual" else scores[name][0].isnan()
    assert task.score(model, unknown)["psnr"].isnan().all()
    # A classical method predicts the same samples from the same others; without true images its weight is chosen so.
    filled = task.score_baseline("zero_filled", None, batch)
    torch.testing.assert_close(filled["kspace_residual"], known["kspace_residual"])
    weights = task.baseline_parameters("tv")
    errors = [task.score_baseline("tv", weight, unknown.part(0, 1))["kspace_residual"].item() for weight in weights]
    assert min(errors) < filled["kspace_residual"][0].item() < 1.05


@pytest.mark.slow
def test_what_cannot_be_split_is_refused(monkeypatch: pytest.MonkeyPatch, folders: Path) -> None:
    everything = {"coils": 2, "mask": {"family": "poisson", "acceleration": 1, "calibration": 1.0}}
    dataset = _dataset(_task(acquisition=everything), folders, "Alpha")
    with pytest.raises(StudyError, match=r"site Alpha: .*lower `calibration`"):
        dataset.batch([0], _random())
    ct = {"acquisition": {"kind": "ct"}, "sites": {"Alpha": {"supervision": SPLIT}}, "model": {"kind": "redcnn"}}
    ct["task"] = {"kind": "reconstruction", "size": [256, 256]}
    with pytest.raises(ValueError, match=r"sites.Alpha.supervision: samples are split for MRI .* acquisition.kind: ct"):
        _task(**ct)
    disc = {"coils": 2, "mask": {"family": "poisson"}}
    with pytest.raises(ValueError, match=r"task.supervision: held: lines needs a scan of lines.*`held: samples`"):
        _task(acquisition=disc, sites={"A": {}}, task={**TASK, "supervision": {"kind": "split", "held": "lines"}})
    outlines = {"kind": "segmentation", "images": ["flair"], "mask": "seg", "structures": {"tumour": "any"}}
    alone = {"Alpha": {"supervision": SPLIT}}
    with pytest.raises(ValueError, match=r"sites.Alpha.supervision: only for task.kind: reconstruction"):
        _task(task=outlines, model={"kind": "monai_unet"}, acquisition=None, sites=alone)
    monkeypatch.setattr(MRIAcquisition, "has_reference", property(lambda self: self.coils == 4))
    with pytest.raises(ValueError, match=r"task.supervision: the raw data of site Beta come without true images"):
        _task()
    unseen = {"role": "unseen", "acquisition": {"coils": 3}}
    assert _task(sites={"Alpha": {}, "Beta": unseen}).metrics[0].name == "kspace_residual"


@pytest.mark.slow
def test_check_says_who_learns_from_what_and_when_total_variation_is_the_easier_one(
    folders: Path, tmp_path: Path
) -> None:
    sites = {"Alpha": {"supervision": SPLIT}, "Beta": {}}
    evaluation = {"baselines": ["zero_filled", "tv"]}
    study, _ = write_study(
        tmp_path,
        folders,
        sites=sites,
        task={**TASK, "evaluation": evaluation},
        model={"preset": "tiny", "image": "real"},
    )
    said = " ".join(explain(study, None, (), ()).split())
    assert "without true images at Alpha: the loss is of measured samples that the network does not see" in said
    assert "sums over validation patients of kspace_residual, psnr" in said
    assert "add tv_real to task.evaluation.baselines" in said
    for quiet in ("model.image=complex", "task.evaluation.baselines=[zero_filled,tv,tv_real]"):
        assert "add tv_real" not in " ".join(explain(study, None, (), (quiet,)).split())


class Stops:
    """Interrupts a run after its second round."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def round(self, report: Any) -> None:
        if report.round == 2:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_federation_learns_without_ever_touching_a_true_image(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """True images are not a number wherever something is learned; simulated scans still know how good images are."""
    plain = SampleDivision.training

    def poisoned(self: SampleDivision, batch: MRIBatch, random: np.random.Generator) -> MRIBatch:
        nothing = torch.full_like(batch.target, torch.nan)
        return replace(plain(self, batch, random), target=nothing, head=nothing)

    monkeypatch.setattr(SampleDivision, "training", poisoned)
    evaluation = {"baselines": ["zero_filled"], "tuning_slices": 1, "slices": {"per_patient": 1}}
    study, sites = write_study(
        tmp_path,
        folders,
        sites={"Alpha": {}, "Beta": {"acquisition": {"coils": 6, "mask": {"calibration": 0.1}}}},
        task={**TASK, "supervision": SPLIT, "evaluation": evaluation},
        model={"preset": "tiny", "image": "complex"},
        local={"steps": 10, "lr": 0.003},
        schedule={"rounds": 3},
    )
    found = run(study, sites, tmp_path / "out", engine="local", quiet=True)
    assert found.metric_specs[0].name == "kspace_residual"
    for metric, sign in (("psnr", 1.0), ("kspace_residual", -1.0)):
        gain = found.metric("federated", "mean", metric) - found.metric("zero_filled", "mean", metric)
        assert sign * gain > 0.0
    validations = [(line.validation or {})["kspace_residual"] for line in read_rounds(found.out)]
    assert found.selected_round["federated"] == 1 + min(range(3), key=validations.__getitem__)
    with pytest.raises(Interrupted):
        run(study, sites, tmp_path / "again", engine="local", watcher=Stops())  # type: ignore[arg-type]
    assert run(study, sites, tmp_path / "again", engine="local", quiet=True).model_sha256 == found.model_sha256


@pytest.mark.slow
def test_masked_sums_come_to_the_same_model(tmp_path: Path) -> None:
    data = make_hospitals(tmp_path / "hospitals")
    for number in range(3):
        save(head(number), data / "Gamma" / f"Doe-John-{number}" / "flair.nii.gz")
    models = []
    for secure in (False, True):
        study, sites = write_study(
            tmp_path / str(secure),
            data,
            sites={"Alpha": {}, "Beta": {}, "Gamma": {}},
            task={**TASK, "supervision": SPLIT, "evaluation": {"baselines": [], "slices": {"per_patient": 1}}},
            schedule={"rounds": 1, "min_sites": 3},
            local={"steps": 1},
            protection={"secure": secure},
        )
        folders = {"sites": {site: {"data": str(data / site)} for site in ("Alpha", "Beta", "Gamma")}}
        sites.write_text(yaml.safe_dump(folders), encoding="utf-8")
        found = run(study, sites, tmp_path / str(secure) / "out", engine="local", quiet=True)
        models.append(load_file(found.out / "models" / "federated.safetensors"))
        assert found.metric("federated", "mean", "kspace_residual") > 0.0
    assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.slow
def test_a_federation_of_both_kinds(folders: Path, tmp_path: Path) -> None:
    study, sites = write_study(tmp_path, folders, sites={"Alpha": {"supervision": SPLIT}, "Beta": {}})
    found = run(study, sites, tmp_path / "out", compare=["local", "pooled"], engine="local", quiet=True)
    for arm in ("zero_filled", "local", "federated", "pooled"):
        assert 0.0 < found.metric(arm, "mean", "kspace_residual") < 1.5
        assert found.metric(arm, "mean", "psnr") > 10.0


@pytest.mark.slow
def test_results_of_sites_whose_true_images_nobody_knows(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of files that were undersampled by the scanner: targets are 0, and image metrics have no value."""
    whole = MRIDataset.scan

    def unknown(self: MRIDataset, *which: Any) -> MRIBatch:
        batch = whole(self, *which)
        return replace(batch, target=torch.zeros_like(batch.target), head=torch.zeros_like(batch.head))

    monkeypatch.setattr(MRIDataset, "scan", unknown)
    study, sites = write_study(tmp_path, folders, task={**TASK, "supervision": SPLIT})
    found = run(study, sites, tmp_path / "out", engine="local", quiet=True)
    row = found.metrics["federated"]["mean"]
    assert row is not None
    assert row["psnr"] is None
    assert found.metric("tv", "mean", "kspace_residual") < found.metric("zero_filled", "mean", "kspace_residual")
    assert found.report.exists()
