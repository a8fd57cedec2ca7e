"""DP-SGD by patient: bounds that hold for whatever data, the self-test, and whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.examples import examples
from tests.toys import Points, Regression, toy_sites, toy_study
from wardround.errors import StudyError, WardroundError
from wardround.learning.gradients import BatchedGradients, Drawn, ExactGradients, autograd
from wardround.learning.private_training import PrivateTraining, clipped, refuse_shared_statistics
from wardround.protection.ledger import Charge, Ledger
from wardround.protection.privacy import PrivacyBudget, SecretRound, Terms
from wardround.protection.secret import SecretRoot, SecretStream
from wardround.runs import session
from wardround.runs.folder import reserve
from wardround.runs.statement import SHARED, statement
from wardround.site.budgets import spending_of
from wardround.storage.store import SiteStore

CLIP = 0.7


def _training(folder: Path, *, rate: float = 0.25, noise: float = 1.0, patients: int = 24) -> PrivateTraining:
    task = Regression(patients=patients)
    store = SiteStore(folder / "store")
    terms = Terms(1e6, 1e-3, CLIP, noise, rate, rate * (patients - 4), 2, "exact", "pld")
    budget = PrivacyBudget("A", terms, Ledger(folder / "ledger.jsonl", store), SecretRoot.of(store))
    return PrivateTraining(task, task.dataset("A", (folder,)), budget, "study", "federated")


def _drawn(examples: Sequence[tuple[int, ...]]) -> tuple[Drawn, ...]:
    """Patients of a step, each with a stream of its own."""
    return tuple(Drawn(own, SecretStream(bytes([own[0]]) * 32)) for own in examples)


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Regression().build_model()


@settings(deadline=None)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=30), bound=st.floats(1e-3, 1e3))
def test_nobody_contributes_more_than_the_bound(values: list[float], bound: float) -> None:
    assert float(clipped(torch.tensor(values, dtype=torch.float32), bound).norm()) <= bound


def test_small_gradients_keep_their_direction_and_size() -> None:
    gradient = torch.tensor([0.1, -0.2])
    torch.testing.assert_close(clipped(gradient, 1.0), gradient.double(), rtol=2e-6, atol=0)


@settings(max_examples=examples(15), deadline=None)
@given(scale=st.sampled_from([0.0, 1.0, 1e6, 1e30, math.inf, math.nan]), seed=st.integers(0, 5))
def test_removing_a_patient_moves_the_sum_by_at_most_the_bound(
    tmp_path_factory: pytest.TempPathFactory, scale: float, seed: int
) -> None:
    training = _training(tmp_path_factory.mktemp("site"))
    task = Regression(patients=24)
    dataset = task.dataset("A", (Path(),))
    dataset.y[:2] *= scale
    training._dataset = dataset
    model = _model(seed)
    gradients, size = ExactGradients(task, model), sum(p.numel() for p in model.parameters())
    everybody = ((0, 1), (2,), (3,), (6, 7))
    sums = [training.clipped_sum(gradients, _drawn(examples), size) for examples in (everybody, everybody[1:])]
    assert bool(torch.isfinite(sums[0]).all())
    assert float((sums[0] - sums[1]).norm()) <= CLIP * (1 + 1e-12)


def test_a_step_is_the_clipped_mean_and_noise_of_the_stated_size(tmp_path: Path) -> None:
    training = _training(tmp_path, noise=2.0)
    model = _model()
    gradients, size = ExactGradients(Regression(patients=24), model), sum(p.numel() for p in model.parameters())
    secret = training._budget.pay("s", "a", 1, 1, "c", [])
    expected = training.terms.patients_per_step
    residuals = []
    for step in range(60):
        signal = training.clipped_sum(gradients, training.draw(secret, step), size)
        residuals.append((training.noisy_mean(gradients, secret, step, size) * expected - signal) / CLIP)
    noise = torch.cat(residuals)
    assert float(noise.std()) == pytest.approx(2.0, rel=5 / math.sqrt(2 * len(noise)))
    assert abs(float(noise.mean())) < 5 * 2.0 / math.sqrt(len(noise))


def test_patients_are_drawn_independently_at_the_stated_rate(tmp_path: Path) -> None:
    training = _training(tmp_path, rate=0.1)
    secret = training._budget.pay("s", "a", 1, 1, "c", [])
    draws = [training.draw(secret, step) for step in range(400)]
    sizes = np.array([len(draw) for draw in draws])
    expected, patients = 2.0, 20
    assert abs(sizes.mean() - expected) < 5 * math.sqrt(expected * 0.9 / 400)
    assert sizes.var() == pytest.approx(patients * 0.1 * 0.9, rel=0.4), "a fixed batch has no variance"
    assert (sizes == 0).any(), "empty draws stay"
    for draw in draws:
        assert all(len({i // 2 for i in own.examples}) == 1 and len(own.examples) == 2 for own in draw)


def test_an_empty_draw_is_a_step_of_noise(tmp_path: Path) -> None:
    training = _training(tmp_path, rate=1e-9)
    secret = training._budget.pay("s", "a", 1, 1, "c", [])
    assert training.draw(secret, 0) == ()
    model = _model()
    size = sum(p.numel() for p in model.parameters())
    step = training.noisy_mean(ExactGradients(Regression(), model), secret, 0, size)
    assert float(step.norm()) > 0


def test_batched_gradients_are_those_of_each_patient(tmp_path: Path) -> None:
    task = Regression(patients=24)
    dataset, model = task.dataset("A", (tmp_path,)), _model()
    examples = [(0, 1), (4,), (8, 9), (3,)]
    exact = list(ExactGradients(task, model).per_patient(dataset, _drawn(examples)))
    with BatchedGradients.attached(task, model) as batched:
        batched.self_test(dataset)
        found = list(batched.per_patient(dataset, _drawn(examples)))
    torch.testing.assert_close(torch.stack(found), torch.stack(exact), rtol=1e-4, atol=1e-6)
    # Nothing of Opacus may stay: the model goes on to be evaluated and to train other arms.
    autograd(task, model, dataset.batch([0], np.random.default_rng(0)))
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


@dataclass(frozen=True)
class _Lacking:
    """A data set without some of its patients; the others keep their numbers, as their examples do."""

    whole: Points
    without: frozenset[int]

    def fingerprint(self) -> str:
        return self.whole.fingerprint()

    def owners(self) -> list[int]:
        return [owner for owner in self.whole.owners() if owner not in self.without]

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> tuple[Tensor, Tensor]:
        kept = [i for i, owner in enumerate(self.whole.owners()) if owner not in self.without]
        x, y = self.whole.batch([kept[i] for i in indices], random)
        return x + 0.1 * torch.from_numpy(random.standard_normal(x.shape).astype(np.float32)), y


def _dropping(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Tanh(), nn.Dropout1d(0.3), nn.Linear(32, 1)).train()


@pytest.mark.parametrize("rate", [1.0, 0.6])
@pytest.mark.parametrize("without", [0, 7, 19])
def test_a_patient_less_changes_nothing_of_the_others_with_dropout_and_augmentation(
    tmp_path: Path, rate: float, without: int
) -> None:
    """Dropout from a public seed ran through all patients: one less shifted the masks of all that followed."""
    whole, model = Regression(patients=24).dataset("A", (tmp_path,)), _dropping()
    whole.y[:] *= 50.0  # Every patient's gradient is clipped: each has all of the bound.
    size = sum(p.numel() for p in model.parameters())
    secret = SecretRound(SecretRoot(b"s" * 32))
    sums, drawn = [], []
    for lacking in (frozenset[int](), frozenset({without})):
        training = _training(tmp_path, rate=rate, patients=24)
        data: Any = _Lacking(whole, lacking)
        training = PrivateTraining(training._task, data, training._budget, "study", "federated")
        draw = training.draw(secret, 3)
        drawn.append(len(draw))
        torch.manual_seed(5)
        state = torch.get_rng_state()
        sums.append(training.clipped_sum(ExactGradients(training._task, model), draw, size))
        assert torch.equal(torch.get_rng_state(), state)
    moved = float((sums[0] - sums[1]).norm())
    taken = drawn[0] - drawn[1]
    assert taken in ((1,) if rate == 1.0 else (0, 1))
    # Twenty sums of 0.7 in double precision; nothing else may differ.
    assert moved <= taken * CLIP + 1e-12
    assert moved == pytest.approx(taken * CLIP, abs=1e-5)


def test_dropout_draws_anew_for_every_patient_and_step(tmp_path: Path) -> None:
    training, model = _training(tmp_path, rate=1.0), _dropping()
    secret = SecretRound(SecretRoot(b"s" * 32))
    one = training.draw(secret, 0)[0].examples
    same = [Drawn(one, secret.patient(step, patient)) for step, patient in ((0, 0), (0, 1), (1, 0), (0, 0))]
    found = list(ExactGradients(training._task, model).per_patient(training._dataset, same))
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_opacus_refuses_a_network_that_draws_random_numbers(tmp_path: Path) -> None:
    """Also where dropout is too rare for wrong gradients to show, and where it is no module."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(torch.as_tensor(self.layer(x)), 1e-9, self.training)

    task = Regression(patients=24)
    for model in (_dropping(), Functional().train()):
        with (
            BatchedGradients.attached(task, model) as batched,
            pytest.raises(StudyError, match=r"draws random numbers in training.*set `gradients: exact`"),
        ):
            batched.self_test(task.dataset("A", (tmp_path,)))


