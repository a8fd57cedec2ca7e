"""The command at a tiny hospital: what it writes, what it refuses, and that it never calls itself safe blindly."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import wardround
from tests.mri_hospitals import make_hospitals, write_study
from tests.toys import toy_sites, toy_study
from wardround.audit import auditor
from wardround.audit.auditor import Auditor, Effort
from wardround.audit.command import audit
from wardround.audit.epsilon import Bound, Claim
from wardround.audit.inversion import ATTACKS, Attack, Recovered, Victim, invert
from wardround.audit.results import Audit, render
from wardround.audit.signature import identity_of, sign
from wardround.cli import app
from wardround.errors import JournalError
from wardround.federation.release import load_model
from wardround.protection.identity import Identity
from wardround.storage.store import SiteStore
from wardround.study.load import load_study
from wardround.study.sites import load_sites

PATIENT = "Doe-John"


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Study and sites files, and the folder of a finished run."""
    folder = tmp_path_factory.mktemp("audit")
    study, sites = write_study(folder, make_hospitals(folder / "data"))
    wardround.run(study, sites, folder / "run", engine="local")
    return study, sites, folder / "run"


@pytest.fixture(scope="module")
def written(hospital: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """What the command printed, and where it wrote."""
    study, sites, run = hospital
    out = tmp_path_factory.mktemp("out")
    # The real ways of attack, with searches just long enough for the control, which alone has labels. What they find of
    # the site's own updates is not looked at: two iterations of one search give rows of the same form.
    effort = Effort(1, 40, 1, 2, 12, 2, 2, 4)
    privacy = ("--noise-multiplier", 1, "--dp-steps", 4)
    tried = []

    def briefly(attack: Attack, victim: Victim, seed: int) -> Recovered:
        tried.append((attack.name, victim.labels is not None))
        return invert(attack if tried[-1][1] else replace(attack, iterations=2, restarts=1), victim, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Effort, "of", staticmethod(lambda **_: effort))
        patch.setattr(auditor, "invert", briefly)
        found = _run(
            "audit", study, "--sites", sites, "--site", "Alpha", "--model", run, "--out", out, "--quick", *privacy
        )  # fmt: skip
    assert {name for name, control in tried if control} == {attack.name for attack in ATTACKS}
    assert {name for name, control in tried if not control} == {attack.name for attack in ATTACKS} - {"iDLG"}
    return found, out


def test_the_command_writes_a_page_and_numbers(written: tuple[Result, Path]) -> None:
    found, out = written
    assert found.exit_code == 0, found.output
    values = json.loads((out / "audit.json").read_text())
    assert found.stdout.startswith(f"{values['light']}: {values['verdict']}")
    assert "<= claimed upper bound" in found.stdout
    page = (out / "audit.html").read_text()
    assert values["verdict"] in page
    assert values["epsilon"]["sentence"].replace("<=", "&lt;=") in page
    assert "<script" not in page
    assert "http" not in page
    assert "data:image" not in page
    assert PATIENT not in page + found.output


def test_who_took_part_is_told_from_alike_slices(hospital: tuple[Path, Path, Path]) -> None:
    """Held-out slices by another rule would differ from training's whether or not anybody remembers them."""
    study, sites, _ = hospital
    two = load_study(study, ["task.slices.per_patient=2", "task.evaluation.slices.per_patient=1"])
    found = Auditor(two, load_sites(sites), "Alpha", Effort.of(quick=True))
    held_out = found._dataset.patients("validation") + found._dataset.patients("test")
    assert len(list(found._outsiders())) > held_out


def test_the_numbers_follow_the_schema(written: tuple[Result, Path], hospital: tuple[Path, Path, Path]) -> None:
    values: dict[str, Any] = json.loads((written[1] / "audit.json").read_text())
    assert values["version"] == 1
    assert values["site"] == "Alpha"
    assert values["study_sha256"] == json.loads((hospital[2] / "result.json").read_text())["study_sha256"]
    assert values["lint"] == []
    assert {control["attack"] for control in values["control"]} == {attack.name for attack in ATTACKS}
    assert all(control["works"] for control in values["control"])
    assert all(control["ssim_median"] >= 0.8 for control in values["control"])
    variants = {row["variant"] for row in values["inversion"]}
    assert len(variants) == 5
    for row in values["inversion"]:
        assert row["light"] in ("red", "amber", "green")
        assert -1.0 <= row["ssim_median"] <= row["ssim_worst"] <= 1.0
        assert 0 <= row["retrieved"] <= row["images"]
        assert row["chance"] == pytest.approx(1 / values["pool"])
    assert [each["attack"].partition(",")[0] for each in values["membership"]] == ["loss threshold", "LiRA", "RMIA"]
    for each in values["membership"]:
        assert [at["fpr"] for at in each["at"]] == [0.01, 0.001]
        assert not each["at"][0]["resolved"]  # a handful of outsiders cannot show one in a hundred
        assert each["curve"][-1] == [1.0, 1.0]
    assert values["epsilon"]["lower"] <= values["epsilon"]["claimed"]
    assert values["epsilon"]["holds"] is True
    assert any("iDLG" in line for line in values["not_attacked"])


def _audit(hospital: tuple[Path, Path, Path], out: Path, attacks: tuple[Attack, ...], **options: Any) -> Audit:
    study, sites, _ = hospital
    return audit(load_study(study), load_sites(sites), "Alpha", out, quick=True, trials=1, attacks=attacks, **options)


def test_a_disabled_attack_is_not_safety(hospital: tuple[Path, Path, Path], tmp_path: Path) -> None:
    lazy = Attack("Inverting Gradients", iterations=1)
    found = _audit(hospital, tmp_path, (lazy,))
    assert found.light == "attack not working"
    assert {row.light for row in found.rows} == {"attack not working"}
    page = (tmp_path / "audit.html").read_text()
    assert "The attack is not working" in page
    assert '"lamp lamp-green"' not in page
    assert "membership: give --model" in page
    assert _audit(hospital, tmp_path, ()).light == "attack not working"


def test_quick_mode_says_that_reference_attacks_were_not_run(hospital: tuple[Path, Path, Path], tmp_path: Path) -> None:
    assert Effort.of(quick=True).references == 0
    found = _audit(hospital, tmp_path, (), model=hospital[2], parts=("membership",))
    assert [each.attack for each in found.membership] == ["loss threshold"]
    page = (tmp_path / "audit.html").read_text()
    assert "membership by LiRA and RMIA: not run in quick mode" in page
    assert "not tried" in page


def test_pictures_are_shown_when_asked_for(hospital: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _audit(hospital, tmp_path, (Attack("Unrolled", iterations=1, unroll=True),), pictures=True)
    page = (tmp_path / "audit.html").read_text()
    assert page.count("data:image/png") == 2
    assert "it stays at the site" in page


def test_a_planted_model_stops_the_audit(hospital: tuple[Path, Path, Path], tmp_path: Path) -> None:
    study, sites, run = hospital
    released = run / "models" / "federated.safetensors"
    tensors, (_, metadata) = load_file(released), load_model(released)
    tensors["denoiser.stack.0.weight"] = np.ones_like(tensors["denoiser.stack.0.weight"])
    save_file(tensors, tmp_path / "planted.safetensors", metadata=metadata)
    found = _run(
        "audit", study, "--sites", sites, "--site", "Alpha", "--model", tmp_path / "planted.safetensors",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert found.exit_code == 2
    assert "denoiser.stack.0.weight" in found.stderr
    values = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert values["light"] == "red"
    assert values["lint"][0]["check"] == "imprint"
    assert values["inversion"] == []


def test_a_refuted_claim_is_an_error(hospital: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A claim of epsilon 0.01 for noise that costs 8 is found out."""
    study, sites, _ = hospital
    found = _run(
        "audit", study, "--sites", sites, "--site", "Beta", "--out", tmp_path, "--only", "epsilon",
        "--noise-multiplier", 0.5, "--epsilon", 0.01,
    )  # fmt: skip
    assert found.exit_code == 2
    assert "> claimed upper bound" in found.stdout
    assert "do not rely on it" in found.stderr
    values = json.loads((tmp_path / "audit.json").read_text())
    assert values["light"] == "red"
    assert values["epsilon"]["lower"] > values["epsilon"]["claimed"]


def test_only_a_site_that_trains_can_be_audited(hospital: tuple[Path, Path, Path], tmp_path: Path) -> None:
    study, sites, _ = hospital
    found = _run("audit", study, "--sites", sites, "--site", "Gamma", "--out", tmp_path)
    assert found.exit_code == 2
    assert "choose among Alpha, Beta" in found.stderr


def test_the_light_is_red_for_a_refuted_claim_alone() -> None:
    found = Audit(
        study="s", study_sha256="0", plan_sha256="0", site="A", model="m", model_sha256="0", architecture_sha256="0",
        quick=True,
        inverted=False,
        lint=(), controls=(), rows=(), membership=(), properties=(), epsilon=Bound(1.0, 2.0, 1e-5, 100, 30, 30),
        skipped=(), pool=0, seconds=0.0, pictures=(),
    )  # fmt: skip
    assert found.light == "red"
    assert "does not hold" in render(found)


def test_the_lint_alone_is_quick_and_says_what_was_left_out(hospital: tuple[Path, Path, Path], tmp_path: Path) -> None:
    study, sites, run = hospital
    site = ("audit", study, "--sites", sites, "--site", "Alpha", "--model", run, "--out", tmp_path)
    found = _run(*site, "--only", "lint")
    assert found.exit_code == 0, found.output
    values = json.loads((tmp_path / "audit.json").read_text())
    assert values["light"] == "not attacked"
    assert "inversion: not asked for" in values["not_attacked"]
    assert "there is no part 'linting'" in _run(*site, "--only", "linting").stderr


@pytest.mark.slow
def test_the_claim_of_a_study_is_put_to_the_test(tmp_path: Path) -> None:
    privacy = {"noise_multiplier": 1.0, "patients_per_step": 1.0, "delta": 0.01}
    study, sites = write_study(
        tmp_path,
        make_hospitals(tmp_path / "data"),
        protection={"privacy": privacy},
        method={"kind": "fedavg", "weights": "equal"},
        schedule={"rounds": 2, "release": "last"},
    )
    found = audit(load_study(study), load_sites(sites), "Alpha", tmp_path / "out", parts=["epsilon"])
    assert found.epsilon is not None
    assert found.epsilon.delta == 0.01
    assert 0.0 <= found.epsilon.lower <= found.epsilon.claimed
    assert f"claimed upper bound {found.epsilon.claimed:.3f}" in (tmp_path / "out" / "audit.html").read_text()


# Signature -----------------------------------------------------------------------------------------------------------


def _verify(folder: Path, *more: object) -> Result:
    return _run("verify-audit", folder, *more)


def test_an_audit_is_signed_with_the_key_of_the_run(
    written: tuple[Result, Path], hospital: tuple[Path, Path, Path]
) -> None:
    found = _verify(written[1])
    assert found.exit_code == 0, found.output
    store = SiteStore(hospital[2] / "work" / "sites" / "Alpha" / "federated")
    assert store.identity is not None
    public = store.identity.public.hex()
    assert f"site Alpha signed it with key {public}" in found.stdout
    assert _verify(written[1], "--key", public).exit_code == 0
    assert "another key" in _verify(written[1], "--key", "00" * 32).stderr
    private = store.identity.private
    assert all(private not in p.read_bytes() and private.hex() not in p.read_text() for p in written[1].iterdir())
    store.close()


@pytest.fixture
def signed(written: tuple[Result, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written[1], tmp_path / "signed"))


@pytest.mark.parametrize("name", ["audit.json", "audit.html"])
def test_an_edited_file_is_found(signed: Path, name: str) -> None:
    text = (signed / name).read_text()
    (signed / name).write_text(text.replace("Alpha", "Alphb", 1))
    found = _verify(signed)
    assert found.exit_code == 2
    assert f"{name} is not what the site signed" in found.stderr
    (signed / name).unlink()
    assert f"{name} is missing" in _verify(signed).stderr


def test_a_forged_or_missing_signature_is_found(signed: Path) -> None:
    path = signed / "audit.sig.json"
    value = json.loads(path.read_text())
    (signed / "audit.json").write_text((signed / "audit.json").read_text() + "\n")
    files = {**value["files"], "audit.json": hashlib.sha256((signed / "audit.json").read_bytes()).hexdigest()}
    path.write_text(json.dumps({**value, "files": files}))
    assert "was not made with the key that it names" in _verify(signed).stderr
    for spoilt in ({**value, "key": "zz"}, {**value, "files": {}}, {**value, "site": 3}, {"version": 1}, [1]):
        path.write_text(json.dumps(spoilt))
        assert "cannot be read" in _verify(signed).stderr
    path.unlink()
    assert "no signed audit" in _verify(signed).stderr


def test_a_signature_speaks_for_the_site_of_its_report(signed: Path) -> None:
    """What another site signs over this one's report is not this one's."""
    study_sha256 = json.loads((signed / "audit.json").read_text())["study_sha256"]
    sign(signed, "Beta", study_sha256, Identity.generate())
    assert "speaks for another site" in _verify(signed).stderr


@pytest.mark.parametrize("name", ["audit.html", "notes.txt", "audit.json"])
def test_a_folder_of_something_else_is_refused_before_anything_is_done(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"site": "Beta", "study_sha256": ""}')
    with pytest.raises(JournalError, match="not of this run") as caught:
        audit(toy_study(), toy_sites(tmp_path / "data"), "Alpha", out)
    assert caught.value.detail == str(out / name)
    assert [path.name for path in out.iterdir()] == [name]


def test_a_store_that_a_run_writes_is_only_looked_at(tmp_path: Path) -> None:
    root = tmp_path / "run" / "work" / "sites" / "Alpha" / "federated"
    store = SiteStore(root)
    unfinished = [root / "blobs" / "a.draft", root / "blobs" / ("0" * 64)]
    for path in unfinished:
        path.touch()
    identity = identity_of("Alpha", tmp_path / "out", tmp_path / "run", None, None)
    assert identity.public == store.enrol().public
    assert all(path.exists() for path in unfinished)


def test_noise_that_sites_share_is_no_claim_of_one_site(tmp_path: Path) -> None:
    study = toy_study(
        protection={"secure": True, "privacy": {"noise": "distributed", "delta": 0.01, "patients_per_step": 4}},
        method={"kind": "fedavg", "weights": "equal"},
        schedule={"rounds": 3, "release": "last"},
        local={"steps": 1, "optimizer": "sgd", "lr": 0.1},
        task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"patients": 12}},
    )
    auditor = Auditor(study, toy_sites(tmp_path), "A", Effort.of(quick=True))
    assert auditor.claim is None
    assert auditor.epsilon() is None
    assert "sites share the study's noise" in auditor.skipped[0]


def test_a_task_that_is_no_reconstruction_says_what_is_not_attacked(tmp_path: Path) -> None:
    """The lint and the claim are for every task; what looks for images of scans is named, and not failed at."""
    task = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"patients": 12}}
    study, claim = toy_study(task=task), Claim(1.0, steps=2)
    found = Auditor(study, toy_sites(tmp_path), "A", Effort.of(quick=True), claim=claim).run(quick=True)
    assert found.lint == ()
    assert found.light == "not attacked"
    assert found.epsilon is not None
    assert found.epsilon.holds
    for part in ("inversion", "membership", "properties"):
        assert any(why.startswith(f"{part}: not attacked") for why in found.skipped)
    page = render(found)
    assert "that says nothing of what such updates give away" in page
