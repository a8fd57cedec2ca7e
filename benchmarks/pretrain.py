"""Four sources of skin tumours label 5 % of their lesions: what is an encoder worth that learned from all pictures?

Runs examples/skin-pretrain.yaml once, without labels, then examples/skin-few-labels.yaml for five draws of 5 % of the
training lesions of each source (--quick: two draws, a quarter of the rounds), federated all of it: `pretrained` starts
from that encoder, `scratch` from random values, and `imagenet` is examples/skin.yaml with the same draws and the public
weights of EfficientNet-lite0, at its own 96 x 128. No validation lesion chooses a round.

Figures are macro AUROC over all sources' test lesions at once, which no run has trained or pretrained on, with
probabilities as if every diagnosis were equally frequent; means of the draws. `gain_low` is the lower end of the 95 %
interval (Student's t) of the gain over `scratch`, paired by draw: it says what another draw of labels would change, and
not what other lesions or another pretraining would.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from common import conditions, finish, kept_arguments, need_images, table
from skin_sites import ROOT, SITES, converted, everybody, lesions, macro_auroc, said

PRETRAIN, FEW, IMAGENET = (ROOT / "examples" / f"{name}.yaml" for name in ("skin-pretrain", "skin-few-labels", "skin"))
DRAWS, QUICK_DRAWS, QUICKER = 5, 2, 4
SHARE = 0.05
ARMS = ("scratch", "imagenet", "pretrained")
# Nothing but the labelled lesions decides: as examples/skin-few-labels.yaml has it.
LAST = ("schedule.validate_every=0", "schedule.release=last", "schedule.rounds=12")


def main() -> None:
    parser = kept_arguments(__doc__ or "")
    parser.add_argument("--weights", type=Path, help="what examples/efficientnet_lite_weights.py made")
    options = parser.parse_args()
    need_images("ham10000")
    draws = QUICK_DRAWS if options.quick else DRAWS
    state = conditions(size="64x64, imagenet 96x128", seed=2026, repeats=draws, quick=options.quick)
    folder = options.out or Path(tempfile.mkdtemp(prefix="pretrain-"))
    folder.mkdir(parents=True, exist_ok=True)
    weights = (options.weights or converted(folder)).absolute()

    began = time.perf_counter()
    first = _run(PRETRAIN, folder / "pretraining", None, options.quick)
    error = first.metric("federated", "mean", "hidden_error")
    seconds = {"pretraining": time.perf_counter() - began}
    print(f"pretraining: error of hidden patches {error:.3f}, {seconds['pretraining']:.0f} s", flush=True)
    seen = _pretrained_on(first.out)
    starts: dict[str, tuple[Path, Path | None, Sequence[str]]] = {
        "scratch": (FEW, None, ("start={kind: fresh}",)),
        "imagenet": (IMAGENET, weights, LAST),
        "pretrained": (FEW, first.out.absolute(), (f"start.sha256={first.model_sha256}",)),
    }
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    labelled: dict[str, int] = {}
    for draw in range(draws):
        for arm, (study, start, overrides) in starts.items():
            before = time.perf_counter()
            named = (*overrides, f"task.labels={{share: {SHARE}, draw: {draw}}}")
            run = _run(study, folder / f"{arm}-{draw}", start, options.quick, named)
            auroc, labelled = _measured(run.out, start, seen)
            found[arm].append(auroc)
            seconds[arm] = seconds.get(arm, 0.0) + time.perf_counter() - before
            print(f"draw {draw}, {arm}: AUROC {auroc:.3f}, {time.perf_counter() - before:.0f} s", flush=True)
    report(found, labelled, {**state, "hidden_error": error, "seconds": seconds}, time.perf_counter() - began)
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


def _run(study: Path, out: Path, start: Path | None, quick: bool, overrides: Sequence[str] = ()) -> Any:
    import wardround
    from wardround.study.load import load_study

    rounds = load_study(study, overrides).schedule.rounds
    fewer = (f"schedule.rounds={max(1, rounds // QUICKER)}",) if quick else ()
    return wardround.run(study, _sites(start), out, overrides=[*overrides, *fewer])


def _sites(start: Path | None) -> Any:
    from wardround.study.sites import load_sites

    sites = load_sites(SITES)
    placed = {name: site.model_copy(update={"start": start}) for name, site in sites.sites.items()}
    return sites.model_copy(update={"sites": placed})


def _pretrained_on(out: Path) -> dict[str, set[str]]:
    """By source the lesions that the pretraining trained on, or looked at between rounds."""
    from wardround.runs.session import open_host

    host = open_host(out / "study.yaml", _sites(None), out, (), (), None)
    found = {}
    for site in host.study.training_sites:
        data: Any = host.dataset(site)
        found[site] = {*data.names("train"), *data.names("validation")}
    return found


def _measured(out: Path, start: Path | None, pretrained_on: Mapping[str, set[str]]) -> tuple[float, dict[str, int]]:
    """Macro AUROC over everybody's test lesions, and how many lesions each source labels.

    Ends with an error where a test lesion was in the pretraining.
    """
    from wardround.federation.release import model_path
    from wardround.runs.releases import ReleasedModel
    from wardround.runs.session import open_host

    host = open_host(out / "study.yaml", _sites(start), out, (), (), None)
    network = ReleasedModel.opened(model_path(out, "federated")).network(host.task.build_model, None, None)
    seen, labelled = {}, {}
    for site in host.study.training_sites:
        data: Any = host.dataset(site)
        if pretrained_on[site].intersection(data.names("test")):
            raise SystemExit(f"{site}: a test lesion was in the pretraining; seed and split of the studies differ")
        seen[site] = said(host.task, network, lesions(data, "test"))
        labelled[site] = data.patients("train")
    return everybody(seen, macro_auroc), labelled


def report(
    found: Mapping[str, Sequence[float]], labelled: Mapping[str, int], state: Mapping[str, Any], seconds: float
) -> None:
    """A table, and the last line."""
    gains = np.subtract(found["pretrained"], found["scratch"])
    print(f"\nmacro AUROC over everybody's test lesions, labelled lesions {dict(labelled)}")
    table(["draw", *ARMS, "gain"], [[n, *(found[arm][n] for arm in ARMS), float(g)] for n, g in enumerate(gains)])
    finish(
        {
            "labels_per_site": dict(labelled),
            **{f"{arm}_auroc": float(np.mean(found[arm])) for arm in ARMS},
            "gain_auroc": float(gains.mean()),
            "gain_low": lower_bound(gains),
            "gain_over_imagenet": float(np.mean(np.subtract(found["pretrained"], found["imagenet"]))),
            "seconds": seconds,
            "conditions": state,
        }
    )


def lower_bound(gains: np.ndarray[Any, Any]) -> float:
    """The lower end of the 95 % interval of their mean."""
    count = len(gains)
    return float(gains.mean() - stats.t.ppf(0.975, count - 1) * gains.std(ddof=1) / count**0.5)


if __name__ == "__main__":
    main()
