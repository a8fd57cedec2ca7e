"""The commands as a person meets them: what they print, what they leave behind, how they say no."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from tests.mri_hospitals import head, make_hospitals, save, write_study
from wardround import __version__
from wardround.cli import app, shared
from wardround.results.pictures import read_pictures
from wardround.results.schema import Measured
from wardround.runs import session
from wardround.study.load import load_study

PATIENT = "Doe-John"


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _refused(*arguments: object) -> str:
    """The one message of a command that must fail: exit code 2, no traceback, nothing on stdout."""
    result = _run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    said = result.stderr.rstrip("\n").split("\n")
    first, *rest = [line for line in said if not line.startswith(("reading: ", "training: "))]
    assert first.startswith("error: ")
    assert len(rest) <= 1
    assert all(line.startswith("       (") for line in rest)  # where it is, for local eyes
    assert "Traceback" not in result.stderr
    assert PATIENT not in first
    return result.stderr


def _ok(*arguments: object) -> str:
    result = _run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def kspace_of_a_point(coils: int, size: int) -> np.ndarray:
    """Centred k-space (coils, size, size) of one bright pixel and a little of everything."""
    kspace = np.ones((coils, size, size), np.complex64)
    kspace[:, size // 2, size // 2] = 2
    return kspace


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hospitals(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path, str]:
    """The folder of a finished run, the sites file, and what the command printed."""
    folder = tmp_path_factory.mktemp("run")
    study, sites = write_study(folder, data)
    said = _ok(
        "run", study, "--sites", sites, "--out", folder / "out", "--compare", "local,pooled", "--engine", "local"
    )
    return folder / "out", sites, said


@pytest.fixture
def copy(finished: tuple[Path, Path, str], tmp_path: Path) -> tuple[Path, Path]:
    """A finished run that a test may damage."""
    out, sites, _ = finished
    return Path(shutil.copytree(out, tmp_path / "out")), sites


def _tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


# A run, and what can be done with it ------------------------------------------------------------------------------


def test_a_run_prints_one_table_and_where_the_report_is(finished: tuple[Path, Path, str]) -> None:
    out, _, said = finished
    written = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert set(written["metrics"]) == {"zero_filled", "cg_sense", "local", "federated", "pooled", "baseline"}
    header = next(line for line in said.splitlines() if "Together" in line)
    labels = ["Zero-filled", "CG-SENSE", "Alone", "Together", "Pooled"]
    assert [header.index(label) for label in labels] == sorted(header.index(label) for label in labels)
    for site in ("Alpha", "Beta", "mean"):
        assert f"{written['metrics']['federated'][site]['psnr']['value']:.2f}" in said
    assert f"Report: {out / 'report.html'}" in said
    assert (out / "models" / "federated.safetensors").is_file()
    assert PATIENT not in said


def test_a_line_of_a_round_shows_the_first_metric(data: Path, tmp_path: Path) -> None:
    study, sites = write_study(tmp_path, data)
    done = _run("run", study, "--sites", sites, "--out", tmp_path / "out", "--engine", "local")
    lines = done.stderr.splitlines()
    assert re.search(r"^federated, round 2 of 2: loss \S+, psnr \d\d(\.\d+)? after round 1", done.stderr, re.MULTILINE)
    assert {"tuning baselines: 4 baselines at sites", "testing: 2 models at sites"} <= set(lines)
    assert max(map(len, lines)) <= 80


def test_pictures_lie_as_radiologists_look_at_them_and_enlarge(finished: tuple[Path, Path, str], data: Path) -> None:
    """The hospitals' files run to the right, the front and the head: shown as stored, a head lies on its side."""
    out = finished[0]
    with np.load(out / "sites" / "Alpha" / "pictures.npz") as archive:
        stored, turn = archive["reference/0"], archive["turn/0"]
    volumes = [nib.load(path).get_fdata() for path in (data / "Alpha").glob("*/flair.nii.gz")]  # type: ignore[attr-defined]
    assert any(np.array_equal(np.round(stored * v.max()), v[..., 1]) for v in volumes)  # as it is stored
    assert turn.tolist() == [1, 1, 1]
    shown = read_pictures(out / "sites" / "Alpha" / "pictures.npz").examples[0]
    for image in shown.values():
        assert image.shape == (64, 64)
    np.testing.assert_array_equal(shown["reference"], np.abs(stored).T[::-1, ::-1].astype(np.float32))
    page = (out / "report.html").read_text(encoding="utf-8")
    ids = re.findall(r'<figure id="(picture-[\d-]+)"', page)
    assert len(ids) == len(set(ids)) > 4
    for key in ids:
        assert f'class="enlarge" href="#{key}"' in page
    assert page.count('class="close"') == len(ids)
    assert "<script" not in page
    # No picture is there twice.
    pictures = re.findall(r'src="(data:image/png[^"]+)"', page)
    assert len(pictures) < 2 * len(ids)


