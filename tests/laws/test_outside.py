"""The law of room to grow: kinds of a package outside are found by entry points, and the package's own in one file."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import wardround
from tests.devices import DEVICES, arm_specs_of, device_named, learner_of
from tests.mri_hospitals import SIZE, head, make_hospitals, save, write_study
from tests.outlines import make_outlines, outline_study
from wardround.audit.victims import measured_anew, singles
from wardround.cli import app
from wardround.errors import DataError, StudyError
from wardround.federation.release import load_model, study_of
from wardround.results.card import write_card
from wardround.results.html import write_report
from wardround.results.schema import Part
from wardround.runs.machine import Machine
from wardround.runs.parts import parts_of
from wardround.site.evaluators import evaluators_of
from wardround.storage.store import NOTHING
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.load import FOREIGN, UNREAD, load_study, plan_sha256, study_sha256
from wardround.study.plugins import Plugins
from wardround.study.registry import BASELINES, BUILTIN, Section, builtin, builtins
from wardround.study.schema import Study
from wardround.study.sites import SitesFile, load_sites
from wardround.tasks.build import build_task

SOURCE = Path(wardround.__file__).parent
ENTRIES = """
[wardround.tasks]
tripling = ward_outside:TriplingSettings
[wardround.models]
scale = ward_outside:ScaleSettings
[wardround.methods]
clipped = ward_outside:ClippedSettings
factory = ward_outside:Clipped
[wardround.acquisitions]
sampled = ward_outside:SampledSettings
[wardround.baselines]
filled = ward_outside:FILLED
[wardround.engines]
counting = ward_outside:counting
[wardround.readers]
rawimg = ward_outside:read_rawimg
"""
METHOD, MODEL = {"kind": "clipped", "weights": "equal"}, {"kind": "scale", "start": 1}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package outside, installed for this process: its module, and what says of its entry points."""
    about = tmp_path / "site-packages" / "ward_outside-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ward-outside\nVersion: 1\n")
    (about / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(about.parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "outside"))
    sys.modules.pop("ward_outside", None)
    yield
    sys.modules.pop("ward_outside", None)


def hospital(folder: Path, allowed: tuple[str, ...], **changes: Any) -> tuple[Path, Path]:
    """Study and sites files of two tiny MRI sites, which allow these plug-ins."""
    make_hospitals(folder / "data")
    study, sites = write_study(folder, folder / "data", **changes)
    content = yaml.safe_load(sites.read_text())
    for entry in content["sites"].values():
        entry["plugins"] = list(allowed)
    sites.write_text(yaml.safe_dump(content))
    return study, sites


def test_a_network_and_a_method_from_outside_are_checked_trained_tested_reported_and_applied(
    package: None, tmp_path: Path
) -> None:
    study, sites = hospital(tmp_path, ("scale", "clipped"), model=MODEL, method=METHOD)
    said = CliRunner().invoke(app, ["check", str(study), "--sites", str(sites)])
    assert said.exit_code == 0, said.output
    assert "scale, one number from 1 on: 1 values" in said.output
    assert "clipped, gradients within 0.5" in said.output
    out = tmp_path / "out"
    result = wardround.run(study, sites, out, engine="local", quiet=True)
    assert result.participants == ("Alpha", "Beta")
    # Defaults of a plug-in are part of the plan, and of its hash, as all others are; the study is what was written.
    written = load_study(out / "study.yaml", reading=UNREAD)
    assert study_sha256(written) == result.study_sha256 == study_sha256(load_study(study))
    assert plan_sha256(load_study(study)) != result.plan_sha256
    assert json.loads((out / "work" / "plan.json").read_text())["method"] == {
        "kind": "clipped", "weights": "equal", "limit": 0.5
    }  # fmt: skip
    # A worker process gets the study as it was read, and reads it again by the same rules.
    host = Machine(load_study(study), load_sites(sites), out, ())
    worker = Machine.from_spec(json.loads(json.dumps(host.spec())))
    assert worker.study == host.study
    assert worker.study_sha256 == result.study_sha256
    assert type(worker.arm_spec("federated").method).__name__ == "Clipped"
    assert wardround.run(study, sites, out, engine="local", quiet=True, resume=True).metrics == result.metrics
    assert wardround.evaluate(out, sites, engine="local", quiet=True).metrics == result.metrics
    report, card = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "model_card.md"))
    assert "clipped" in report
    assert "scale" in card
    # At another hospital: the model's file names a plug-in, and who has the file says whether to import it.
    model, image = out / "models" / "federated.safetensors", tmp_path / "image.nii.gz"
    save(head(3), image)
    with pytest.raises(StudyError, match=r"plug-in's, 'scale'.*--plugin scale"):
        wardround.reconstruct(model, image, tmp_path / "image-out.nii.gz")
    wardround.reconstruct(model, image, tmp_path / "image-out.nii.gz", plugins=("scale",))
    assert (tmp_path / "image-out.nii.gz").exists()
    # Without the package nothing is trained or applied; the model's file and the run's study are read all the same.
    (tmp_path / "site-packages" / "ward_outside-1.dist-info" / "entry_points.txt").write_text("")
    with pytest.raises(
        StudyError, match=r"(?s)model\.kind: unknown kind 'scale'.*method\.kind: unknown kind 'clipped'"
    ):
        load_study(study)
    assert study_of(model, load_model(model)[1]).method.kind == "clipped"
    assert load_study(out / "study.yaml", reading=UNREAD) == written