class _ChannelsLast(nn.Module):
    """Permutes to channels last and back, as unrolled MRI networks do: Opacus's gradients are wrong then."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x.permute(0, 3, 1, 2)))
        result: Tensor = self.second(hidden.contiguous(memory_format=torch.channels_last))
        return result


@dataclass(frozen=True)
class _Images:
    x: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> Tensor:
        return self.x[list(indices)]


class _ImageTask(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.as_tensor(model(batch).square().mean())


def test_wrong_gradients_of_opacus_are_refused() -> None:
    torch.manual_seed(0)
    model, dataset = _ChannelsLast(), _Images(torch.randn(4, 8, 8, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        BatchedGradients.attached(_ImageTask(), model) as batched,
        pytest.raises(StudyError, match=r"wrong by.*set `gradients: exact`"),
    ):
        batched.self_test(dataset)  # type: ignore[arg-type]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_batch_statistics_are_refused() -> None:
    with pytest.raises(StudyError, match="BatchNorm1d"):
        refuse_shared_statistics(Regression(norm=True).build_model())
    refuse_shared_statistics(nn.Sequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)))
    with pytest.raises(StudyError, match="InstanceNorm2d"):
        refuse_shared_statistics(nn.InstanceNorm2d(3, track_running_stats=True))


# Whole runs -----------------------------------------------------------------------------------------------------------


def _study(**privacy: Any) -> Any:
    return toy_study(
        protection={"privacy": {"patients_per_step": 2, **privacy}},
        method={"kind": "fedavg", "weights": "equal"},
        schedule={"rounds": 3, "release": "last"},
        task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"patients": 12}},
    )


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [pytest.param("exact", marks=pytest.mark.slow), "opacus"])
def test_a_run_says_what_was_spent(tmp_path: Path, gradients: str) -> None:
    values = session.run(
        _study(gradients=gradients), toy_sites(tmp_path), tmp_path / "out", compare=("local",), engine="local"
    )
    spent = values.privacy
    assert spent.unit == "patient"
    assert spent.secure is False
    assert 7.8 < spent.epsilon <= 8.0, "noise is chosen for all rounds of all arms"
    assert spent.epsilon == max(site.epsilon for site in spent.sites.values())
    # 3 rounds of 3 steps in two arms: together and alone.
    assert spent.sites["B"].steps == 18
    assert (spent.sites["B"].sample_rate, spent.sites["B"].delta) == (2 / 8, 1 / 80)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    assert {line["loss"] for line in lines} == {None}, "a loss is of training patients and has no noise"
    assert "patient" in (tmp_path / "out" / "model_card.md").read_text()


@pytest.mark.slow
def test_a_site_that_trains_nothing_is_tested_and_has_no_purse(tmp_path: Path) -> None:
    names = ("A", "B", "C", "Unseen")
    roles = {name: {"role": "unseen" if name == "Unseen" else "train"} for name in names}
    study = _study().model_copy(update={"sites": toy_study(roles).sites})
    result = session.run(study, toy_sites(tmp_path, names), tmp_path / "out", engine="local")
    assert result.metric("federated", "Unseen", "mse") > 0
    assert not (tmp_path / "out" / "work" / "sites" / "Unseen" / "privacy").exists()
    assert sorted(result.privacy.sites) == ["A", "B", "C"]


@pytest.mark.slow
def test_sites_with_other_secrets_train_other_models(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path)
    found = [session.run(_study(), sites, tmp_path / out, engine="local").model_sha256 for out in "ab"]
    assert found[0] != found[1]


@pytest.mark.slow
def test_a_ledger_of_the_site_stops_the_next_study(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path)
    own = {n: s.model_copy(update={"ledger": tmp_path / f"{n}.jsonl"}) for n, s in sites.sites.items() if n == "A"}
    sites = sites.model_copy(update={"sites": {**sites.sites, **own}})
    first = session.run(_study(), sites, tmp_path / "first", engine="local")
    another = _study().model_copy(update={"name": "another"})
    second = session.run(another, sites, tmp_path / "second", engine="local")
    assert not any("budget" in note for note in first.notes)
    assert any("without A (BudgetSpent: site A stops training" in note for note in second.notes)
    assert second.privacy.sites["A"].epsilon_ledger <= 8.0
    assert second.participants == ("B", "C")
    assert second.privacy.sites["A"].steps == 0


def test_a_lost_ledger_stops_the_site(tmp_path: Path) -> None:
    sites, out = toy_sites(tmp_path), tmp_path / "out"
    study = _study(noise_multiplier=1.0, epsilon=1000.0)  # the search for the noise takes seconds
    reserve(out)
    host = session.open_host(study, sites, out, (), (), None)
    budget = host.agent("A").held.budgets.of("A", host.dataset("A"))
    budget.pay("s", "a", 1, 1, "c", [])
    budget.ledger.path.unlink()
    with pytest.raises(WardroundError, match="ledger was lost"):
        session.run(study, sites, out, engine="local")


def test_what_cannot_be_private_is_refused() -> None:
    for changes, said in (
        ({"method": {"kind": "fedavg"}}, "method.weights"),
        ({"schedule": {"release": "best"}}, "schedule.release"),
        ({"local": {"clip_norm": 1.0}}, "local.clip_norm"),
        ({"method": {"kind": "custom", "factory": "a:b"}}, "method.kind=custom"),
    ):
        good: dict[str, Any] = {
            "protection": {"privacy": {}},
            "method": {"kind": "fedavg", "weights": "equal"},
            "schedule": {"release": "last"},
        }
        toy_study(**good)
        with pytest.raises(ValueError, match=said):
            toy_study(**{**good, **changes})


def test_pooling_and_data_without_owners_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="--compare pooled"):
        session.open_host(_study(), toy_sites(tmp_path), tmp_path / "out", ("pooled",), (), None)
    points = Regression(patients=12).dataset("A", (tmp_path,))
    assert isinstance(points, Points)
    assert points.owners() == [p for p in range(8) for _ in range(2)]
    with pytest.raises(StudyError, match=r"owners\(\)"):
        PrivateTraining(Regression(), _Images(torch.zeros(2)), None, "s", "a")  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_epsilon_that_rests_on_shared_noise_of_another_study_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    host = session.open_host(_study(), toy_sites(tmp_path), out, (), (), None)
    budget = host.agent("A").held.budgets.of("A", host.dataset("A"))
    told = statement(host.study, {"A": spending_of(budget, "study")})
    assert told is not None
    assert SHARED not in told.note
    entry = Charge("another", "federated", 1, 1, 0.25, 5.0, "c", "i", "then", rho=0.01)
    budget.ledger.spend(entry, lambda entries: None)
    told = statement(host.study, {"A": spending_of(budget, "study")})
    assert told is not None
    assert (told.sites["A"].epsilon, told.noise) == (0.0, "site")
    assert told.sites["A"].epsilon_ledger > 0.0
    assert SHARED in told.note
