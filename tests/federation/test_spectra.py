"""Methods that use amplitudes of images, against their equations: HarmoFL's one amplitude, FedDG's bank of others'."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from tests.examples import quickly
from tests.federation.alignment import Away
from tests.federation.pictures import Shown, picture_study
from tests.federation.rig import Rig
from tests.outlines import outline_study
from tests.toys import toy_sites
from wardround.errors import StudyError, WardroundError, Withheld
from wardround.learning.examples import ExampleStream, SiteExamples
from wardround.learning.methods.apart import APART
from wardround.learning.methods.harmofl import running_weights
from wardround.learning.survey import Survey
from wardround.models.spectrum import Amplitude, spectrum_of
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.weights import load_model
from wardround.runs.explain import explain
from wardround.runs.session import run
from wardround.study.hashes import written
from wardround.study.methods import AMPLITUDE_BANK, UNKNOWN_AMPLITUDE
from wardround.study.plugins import Plugins
from wardround.study.sites import Egress, SiteData, SitesFile
from wardround.wire.random import public_generator

HARMOFL = {"kind": "harmofl", "alpha": 0.05, "amplitude": True}
FEDDG = {"kind": "feddg", "rate": 0.05, "spectra": 2, "window": 0.2}
BANKED = {"bank": 2}
FINE = {"max_sites": 4, "max_weight": 64.0, "initial_scale": 4.0}


def harmofl(tmp_path: Path, **changes: Any) -> Rig:
    return Rig(picture_study({**HARMOFL, **changes.pop("method", {})}, {"mean": True}, **changes), tmp_path)


def feddg(tmp_path: Path, **changes: Any) -> Rig:
    return Rig(picture_study(FEDDG, BANKED, **changes), tmp_path)


def first_batches(rig: Rig, site: str) -> list[torch.Tensor]:
    """The images of a site's first round, batch by batch, by a plain loop."""
    learner, local = rig.learner(site), rig.study.local
    order = ExampleStream(len(learner.dataset), rig.study.seed, site).take(0, local.steps * local.batch)
    parts = [order[step * local.batch : (step + 1) * local.batch] for step in range(local.steps)]
    return [learner.dataset.batch(part, np.random.default_rng()).images for part in parts]


# One amplitude for all images -----------------------------------------------------------------------------------------


def test_the_amplitude_is_the_mean_of_the_sites_running_means_and_then_stays(tmp_path: Path) -> None:
    """It is said in 32 bits, also where changes of the model are not."""
    rig = harmofl(tmp_path, method={"momentum": 0.4}, protection={**FINE, "ring_bits": 16})
    expected = []
    for site in "ABC":
        each = [np.abs(np.fft.rfft2(images.double().numpy())).mean(0) / 64 for images in first_batches(rig, site)]
        # The first two are a plain mean.
        expected.append(0.6 * (each[0] + each[1]) / 2 + 0.4 * each[2])
    states = [state.public["apart/amplitude.mean"].copy() for state in rig.states()]
    assert (states[0] == UNKNOWN_AMPLITUDE).all()
    part = deepcopy(rig.host.model_context.model.amplitude)
    part.mean.copy_(torch.from_numpy(states[1]))
    # A step of the fixed point: 32 / 2 ** 29, and of float32 beside 8.
    assert np.allclose(part.amplitude.numpy(), np.mean(expected, axis=0), atol=2e-6)
    assert len(states) == 4
    assert all(np.array_equal(state, states[1]) for state in states[2:])


def test_a_site_weighs_in_the_amplitude_as_in_the_model(tmp_path: Path) -> None:
    rig = harmofl(tmp_path, method={"weights": "samples"}, schedule={"rounds": 1, "keep": 2})
    own = [Amplitude.running(first_batches(rig, site), 0.1).numpy() for site in "ABC"]
    part = deepcopy(rig.host.model_context.model.amplitude)
    part.mean.copy_(torch.from_numpy(rig.train().public["apart/amplitude.mean"]))
    assert np.allclose(part.amplitude.numpy(), np.average(own, axis=0, weights=[5, 7, 9]), atol=2e-6)