def test_a_task_and_an_engine_from_outside(package: None, tmp_path: Path) -> None:
    kinds = {"task": {"kind": "tripling"}, "model": {"kind": "own_network"}, "method": METHOD}
    study, sites = hospital(tmp_path, ("tripling", "clipped"), **kinds)
    said = CliRunner().invoke(app, ["check", str(study), "--sites", str(sites)])
    assert "to triple numbers, of 24 patients a site" in said.output
    result = wardround.run(study, sites, tmp_path / "out", engine="counting", quiet=True)
    from ward_outside import MADE

    assert {"facts", "train", "evaluate"} <= set(MADE[-1].carried)
    assert result.metrics["federated"]["mean"]["off"].value is not None
    report, card = ((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("report.html", "model_card.md"))
    assert "Off by" in report
    # What the task says of its results is text.
    (part,) = result.parts
    assert (part.head, [row[0] for row in part.rows]) == (("site", "off", "why"), ["Alpha", "Beta"])
    assert part.rows[0][1] == result.metric("federated", "Alpha", "off")
    for page in (report, card):
        assert "How far &lt;off&gt;" in page
        assert "Of 3 x &amp; more." in page
    assert "How far <off>" not in report
    assert wardround.evaluate(tmp_path / "out", sites, engine="local", quiet=True).parts == result.parts
    with pytest.raises(StudyError, match="--engine other: there is none of that name; known are counting, local"):
        wardround.run(study, sites, tmp_path / "other", engine="other", quiet=True)


SAMPLED: dict[str, Any] = {
    "acquisition": {"kind": "sampled"},
    "sites": {
        "Alpha": {},
        "Beta": {"acquisition": {"kind": "sampled", "share": 0.7}},
        "Gamma": {"role": "unseen", "scans": ["Alpha"], "acquisition": {"kind": "sampled", "share": 0.9}},
    },
    "task": {
        "contrasts": ["flair"],
        "size": [SIZE, SIZE],
        "evaluation": {"tuning_slices": 1, "slices": {"per_patient": 1}, "tv_weights": [0.01]},
    },
    "schedule": {"rounds": 1},
}


def test_an_acquisition_and_a_baseline_from_outside_are_checked_trained_tested_reported_and_applied(
    package: None, tmp_path: Path
) -> None:
    study, sites = hospital(tmp_path, ("sampled", "filled"), **SAMPLED)
    said = " ".join(CliRunner().invoke(app, ["check", str(study), "--sites", str(sites)]).output.split())
    assert "50% of all pixels, noise 0.01" in said
    assert "nothing learned: tv, filled" in said
    out = tmp_path / "out"
    result = wardround.run(study, sites, out, engine="local", quiet=True, compare=("pooled",))
    assert list(result.baselines) == ["tv", "filled"]
    assert min(result.metric(arm, "Beta", "psnr") for arm in ("federated", "pooled", "tv", "filled")) > 10.0
    # A scanner that loses fewer pixels of the same patients.
    assert result.metric("tv", "Gamma", "psnr") > result.metric("tv", "Alpha", "psnr")
    assert study_sha256(load_study(out / "study.yaml", reading=UNREAD)) == result.study_sha256
    assert json.loads((out / "work" / "plan.json").read_text())["acquisition"] == {
        "kind": "sampled", "share": 0.5, "noise": 0.01
    }  # fmt: skip
    host = Machine(load_study(study), load_sites(sites), out, ())
    assert Machine.from_spec(json.loads(json.dumps(host.spec()))).study == host.study
    assert wardround.evaluate(out, sites, engine="local", quiet=True).metrics == result.metrics
    model, image = out / "models" / "federated.safetensors", tmp_path / "image.nii.gz"
    save(head(3), image)
    with pytest.raises(StudyError, match=r"scanner is a plug-in's, 'sampled'.*--plugin sampled"):
        wardround.reconstruct(model, image, tmp_path / "image-out.nii.gz")
    (done,) = wardround.reconstruct(model, image, tmp_path / "image-out.nii.gz", site="Beta", plugins=("sampled",))
    assert "by the scanner of Beta (70% of all pixels, noise 0.01)" in done.said
    assert "Untested there" not in done.said
    assert done.metrics["network"]["psnr"] > 10.0
    # Data that a camera measured, in units of its own.
    truth = head(3).astype(np.float64)
    seen = truth * (np.random.default_rng(0).random((SIZE, SIZE, 1)) < 0.6)
    np.save(tmp_path / "raw.npy", 7 * seen.transpose(2, 0, 1).astype(np.int16))
    (done,) = wardround.reconstruct(model, tmp_path / "raw.npy", tmp_path / "raw.nii.gz", plugins=("sampled",))
    assert "Reconstructed 3 slices of 64 x 64 from raw data" in done.said
    found = nibabel.load(tmp_path / "raw.nii.gz").get_fdata() / 7
    assert np.square(found - truth).mean() < np.square(seen - truth).mean()
    np.save(tmp_path / "raw.npy", np.full((3, SIZE, SIZE), np.nan))
    with pytest.raises(DataError, match="the raw data hold what is no finite number"):
        wardround.reconstruct(model, tmp_path / "raw.npy", tmp_path / "raw.nii.gz", plugins=("sampled",))
    # What the run wrote is read without the package, and nothing that a package says becomes markup.
    (tmp_path / "site-packages" / "ward_outside-1.dist-info" / "entry_points.txt").write_text("")
    sys.modules.pop("ward_outside")
    write_report(out)
    write_card(out)
    report, card = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "model_card.md"))
    assert "Filled &lt;b&gt;" in report
    assert "Filled <b>" not in report
    assert "Filled &lt;b&gt;" in card
    assert "sampled, share 0.7" in report
    assert "sampled, share 0.7" in card
    assert "SAMPLED" in CliRunner().invoke(app, ["inspect", str(model)]).output
    assert "ward_outside" not in sys.modules
    with pytest.raises(StudyError, match=r"acquisition\.kind: unknown kind 'sampled'"):
        load_study(study)


