"""A source of skin pictures leaves: is it forgotten, what does that cost, and what is it worth beside training anew?

Four sources train a classifier on features of a frozen encoder (ImageNet's EfficientNet-Lite0, as examples/skin.yaml
has it): 1250 steps of Adam at ten times the example's rate on the same pictures, without weight decay, and the
last round is released. So it knows its training patients, and the attack has something to find. Then one source,
--leaving, is forgotten in both ways of `wardround forget`. The attack (`wardround.audit.remains`) asks of each
of its patients whether the loss is that of one who trained; its AUROC is compared on the same patients with the one on
the model that never had the source. Intervals are bootstraps over its patients, of one run each. `short` is trained
anew for as few rounds as the approximate way takes: what that way is worth, it must be worth beside this.

Utility is the macro AUROC over the remaining sources' test patients, all at once; `utility_drop_auroc` is by how much
the approximate model is worse than the one trained anew. `share_of_retraining_cost` is of optimiser steps.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common import arguments, conditions, finish, need_images, table
from forget_task import CLASSES, FEATURES, FILE, SPLITS
from skin_sites import SITES, STUDY, converted, macro_auroc

SOURCES = ("vidir_molemax", "vidir_modern", "vienna_dias", "rosendahl")
Floats = npt.NDArray[np.float64]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    parser.add_argument("--features", type=Path, help="a folder with the features, or for them: made once, then read")
    parser.add_argument("--weights", type=Path, help="what examples/efficientnet_lite_weights.py made")
    parser.add_argument("--leaving", choices=SOURCES, default="rosendahl")
    options = parser.parse_args()
    rounds = 20 if options.quick else 50
    state = conditions(size="96x128", seed=2026, repeats=1, quick=options.quick, leaving=options.leaving, rounds=rounds)
    folder = options.out or Path(tempfile.mkdtemp(prefix="forget-"))
    folder.mkdir(parents=True, exist_ok=True)
    features = (options.features or folder / "features").absolute()
    if not all((features / name / FILE).is_file() for name in SOURCES):
        need_images("ham10000")
        encode(features, (options.weights or converted(folder)).absolute())
    report(measure(folder, features, options.leaving, rounds), state)
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


def encode(folder: Path, weights: Path) -> None:
    """Write what the frozen encoder gives of every source's pictures, and how the example study parts its patients."""
    import torch

    from wardround.runs.session import open_host
    from wardround.study.sites import load_sites

    sites = load_sites(SITES)
    entries = {name: site.model_copy(update={"start": weights}) for name, site in sites.sites.items()}
    sites = sites.model_copy(update={"sites": entries})
    host = open_host(STUDY, sites, folder / "none", (), (), None)
    network: Any = host.model_context.model.eval()
    encoder = torch.nn.Sequential(*network.layers())
    for name in SOURCES:
        dataset, rows = host.dataset(name), []
        for part, split in enumerate(SPLITS):
            for patient, batch in dataset.evaluation(split):  # type: ignore[arg-type]
                with torch.no_grad():
                    x = encoder(batch.images).mean(dim=(2, 3)).numpy().astype(np.float16)
                labels = np.asarray(batch.labels)
                labels = labels.argmax(1) if labels.ndim > 1 else labels
                rows.append((x, labels, np.full(len(x), patient), np.full(len(x), part)))
        columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        np.savez(folder / name / FILE, **dict(zip(("x", "y", "patient", "part"), columns, strict=True)))
        print(f"{name}: {len(columns[0])} pictures encoded", flush=True)


def study_of(rounds: int) -> Any:
    from wardround.study.schema import Study

    return Study.model_validate(
        {
            "name": "forget-skin",
            "seed": 2026,
            "sites": {name: {} for name in SOURCES},
            "task": {"kind": "custom", "factory": "forget_task:make_task", "options": {}},
            "local": {
                "steps": 25,
                "batch": 32,
                "optimizer": "adam",
                "lr": 0.01,
                "schedule": "cosine",
                "optimizer_state": "keep",
            },
            "schedule": {"rounds": rounds, "release": "last", "validate_every": 0},
        }
    )


