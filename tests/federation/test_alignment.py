"""What every method for unlike sites must stand: masks, other codecs, a run that goes on, sites that are away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.devices import DEVICES, arm_specs_of, device_named, learner_of
from tests.examples import quickly
from tests.federation.alignment import Away, shared_in, unlike_study
from tests.federation.rig import Rig, assert_billed, recorded_sessions
from tests.toys import toy_sites
from wardround.learning.device import CPU
from wardround.runs.explain import explain
from wardround.runs.session import run
from wardround.storage.store import NOTHING, Memory
from wardround.study.hashes import written

SGD = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.5}
KEPT = {"optimizer": "adam", "lr": 0.02, "optimizer_state": "keep", "steps": 2}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scaffold": ({"kind": "scaffold"}, KEPT),
    "fednova": ({"kind": "fednova"}, {**SGD, "passes": 0.5}),
    "moon": ({"kind": "moon", "layer": "2", "mu": 0.1}, KEPT),
    "fedcostwavg": ({"kind": "fedcostwavg"}, KEPT),
    "fedpidavg": ({"kind": "fedpidavg"}, KEPT),
    "harmofl": ({"kind": "harmofl"}, KEPT),
    "modfed": ({"kind": "modfed", "encoder": ["0.*", "1.*"]}, KEPT),
    "fair_weights": ({"kind": "fair_weights"}, KEPT),
    "fl_mrcm": ({"kind": "fl_mrcm", "target": "C", "layer": "0", "patients": 2, "adversarial": 0.01}, KEPT),
}
# The target's latents are refused with it.
SUMMED = [name for name in METHODS if name != "fl_mrcm"]
NORM = {"norm": True}


def study_of(name: str, rounds: int = 3, **changes: Any) -> Any:
    method, local = METHODS[name]
    return unlike_study(method, local, rounds, options=NORM, **changes)


@pytest.mark.parametrize("name", quickly(SUMMED, 0, 4))
def test_a_secure_sum_comes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Whatever travels beside the model is masked with it: released models are those of the clear sum."""
    released = []
    for secure in (False, True):
        study = study_of(name, 2, schedule={"release": "last"}, protection={"secure": secure})
        folder = tmp_path / str(secure)
        result = run(study, toy_sites(folder), folder / "out", engine="local", quiet=True, allow_code=True)
        released.append(load_file(result.out / "models" / "federated.safetensors"))
    clear, masked = released
    assert clear.keys() == masked.keys()
    assert all(np.array_equal(clear[key], masked[key]) for key in clear)


@pytest.mark.slow
@pytest.mark.parametrize("name", quickly(METHODS, 0, 2, 4))
def test_a_run_that_goes_on_after_a_stop_comes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = Rig(study_of(name), tmp_path / "whole").train()
    stopped = Rig(study_of(name), tmp_path / "stopped")
    states = stopped.states()
    assert [next(states).round for _ in range(3)] == [0, 1, 2]
    for site in stopped.sites.values():
        site.close()
    again = Rig(study_of(name), tmp_path / "stopped").train()
    assert again.round == whole.round == 3
    assert again.public_sha256 == whole.public_sha256


@pytest.mark.parametrize("name", quickly(METHODS, 1, 2, 4))
def test_a_site_that_was_away_comes_back(name: str, tmp_path: Path) -> None:
    """Nothing of it is older than it was, and what is released is the model and its buffers alone."""
    rig = Rig(study_of(name, 4, schedule={"min_sites": 2}), tmp_path)
    rig.sites["B"] = Away(rig.sites["B"], (2, 3))  # type: ignore[assignment]
    state = rig.train()
    assert [len(report.participants) for report in rig.journal.reports()] == [3, 2, 2, 3]
    losses = [report.loss for report in rig.journal.reports() if report.loss is not None]
    assert losses[-1] < losses[0]
    for site in (None, "A"):
        assert set(rig.method.release_for(site, state.public, state.private)) == set(shared_in(state.public))


