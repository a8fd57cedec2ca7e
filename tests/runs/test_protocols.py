"""Every released model says which scanners it was trained on, and `reconstruct` which it was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from typer.testing import CliRunner

from tests.ct_files import setting, write_series
from tests.ct_hospitals import ct_study, make_ct_hospitals
from tests.federation.rig import Sent, recorded_sessions
from tests.laws.test_silence import leaks
from wardround.cli import app
from wardround.federation.facts import DELIVER, FACTS
from wardround.imaging.readers.ct_protocol import CTProtocol, facts_of
from wardround.runs.apply import trained_coils
from wardround.runs.machine import Machine
from wardround.runs.protocols import lines, summary, warning
from wardround.runs.session import Result, run
from wardround.study.ct import CTAcquisition
from wardround.study.load import load_study
from wardround.study.protocols import HeaderFacts, ModelProtocols
from wardround.study.sites import Egress, SiteData, SitesFile

TOLD = HeaderFacts(scanners=("SIEMENS Sensation 16",), kvp=(120.0,), slice_thickness=(5.0,), kernels=("B30f",))


def _sites(folders: dict[str, Path], **rules: Any) -> SitesFile:
    return SitesFile(sites={site: SiteData(data=(folder,), egress=Egress(**rules)) for site, folder in folders.items()})


def _protocols(model: Path) -> ModelProtocols:
    with safe_open(str(model), framework="numpy") as file:
        return ModelProtocols.model_validate_json(file.metadata()["protocols"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_ct_hospitals(tmp_path_factory.mktemp("hospitals"))


@pytest.fixture(scope="module")
def finished(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[Sent]]:
    """A run in which a value must be that of two patients to be told, and its messages."""
    with pytest.MonkeyPatch.context() as patch:
        sent = recorded_sessions(patch)
        out = tmp_path_factory.mktemp("run")
        rules = {"minimum_cohort": 2, "per_site_results": False}
        result = run(ct_study(), _sites(folders, **rules), out, compare=("local",), engine="local")
    return result, sent


def test_a_model_carries_its_scanners_and_what_two_patients_headers_say(finished: tuple[Result, list[Sent]]) -> None:
    result, _ = finished
    study = load_study(ct_study())
    found = _protocols(result.out / "models" / "federated.safetensors")
    # The scanner that took no part is none of them, and NIfTI has no header.
    assert found.scanners == {site: study.acquisition_of(site) for site in "AB"}
    assert found.headers == {"A": TOLD}
    alone = _protocols(result.out / "models" / "local-B.safetensors")
    assert (list(alone.scanners), alone.headers) == (["B"], {})


def test_result_card_and_inspect_list_them(finished: tuple[Result, list[Sent]]) -> None:
    out = finished[0].out
    written = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert written["scanners"] == {"A": TOLD.model_dump(mode="json")}
    assert "| A | SIEMENS Sensation 16; 120 kV; 5 mm; kernels B30f |" in (out / "model_card.md").read_text("utf-8")
    said = CliRunner().invoke(app, ["inspect", str(out / "models" / "federated.safetensors")]).stdout
    assert "study tiny-ct" in said
    assert "simulated scanner of B: geometry fan_arc, views 16, bins 56, pixel 12 mm, bin 16 mm" in said
    assert "headers of A: SIEMENS Sensation 16; 120 kV; 5 mm; kernels B30f" in said


def test_headers_are_in_the_answer_to_facts_and_in_the_delivered_model_alone(
    finished: tuple[Result, list[Sent]],
) -> None:
    said = [sent for sent in finished[1] if sent.message.header.kind not in (FACTS, DELIVER)]
    assert 10 < len(said) < len(finished[1])
    assert leaks(said, [b"SIEMENS", b"Sensation", b"B30f", b"kernel", b"tube voltage"]) == []


@pytest.mark.slow
def test_a_model_written_again_has_the_same_bytes(
    finished: tuple[Result, list[Sent]], folders: dict[str, Path], tmp_path: Path
) -> None:
    first = finished[0].out
    rules = {"minimum_cohort": 2, "per_site_results": False}
    run(ct_study(), _sites(folders, **rules), tmp_path / "again", compare=("local",), engine="local")
    for model in sorted((first / "models").glob("*.safetensors")):
        assert model.read_bytes() == (tmp_path / "again" / "models" / model.name).read_bytes()


@pytest.mark.parametrize(
    ("rules", "privacy", "told"),
    [
        ({"minimum_cohort": 2}, False, TOLD),
        ({"minimum_cohort": 6}, False, HeaderFacts()),
        ({"scanner_facts": False}, False, HeaderFacts()),
        ({}, True, HeaderFacts()),
    ],
)
def test_a_site_tells_what_its_rules_allow(
    folders: dict[str, Path], tmp_path: Path, rules: dict[str, Any], privacy: bool, told: HeaderFacts
) -> None:
    changes: dict[str, Any] = {}
    if privacy:
        changes = {
            "method": {"kind": "fedavg", "weights": "equal"},
            "schedule": {"rounds": 1, "release": "last"},
            "protection": {"privacy": {"epsilon": 8.0, "delta": 1e-2, "clip": 1.0}},
        }
    host = Machine(load_study(ct_study(**changes)), _sites(folders, **rules), tmp_path, ())
    assert host.agent("A").held.header_facts() == told


def test_a_rare_value_and_what_looks_like_a_name_are_not_told() -> None:
    common = CTProtocol(vendor="GE", model="Discovery CT750 HD", kernel="STANDARD", kvp=120.0)
    rare = CTProtocol(vendor="GE", model="MUELLER^ANNA", kernel="4711077", kvp=100.0)
    found = facts_of([{common, rare}, {common}], 2)
    assert found == HeaderFacts(scanners=("GE Discovery CT750 HD",), kvp=(120.0,), kernels=("STANDARD",))
    everything = facts_of([{common, rare}, {common}], 1)
    assert everything.kvp == (100.0, 120.0)
    assert everything.scanners == found.scanners
    assert everything.kernels == found.kernels


def _reconstructed(model: Path, source: Path, output: Path, *more: str) -> str:
    result = CliRunner().invoke(app, ["reconstruct", str(model), str(source), str(output), *more])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_reconstruct_warns_of_scanners_that_the_model_does_not_know(
    finished: tuple[Result, list[Sent]], tmp_path: Path
) -> None:
    model = finished[0].out / "models" / "federated.safetensors"
    like = setting(ConvolutionKernel="B30f", PixelSpacing=["4", "4"])
    other = setting(ConvolutionKernel="B70f", KVP="80", PixelSpacing=["4", "4"])
    known = _reconstructed(model, write_series(tmp_path / "known", change=like), tmp_path / "a.nii.gz")
    assert "Trained on the simulated scanners of A (fan_flat, 24 views, 100000 photons), B (fan_arc," in known
    assert "Mind: unlike" not in known
    strange = _reconstructed(model, write_series(tmp_path / "strange", change=other), tmp_path / "b.nii.gz")
    (mind,) = (line for line in strange.splitlines() if line.startswith("Mind: unlike"))
    assert "tube voltage 80 kV (trained on 120 kV)" in mind
    assert "kernel B70f (trained on B30f)" in mind
    assert "views" not in mind


def test_only_what_lies_outside_is_named() -> None:
    study = load_study(ct_study())
    trained = ModelProtocols(scanners={site: study.acquisition_of(site) for site in "AB"})
    inside = study.acquisition_of("A")
    assert isinstance(inside, CTAcquisition)
    assert warning(trained, inside.facts(), {"kernel": "X", "scanner": "Y"}) == ""
    between = inside.model_copy(update={"geometry": inside.geometry.model_copy(update={"views": 20})})
    assert warning(trained, between.facts(), {}) == ""
    far = inside.model_copy(update={"photons": 1e6, "geometry": inside.geometry.model_copy(update={"views": 96})})
    said = warning(trained, far.facts(), {})
    assert "views 96 (trained on 16 to 24)" in said
    assert "photons 1,000,000 (trained on 30,000 to 100,000)" in said
    assert "\n" not in said
    assert "bins" not in said


def test_a_model_of_mri_knows_its_masks(tmp_path: Path) -> None:
    study = load_study({"name": "m", "sites": {"A": {}, "B": {"acquisition": {"coils": 6}}}})
    trained = ModelProtocols(scanners={site: study.acquisition_of(site) for site in "AB"})
    assert ModelProtocols.model_validate_json(trained.model_dump_json()) == trained
    assert warning(trained, {"acceleration": 4.3, "coils": 6.0}, {}) == ""
    assert "acceleration 2 (trained on 4)" in warning(trained, {"acceleration": 2.0, "coils": 8.0}, {})


def test_what_training_scans_varied_is_known() -> None:
    """Ranges replace the scanner's own values, which no training scan had."""
    vary = {"acceleration": [2, 3], "coils": [1, 12], "families": ["random", "equispaced"]}
    study = load_study({"name": "m", "sites": {"A": {}, "B": {}}, "acquisition": {"vary": vary}})
    trained = ModelProtocols(scanners={site: study.acquisition_of(site) for site in "AB"})
    scan = {"mask": "equispaced", "acceleration": 2.5, "coils": 3.0}
    assert warning(trained, scan, {}) == ""
    said = warning(trained, {"mask": "poisson", "acceleration": 4.0, "coils": 16.0}, {})
    assert "mask poisson (trained on equispaced, random)" in said
    assert "acceleration 4 (trained on 2 to 3); coils 16 (trained on 1 to 12)" in said
    assert lines(trained)[0].endswith("mask random or equispaced, acceleration 2 to 3, coils 1 to 12")
    assert "noise 0.005, varied in training" in summary(trained)
    assert trained_coils(study, "A") == tuple(range(1, 13))


def test_damaged_protocols_are_one_error(finished: tuple[Result, list[Sent]], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = finished[0].out / "models" / "federated.safetensors"
    with safe_open(str(model), framework="numpy") as file:
        metadata = file.metadata()
    save_file(load_file(model), tmp_path / "bad.safetensors", metadata | {"protocols": '{"scanners": 3}'})
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "bad.safetensors")])
    assert result.exit_code == 2
    assert "the model file's scanners cannot be read" in result.stderr
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    assert "not a model" in CliRunner().invoke(app, ["inspect", str(tmp_path / "other.safetensors")]).stderr


def test_check_says_whose_headers_a_model_may_name(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(ct_study()), encoding="utf-8")
    entries = {site: {"data": str(folder)} for site, folder in folders.items()}
    entries["B"]["egress"] = {"scanner_facts": False}  # type: ignore[assignment]
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump({"sites": entries}), encoding="utf-8")
    arguments = ["check", str(tmp_path / "study.yaml"), "--sites", str(tmp_path / "sites.yaml")]
    said = " ".join(CliRunner().invoke(app, arguments).stdout.split())
    assert "that the headers of DICOM images name, as sets (A: egress.scanner_facts)" in said