def measure(folder: Path, features: Path, leaving: str, rounds: int) -> dict[str, Any]:
    """Train, forget in both ways, and attack; by model: its file, seconds and rounds."""
    import wardround
    from wardround.audit.remains import remains
    from wardround.living.forgetting import approximate, exact, forget_approximately, forget_exactly, model_in
    from wardround.study.sites import SiteData, SitesFile

    study = study_of(rounds)
    sites = SitesFile(sites={name: SiteData(data=features / name) for name in SOURCES}).with_code()
    seconds = {}

    def timed(name: str, made: Any) -> Path:
        began = time.perf_counter()
        result = made()
        seconds[name] = time.perf_counter() - began
        return model_in(result.out)

    models = {
        "before": timed(
            "before", lambda: wardround.run(study, sites, folder / "before", engine="local", quiet=True, near=folder)
        )
    }
    way = exact(study, folder, leaving, folder / "before", SOURCES)
    models["retrained"] = timed("retrained", lambda: forget_exactly(way, sites, folder / "retrained", engine="local"))
    plan = approximate(study, folder, leaving, folder / "before", SOURCES)
    models["after"] = timed("after", lambda: forget_approximately(plan, sites, folder / "approximate", engine="local"))
    number = plan.recover["schedule"]["rounds"]
    short = exact(study_of(number), folder, leaving, folder / "before", SOURCES)
    models["short"] = timed("short", lambda: forget_exactly(short, sites, folder / "short", engine="local"))
    found = remains(study, sites, leaving, models, folder)
    others = [name for name in SOURCES if name != leaving]
    utility = {name: macro_auroc(*said(path, features, others)) for name, path in models.items()}
    return {"remains": found, "utility": utility, "seconds": seconds, "share": number / rounds}


def said(model: Path, features: Path, sources: list[str]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Probabilities (patients, classes) of test patients, each the mean of the pictures', and what they are."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(model)
    scores, labels = [], []
    for name in sources:
        with np.load(features / name / FILE) as file:
            inside = file["part"] == SPLITS.index("test")
            x, y, patient = (file[key][inside] for key in ("x", "y", "patient"))
        assert x.shape[1] == FEATURES
        logits = torch.from_numpy(x.astype(np.float32)) @ tensors["1.weight"].T + tensors["1.bias"]
        found = torch.softmax(logits, 1).numpy().astype(np.float64)
        for one in np.unique(patient):
            scores.append(found[patient == one].mean(axis=0))
            labels.append(int(y[patient == one][0]))
    assert np.array(scores).shape[1] == CLASSES
    return np.array(scores), np.array(labels)


def report(found: dict[str, Any], state: dict[str, Any]) -> None:
    """Print the table and the last line."""
    remains, utility = found["remains"], found["utility"]
    print(f"{remains.members} patients who trained, {remains.outsiders} who did not, at {remains.site}")
    rows = [
        [name, one.auroc, f"{one.low:.3f} to {one.high:.3f}", utility[name], round(found["seconds"][name], 1)]
        for name, one in remains.models.items()
    ]
    table(["model", "attack AUROC", "95 %", "utility (AUROC)", "seconds"], rows)
    gap = remains.to_retrained["after"]
    finish(
        {
            "attack_before": remains.models["before"].auroc,
            "attack_after": remains.models["after"].auroc,
            "attack_retrained": remains.models["retrained"].auroc,
            "gap_to_retrained": gap.gap,
            "gap_high": gap.high,
            "gap_before": remains.to_retrained["before"].gap,
            "utility_drop_auroc": utility["retrained"] - utility["after"],
            "utility_drop_from_original": utility["before"] - utility["after"],
            "share_of_retraining_cost": found["share"],
            "share_of_retraining_seconds": found["seconds"]["after"] / found["seconds"]["retrained"],
            "attack_short": remains.models["short"].auroc,
            "utility_drop_short_auroc": utility["retrained"] - utility["short"],
            "members": remains.members,
            "outsiders": remains.outsiders,
            **state,
        }
    )


if __name__ == "__main__":
    main()
