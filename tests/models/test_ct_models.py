"""Networks for CT: what they are before training, their equations, and that protocols reach them."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from tests.examples import quickly
from torch import Tensor, nn

from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.ct.phantom import HEAD, THORAX, ellipse_image, ellipse_sinogram
from wardround.imaging.acquisition.ct.system import CTSystem
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.models.build import build_model
from wardround.models.cnn import UNetSettings as UNet
from wardround.models.conditioning import FiLM, ProtocolHyperNet, within
from wardround.models.iradonmap import IRadonMAPSettings as IRadonMAP
from wardround.models.learn import Learn as LearnNetwork
from wardround.models.learn import LearnSettings as Learn
from wardround.models.lpd import LPD as LPDNetwork
from wardround.models.lpd import LPDSettings as LPD
from wardround.models.redcnn import REDCNNSettings as REDCNN
from wardround.models.two_band import TwoBandSettings as TwoBand
from wardround.models.two_band import low_pass
from wardround.models.unrolled import MoDLSettings as MoDL
from wardround.study.ct import MU_WATER, CTAcquisition, CTGeometry
from wardround.study.models import ModelSettings as Model
from wardround.study.schema import Study

CONFIGS: list[Model] = [
    MoDL(preset="tiny"),
    UNet(kind="unet", preset="tiny"),
    UNet(kind="unet", preset="tiny", conditioned=True),
    Learn(kind="learn", preset="tiny"),
    Learn(kind="learn", preset="tiny", prox="unet", levels=2),
    Learn(kind="learn", preset="tiny", gradient="fbp", conditioned=True),
    Learn(kind="learn", preset="tiny", prox="unet", conditioned=True),
    Learn(kind="learn", preset="tiny", weighted=True, guided=True),
    Learn(kind="learn", preset="tiny", norm="instance"),
    Learn(kind="learn", preset="tiny", prox="unet", levels=2, gradient="fbp", weighted=True, guided=True),
    REDCNN(kind="redcnn", preset="tiny"),
    REDCNN(kind="redcnn", preset="tiny", conditioning="every"),
    REDCNN(kind="redcnn", preset="tiny", conditioning="bottleneck"),
    LPD(kind="lpd", preset="tiny"),
    LPD(kind="lpd", preset="tiny", memory=1, conditioned=True),
    TwoBand(kind="two_band", preset="tiny"),
    IRadonMAP(kind="iradonmap", preset="tiny"),
    IRadonMAP(kind="iradonmap", preset="tiny", conditioned=False),
]
# Data consistency comes before learning in these: untrained, they are not the initial image.
UNTRAINED = [config for config in CONFIGS if not isinstance(config, MoDL | Learn)]
CONDITIONED = [c for c in CONFIGS if getattr(c, "conditioned", False) or getattr(c, "conditioning", "none") != "none"]


def _name(config: Model) -> str:
    return "-".join(str(v) for k, v in config.model_dump().items() if v not in (None, "tiny") and k != "hidden")


@cache
def _system(size: int = 48, photons: float = 1e5) -> CTSystem:
    geometry = CTGeometry(
        size=(size, size),
        pixel=240 / size,
        views=32,
        bins=72,
        bin=7.0,
        source_distance=595.0,
        detector_distance=490.6,
    )
    return CTSystem(CTAcquisition(geometry=geometry, photons=photons))


@cache
def _scan() -> tuple[Tensor, Tensor]:
    """Two phantoms: noisy data (2, views, bins) and true images (2, H, W)."""
    system, random = _system(), np.random.default_rng(0)
    geometry = system.acquisition.geometry
    lines = np.stack([ellipse_sinogram(p, geometry) for p in (HEAD, THORAX)])
    truth = np.stack([ellipse_image(p, geometry) for p in (HEAD, THORAX)]) / MU_WATER
    noisy = torch.from_numpy(lines + 0.02 * random.standard_normal(lines.shape)).float()
    return system.scaled(noisy), torch.from_numpy(truth).float()


def _build(config: Model, *, shaken: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(config, "ct")
    if shaken:
        # Zero layers hide what stands before them.
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("config", UNTRAINED, ids=_name)
def test_an_untrained_network_gives_the_filtered_back_projection(config: Model) -> None:
    data, _ = _scan()
    torch.testing.assert_close(_build(config)(_system(), data), _system().initial(data))


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_gradients_reach_every_parameter(config: Model) -> None:
    data, truth = _scan()
    model = _build(config, shaken=True)
    image = model(_system(), data)
    assert image.shape == truth.shape
    assert image.dtype == torch.float32
    (image - truth).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("config", quickly(CONFIGS, *range(0, len(CONFIGS), 3)), ids=_name)
def test_every_network_learns_within_forty_steps(config: Model) -> None:
    data, truth = _scan()
    model = _build(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = (model(_system(), data) - truth).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    first = step()
    assert any(step() < 0.95 * first for _ in range(39))


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
def test_images_of_a_batch_do_not_see_each_other(config: Model) -> None:
    data, _ = _scan()
    model = _build(config, shaken=True)
    with torch.no_grad():
        together, swapped = model(_system(), data), model(_system(), data.flip(0))
        alone = torch.cat([model(_system(), item[None]) for item in data])
    torch.testing.assert_close(swapped.flip(0), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", CONDITIONED, ids=_name)
def test_an_untrained_hypernetwork_changes_nothing_and_a_trained_one_tells_scanners_apart(config: Model) -> None:
    data, _ = _scan()
    other = _system(photons=1e6)
    model = _build(config, shaken=True)
    names = [name for name, _ in model.named_parameters()]
    hyper = [name for name in names if name.startswith("hypernetwork.")]
    assert 0 < len(hyper) < len(names)
    last = [model.get_parameter(name) for name in hyper[-2:]]
    with torch.no_grad():
        assert (model(_system(), data) - model(other, data)).abs().max() > 1e-5
        for parameter in last:
            parameter.zero_()
        plain = model(_system(), data)
        torch.testing.assert_close(model(other, data), plain)
        model.get_submodule("hypernetwork").forward = lambda protocol: {}  # type: ignore[method-assign, assignment]
        torch.testing.assert_close(model(_system(), data), plain)


def test_film_follows_its_formula_for_one_scanner_and_for_one_each() -> None:
    random = torch.Generator().manual_seed(0)
    h = torch.randn(2, 3, 4, 5, generator=random)
    gamma, beta = torch.randn(2, 2, 3, generator=random)
    expected = torch.stack([(1 + gamma[0, c]) * h[:, c] + beta[0, c] for c in range(3)], 1)
    torch.testing.assert_close(FiLM(gamma[0], beta[0])(h), expected)
    torch.testing.assert_close(FiLM(gamma, beta)(h)[:1], expected[:1])
    torch.testing.assert_close(FiLM(gamma, beta)(h)[1], h[1] * (1 + gamma[1, :, None, None]) + beta[1, :, None, None])


def test_a_hypernetwork_gives_every_block_its_own_part_of_the_last_layer() -> None:
    net = ProtocolHyperNet({"a.first": 2, "b": 3}, hidden=(4,))
    protocol = torch.rand(7, generator=torch.Generator().manual_seed(0))
    assert all(not film.gamma.any() and not film.beta.any() for film in net(protocol).values())
    nn.init.normal_(net.layers[-1].weight)  # type: ignore[arg-type]
    raw = net.layers(protocol)
    films = net(protocol)
    torch.testing.assert_close(torch.cat([films["a.first"].gamma, films["b"].gamma]), raw[:5])
    torch.testing.assert_close(torch.cat([films["a.first"].beta, films["b"].beta]), raw[5:])
    assert list(within(films, "a")) == ["first"]
    assert net(torch.stack([protocol] * 2))["b"].beta.shape == (2, 3)


@pytest.mark.parametrize("gradient", ["adjoint", "fbp"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_learn_takes_the_steps_of_its_equation(gradient: str, weighted: bool, guided: bool) -> None:
    data, _ = _scan()
    system = _system()
    chosen = {"kind": "learn", "preset": "tiny", "gradient": gradient, "weighted": weighted, "guided": guided}
    model = _build(Learn.model_validate(chosen), shaken=True)
    assert isinstance(model, LearnNetwork)
    with torch.no_grad():
        # Counts behind the rays, and how far off they are.
        counts = 1e5 * (-(data * system.data_scale).clamp_min(0)).exp()
        uncertainty = 1 / counts + system.acquisition.electronic_noise**2 / counts**2
        tolerance = model.log_tolerance.exp() if weighted else None
        weights = 1.0 if tolerance is None else 1 / (1 + uncertainty / tolerance)
        x = system.initial(data)
        for prox, t in zip(model.proxes, model.log_steps.exp(), strict=True):
            misfit = weights * (system.A(x) - data)
            back = system.initial(misfit) if gradient == "fbp" else system.A_adjoint(misfit)
            x = x - t * back - (x - (prox(x, guides=(back,)) if guided else prox(x)))
        torch.testing.assert_close(model(system, data), x, rtol=1e-4, atol=1e-5)


def test_learn_trusts_rays_of_many_photons_whole_and_others_by_their_inverse_variance() -> None:
    model = _build(Learn(kind="learn", preset="tiny", weighted=True))
    system = _system()
    data = torch.zeros(1, *system.data_shape)
    data[..., 0] = 9.0 / system.data_scale
    weights = model._weights(system, data)
    uncertainty = system.uncertainty(data)
    assert weights[..., 1:].min() > 0.99
    assert (weights[..., 0] * uncertainty[..., 0] / model.log_tolerance.exp()).sub(1).abs().max() < 0.1


def test_learn_has_no_norm_in_a_unet() -> None:
    with pytest.raises(ValueError, match="`norm` stands between the layers of `prox: cnn`"):
        Learn(kind="learn", prox="unet", norm="batch")


def test_learn_counts_its_own_network_for_every_step_and_keeps_steps_positive() -> None:
    one, three = (_build(Learn(kind="learn", preset="tiny", unrolls=n)) for n in (1, 3))
    count = [sum(p.numel() for p in model.parameters()) for model in (one, three)]
    assert count[1] == 3 * count[0]
    assert isinstance(one, LearnNetwork)
    one.log_steps.data.fill_(-20.0)
    assert (one.steps > 0).all()


def test_red_cnn_of_the_paper_has_its_parameters_and_parts() -> None:
    model = _build(REDCNN(kind="redcnn", preset="paper"))
    # 25 x 96 + 96, eight times 25 x 96 x 96 + 96, 25 x 96 + 1
    assert sum(p.numel() for p in model.parameters()) == 1_848_865
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"encoder", "decoder"}
    assert len(list(model.get_submodule("encoder").children())) == 5
    hyper = _build(REDCNN(kind="redcnn", preset="paper", conditioning="bottleneck"))
    assert hyper.get_parameter("hypernetwork.layers.4.weight").shape == (2 * 96, 64)


def test_red_cnn_says_that_images_are_too_small() -> None:
    system = _system(20)
    with pytest.raises(GeometryError, match="at least 21 x 21 pixels, not 20 x 20"):
        _build(REDCNN(kind="redcnn", preset="tiny"))(system, torch.zeros(1, *system.data_shape))


def test_primal_dual_iterations_follow_the_algorithm() -> None:
    data, _ = _scan()
    system = _system()
    model = _build(LPD(kind="lpd", preset="tiny"), shaken=True)
    assert isinstance(model, LPDNetwork)
    with torch.no_grad():
        f = torch.stack([system.initial(data)] * 2, 1)
        h = torch.zeros(2, 2, *system.data_shape)
        for dual, primal in zip(model.dual, model.primal, strict=True):
            h = h + dual(torch.cat([h, system.A(f[:, 1])[:, None], data[:, None]], 1), {})
            f = f + primal(torch.cat([f, system.A_adjoint(h[:, 0].contiguous())[:, None]], 1), {})
        torch.testing.assert_close(model(system, data), f[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cutoff", [0.05, 0.1, 0.2])
def test_the_bands_meet_at_the_cut_off(cutoff: float) -> None:
    wave = torch.cos(2 * torch.pi * cutoff * torch.arange(200.0)).expand(1, 200, 200)
    ratio = (low_pass(wave, cutoff) / wave)[0, 100, 40:160:20]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5), rtol=0.03, atol=0.0)
    constant = torch.full((1, 30, 20), 3.0)
    torch.testing.assert_close(low_pass(constant, cutoff), constant)


def test_each_band_has_its_own_network() -> None:
    names = {name.split(".")[0] for name, _ in _build(TwoBand(kind="two_band", preset="tiny")).named_parameters()}
    assert names == {"low", "high"}


def test_what_belongs_to_a_geometry_is_apart_from_what_is_shared() -> None:
    names = {name.split(".")[0] for name, _ in _build(IRadonMAP(kind="iradonmap", preset="tiny")).named_parameters()}
    assert names == {"projection", "image", "hypernetwork"}


@pytest.mark.parametrize(
    "model",
    [{"kind": kind} for kind in ("redcnn", "lpd", "two_band", "iradonmap")]
    + [{"kind": "unet", "conditioned": True}, {"kind": "learn", "conditioned": True}],
)
def test_networks_for_ct_are_refused_for_mri(model: dict[str, object]) -> None:
    study = {"name": "s", "sites": {"A": {}}, "model": model}
    with pytest.raises(ValueError, match="CT"):
        Study.model_validate(study)
    ct = Study.model_validate(
        study | {"acquisition": {"kind": "ct"}, "task": {"kind": "reconstruction", "size": [256, 256]}}
    )
    with pytest.raises(StudyError, match=r"model\..*CT"):
        build_model(ct.model)


def test_complex_images_are_refused_for_ct() -> None:
    with pytest.raises(StudyError, match=r"model\.image: complex is for MRI"):
        build_model(MoDL(image="complex"), "ct")


def test_a_conditioned_network_says_that_an_operator_has_no_protocol() -> None:
    operator = CartesianMRI(torch.ones(1, 1, 48, 48, dtype=torch.complex64), torch.ones(1, 1, 48))
    with pytest.raises(StudyError, match=r"model\.conditioned: false"):
        _build(UNet(kind="unet", preset="tiny", conditioned=True))(operator, torch.ones(1, 1, 48, 48) + 0j)


def test_learn_reconstructs_complex_images_too() -> None:
    operator = CartesianMRI(torch.ones(1, 1, 30, 34, dtype=torch.complex64), torch.ones(1, 1, 34))
    random = torch.Generator().manual_seed(0)
    data = torch.randn(1, 1, 30, 34, dtype=torch.complex64, generator=random)
    image = build_model(Learn(kind="learn", preset="tiny"))(operator, data)
    # All of k-space: the gradient vanishes at A* y, where it starts.
    torch.testing.assert_close(image, operator.A_adjoint(data))
