"""A new hospital joins: it starts from the release, trains at home, and is never worse on its validation patients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.examples import quickly
from tests.toys import Regression, toy_sites, toy_study
from wardround.cli import app
from wardround.errors import DataError, StudyError
from wardround.federation.release import shared_sha256
from wardround.learning.methods.method import LocalRound
from wardround.living.joining import AtHome, join
from wardround.runs.machine import Machine
from wardround.runs.releases import ReleasedModel
from wardround.runs.session import run
from wardround.site.lineage import Lineage
from wardround.study.sites import SitesFile

Values = dict[str, Any]
NORM = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True, "patients": 12}}
METHODS: dict[str, Values] = {
    "fedavg": {"kind": "fedavg"},
    "fedbn": {"kind": "fedbn"},
    "fedrep": {"kind": "fedrep", "head": ["3.*"], "head_steps": 2},
    "ditto": {"kind": "ditto", "pull": [0.5, 0.0]},
    "fedmri": {"kind": "fedmri", "encoder": ["0.*", "1.*"], "contrast": 0.1},
}
PRIVATE = {"fedbn": "1.", "fedrep": "3.", "fedmri": "3."}


Released = Callable[..., tuple[Path, SitesFile]]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """Makes a run of two sites that New has no part in, each once; a joining only reads it."""
    folder = tmp_path_factory.mktemp("released")
    sites, made = toy_sites(folder / "data", ("A", "B", "New")), dict[str, Path]()

    def of(method: Values, **changes: Any) -> tuple[Path, SitesFile]:
        values = {"method": method, "task": NORM, "schedule": {"rounds": 2}, **changes}
        if (key := repr(values)) not in made:
            study, out = toy_study({"A": {}, "B": {}}, **values), folder / str(len(made))
            made[key] = run(study, sites, out, engine="local", quiet=True).out
        return made[key], sites

    return of


@torch.no_grad()
def mse(values: dict[str, Any], site: str, sites: SitesFile, out: Path, split: Any, *, own: bool) -> float:
    """Computed outside every room of the product; `own`: batch norm by the images themselves (FedBN's stranger)."""
    network = Regression(norm=True).build_model().eval()
    network.load_state_dict({n: torch.from_numpy(np.array(t)) for n, t in values.items()})
    network[1].train(own)  # type: ignore[index]
    host = Machine(toy_study({site: {}}, task=NORM), sites, out, ())
    return float(
        np.mean([float((network(x) - y).square().mean()) for _, (x, y) in host.dataset(site).evaluation(split)])
    )


@pytest.mark.parametrize("kind", quickly(METHODS, 0, 1, 2, 3))
def test_a_joined_model_is_the_release_with_what_was_learned_at_home(
    released: Released, tmp_path: Path, kind: str
) -> None:
    before, sites = released(METHODS[kind])
    model = before / "models" / "federated.safetensors"
    bytes_before = model.read_bytes()
    found = join(before, sites, "New", tmp_path / "new", rounds=4, steps=5, lr=0.1)
    assert found.chosen == "joined"
    assert found.release == shared_sha256(model)
    assert model.read_bytes() == bytes_before
    served = ReleasedModel.opened(found.model).network(Regression(norm=True).build_model, "New", None)
    start, joined = load_file(model), {n: t.numpy() for n, t in served.state_dict().items()}
    moved = {n for n in start if not np.array_equal(start[n], joined[n]) and not n.endswith("tracked")}
    assert moved == {n for n in start if n.startswith(PRIVATE.get(kind, "")) and not n.endswith("tracked")}
    # Which wins on validation, and what both come to on test patients, measured by hand.
    for split, mine, other in (
        ("validation", found.validation["joined"], found.validation["release"]),
        ("test", found.test["r"].joined.value, found.test["r"].release.value),
    ):
        assert -mine == pytest.approx(mse(joined, "New", sites, tmp_path, split, own=False), abs=1e-5)
        assert -other == pytest.approx(mse(start, "New", sites, tmp_path, split, own=kind == "fedbn"), abs=1e-5)
    assert found.validation["joined"] > found.validation["release"]
    assert found.test["mse"].gain.value == pytest.approx(
        found.test["mse"].release.value - found.test["mse"].joined.value
    )
    written = json.loads((tmp_path / "new" / "joining.json").read_text())
    assert written == found.to_json()
    assert written["test"]["mse"]["gain"]["n"] == 2
    assert set(load_file(found.model)) >= moved


def test_a_release_that_no_round_betters_is_the_hospital_s_model(released: Released, tmp_path: Path) -> None:
    plain = {"kind": "custom", "factory": "tests.toys:make_task", "options": {}}
    before, sites = released({"kind": "fedavg"}, task=plain)
    found = join(before, sites, "New", tmp_path / "new", rounds=2, lr=1e-30)
    assert (found.chosen, found.round) == ("release", 0)
    assert found.validation["joined"] <= found.validation["release"]
    assert found.model.read_bytes() == (before / "models" / "federated.safetensors").read_bytes()
    assert found.test["mse"].gain.value == pytest.approx(0.0, abs=1e-6)


def test_ditto_s_pull_holds_a_model_at_the_release(released: Released, tmp_path: Path) -> None:
    """A pull of 1 / lr brings every step back to the release, less the gradient there."""
    ends = []
    for pull in (0.0, 10.0):
        before, sites = released({"kind": "ditto", "pull": pull})
        found = join(before, sites, "New", tmp_path / str(pull) / "new", rounds=3, steps=10, lr=0.1)
        assert found.pull == pull
        start, joined = load_file(before / "models" / "federated.safetensors"), load_file(found.model)
        ends.append(sum(float(np.square(joined[n] - start[n]).sum()) for n in ("0.weight", "3.weight")))
    assert ends[1] < 0.3 * ends[0]


def test_the_pull_is_lambda_over_2_times_the_square_of_the_distance() -> None:
    w, release = torch.tensor([3.0, 1.0], requires_grad=True), torch.tensor([1.0, 0.0])
    local = LocalRound("A", torch.nn.Module(), {"w": w}, {}, {}, {}, 1, 1, 0.1, initial={"w": release})
    assert AtHome("equal", pull=3.0).objective(local, torch.zeros(())).item() == 0.5 * 3.0 * (4.0 + 1.0)
    assert float(AtHome("equal").objective(local, torch.zeros(()))) == 0.0


def test_all_of_a_personal_release_learns_where_the_hospital_says_so(released: Released, tmp_path: Path) -> None:
    before, sites = released(METHODS["fedbn"])
    found = join(before, sites, "New", tmp_path / "new", train="all", rounds=2, lr=0.1)
    start, joined = load_file(before / "models" / "federated.safetensors"), load_file(found.model)
    assert not np.array_equal(start["0.weight"], joined["0.weight"])


def test_adapters_alone_learn_where_the_release_has_them(released: Released, tmp_path: Path) -> None:
    lora = {"kind": "lora", "targets": ["0", "3"], "rank": 2, "alpha": 1.0}
    before, sites = released({"kind": "fedavg"}, adapters=lora)
    found = join(before, sites, "New", tmp_path / "new", rounds=3, lr=0.02)
    assert (found.chosen, found.trained) == ("joined", "adapters")
    assert all("lora" in name or name.startswith("1.") for name in load_file(found.model))
    served = ReleasedModel.opened(found.model).network(Regression(norm=True).build_model, "New", None)
    given = ReleasedModel.opened(before / "models" / "federated.safetensors")
    base = given.network(Regression(norm=True).build_model, None, None).state_dict()
    frozen = [name for name in base if "lora" not in name and name.startswith(("0.", "3."))]
    assert frozen
    assert all(torch.equal(served.state_dict()[name], base[name]) for name in frozen)


def test_the_same_joining_gives_the_same_model(released: Released, tmp_path: Path) -> None:
    before, sites = released({"kind": "fedavg"})
    one, other = (join(before, sites, "New", tmp_path / name, rounds=2, lr=0.1) for name in ("one", "other"))
    assert one.model.read_bytes() == other.model.read_bytes()
    assert one.to_json() == other.to_json()


def test_the_hospital_records_whom_its_model_learned_from(released: Released, tmp_path: Path) -> None:
    named = {"kind": "custom", "factory": "tests.cohorts:CohortTask", "options": {}}
    before, sites = released({"kind": "fedavg"}, task=named)
    found = join(before, sites, "New", tmp_path / "new", rounds=2, lr=0.1)
    assert found.chosen == "joined"
    lineage = Lineage(tmp_path / "new" / "work" / "sites" / "New" / "history")
    model = shared_sha256(found.model)
    assert lineage.ancestors(model) == (found.release,)
    assert lineage.trained(model, [f"Doe-{n}" for n in range(8)]) == {f"Doe-{n}" for n in range(4)}


def test_who_may_not_join(released: Released, tmp_path: Path) -> None:
    before, sites = released({"kind": "fedavg"})
    with pytest.raises(StudyError, match="it trained the release"):
        join(before, sites, "A", tmp_path / "new")
    with pytest.raises(StudyError, match="no entry for site Other"):
        join(before, sites, "Other", tmp_path / "new")
    with pytest.raises(DataError, match="model file cannot be read"):
        join(before / "models" / "nothing.safetensors", sites, "New", tmp_path / "new")


def test_a_hospital_without_validation_patients_cannot_choose(
    released: Released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, sites = released({"kind": "fedavg"})
    monkeypatch.setattr("tests.toys.Points.patients", lambda self, split: 0 if split == "validation" else 2)
    with pytest.raises(DataError, match="has no validation patients"):
        join(before, sites, "New", tmp_path / "new")


def test_the_command_says_what_was_chosen_and_how_to_use_it(
    released: Released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, sites = released({"kind": "fedavg"})
    monkeypatch.setattr("wardround.living.joining.load_sites", lambda _: sites)
    said = CliRunner().invoke(
        app,
        ["join", str(before), "--sites", "sites.yaml", "--site", "New", "--out", str(tmp_path / "new"), "--allow-code",
         "--rounds", "2", "--lr", "0.1"],
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    text = " ".join(said.output.split())
    assert "New joined release" in text
    assert "learned at home: all that the release trained" in text
    assert "test mse: release" in text
    assert "--site New" in text
