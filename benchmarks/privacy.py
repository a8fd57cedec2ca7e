"""What does patient-level differential privacy cost? Epsilon by two accountants and image quality, for every preset.

Two studies, each without privacy and with every preset; real images in both.

- `mri`: examples/lgg-mri.yaml, FLAIR alone at 64 x 64 and the smallest network, to be quick: four institutions with 8
  to 21 training patients, which is few. The acquisition is simulated. Utility is the PSNR on test patients.
- `xray`: PneumoniaMNIST dealt to three sites of 1,404 training images, each taken as one patient (the set does not
  say). Utility is the AUROC on its own test images.

Epsilon is the worst site's, of all steps in its ledger, computed anew by dp-accounting (PLD) and by Opacus (PRV).
Settings were chosen on validation patients, `tried` says among which. That choice is not in epsilon: at a hospital,
every value that is tried on its patients costs as much again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import arguments, conditions, finish, table
from wardround.results.schema import PrivacyStatement, Result

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("reconstruction-guard", "moderate", "strict")
NONE = "none"
MRI = (
    "task.size=[64,64]",
    "task.contrasts=[flair]",
    "task.slices.per_patient=6",
    "task.evaluation.leave_one_out=false",
    "task.evaluation.baselines=[zero_filled]",
    "task.evaluation.slices.per_patient=4",
    "model.preset=tiny",
    "method.weights=equal",
    "local.steps=5",
    "local.batch=4",
    "local.schedule=constant",
    "local.warmup=0",
    "local.clip_norm=null",
    "schedule.rounds=10",
    "schedule.release=last",
    "schedule.validate_every=0",
)
MRI_PRIVACY = {"examples_per_patient": 1, "clip": 0.1}
# Chosen on validation patients, as `TRIED` says.
MRI_CHOICE: dict[str, dict[str, float]] = {
    NONE: {"lr": 0.005},
    "reconstruction-guard": {"lr": 0.005, "patients_per_step": 4},
    "moderate": {"lr": 0.005, "patients_per_step": 4},
    "strict": {"lr": 0.005, "patients_per_step": 4},
}
XRAY: dict[str, Any] = {
    "name": "xray",
    "seed": 2026,
    "task": {"kind": "custom", "factory": "privacy_task:PneumoniaTask"},
    "method": {"kind": "fedavg", "weights": "equal"},
    "local": {"optimizer": "sgd", "steps": 20, "batch": 64, "lr": 0.2, "momentum": 0.9},
    "schedule": {"rounds": 10, "validate_every": 0, "release": "last"},
}
XRAY_PRIVACY = {"patients_per_step": 64, "clip": 1.0, "gradients": "opacus"}
# Mean PSNR or accuracy of the validation patients, none of whom is a test patient. For `mri` on both contrasts and all
# slices, which took too long to repeat with the smaller study of this benchmark.
TRIED: dict[str, dict[str, float]] = {
    "mri psnr": {
        "none, lr 0.002": 24.82,
        "none, lr 0.005": 25.04,
        "reconstruction-guard, 4 patients a step, lr 0.0005": 22.73,
        "reconstruction-guard, 4 patients a step, lr 0.002": 23.49,
        "reconstruction-guard, 4 patients a step, lr 0.005": 23.85,
        "reconstruction-guard, 8 patients a step, lr 0.0005": 22.96,
        "moderate, 8 patients a step, lr 0.005": 23.35,
    },
    "xray accuracy": {
        "none, lr 0.05": 0.949,
        "none, lr 0.2": 0.951,
        "reconstruction-guard, lr 0.2": 0.925,
        "strict, lr 0.2": 0.949,
        "strict, lr 0.5": 0.938,
    },
}
UNTRAINED = "untrained"


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    state = conditions(size={"mri": "64x64", "xray": "28x28"}, seed=2026, repeats=1, quick=options.quick, tried=TRIED)
    folder = Path(tempfile.mkdtemp(prefix="privacy-"))
    try:
        with ProcessPoolExecutor(state["cores"], get_context("spawn")) as pool:
            mri = {name: pool.submit(_mri, folder, name, options.quick) for name in (UNTRAINED, *MRI_CHOICE)}
            xray = {name: pool.submit(_xray, folder, name, options.quick) for name in (NONE, *PRESETS)}
            rows = {name: future.result() for name, future in mri.items()}
            sick = {name: future.result() for name, future in xray.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows["zero-filled"] = rows[NONE].pop("zero_filled")
    for table_rows in (rows, sick):
        for row in table_rows.values():
            row["utility_lost"] = table_rows[NONE]["utility"] - row["utility"]
    for row in rows.values():
        row["over_zero_filled_db"] = row["utility"] - rows["zero-filled"]["utility"]
    header = ("", "epsilon PLD", "epsilon PRV", "delta", "noise", "sample rate", "utility", "low", "high", "lost")
    for title, found in (("mri: PSNR, dB", rows), ("xray: AUROC", sick)):
        print(f"\n{title} on test patients; lost is against no privacy")
        table(header, [[preset, *_cells(row)] for preset, row in found.items()])
    finish(
        {
            "presets": {name: _brief(rows[name]) | {"xray": _brief(sick[name])} for name in PRESETS},
            "mri": rows,
            "xray": sick,
            "conditions": {**state, "cpu_seconds": round(_cpu_seconds(), 1)},
        }
    )


def _cpu_seconds() -> float:
    """Of this process and of those that it started."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("epsilon_pld", "epsilon_prv", "utility", "utility_lost")}


