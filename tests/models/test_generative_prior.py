"""The generative prior against its equations, and that it reconstructs scans that no training was of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from tests.applied import reconstruct
from tests.mri_hospitals import SIZE, head, save, write_study
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.federation.release import FORMAT
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.mri.simulate import simulate
from wardround.models.generative_prior import (
    PRESETS,
    GenerativePrior,
    GenerativePriorSettings,
    misfit,
)
from wardround.models.images_alone import LearnsImages
from wardround.plan.arm_specs import ArmSpecs
from wardround.runs.session import run
from wardround.study.acquisition import Mask, MRIAcquisition
from wardround.study.load import load_study


def network(size: int = 16, codes: int = 2, **changes: Any) -> GenerativePrior:
    torch.manual_seed(0)
    return GenerativePrior(replace(PRESETS["tiny"], **{"iterations": 3, **changes}), size, codes)


def disc(size: int, shift: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    return (0.5 * (x**2 + y**2 < 0.6) + 0.4 * ((x - shift) ** 2 + y**2 < 0.05)).astype(np.float32)


def scans(size: int, acceleration: float = 2.0, coils: int = 3) -> tuple[CartesianMRI, Tensor, Tensor]:
    """Two discs: operator, data and true images."""
    scanner = MRIAcquisition(coils=coils, mask=Mask(acceleration=acceleration, calibration=0.2))
    images = [disc(size, shift) for shift in (-0.2, 0.3)]
    found = [simulate(image, scanner, np.random.default_rng(n)) for n, image in enumerate(images)]
    operator = CartesianMRI(torch.stack([s.maps for s in found]), torch.stack([s.mask for s in found]))
    return operator, torch.stack([s.kspace for s in found]), torch.from_numpy(np.stack(images))


class Linear(nn.Module):
    """D(x) = sum of w x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return (self.weight * images).sum((1, 2))


def test_what_the_discriminator_lowers_by_hand() -> None:
    """|grad D|^2 of a linear one is that of its weights."""
    model = network(penalty=4.0)
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    model.discriminator = Linear(weight)  # type: ignore[assignment]
    made, true = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) / 16
    said = [(weight * x).sum((1, 2)).double().numpy() for x in (made, true)]
    wanted = np.log1p(np.exp(said[0])).mean() + np.log1p(np.exp(-said[1])).mean()
    assert float(model.told_apart(made, true).detach()) == pytest.approx(wanted + 2.0 * float(weight.square().sum()))
    with torch.no_grad():
        assert float(model.told_apart(made, true)) == pytest.approx(wanted)


def test_each_part_learns_from_its_own_loss() -> None:
    """In one backward pass: G lowers softplus(-D(G)) with D as it is, D its own loss with G's images as they are."""
    model, images = network(), torch.rand(3, 16, 16)
    assert isinstance(model, LearnsImages)
    torch.manual_seed(5)
    model.learned(images).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    torch.manual_seed(5)
    made = model.made(3)
    generator = torch.nn.functional.softplus(-model.discriminator(made)).mean()
    own = [(n, p) for n, p in model.named_parameters() if not n.startswith("discriminator.")]
    for (name, _), g in zip(own, torch.autograd.grad(generator, [p for _, p in own]), strict=True):
        assert torch.allclose(found[name], g, rtol=1e-4, atol=1e-6)
    told = model.told_apart(made.detach(), images)
    theirs = dict(model.discriminator.named_parameters())
    for name, g in zip(theirs, torch.autograd.grad(told, list(theirs.values())), strict=True):
        assert torch.allclose(found[f"discriminator.{name}"], g, rtol=1e-4, atol=1e-6)


def test_a_reconstruction_begins_at_the_site_or_at_the_mean_of_sites() -> None:
    model = network(codes=3)
    each = []
    for site in range(3):
        model.code.copy_(torch.eye(3)[site])
        each.append(model.mean_latent().detach())
    assert not torch.allclose(each[0], each[1], atol=1e-3)
    model.code.fill_(1 / 3)
    assert torch.allclose(model.mean_latent(), torch.stack(each).mean(0), atol=1e-6)