def test_a_part_of_the_report_that_fails_says_so_and_costs_no_result(package: None) -> None:
    from ward_outside import Tripling

    (part,) = parts_of(Tripling(24), {"local": {}})
    assert "could not be made (KeyError)" in part.text
    with pytest.raises(ValueError, match="not of its 2 columns"):
        Part(title="Odd", head=("a", "b"), rows=(("c",),))


@pytest.mark.parametrize("device", DEVICES)
def test_an_acquisition_from_outside_computes_where_its_site_does_and_can_be_attacked(
    package: None, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hospitals(tmp_path)
    # Total variation runs on the meta device with the package's own acquisitions, and slowly.
    task = {**SAMPLED["task"], "evaluation": {"baselines": ["filled"]}}
    study = {**SAMPLED, "name": "sampled", "sites": {"Alpha": {}}, "task": task, "local": {"steps": 1}}
    specs = arm_specs_of(Study.model_validate({**study, "model": {"preset": "tiny"}}))
    learner = learner_of(specs, tmp_path / "Alpha", device_named(device, monkeypatch), "Alpha")
    public, _ = specs.initial(specs.arm_spec("federated"))
    learner.load(public, NOTHING)
    assert learner.train(1, public, NOTHING).changes["model"]
    evaluator = evaluators_of(tmp_path, tmp_path / "pictures.npz")["baseline"]
    rows = evaluator(learner, None, {"baseline": "filled", "picture": "filled"}, "test")
    assert len(rows["psnr"]) == learner.dataset.patients("test")
    batch = learner.dataset.batch(range(len(learner.dataset)), np.random.default_rng(0))
    assert len(batch.parts) == learner.dataset.patients("train") > 1  # each patient with holes of their own
    alone = singles(batch)
    assert [one.parts[0].operator for one in alone] == [part.operator for part in batch.parts for _ in range(len(part))]
    # What an attacker expects of the true images is what was measured, but for the noise.
    data, expected = (torch.cat([part.data for part in b.parts]) for b in (batch, measured_anew(batch, batch.target)))
    assert (data - expected).abs().max() < 6 * 0.01  # 36,864 values of a normal distribution: 4.2 deviations


def test_an_acquisition_or_a_baseline_that_a_site_does_not_allow_is_not_imported(package: None, tmp_path: Path) -> None:
    def refused(*allowed: str, **changes: Any) -> str:
        study, sites = hospital(tmp_path, allowed, **{**SAMPLED, **changes})
        said = " ".join(CliRunner().invoke(app, ["check", str(study), "--sites", str(sites)]).output.split())
        with pytest.raises(StudyError) as caught:
            wardround.run(study, sites, tmp_path / "out", engine="local", quiet=True)
        assert ("ward_outside" in sys.modules) == bool(allowed)
        assert allowed or str(caught.value) in said
        return str(caught.value)

    assert refused().startswith("acquisition.kind: site Alpha does not allow the plug-in 'sampled'")
    mri: dict[str, Any] = {"acquisition": {"coils": 4}, "sites": {"Alpha": {}, "Beta": {}}}
    named = {**SAMPLED["task"], "evaluation": {"baselines": ["tv", "filled"]}}
    only = "task.evaluation.baselines: site Alpha does not allow the plug-in 'filled'"
    assert refused(task=named, **mri).startswith(only)
    own = {"sites": {"Alpha": {"acquisition": {"kind": "sampled"}}, "Beta": {"acquisition": {"kind": "sampled"}}}}
    assert refused(**own, acquisition={}).startswith("sites.Alpha.acquisition.kind: site Alpha does not allow")
    # A plug-in that is allowed says that it is compared with one that is not.
    assert refused("sampled").startswith(only)


def test_what_a_study_says_of_an_acquisition_never_stands_for_what_its_class_says() -> None:
    keys = {"reconstruction": "os:system", "applied": "os:system", "costs": "os:system", "closed": False, "share": 2}
    study = load_study({"name": "s", "sites": {"A": {}}, "acquisition": {"kind": "away", **keys}}, reading=FOREIGN)
    assert study.scanner.closed
    assert study.scanner.reconstruction != "os:system" != study.scanner.applied
    assert study.scanner.costs == ""
    assert "share 2" in study.scanner.describe()
    with pytest.raises(StudyError, match=r"acquisition\.kind: no sites file was given to allow the plug-in 'away'"):
        build_task(study)


def test_an_acquisition_that_is_not_of_its_contract_and_an_unknown_baseline_are_errors_of_the_study(
    package: None, tmp_path: Path
) -> None:
    def refused(acquisition: dict[str, Any], baselines: list[str]) -> str:
        evaluation = {"baselines": baselines}
        changes = {"task": {**SAMPLED["task"], "evaluation": evaluation}, "sites": {"Alpha": {}, "Beta": {}}}
        study, sites = hospital(tmp_path, ("sampled", "filled", "scale"), **changes, acquisition=acquisition)
        with pytest.raises(StudyError) as caught:
            wardround.run(study, sites, tmp_path / "out", engine="local", quiet=True)
        return str(caught.value)

    sampled = {"kind": "sampled"}
    assert "acquisition.shre: unknown key; did you mean `share`?" in refused({**sampled, "shre": 1.0}, [])
    assert "acquisition.share: must be greater than 0" in refused({**sampled, "share": 0}, [])
    assert "'fbp' is none of CAMERA; choose from tv" in refused(sampled, ["fbp"])
    assert "there is no baseline 'fild'" in refused(sampled, ["fild"])
    assert "'federated' is a reserved name" in refused(sampled, ["federated"])


def test_a_reader_from_outside_reads_where_a_site_allows_its_ending_and_only_there(
    package: None, tmp_path: Path
) -> None:
    nifti = make_outlines(tmp_path / "nifti", {"A": 5})
    for path in (tmp_path / "nifti").rglob("*.nii.gz"):
        raw = tmp_path / "raw" / path.relative_to(tmp_path / "nifti").with_name(path.name.replace(".nii.gz", ".rawimg"))
        raw.parent.mkdir(parents=True, exist_ok=True)
        image = nibabel.load(path)
        with raw.open("wb") as file:
            np.savez(file, array=np.asarray(image.dataobj)[None], affine=image.affine)
    study = outline_study({"A": {}})
    root = tmp_path / "raw" / "A"

    def plugins(*names: str, code: bool = False) -> Plugins:
        sites = SitesFile.model_validate({"sites": {"A": {"data": str(root), "plugins": list(names)}}})
        return Plugins.of(study, sites.with_code() if code else sites)

    for allowed in (plugins(), plugins(code=True), plugins("scale")):
        with pytest.raises(DataError, match=r"no file in its data folder matches"):
            build_task(study, plugins=allowed).dataset("A", root)
    assert "ward_outside" not in sys.modules
    read = build_task(study, plugins=plugins("rawimg")).dataset("A", root)
    assert read.fingerprint() == build_task(study).dataset("A", nifti.sites["A"].data).fingerprint()
    # Its words may name a patient's file: they stay in the detail.
    next(root.rglob("image.rawimg")).write_bytes(b"torn")
    with pytest.raises(DataError, match=r"site A: the plug-in for \.rawimg files cannot read an image") as caught:
        build_task(study, plugins=plugins("rawimg")).dataset("A", root)
    assert "DOE" not in str(caught.value)


@pytest.mark.parametrize("sites_given", [False, True])
def test_check_imports_no_plug_in_that_a_site_does_not_allow(package: None, tmp_path: Path, sites_given: bool) -> None:
    study, sites = hospital(tmp_path, ("scale",), model=MODEL, method=METHOD)
    said = CliRunner().invoke(app, ["check", str(study), *(["--sites", str(sites)] if sites_given else [])])
    assert "ward_outside" not in sys.modules
    text = " ".join(said.output.split())
    assert ("does not allow the plug-in 'clipped'" if sites_given else "check did not call it") in text
    with pytest.raises(StudyError, match=r"method\.kind: site Alpha does not allow the plug-in 'clipped'"):
        wardround.run(study, sites, tmp_path / "out", engine="local", quiet=True)
    assert "ward_outside" not in sys.modules


def test_what_a_plug_in_says_of_its_section_is_an_error_of_the_study(package: None, tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        study, sites = hospital(tmp_path, ("scale", "clipped", "factory"), **changes)
        with pytest.raises(StudyError) as caught:
            wardround.run(study, sites, tmp_path / "out", engine="local", quiet=True)
        return str(caught.value)

    assert "method.limt: unknown key; did you mean `limit`?" in refused(method={"kind": "clipped", "limt": 1})
    assert "method.limit: must be greater than 0" in refused(method={"kind": "clipped", "limit": 0})
    assert "not a MethodSettings; if it is a factory, write `method: {kind: custom, factory: factory}`" in refused(
        method={"kind": "factory"}
    )
    # No plug-in says by silence that its method is covered by noise.
    privacy = {"protection": {"privacy": {"preset": "moderate"}}, "schedule": {"rounds": 1, "release": "last"}}
    assert "method.kind=clipped cannot be combined with protection.privacy" in refused(method=METHOD, **privacy)


def test_an_unknown_kind_is_an_error_that_lists_the_known_and_says_how_a_plug_in_is_allowed(package: None) -> None:
    study = {"name": "s", "sites": {"A": {}}, "model": {"kind": "zzz"}}
    with pytest.raises(StudyError) as caught:
        load_study(study)
    assert "`modl`" in str(caught.value)
    assert "`scale`" in str(caught.value)
    assert "sites.NAME.plugins" in str(caught.value)
    assert load_study(study, reading=UNREAD).model.kind == "zzz"


KINDS = [(section, kind) for section in ("model", "method") for kind in BUILTIN[section] if kind != "custom"]
# The values of other keys that are called like a kind.
HOMONYMS = {
    ("unet", SOURCE / "models" / "learn.py"),
    # The shape of a denoiser.
    ("unet", SOURCE / "models" / "unrolled.py"),
    ("vit", SOURCE / "models" / "transformers_config.py"),
    # A head that stays, trained in another order.
    ("fedper", SOURCE / "learning" / "methods" / "fedrep.py"),
    # Fisher information has a file, and a hospital may be forgotten by taking back what it taught.
    *(("fisher", SOURCE / "living" / f"{name}.py") for name in ("fisher", "update")),
    *(("unlearn", SOURCE / "living" / f"{name}.py") for name in ("forgetting",)),
    *(("unlearn", SOURCE / "study" / f"{name}.py") for name in ("forget", "rules")),
    ("unlearn", SOURCE / "plan" / "leaving.py"),
    ("unlearn", SOURCE / "federation" / "release.py"),
}


@pytest.mark.parametrize(("section", "kind"), KINDS)
def test_a_kind_is_known_to_its_own_file_and_the_registry_alone(section: Section, kind: str) -> None:
    module = BUILTIN[section][kind].partition(":")[0]
    own = SOURCE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert own.exists()
    assert kind in builtin(section, kind).kinds()
    knowing = {path for path, (strings, modules) in _sources().items() if kind in strings or module in modules}
    assert {path for path in knowing if (kind, path) not in HOMONYMS} == {own, SOURCE / "study" / "registry.py"}


# A network's word for its gradient, and a way to project.
BACK_PROJECTION = {SOURCE / "models" / "learn.py", *(SOURCE / "imaging" / "acquisition" / "ct").glob("*.py")}

# What a chain's second network may see in place of a reconstruction, and so what the chain is compared with.
SEES_IT = {SOURCE / "tasks" / f"chain_{part}.py" for part in ("mri", "ct", "settings")}


# `tv` is what `reconstruct` looks at a network with, and what any acquisition is compared with.
@pytest.mark.parametrize("name", [name for name in BASELINES if name != "tv"])
def test_a_baseline_is_known_to_its_own_file_the_registry_and_the_acquisition_that_takes_it(name: str) -> None:
    module = BASELINES[name].partition(":")[0]
    own = SOURCE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    acquisitions = {Path(inspect.getfile(settings)) for settings in builtins("acquisition")}
    knowing = {path for path, (strings, modules) in _sources().items() if name in strings or module in modules}
    assert knowing - BACK_PROJECTION - SEES_IT <= {own, SOURCE / "study" / "registry.py", *acquisitions}
    assert SOURCE / "study" / "registry.py" in knowing


@pytest.mark.parametrize("kind", list(BUILTIN["acquisition"]))
def test_no_room_above_tasks_asks_of_which_kind_scans_are_but_what_an_acquisition_names(kind: str) -> None:
    settings = builtin("acquisition", kind)
    assert issubclass(settings, AcquisitionSettings)
    places = (place.partition(":")[0] for place in (settings.reconstruction, settings.applied, settings.costs) if place)
    own = {SOURCE.joinpath(*module.split(".")[1:]).with_suffix(".py") for module in places}
    module = BUILTIN["acquisition"][kind].partition(":")[0]
    knowing = {path for path, (strings, modules) in _sources().items() if kind in strings or module in modules}
    rooms = {path.relative_to(SOURCE).parts[0] for path in knowing - own}
    assert rooms <= {"tasks", "models", "imaging", "study"}


@cache
def _sources() -> dict[Path, tuple[frozenset[str], frozenset[str]]]:
    """By file its whole strings, one of which would be a kind, and the modules that it imports from."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        found[path] = frozenset(strings), frozenset(modules)
    return found