def test_the_result_names_no_patient(finished: tuple[Path, Path, str]) -> None:
    out = finished[0]
    for name in ("result.json", "rounds.jsonl", "report.html", "model_card.md", "study.yaml"):
        assert PATIENT not in (out / name).read_text(encoding="utf-8"), name


def test_evaluate_finds_every_number_again(finished: tuple[Path, Path, str]) -> None:
    out, sites, _ = finished
    said = _ok("evaluate", out, "--sites", sites, "--engine", "local")
    assert "numbers agree with result.json" in said
    assert "Together" in said


def test_results_say_who_is_lacking_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    lacking = {"withheld": {"Alpha": "Withheld: by rule"}, "failed": {"Beta": "DataError: [path] cannot be read"}}
    shared.results(Measured(metric_specs=(), metrics={}, gains={}, left_out={}, **lacking))
    assert capsys.readouterr().out.splitlines() == [
        "Alpha: withheld by the site (Withheld: by rule)",
        "Beta: could not be measured (DataError: [path] cannot be read)",
    ]


def test_evaluate_does_not_agree_where_a_site_could_not_be_measured(
    copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sites = copy
    again = session.evaluate

    def lacking(*arguments: Any, **options: Any) -> Measured:
        failed = {"Alpha": "JournalError: a site's store does not open"}
        return again(*arguments, **options).model_copy(update={"failed": failed})

    monkeypatch.setattr(session, "evaluate", lacking)
    result = _run("evaluate", out, "--sites", sites, "--engine", "local")
    assert result.exit_code == 2
    assert "numbers agree" not in result.stdout
    assert "Alpha could not be measured this time" in result.stderr


def test_evaluate_says_which_number_differs(copy: tuple[Path, Path]) -> None:
    out, sites = copy
    path = out / "result.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["metrics"]["federated"]["mean"]["psnr"]["value"] += 1.0
    path.write_text(json.dumps(values), encoding="utf-8")
    result = _run("evaluate", out, "--sites", sites, "--engine", "local")
    assert result.exit_code == 2
    assert "error: 1 of " in result.stderr
    assert "federated.mean.psnr.value" in result.stderr


def test_inspect_writes_the_numbers_of_a_finished_run_as_a_table(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    out, file = finished[0], tmp_path / "new" / "numbers.csv"
    assert "Wrote" in _ok("inspect", out, "--csv", file)
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    # A site's own model at itself is in `metrics`.
    others = {
        f"local/{trained}": {site: row for site, row in table.items() if site != trained}
        for trained, table in result["elsewhere"].items()
    }
    written = {**result["metrics"], **others}
    # A row for every number, and the alias of the first baseline not again.
    cells = [cell for arm, table in written.items() if arm != "baseline" for cell in table.values() if cell]
    assert len(rows) == sum(map(len, cells))
    assert list(rows[0]) == ["arm", "site", "metric", "value", "se", "ci_low", "ci_high", "n", "absent"]
    for row in rows:
        found = written[row["arm"]][row["site"]][row["metric"]]
        assert float(row["value"]) == found["value"]
        assert (int(row["n"]), int(row["absent"])) == (found["n"], 0)
        assert row["ci_low"] == ("" if found["ci_low"] is None else str(found["ci_low"]))
    assert "no finished run" in _refused("inspect", tmp_path, "--csv", file)


def test_a_model_of_another_study_is_not_evaluated(copy: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    out, sites = copy
    study, _ = write_study(tmp_path / "other", data, seed=1)
    _ok("run", study, "--sites", sites, "--out", tmp_path / "theirs", "--engine", "local")
    shutil.copy(tmp_path / "theirs" / "models" / "federated.safetensors", out / "models" / "federated.safetensors")
    said = _refused("evaluate", out, "--sites", sites, "--engine", "local")
    assert "models/federated.safetensors belongs to another study" in said


def test_a_damaged_model_is_neither_evaluated_nor_applied(copy: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    out, sites = copy
    model = out / "models" / "federated.safetensors"
    model.write_bytes(model.read_bytes()[:1000])
    assert "model file cannot be read" in _refused("evaluate", out, "--sites", sites, "--engine", "local")
    image = next((data / "Alpha").glob("*/flair.nii.gz"))
    assert "model file cannot be read" in _refused("reconstruct", model, image, tmp_path / "new" / "out.nii.gz")
    assert not (tmp_path / "new").exists()


def test_reconstruct_writes_an_image(finished: tuple[Path, Path, str], data: Path, tmp_path: Path) -> None:
    model = finished[0] / "models" / "federated.safetensors"
    image = next((data / "Alpha").glob("*/flair.nii.gz"))
    said = _ok("reconstruct", model, image, tmp_path / "out.nii.gz")
    assert "Research use only" in said
    assert nib.load(tmp_path / "out.nii.gz").shape == nib.load(image).shape  # type: ignore[attr-defined]


def test_reconstruct_says_where_coils_are_others(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    np.save(tmp_path / "k.npy", kspace_of_a_point(3, 64))
    model = finished[0] / "models" / "federated.safetensors"
    said = _ok("reconstruct", model, tmp_path / "k.npy", tmp_path / "out.nii.gz")
    assert "coils 3 (trained on 4 to 6)" in " ".join(said.split())
    assert (tmp_path / "out.nii.gz").exists()


def test_a_run_goes_on_only_with_its_own_study(copy: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    out, sites = copy
    before = _tree(out / "models")
    study, _ = write_study(tmp_path, data, seed=1)
    assert "run of another study" in _refused("run", study, "--sites", sites, "--out", out, "--engine", "local")
    assert _tree(out / "models") == before


# Before a run -----------------------------------------------------------------------------------------------------


def test_init_proposes_what_check_accepts(data: Path, tmp_path: Path) -> None:
    said = _ok("init", data, "--out", tmp_path / "new")
    study, sites = tmp_path / "new" / "study.yaml", tmp_path / "new" / "sites.yaml"
    assert f"wardround check {study} --sites {sites}" in said
    assert load_study(study).training_sites == ("Alpha", "Beta")
    before = _tree(tmp_path)
    explained = _ok("check", study, "--sites", sites, "--compare", "local,pooled")
    assert _tree(tmp_path) == before
    for expected in ("reconstruction of flair, 64 x 64", "local/Beta", "4× random, 8 coils", "leave the site"):
        assert expected in explained
    assert "No " not in explained
    assert PATIENT not in explained
    assert "exists already" in _refused("init", data, "--out", tmp_path / "new")


def test_check_is_aligned_and_narrow(data: Path, tmp_path: Path) -> None:
    study, sites = write_study(tmp_path, data, description="A long story. " * 20)
    lines = _ok("check", study, "--sites", sites).splitlines()
    assert max(map(len, lines)) <= 80
    start = lines.index("Sites") + 1
    assert lines[start].startswith("  site   role")
    rows = [line for line in lines[start : lines.index("Training")] if " role " in line or " trains " in line]
    assert len(rows) == 3
    assert len({re.search("role|trains", row).start() for row in rows}) == 1  # type: ignore[union-attr]
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings == ["Study tiny", "Sites", "Training", "Scans and images", "Arms", "What leaves a site", "Mind"]


def test_check_counts_patients_and_warns_of_sums_of_one(data: Path, tmp_path: Path) -> None:
    study, sites = write_study(tmp_path, data)
    said = _ok("check", study, "--sites", sites)
    assert "One test patient at Alpha, Beta" in said
    alpha = next(line.split() for line in said.splitlines() if line.startswith("  Alpha"))
    assert alpha[:6] == ["Alpha", "trains", "2", "1", "1", "6"]
    assert "Add --compare" in said
    without = _ok("check", study)
    assert "not looked at" in without
    assert "Mind" not in without


def test_check_says_what_leaves_and_what_a_site_keeps(data: Path, tmp_path: Path) -> None:
    study, sites = write_study(tmp_path, data)

    def said(*options: object, **egress: Any) -> str:
        entries = {site: {"data": str(data / site), "egress": egress} for site in ("Alpha", "Beta")}
        sites.write_text(yaml.safe_dump({"sites": entries}), encoding="utf-8")
        return " ".join(_ok("check", study, "--sites", sites, *options).split())

    open_, closed = said(), said(per_site_results=False)
    assert "at the end number of test patients; mean and standard error of the same metrics" in open_
    assert "only from sites" not in open_
    assert "at the end nothing of test patients: every site keeps its own results" in closed
    assert "only from sites whose own results leave" in " ".join(_ok("check", study).split())
    assert "the head of its log (a hash), and where it refuses the reason" in open_
    assert "shows pictures in its report, of sites whose own results leave" in open_
    # None is not few.
    empty = said("--set", "task.split.validation=0.0", minimum_cohort=2)
    assert "No validation patient at Alpha, Beta." in empty
    assert "Sums over validation patients stay" not in empty
    assert "Sums over validation patients stay at Alpha" in said(minimum_cohort=2)
    weighed = ("--set", "method.weights=validation")
    assert "Alpha (fewer patients than egress.minimum_cohort), Beta" in said(*weighed, minimum_cohort=2)
    assert "will refuse every round" in said(*weighed, minimum_cohort=2)
    for fine in (said(*weighed), said(minimum_cohort=2)):
        assert "will refuse every round" not in fine


def test_check_adds_up_the_traffic(data: Path, tmp_path: Path) -> None:
    study, _ = write_study(tmp_path, data)
    small, large = (_ok("check", study, "--set", f"schedule.rounds={rounds}") for rounds in (10, 1000))
    assert "all rounds, all sites: 2" in small
    assert "kB" in small.split("all rounds")[1]
    assert "MB" in large.split("all rounds")[1]


def test_check_full_prints_the_study_with_every_default(data: Path, tmp_path: Path) -> None:
    study, _ = write_study(tmp_path, data)
    said = _ok("check", study, "--full", "--set", "local.lr=0.5")
    assert load_study(yaml.safe_load(said)) == load_study(study, ["local.lr=0.5"])
    assert "clip_norm: null" in said


def test_check_knows_what_a_method_keeps_at_a_site(data: Path, tmp_path: Path) -> None:
    study, _ = write_study(tmp_path, data, method={"kind": "fedbn"}, model={"preset": "tiny", "norm": "batch"})
    assert "stay at each site" in _ok("check", study)


def test_inspect_describes_folders_and_files(data: Path, tmp_path: Path) -> None:
    said = _ok("inspect", data)
    assert "site Alpha: 4 patients; with flair (4)" in said
    assert PATIENT not in said
    np.save(tmp_path / "k.npy", kspace_of_a_point(2, 16))
    assert "NumPy: 1 slice of 16 x 16 samples, 2 coils" in _ok("inspect", tmp_path / "k.npy")
    assert "nothing at the given path" in _refused("inspect", tmp_path / "absent")
    raw = tmp_path / "raw" / "Alpha" / PATIENT / "scan.npy"
    raw.parent.mkdir(parents=True)
    raw.touch()
    image = tmp_path / "images" / "Beta" / PATIENT / "flair.nii"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"x")
    for root, file in ((tmp_path / "raw", raw), (tmp_path / "images", image)):
        assert PATIENT not in _ok("inspect", root)
        assert f"{file}: " in _ok("inspect", root, "--names").split("keep this list at the site:")[1]
    (tmp_path / "none.npy").touch()
    bad = _run("inspect", tmp_path / "none.npy")
    assert (bad.exit_code, "is empty; copy it again" in bad.stdout) == (1, True)


@pytest.mark.parametrize(
    ("inputs", "last"),
    [(["a.h5"], "b.npy"), (["a.h5"], "b.png"), (["a.h5", "b.npy"], "c.nii.gz"), (["a.h5"], "--out b.nii.gz")],
)
def test_an_output_that_is_named_as_a_file_is_refused(
    inputs: list[str], last: str, finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    *option, name = last.split()
    paths = [tmp_path / each for each in inputs]
    model = finished[0] / "models" / "federated.safetensors"
    assert "is where results are written: a folder" in _refused("reconstruct", model, *paths, *option, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--clip", "--dp-steps", "--sampling", "--delta", "--epsilon"])
def test_half_a_claim_of_privacy_is_refused(option: str, data: Path, tmp_path: Path) -> None:
    study, sites = write_study(tmp_path, data)
    audit = ["audit", study, "--sites", sites, "--site", "Alpha", "--out", tmp_path / "out"]
    assert f"{option}: a claim needs --noise-multiplier" in _refused(*audit, option, "1")


def test_convert_says_what_it_looks_for(tmp_path: Path) -> None:
    assert "kaggle_3m/TCGA_XX_NNNN_DATE" in _refused("convert", "lgg", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_package_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "wardround", "version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


@pytest.mark.parametrize("command", ["run", "demo", "evaluate", "predict", "init", "check", "inspect"])
def test_help_is_whole(command: str) -> None:
    """Rich reads square brackets as markup and swallows them."""
    said = _ok(command, "--help")
    assert not re.search(r" \.\s", said)
    assert "default: " in said or command not in ("run", "predict")


# Bad input --------------------------------------------------------------------------------------------------------


def _without_patients(root: Path) -> None:
    shutil.rmtree(root / "Beta")
    (root / "Beta").mkdir()


def _without_flair(root: Path) -> None:
    (root / "Beta" / f"{PATIENT}-1" / "flair.nii.gz").rename(root / "Beta" / f"{PATIENT}-1" / "t1.nii.gz")


def _with_nan(root: Path) -> None:
    image = head(3).astype(np.float32)
    image[10, 10, 1] = np.nan
    save(image, root / "Beta" / f"{PATIENT}-1" / "flair.nii.gz")


def _damaged(root: Path) -> None:
    (root / "Beta" / f"{PATIENT}-1" / "flair.nii.gz").write_bytes(b"\x1f\x8b broken")


BAD_DATA = {
    "no folder": (lambda root: shutil.rmtree(root / "Beta"), r"sites.Beta.data: the folder does not exist"),
    "no patient": (_without_patients, "site Beta: no patient found"),
    "no contrast": (_without_flair, "site Beta: 1 of 3 patients lack the contrast flair"),
    "NaN": (_with_nan, "site Beta, contrast flair: an image holds NaN"),
    "damaged": (_damaged, "site Beta, contrast flair: an image file is damaged"),
}


@pytest.mark.parametrize("name", BAD_DATA)
@pytest.mark.parametrize("command", ["check", "run"])
def test_bad_data_are_one_line(name: str, command: str, data: Path, tmp_path: Path) -> None:
    spoil, message = BAD_DATA[name]
    root = Path(shutil.copytree(data, tmp_path / "data"))
    study, sites = write_study(tmp_path, root)
    spoil(root)
    options: list[Any] = [] if command == "check" else ["--out", tmp_path / "out", "--engine", "local"]
    assert message in _refused(command, study, "--sites", sites, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["check", "run"])
def test_bad_studies_name_the_key(command: str, data: Path, tmp_path: Path) -> None:
    study, sites = write_study(tmp_path, data)
    out: list[Any] = [] if command == "check" else ["--out", tmp_path / "out"]
    for override, message in (
        ("local.stepz=3", "local.stepz: unknown key; did you mean `steps`?"),
        ("schedule.rounds=0", "schedule.rounds: "),
        ("sites.Gamma.role=train", "the study has no site 'Gamma'"),
    ):
        result = _run(command, study, "--sites", sites, *out, "--set", override)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
    needs_norm = ["--set", "method.kind=fedbn"]
    assert "set model.norm: batch" in _refused(command, study, "--sites", sites, *out, *needs_norm)
    for size in ("[0, 64]", "[64, -5]", "[6, 6]"):
        said = _refused(command, study, "--sites", sites, *out, "--set", f"task.size={size}")
        assert "task.size: images must have at least 7 x 7 pixels" in said
    assert "--compare alone: choose from local, pooled" in _refused(
        command, study, "--sites", sites, *out, "--compare", "alone"
    )
    assert "study file cannot be read" in _refused(command, tmp_path / "absent.yaml", "--sites", sites, *out)
    (tmp_path / "sites.yaml").write_text("sites: {Alpha: {data: .}}", encoding="utf-8")
    assert "no entry for site Beta" in _refused(command, study, "--sites", sites, *out)
    assert not (tmp_path / "out").exists()


def test_brackets_in_a_message_are_printed_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "[bold].yaml").write_text("name: '[/red]'", encoding="utf-8")
    result = _run("check", tmp_path / "[bold].yaml")
    assert result.exit_code == 2
    assert "not '[/red]'" in result.stderr
    assert "[bold].yam)" in _refused("check", tmp_path / "[bold].yam")


def test_a_disk_that_refuses_is_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "Not a directory" in _refused("init", data, "--out", tmp_path / "file" / "new")


def test_the_command_itself(data: Path, tmp_path: Path) -> None:
    """Through a real process: stdout and stderr apart, no warning, no traceback."""

    def wardround(*arguments: object) -> subprocess.CompletedProcess[str]:
        script = "from wardround.cli import main; main()"
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    study, sites = write_study(tmp_path, data)
    good = wardround("check", study, "--sites", sites)
    assert (good.returncode, good.stderr) == (0, "")
    assert "Study tiny" in good.stdout
    bad = wardround("run", study, "--sites", tmp_path / "absent.yaml", "--out", tmp_path / "out")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: the sites file cannot be read")
    assert not (tmp_path / "out").exists()