def test_images_are_of_the_codes_by_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = network(codes=3), []
    model.code.copy_(torch.tensor([0.0, 0.75, 0.25]))
    model.mapper.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    torch.manual_seed(0)
    model.made(1000)
    shares = seen[0].mean(0)
    assert float(shares[0]) == 0.0
    # Three deviations of a share of 0.75 over 1000 draws.
    assert float(shares[1]) == pytest.approx(0.75, abs=3 * (0.75 * 0.25 / 1000) ** 0.5)


def test_the_misfit_by_hand() -> None:
    operator, data, _ = scans(16)
    images = torch.rand(2, 16, 16)
    residual = (operator.A(images.to(torch.complex64)) - data).numpy().astype(np.complex128)
    x = images.double().numpy()
    variation = [np.abs(np.diff(one, axis=0)).sum() + np.abs(np.diff(one, axis=1)).sum() for one in x]
    wanted = np.sqrt((np.abs(residual) ** 2).mean((1, 2, 3))) + 0.1 * np.array(variation)
    from wardround.imaging.acquisition.wrapped import RealImage

    assert np.allclose(misfit(RealImage(operator), data, images, 0.1), wanted, rtol=1e-5)


@pytest.mark.slow
def test_every_scan_is_fitted_by_itself_and_the_model_stays() -> None:
    """From the same start and with no randomness: the same again, and alone as in a batch to the order of sums."""
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    operator, data, _ = scans(16)
    with torch.no_grad():
        both = model(operator, data)
        assert torch.equal(both, model(operator, data))
        alone = model(CartesianMRI(operator.maps[1:], operator.mask[1:]), data[1:])
    # Adam's first steps are of one size, whatever a gradient's: a few steps carry few roundings.
    assert torch.allclose(alone[0], both[1], atol=1e-3)
    assert not torch.allclose(both[0], both[1], atol=1e-2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    start = model.synthesiser(model.mean_latent()[None], model.synthesiser.noise(1, data.real))
    assert start.shape == (1, 16, 16)


def test_another_size_is_refused() -> None:
    operator, data, _ = scans(32)
    for call in (lambda m: m(operator, data), lambda m: m.learned(torch.zeros(1, 32, 32))):
        with pytest.raises(StudyError, match=r"model\.size: the generative prior makes images of 16 x 16"):
            call(network().eval())


def test_a_training_loss_through_a_reconstruction_is_refused() -> None:
    """As that of sites without true images would be: no gradient comes through it."""
    operator, data, _ = scans(16)
    with pytest.raises(StudyError, match="learns from true images, and not from measured samples"):
        network()(operator, data)


MODEL = {"kind": "generative_prior", "preset": "tiny", "codes": 2}


def hospitals(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Alpha and Beta train with their scanners; Gamma tests with another acceleration and number of coils."""
    for site, count in (("Alpha", 5), ("Beta", 5), ("Gamma", 2)):
        for number in range(count):
            save(head(10 * ord(site[0]) + number), folder / "data" / site / f"P{number}" / "flair.nii.gz")
    other = {"coils": 6, "mask": {"acceleration": 2, "calibration": 0.1}}
    values = {
        "sites": {"Alpha": {}, "Beta": {}, "Gamma": {"role": "unseen", "acquisition": other}},
        "model": MODEL,
        "method": {"kind": "fedgimp"},
        "local": {"steps": 10, "batch": 4, "lr": 2e-3},
        "schedule": {"rounds": 3, "release": "last", "validate_every": 0},
    }
    study, sites = write_study(folder, folder / "data", **{**values, **changes})
    every = {"sites": {site: {"data": str(folder / "data" / site)} for site in ("Alpha", "Beta", "Gamma")}}
    sites.write_text(yaml.safe_dump(every), encoding="utf-8")
    return study, sites


@pytest.mark.slow
def test_a_federation_learns_it_and_reconstructs_with_any_scanner(tmp_path: Path) -> None:
    """4x with 4 coils and 2x with 6, of which no training step knew; resumed, the same hash; D and code stay."""
    study, sites = hospitals(tmp_path)
    result = run(study, sites, tmp_path / "out", engine="local", quiet=True)
    for site in ("Alpha", "Beta", "Gamma"):
        prior, zero_filled = (result.estimate(arm, site, "psnr") for arm in ("federated", "zero_filled"))
        assert prior is not None
        assert zero_filled is not None
        assert prior.value > zero_filled.value + 1.0
    released = load_file(tmp_path / "out" / "models" / "federated.safetensors")
    assert np.allclose(released["code"], 0.5)
    specs = ArmSpecs(load_study(study), ())
    begun = specs.model_context.initial_values()
    for name, value in released.items():
        moved = not np.array_equal(value, begun[name])
        assert moved == (not name.startswith(("discriminator.", "code"))), name
    own = load_file(tmp_path / "out" / "models" / "Beta" / "federated" / "local.safetensors")
    assert own["code"].tolist() == [0.0, 1.0]
    assert {n.partition(".")[0] for n in own} == {"code", "discriminator"}


@pytest.mark.slow
def test_a_run_that_was_stopped_comes_to_the_same_model(tmp_path: Path) -> None:
    from tests.federation.rig import Rig

    hashes = []
    for stop in (False, True):
        study, _ = hospitals(tmp_path / str(stop), local={"steps": 1, "batch": 2}, sites={"Alpha": {}, "Beta": {}})
        loaded = load_study(study)
        rig = Rig(loaded, tmp_path / str(stop))
        if stop:
            states = rig.states()
            assert [next(states).round for _ in range(2)] == [0, 1]
            for site in rig.sites.values():
                site.close()
            rig = Rig(loaded, tmp_path / str(stop))
        hashes.append(rig.train().public_sha256)
    assert hashes[0] == hashes[1]


@pytest.mark.slow
@pytest.mark.parametrize(("acceleration", "coils"), [(4, 4), (2, 6)])
def test_reconstruct_serves_a_released_one(acceleration: float, coils: int, tmp_path: Path) -> None:
    """K-space of either scanner, of one slice, comes back at its own scale."""
    study, _ = hospitals(tmp_path, model={**MODEL, "iterations": 5})
    released = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    model = GenerativePrior(replace(PRESETS["tiny"], iterations=5), SIZE, 2)
    said = {"format": FORMAT, "study": load_study(study).model_dump_json()}
    save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, released, metadata=said)
    scanner = MRIAcquisition(coils=coils, mask=Mask(acceleration=acceleration, calibration=0.1))
    scan = simulate(disc(SIZE, 0.2), scanner, np.random.default_rng(0))
    found = []
    for scale in (1.0, 8.0):
        np.save(tmp_path / "kspace.npy", scale * scan.kspace[None].numpy())
        reconstruct(released, tmp_path / "kspace.npy", tmp_path / "out.nii.gz")
        found.append(nib.load(tmp_path / "out.nii.gz").get_fdata())  # type: ignore[attr-defined]
        assert found[-1].shape == (SIZE, SIZE, 1)
    # A power of two, so that no digit changes.
    assert np.allclose(found[1], 8.0 * found[0], rtol=1e-5)
    assert np.ptp(found[0]) > 0.1


def test_codes_and_sites_are_as_many(tmp_path: Path) -> None:
    study, _ = write_study(tmp_path, tmp_path, model={**MODEL, "codes": 3}, method={"kind": "fedgimp"})
    with pytest.raises(StudyError, match=r"model\.codes: the generator has 3 site codes, and the study 2 training"):
        ArmSpecs(load_study(study), ()).arm_spec("federated")
    split = {"Alpha": {}, "Beta": {"supervision": {"kind": "split"}}}
    study, _ = write_study(tmp_path, tmp_path, model=MODEL, method={"kind": "fedgimp"}, sites=split)
    with pytest.raises(StudyError, match=r"sites\.Beta\.supervision: method\.kind=fedgimp learns from true images"):
        ArmSpecs(load_study(study), ()).arm_spec("federated")
    study, _ = write_study(tmp_path, tmp_path, model={"preset": "tiny"}, method={"kind": "fedgimp"})
    with pytest.raises(StudyError, match=r"FedGIMP needs a model with a part `discriminator`.*generative_prior"):
        ArmSpecs(load_study(study), ()).arm_spec("federated")


def test_it_is_for_mri() -> None:
    config = GenerativePriorSettings(kind="generative_prior", preset="tiny")
    assert config.real_images
    assert config.modalities == {"mri"}
    assert config.describe() == f"generative_prior, preset tiny, {SIZE} x {SIZE} pixels, 1 sites"
