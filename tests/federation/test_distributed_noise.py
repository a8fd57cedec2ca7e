"""Noise that sites share: whole secure rounds, what one patient can do to a sum, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.toys import Regression, toy_sites, toy_study
from wardround.errors import StudyError
from wardround.learning.gradients import Drawn, ExactGradients
from wardround.learning.methods.method import MODEL, LocalRound
from wardround.learning.private_training import PrivateTraining
from wardround.protection.compression import Codec
from wardround.protection.discrete_gaussian import discrete_gaussians, epsilon_of_zcdp, squared_norm
from wardround.protection.lattice import Lattice, LatticeCodec
from wardround.protection.ledger import Ledger
from wardround.protection.privacy import PrivacyBudget, Terms
from wardround.protection.rotation import unrotate
from wardround.protection.secret import SecretRoot, SecretStream
from wardround.runs import session
from wardround.storage.store import SiteStore
from wardround.wire.ring import ExactSum, Ring, levels, whole_elements
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Aggregate, Group, Layout, encode, scale_key

LATTICE = Lattice(step=1e-3, deviation=50, bound=720**2, parties=3, dimension=65)


def _study(options: dict[str, Any] | None = None, **changes: Any) -> Any:
    privacy = {"noise": "distributed", "delta": 0.01, "patients_per_step": 4, **changes.pop("privacy", {})}
    return toy_study(
        **{
            "protection": {"secure": True, "privacy": privacy, **changes.pop("protection", {})},
            "method": {"kind": "fedavg", "weights": "equal"},
            "schedule": {"rounds": 3, "release": "last"},
            "local": {"steps": 1, "optimizer": "sgd", "lr": 0.1, **changes.pop("local", {})},
            "task": {
                "kind": "custom",
                "factory": "tests.toys:make_task",
                "options": {"patients": 12, **(options or {})},
            },
            **changes,
        }
    )


def _change(out: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    released = load_file(out / "models" / "federated.safetensors")
    host = session.open_host(out / "study.yaml", toy_sites(out / "data"), out, (), (), None)
    initial = host.model_context.initial_values()
    return np.concatenate([(released[name].astype(np.float64) - initial[name]).ravel() for name in released])


def test_a_secure_round_holds_the_noise_of_all_its_sites(tmp_path: Path) -> None:
    # Nobody is drawn: what is left is noise alone.
    study = _study({"features": 200}, privacy={"patients_per_step": 1e-9}, schedule={"rounds": 1, "release": "last"})
    out = tmp_path / "out"
    session.run(study, toy_sites(tmp_path), out, engine="local")
    lattice = session.open_host(study, toy_sites(tmp_path), out, (), (), None).lattice
    assert lattice is not None
    noise = _change(out) / (0.1 / 1e-9)
    # The mean over three sites, each with its own noise.
    expected = lattice.step * lattice.deviation / math.sqrt(3)
    assert noise.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * len(noise)))
    assert abs(noise.mean()) < 5 * expected / math.sqrt(len(noise))


def test_a_study_says_and_charges_what_shared_noise_costs(tmp_path: Path) -> None:
    result = session.run(_study(), toy_sites(tmp_path), tmp_path / "out", engine="local")
    privacy = result.privacy
    assert (privacy.secure, privacy.noise) == (True, "distributed")
    assert 7.9 < privacy.epsilon <= 8.0
    assert "no site's own noise is enough" in privacy.note
    lines = (tmp_path / "out" / "work" / "sites" / "A" / "ledger.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["round"] for entry in entries] == [1, 2, 3]
    assert epsilon_of_zcdp(sum(e["rho"] for e in entries), 0.01) == pytest.approx(privacy.epsilon, abs=1e-4)


@pytest.mark.slow
def test_training_with_little_shared_noise_follows_the_gradients(tmp_path: Path) -> None:
    """Everybody in every step and next to no noise: as good as training without privacy."""
    common = {"patients_per_step": 8, "examples_per_patient": 2, "noise_multiplier": 0.05, "clip": 100.0}
    study = _study(privacy={**common, "epsilon": 1e9}, schedule={"rounds": 4, "release": "last"})
    private = session.run(study, toy_sites(tmp_path), tmp_path / "private", engine="local")
    plain = study.model_copy(
        update={
            "protection": study.protection.model_copy(update={"privacy": None}),
            "local": study.local.model_copy(update={"batch": 16}),
        }
    )
    session.run(plain, toy_sites(tmp_path), tmp_path / "plain", engine="local")
    assert private.privacy.epsilon > 100
    exact, noisy = _change(tmp_path / "plain"), _change(tmp_path / "private")
    # Noise of 0.05 x 100 / sqrt(3) x 0.1 / 8 x sqrt(4) a coordinate is what may be between them.
    assert np.abs(noisy - exact).std() < 3 * 0.05 * 100 / math.sqrt(3) * 0.1 / 8 * 2


def drawn(examples: tuple[tuple[int, ...], ...]) -> tuple[Drawn, ...]:
    """Patients of a step, each with a stream of its own."""
    return tuple(Drawn(own, SecretStream(bytes([n]) * 32)) for n, own in enumerate(examples))


def _whole_sums(folder: Path, examples: tuple[tuple[int, ...], ...], scale: float = 1.0) -> tuple[np.ndarray, Any]:
    """A site's sum without its noise, rotated, in steps; and the clipped sum that it stands for."""
    task = Regression(patients=24)
    dataset, store = task.dataset("A", (folder,)), SiteStore(folder / "store")
    dataset.y[:] *= scale
    terms = Terms(1e9, 1e-3, 0.7, 1.0, 0.25, 5.0, 2, "exact", "pld", LATTICE)
    budget = PrivacyBudget("A", terms, Ledger(folder / "ledger.jsonl", store), SecretRoot.of(store))
    training = PrivateTraining(task, dataset, budget, "study", "federated")
    torch.manual_seed(0)
    model = task.build_model()
    gradients = ExactGradients(task, model)
    training.draw = lambda secret, step: drawn(examples)  # type: ignore[method-assign]
    context = LocalRound("A", model, {}, {}, {}, {}, 5, 1, 0.1, seed=3)
    secret = budget.pay("s", "a", 5, 1, "c", [])
    sums = training.whole_sums(context, gradients, secret, 0, LATTICE)
    noise = discrete_gaussians(secret.noise(0), LATTICE.deviation, LATTICE.dimension)
    whole = np.concatenate([part.ravel() for part in sums.values()]) - noise
    turned = np.split(whole * LATTICE.step, np.cumsum([part.size for part in sums.values()])[:-1])
    back = [unrotate(part, Codec(3).signs(5, MODEL, name)) for name, part in zip(sums, turned, strict=True)]
    exact = training.clipped_sum(gradients, drawn(examples), LATTICE.dimension).numpy()
    return whole, (np.concatenate(back), exact)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6, 1e30, math.nan])