CODECS: dict[str, dict[str, Any]] = {
    "rotation": {"compression": {"kind": "rotation"}, "ring_bits": 16},
    "subspace": {"compression": {"kind": "subspace", "ratio": 0.5}},
    "top_k": {"compression": {"kind": "top_k", "ratio": 0.25}},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "codec"), quickly([(n, c) for n in METHODS for c in CODECS], 1, 4, 9, 13))
def test_it_learns_through_every_codec_or_says_why_not(name: str, codec: str, tmp_path: Path) -> None:
    def study() -> Any:
        return study_of(name, 6, protection={**CODECS[codec], "initial_scale": 1.0})

    if name in ("fedcostwavg", "fedpidavg") and codec != "rotation":
        with pytest.raises(ValueError, match="set it to rotation or none"):
            study()
        return
    rig = Rig(study(), tmp_path)
    rig.train()
    losses = [report.loss for report in rig.journal.reports() if report.loss is not None]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ["scaffold", "fedpidavg", pytest.param("fl_mrcm", marks=pytest.mark.slow)])
def test_every_byte_is_on_the_bill(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = recorded_sessions(monkeypatch)
    study = study_of(name, 2, sites={"C": {}, "B": {}, "A": {"role": "unseen"}})
    result = run(study, toy_sites(tmp_path), tmp_path / "out", engine="local", quiet=True, allow_code=True)
    assert_billed(result, sent)
    # A hospital that did not train is measured with the model, and has numbers.
    assert result.estimate("federated", "A", "mse") is not None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scaffold", "the change of its control variate"),
        ("fednova", "its weight times its number of steps"),
        ("fl_mrcm", "of site C alone: every round 8 vectors of 8 numbers at most"),
        ("fedpidavg", "how much its training loss fell and the sum of its last five"),
    ],
)
def test_check_says_what_leaves_beside_the_model(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(written(study_of(name))))
    text = " ".join(explain(tmp_path / "study.yaml", None, (), (), allow_code=True).split())
    assert said in text
    assert ("0.5 passes over a site's own examples" in text) == (name == "fednova")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METHODS)
def test_a_round_is_the_same_on_any_device(
    name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's `meta` device a number that is read past `on_host`, or a constant of the CPU, is an error."""
    changes = {}
    for compute in (CPU, device_named(device, monkeypatch)):
        plans = arm_specs_of(study_of(name))
        learner, memory = learner_of(plans, tmp_path, compute), NOTHING
        public, _ = plans.initial(plans.arm_spec("federated"))
        for number in (1, 2):
            learner.load(public, memory)
            trained = learner.train(number, public, memory)
            memory = Memory(trained.memory, {})
        changes[str(compute.device)] = trained.changes
    here, there = changes.values()
    assert {g: {n: t.shape for n, t in part.items()} for g, part in here.items()} == {
        g: {n: t.shape for n, t in part.items()} for g, part in there.items()
    }
    if device == "cuda":
        for group, part in here.items():
            for key, tensor in part.items():
                assert np.allclose(tensor, there[group][key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["scaffold", "moon", "harmofl"])
def test_layers_of_fewer_bits_give_nearly_the_same(name: str, precision: Any, tmp_path: Path) -> None:
    """fp16 has a scaler: gradients are scaled up when a method sees the loss, and are not when it sees them."""
    method, _ = METHODS[name]
    ends = []
    for compute in (CPU, replace(CPU, precision=precision)):
        plans = arm_specs_of(unlike_study(method, {"steps": 3, "lr": 0.1}, options=NORM))
        learner, memory = learner_of(plans, tmp_path, compute), NOTHING
        public, _ = plans.initial(plans.arm_spec("federated"))
        for number in (1, 2):
            learner.load(public, memory)
            trained = learner.train(number, public, memory)
            memory = Memory(trained.memory, {})
        ends.append(np.concatenate([t.ravel() for part in trained.changes.values() for t in part.values()]))
    # Layers have 8 bits and 11; a few steps of them, and normalisation, add some up.
    assert np.linalg.norm(ends[1] - ends[0]) < 0.1 * np.linalg.norm(ends[0])
    assert np.any(ends[1] != ends[0])