def test_a_site_trains_its_first_round_with_its_own_amplitude(tmp_path: Path) -> None:
    """The gradient of one step of SGD, at w + alpha g / |g|, on images that have the site's mean amplitude."""
    rig = harmofl(tmp_path, local={"steps": 1, "batch": 4, "optimizer": "sgd", "lr": 0.1})
    learner, state = rig.learner("B"), rig.start()
    learner.load(state.public, rig.sites["B"].store.memory(0))
    model = deepcopy(learner.model)
    trained = learner.train(1, state.public, rig.sites["B"].store.memory(0))
    (images,) = first_batches(rig, "B")
    model.amplitude.take(Amplitude.running([images], 0.1))
    y = learner.dataset.batch(ExampleStream(len(learner.dataset), 3, "B").take(0, 4), np.random.default_rng()).y
    names = [name for name, _ in model.named_parameters()]

    def gradient() -> dict[str, torch.Tensor]:
        loss = (model(images) - y).square().mean()
        return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))

    first = gradient()
    length = torch.sqrt(sum(g.square().sum() for g in first.values()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.05 * first[name] / length
    for name, g in gradient().items():
        assert np.allclose(trained.changes["model"][name], (-0.1 * g).numpy(), atol=1e-6)


def test_it_measures_in_the_first_round_that_comes_to_something_and_always_the_same(tmp_path: Path) -> None:
    """A coordinator that sends the start again and again learns no second mean, of other patients."""
    rig = harmofl(tmp_path)
    learner, state = rig.learner("A"), rig.start()
    told = []
    for number in (1, 2, 7):
        learner.load(state.public, rig.sites["A"].store.memory(0))
        told.append(learner.train(number, state.public, rig.sites["A"].store.memory(0)).changes[APART])
    assert all(np.array_equal(each["amplitude.mean"], told[0]["amplitude.mean"]) for each in told)


def test_the_weights_of_batches_in_the_running_mean_by_hand() -> None:
    assert running_weights(1, 0.1) == (1.0,)
    assert running_weights(3, 0.1) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert running_weights(3, 0.4) == pytest.approx((0.3, 0.3, 0.4))
    assert running_weights(12, 0.1) == pytest.approx((*[0.1 * 0.9**2] * 10, 0.09, 0.1))


def survey_of(rig: Rig, site: str, least: int) -> Survey:
    learner = rig.learner(site)
    examples = SiteExamples(ExampleStream(len(learner.dataset), rig.study.seed, site))
    return Survey(site, learner.dataset, examples, rig.study.local, rig.study.seed, least)


def test_a_mean_of_too_few_patients_stays_at_the_site(tmp_path: Path) -> None:
    """Patients count by Kish's rule over what each weighs in the running mean."""
    rig = harmofl(tmp_path, method={"momentum": 0.5}, local={"steps": 5, "batch": 2, "optimizer": "sgd", "lr": 0.1})
    found, weights = survey_of(rig, "A", 5), running_weights(5, 0.5)
    shares: dict[int, float] = {}
    for weight, part in zip(weights, found.order, strict=True):
        for example in part:
            shares[example // 2] = shares.get(example // 2, 0.0) + weight / 2
    patients = 1.0 / sum(share**2 for share in shares.values())
    assert 2.0 < patients < 5.0
    with pytest.raises(Withheld, match=rf"site A withholds it: it would be of as little as {patients:.1f} patients"):
        found.check_spread(weights, "it", "do something")
    survey_of(rig, "A", 2).check_spread(weights, "it", "do something")
    learner, state = rig.learner("A"), rig.start()
    learner._least = 5
    learner.load(state.public, rig.sites["A"].store.memory(0))
    with pytest.raises(Withheld, match=r"its mean amplitude \(method.amplitude\).*; raise local.steps or local.batch"):
        learner.train(1, state.public, rig.sites["A"].store.memory(0))


def test_without_the_method_images_stay_as_they_are(tmp_path: Path) -> None:
    """So it is in the arms that the study is compared with, whose network is the same one."""
    public = Rig(picture_study({"kind": "fedavg"}, {"mean": True}), tmp_path).train().public
    assert (public["buffers/amplitude.mean"] == UNKNOWN_AMPLITUDE).all()


# Amplitudes of other sites --------------------------------------------------------------------------------------------


def test_a_bank_holds_means_over_patients_of_whom_none_is_in_two(tmp_path: Path) -> None:
    rig = feddg(tmp_path, schedule={"rounds": 1, "keep": 2})
    state = rig.train()
    bank = deepcopy(rig.host.model_context.model.amplitude_bank)
    bank.spectra.copy_(torch.from_numpy(state.public[f"{APART}/amplitude_bank.spectra"]))
    bank.filled.copy_(torch.from_numpy(state.public[f"{APART}/amplitude_bank.filled"]))
    # A has 5 training patients: two groups, of 3 and of 2. All banks count alike, whatever their sites weigh.
    assert np.allclose(bank.filled.numpy(), 1 / 3, atol=1e-6)
    for site, rest in (("A", "BC"), ("B", "AC")):
        expected = []
        for other in rest:
            survey = survey_of(rig, other, 1)
            for group in survey.cohorts(2):
                patients = [spectrum_of(survey.dataset.batch(own, np.random.default_rng()).images) for own in group]
                assert len(patients) >= 2
                expected.append(np.mean([bank.low.of(p.abs()).mean(0).numpy() for p in patients], axis=0))
        assert np.allclose(bank.given_by_others(site).numpy(), expected, atol=4e-6)
    groups = survey_of(rig, "A", 1).cohorts(2)
    assert sorted(len(group) for group in groups) == [2, 3]
    assert len({owner for group in groups for owner in group}) == 5


@pytest.mark.parametrize(("least", "sizes"), [(1, [3, 2]), (2, [3, 2]), (3, [5]), (5, [5]), (6, [])])
def test_a_site_gives_as_many_as_its_rules_allow(tmp_path: Path, least: int, sizes: list[int]) -> None:
    rig = feddg(tmp_path)
    assert [len(group) for group in survey_of(rig, "A", least).cohorts(2)] == sizes


def test_a_step_lowers_both_losses_the_second_after_a_step_on_the_first(tmp_path: Path) -> None:
    """gradient = grad L(x; w) + grad L(x'; w - rate grad L(x; w)) in its place, by a plain loop; round 2 has a bank."""
    rig = feddg(tmp_path, local={"steps": 1, "batch": 4, "optimizer": "sgd", "lr": 0.1})
    states = rig.states()
    next(states)
    state = next(states)
    learner, memory = rig.learner("C"), rig.sites["C"].store.memory(1)
    learner.load(state.public, memory)
    model = deepcopy(learner.model)
    trained = learner.train(2, state.public, memory)
    batch = learner.dataset.batch(ExampleStream(len(learner.dataset), 3, "C").take(4, 4), np.random.default_rng())
    bank, random = model.amplitude_bank, public_generator(3, "C", 2, 0, AMPLITUDE_BANK)
    others = bank.given_by_others("C")
    assert len(others) == 4
    which, share = random.random((4, 2)).T
    chosen, share = (4 * which).astype(int), torch.from_numpy(share.astype("f4"))
    swapped = Shown(bank.swapped(batch.images, others[torch.from_numpy(chosen)], share), batch.y)
    assert not torch.allclose(swapped.images, batch.images, atol=1e-2)

    def gradient(seen: Shown) -> list[torch.Tensor]:
        return list(torch.autograd.grad(learner.task.loss(model, seen), list(model.parameters())))

    first = gradient(batch)
    with torch.no_grad():
        for parameter, g in zip(model.parameters(), first, strict=True):
            parameter -= 0.05 * g
    second = gradient(swapped)
    for (name, _), one, other in zip(model.named_parameters(), first, second, strict=True):
        assert np.allclose(trained.changes["model"][name], (-0.1 * (one + other)).numpy(), atol=1e-6)


def test_an_episode_of_pieces_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    local = {"steps": 2, "batch": 4, "lr": 0.1, "optimizer": "sgd"}
    public = [feddg(tmp_path / str(pieces), local={**local, "accumulate": pieces}).train().public for pieces in (1, 3)]
    for name, one in public[0].items():
        assert np.allclose(one, public[1][name], atol=1e-5), name


def test_the_bank_is_a_side_channel_and_the_released_model_has_none(tmp_path: Path) -> None:
    rig = feddg(tmp_path)
    public = rig.train().public
    assert rig.arm_spec.kinds.side_channels == {APART}
    for site, there in (("A", True), (None, False)):
        found = rig.method.release_for(site, public, {})
        assert set(found) == set(rig.arm_spec.policy.names("shared"))
        assert (found["amplitude_bank.spectra"] > UNKNOWN_AMPLITUDE).any() == there
        assert found["amplitude_bank.filled"].any() == there


def test_a_release_with_a_bank_starts_any_study_of_its_network(tmp_path: Path) -> None:
    """The bank is of the run: another has other sites, and its own method."""
    first = run(picture_study(FEDDG, BANKED), toy_sites(tmp_path), tmp_path / "out", engine="local", quiet=True)
    start = {"kind": "release", "file": "out/models/federated.safetensors", "sha256": first.model_sha256}
    values = load_model(tmp_path / "out" / "models" / "federated.safetensors")[0]
    for method, options in (({"kind": "fedavg"}, {}), (FEDDG, {"bank": 3, "sites": ["A", "B"]})):
        study = picture_study(method, options, start=start)
        specs = ArmSpecs(study, (), plugins=Plugins(code=True), places=study.places(tmp_path))
        begun = specs.model_context.initial_values()
        assert np.array_equal(begun["layer.weight"], values["layer.weight"])
        assert not begun.get("amplitude_bank.filled", np.zeros(1)).any()


def test_where_no_site_has_enough_patients_it_says_so(tmp_path: Path) -> None:
    rig = feddg(tmp_path)
    learner, state = rig.learner("A"), rig.start()
    learner._least = 6
    learner.load(state.public, rig.sites["A"].store.memory(0))
    trained = learner.train(1, state.public, rig.sites["A"].store.memory(0))
    assert not trained.changes[APART]["amplitude_bank.filled"].any()
    with pytest.raises(StudyError, match="no site has enough training patients to give an amplitude"):
        learner.train(2, state.public, rig.sites["A"].store.memory(0))


# Both -----------------------------------------------------------------------------------------------------------------


OPTIONS = {"harmofl": (HARMOFL, {"mean": True}), "feddg": (FEDDG, BANKED)}


@pytest.mark.parametrize("name", quickly(OPTIONS, 0))
def test_masks_change_nothing_and_a_hospital_that_did_not_train_is_measured(tmp_path: Path, name: str) -> None:
    """The mean of amplitudes and the bank are sums, as all else is."""
    results = []
    for secure in (False, True):
        study = picture_study(
            *OPTIONS[name],
            sites={"A": {}, "B": {}, "C": {}, "D": {"role": "unseen"}},
            schedule={"rounds": 2, "release": "last"},
            protection={**FINE, "secure": secure, "ring_bits": 16},
        )
        folder = tmp_path / str(secure)
        results.append(run(study, toy_sites(folder, "ABCD"), folder / "out", engine="local", quiet=True))
    assert results[0].model_sha256 == results[1].model_sha256
    assert results[0].estimate("federated", "D", "r") is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_that_goes_on_after_a_stop_comes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = Rig(picture_study(*OPTIONS[name]), tmp_path / "whole").train()
    stopped = Rig(picture_study(*OPTIONS[name]), tmp_path / "stopped")
    states = stopped.states()
    assert [next(states).round for _ in range(2)] == [0, 1]
    for site in stopped.sites.values():
        site.close()
    again = Rig(picture_study(*OPTIONS[name]), tmp_path / "stopped").train()
    assert again.round == whole.round == 3
    assert again.public_sha256 == whole.public_sha256


@pytest.mark.parametrize("name", OPTIONS)
def test_a_site_that_was_away_in_the_first_round_trains_with_what_others_gave(name: str, tmp_path: Path) -> None:
    rig = Rig(picture_study(*OPTIONS[name], schedule={"rounds": 3, "keep": 4, "min_sites": 2}), tmp_path)
    rig.sites["B"] = Away(rig.sites["B"], (1,))  # type: ignore[assignment]
    state = rig.train()
    assert [len(report.participants) for report in rig.journal.reports()] == [2, 3, 3]
    if name == "feddg":
        assert state.public[f"{APART}/amplitude_bank.filled"].tolist() == pytest.approx([0.5, 0.5, 0, 0, 0.5, 0.5])
    else:
        own = [Amplitude.running(first_batches(rig, site), 0.1).numpy() for site in "AC"]
        part = deepcopy(rig.host.model_context.model.amplitude)
        part.mean.copy_(torch.from_numpy(state.public["apart/amplitude.mean"]))
        assert np.allclose(part.amplitude.numpy(), np.mean(own, axis=0), atol=2e-6)


@pytest.mark.parametrize(("name", "said"), [("harmofl", "the mean amplitude of the"), ("feddg", "all sites and")])
def test_check_says_what_leaves_beside_the_model(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(written(picture_study(*OPTIONS[name]))))
    text = " ".join(explain(tmp_path / "study.yaml", None, (), (), allow_code=True).split())
    assert said in text
    assert "egress.minimum_cohort" in text


def test_the_rules_of_a_site_s_own_file_count(tmp_path: Path) -> None:
    study, sites = picture_study(HARMOFL, {"mean": True}), toy_sites(tmp_path)
    strict = {name: SiteData(data=entry.data, egress=Egress(minimum_cohort=7)) for name, entry in sites.sites.items()}
    with pytest.raises(WardroundError, match="withholds its mean amplitude"):
        run(study, SitesFile(sites=strict).with_code(), tmp_path / "out", engine="local", quiet=True)


@pytest.mark.parametrize(("method", "said"), [(HARMOFL, "has no amplitude of the images"), (FEDDG, "has no bank of")])
def test_a_network_that_has_no_place_for_it_is_refused(tmp_path: Path, method: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        Rig(picture_study(method, {}), tmp_path)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("part", ["frozen", "local"])
def test_a_study_that_keeps_it_from_the_sum_is_refused(tmp_path: Path, name: str, part: str) -> None:
    with pytest.raises(StudyError, match=r"parts: amplitude\S* is measured at the sites and shared"):
        Rig(picture_study(*OPTIONS[name], parts={part: ["amplitude*"]}), tmp_path)


def test_studies_that_cannot_have_it_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"feddg uses the spectra .* task.kind reconstruction has"):
        picture_study(FEDDG, {}, task={"kind": "reconstruction"})
    with pytest.raises(ValidationError, match=r"feddg cannot be combined with protection.robust"):
        picture_study(
            FEDDG, BANKED, protection={"robust": {"rule": "median"}}, schedule={"rounds": 2, "release": "last"}
        )
    for method in (HARMOFL, FEDDG):
        with pytest.raises(ValidationError, match=r"cannot be combined with protection.privacy"):
            outline_study({"A": {}, "B": {}}, method=method, protection={"privacy": {"epsilon": 3.0, "delta": 1e-5}})


@pytest.mark.parametrize(("method", "name"), [(HARMOFL, "amplitude"), (FEDDG, "amplitude_bank")])
def test_a_segmentation_has_a_place_for_it(method: dict[str, Any], name: str) -> None:
    spec = ArmSpecs(outline_study({"A": {}, "B": {}}, method=method), ()).arm_spec("federated")
    assert any(shared.startswith(f"{name}.") for shared in spec.policy.names("shared"))
    assert spec.method.discloses