def test_no_patient_moves_a_sum_further_than_the_bound(tmp_path: Path, scale: float) -> None:
    whole, _ = _whole_sums(tmp_path, ((0, 1),), scale)
    assert squared_norm(whole) <= LATTICE.bound


def test_a_whole_sum_stands_for_the_clipped_gradients(tmp_path: Path) -> None:
    _, (found, exact) = _whole_sums(tmp_path, ((0, 1), (4,), (8, 9)))
    assert np.linalg.norm(exact) > 0.1
    # Three roundings of 65 values by less than a step each.
    assert np.linalg.norm(found - exact) < LATTICE.step * 3 * math.sqrt(65)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_whole_numbers_add_up_modulo_the_ring(bits: int) -> None:
    """Cutting a value at a site would take its noise from the sum; wrapping around does not."""
    ring = Ring(bits)
    values = np.array([[3, -4, 2 ** (bits - 1) - 1], [-9, -1, 5]])
    sums = ExactSum(((12, ring),))
    for row in values:
        sums.add(bytes(ring.pack(whole_elements(row, ring))).ljust(12, b"\0"), 0)
    assert ring.signed(sums.segment(0)[:3]).tolist() == [-6, -5, -(2 ** (bits - 1)) + 4]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protection": {"secure": False}}, "set `secure: true`"),
        ({"protection": {"compression": {"kind": "rotation"}}}, "compression"),
        ({"privacy": {"delta": None}}, r"give `privacy\.delta`"),
        ({"local": {"steps": 2}}, r"local\.steps=2.*set it to 1"),
        ({"local": {"optimizer": "adam"}}, "optimizer: sgd"),
        ({"local": {"momentum": 0.9}}, "without momentum"),
        ({"local": {"schedule": "cosine"}}, "schedule: constant"),
        ({"method": {"kind": "fedprox", "weights": "equal"}}, "set it to `fedavg`"),
    ],
)
def test_what_breaks_the_assumptions_is_refused(changes: dict[str, Any], said: str) -> None:
    _study()
    with pytest.raises(ValueError, match=said):
        _study(**changes)


def test_comparisons_and_buffers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"--compare local.*too little noise"):
        session.open_host(_study(), toy_sites(tmp_path), tmp_path / "out", ("local",), (), None)
    host = session.open_host(_study({"norm": True}), toy_sites(tmp_path), tmp_path / "out", (), (), None)
    with pytest.raises(StudyError, match="averaged and not trained"):
        host.arm_spec("federated")


def test_scales_stay_finite_however_tight_the_ring() -> None:
    """Sums near the end of the ring would make scales that follow them grow in every round."""
    info = TensorInfo("w", "float32", (4,))
    layout = Layout((Group(MODEL, (info,), 24),), max_sites=256)
    codec = LatticeCodec(0, frozenset(), -0.5)
    top = levels(layout.bits_of(layout.groups[0]))
    scales = {scale_key(MODEL, "w"): 0.2}
    changes = np.array([top, -top, 7, 0])
    expected = None
    for number in range(1, 1001):
        total = ExactSum(layout.segments)
        for site in range(3):
            chunks = encode(layout, scales, {MODEL: 1.0}, {MODEL: {"w": changes}}, {}, np.random.default_rng(site))
            total.add(b"".join(bytes(chunk) for chunk in chunks), 0)
        aggregate = Aggregate(layout, total, scales)
        found = codec.restore(1, layout, aggregate).total(MODEL, "w")
        expected = found if expected is None else expected
        assert np.allclose(found, expected, rtol=1e-9)
        scales, saturated = codec.next_scales(aggregate, first=number == 1)
        assert not saturated
    assert scales == {scale_key(MODEL, "w"): 0.2}