def _cells(row: dict[str, Any]) -> list[Any]:
    keys = ("epsilon_pld", "epsilon_prv", "delta", "noise", "sample_rate", "utility", "ci_low", "ci_high")
    cells = [row.get(key, "-") for key in keys]
    return [*(f"{c:.3g}" if isinstance(c, float) and k < 5 else c for k, c in enumerate(cells)), row["utility_lost"]]


def _mri(folder: Path, name: str, quick: bool) -> dict[str, Any]:
    """No training, no privacy or a preset on the institutions' images."""
    import wardround

    settings = [*MRI, *(["schedule.rounds=2", "local.steps=2"] if quick else [])]
    if name == UNTRAINED:
        # A learning rate of nearly nothing leaves the network as it is initialised: what training starts from.
        settings += ["local.lr=1e-12", "schedule.rounds=1", "local.steps=1"]
    else:
        settings.append(f"local.lr={MRI_CHOICE[name]['lr']}")
    if name in PRESETS:
        privacy = {**MRI_PRIVACY, "preset": name, "patients_per_step": MRI_CHOICE[name]["patients_per_step"]}
        settings.append(f"protection.privacy={json.dumps(privacy)}")
    study, sites, out = ROOT / "examples" / "lgg-mri.yaml", ROOT / "examples" / "lgg-sites.yaml", folder / f"mri-{name}"
    result = wardround.run(study, sites, out, overrides=settings, engine="local")
    row = _psnr(result, "federated") | _spent(out, result.privacy)
    return row | ({"zero_filled": _psnr(result, "zero_filled")} if name == NONE else {})


def _psnr(result: Result, arm: str) -> dict[str, Any]:
    psnr = result.metrics[arm]["mean"]["psnr"]
    return {"utility": psnr.value, "ci_low": psnr.ci_low, "ci_high": psnr.ci_high}


def _xray(folder: Path, name: str, quick: bool) -> dict[str, Any]:
    """No privacy or a preset on the X-rays."""
    from safetensors.torch import load_file

    import wardround
    from privacy_task import SITES, auroc, interval, scores
    from wardround.study.sites import SiteData, SitesFile

    # Sites have no test patients of their own here and say so, which is no news.
    logging.getLogger("wardround").setLevel(logging.ERROR)
    sites = SitesFile(sites={site: SiteData(data=(folder,)) for site in SITES})
    study, out = {**XRAY, "sites": {site: {} for site in SITES}}, folder / f"xray-{name}"
    if name != NONE:
        study["protection"] = {"privacy": {**XRAY_PRIVACY, "preset": name}}
    overrides = ["schedule.rounds=2"] if quick else []
    result = wardround.run(study, sites, out, overrides=overrides, engine="local", allow_code=True)
    found = scores(load_file(out / "models" / "federated.safetensors"))
    low, high = interval(*found)
    return {"utility": auroc(*found), "ci_low": low, "ci_high": high} | _spent(out, result.privacy)


def _spent(out: Path, privacy: PrivacyStatement | None) -> dict[str, Any]:
    """What the ledgers of a run come to at the worst site, by both accountants."""
    from wardround.protection.accounting import Spending, epsilon_of

    if privacy is None:
        return {}
    found = []
    for site, said in privacy.sites.items():
        lines = (out / "work" / "sites" / site / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [Spending(entry["noise"], entry["rate"], entry["steps"]) for entry in map(json.loads, lines)]
        pld, prv = (epsilon_of(steps, said.delta, which) for which in ("pld", "prv"))
        found.append(
            {
                "epsilon_pld": pld,
                "epsilon_prv": prv,
                "delta": said.delta,
                "noise": said.noise_multiplier,
                "sample_rate": said.sample_rate,
                "steps": sum(s.steps for s in steps),
                "worst_site": site,
            }
        )
    return max(found, key=lambda each: each["epsilon_pld"])


if __name__ == "__main__":
    main()
