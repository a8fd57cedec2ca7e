"""A network pretrained on phantoms comes to five real institutions: adapt it by prompts, by LoRA, whole, or not at all?

The network is the Swin denoiser. It is pretrained on the package's phantoms (made-up patients of the ICBM152 anatomy,
nine protocols; a federation of their sites), then adapted on simulated scans of the real images of
examples/lgg-mri.yaml, federated, with the same rounds and steps: `prompts` trains and exchanges 20 deep prompts a block
(FedPR's number, plain averages), `fedpr` the same by FedPR (steps in the null space of the common prompts, which are
shorter), `lora` products of rank 4 on queries and values, `full` every value, `scratch` every value from random ones.
`pretrained` is the network as it came. Rates are one guess for each arm (RATES), not tuned.

Per arm: PSNR of magnitude images on test patients (mean of the training sites, worst of them, unseen EZ), bytes of all
messages of the rounds, bytes of one site in one round, and CPU seconds. Resumable with --out. Phantoms are no patients.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import add_processes, conditions, cpu_seconds, engine_of, finish, kept_arguments, need_images, table

ROOT = Path(__file__).resolve().parent.parent
STUDY, SITES = (ROOT / "examples" / f"{name}.yaml" for name in ("lgg-mri", "lgg-sites"))
TRAINING = ("CS", "DU", "FG", "HT")
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "prompts": {"kind": "partial", "trained": ["*.prompts"]},
    "lora": {"kind": "lora", "targets": ["*.q_proj", "*.v_proj"], "rank": 4, "alpha": 8.0},
}
RATES = {"pretrained": 1e-3, "prompts": 1e-2, "fedpr": 5e-2, "lora": 2e-3, "full": 5e-4, "scratch": 1e-3}
# The arms that train and exchange a part of the values.
PARTS = ("prompts", "fedpr", "lora")
WITH_PROMPTS = ("prompts", "fedpr")
PROMPTS = 20
PHANTOM_RATE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """Of a run: rounds of the pretraining and of an adaptation, steps of a round, and what there is to see.

    `patients` phantoms of `slices` slices a site, images of `size` pixels, `test` slices of each test patient.
    """

    preset: str
    pretraining: int
    rounds: int
    steps: int
    patients: int
    slices: int
    size: int
    test: int
    contrasts: tuple[str, ...]
    baselines: tuple[str, ...]


FULL = Sizes("small", 48, 48, 10, 6, 12, 128, 6, ("flair", "t1ce"), ("zero_filled", "tv"))
# Says that it runs, and nothing of the arms: 64 pixels are the middle of the institutions' images.
QUICK = Sizes("tiny", 1, 1, 2, 3, 2, 64, 1, ("flair",), ("zero_filled",))


def main() -> None:
    parser = kept_arguments(__doc__ or "")
    add_processes(parser)
    options = parser.parse_args()
    need_images("lgg")
    sizes = QUICK if options.quick else FULL
    state = conditions(**asdict(sizes), seed=2026, repeats=1, quick=options.quick)
    folder = options.out or Path(tempfile.mkdtemp(prefix="adapt-mri-"))
    folder.mkdir(parents=True, exist_ok=True)

    import wardround

    began = cpu_seconds()
    engine, sites = engine_of(options.processes), phantoms(folder / "phantoms", sizes)
    first = wardround.run(pretraining(list(sites), sizes), _phantom_sites(sites), folder / "pretraining", **engine)
    on_phantoms = _baselines(first, sizes) | {"pretrained": first.metric("federated", "mean", "psnr")}
    print("on phantoms:", ", ".join(f"{name} {value:.2f} dB" for name, value in on_phantoms.items()), flush=True)
    known: dict[str, float] = {}
    found: dict[str, dict[str, Any]] = {}
    for arm in RATES:
        before = cpu_seconds()
        study, own = adaptation(arm, first.model_sha256, sizes), _sites(arm, first.out)
        result = wardround.run(study, own, folder / arm, **engine)
        known = known or _baselines(result, sizes)
        found[arm] = {**measured(result, sizes.rounds), "seconds": cpu_seconds() - before}
        print(f"{arm}: {found[arm]['psnr']:.2f} dB, {found[arm]['seconds']:.0f} s", flush=True)
    report(found, known, {**state, "psnr_on_phantoms": on_phantoms}, cpu_seconds() - began)
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


def phantoms(folder: Path, sizes: Sizes) -> dict[str, Path]:
    """Made-up hospitals with all protocols of the package's demos, by name; each is made once."""
    from wardround.imaging.phantoms import CONTRAST_SITES, DEMO_SITES, make_site

    made = {}
    for number, site in enumerate((*DEMO_SITES, *CONTRAST_SITES), 1):
        named = replace(site, name=f"{site.name}{number}")
        if not (done := folder / f"{named.name}.complete").exists():
            make_site(folder, named, sizes.patients, 2026, size=sizes.size, slices=sizes.slices)
            done.touch()
        made[named.name] = folder / named.name
    return made


def pretraining(sites: list[str], sizes: Sizes) -> dict[str, Any]:
    """The study on phantoms: scanners with unlike numbers of coils, accelerations and noise."""
    families = ("random", "equispaced")
    scanners = {
        site: {
            "acquisition": {
                "coils": 4 + 2 * (number % 4),
                "noise": (0.002, 0.005, 0.008)[number % 3],
                "mask": {"family": families[number % 2], "acceleration": 3 + number % 3, "calibration": 0.1},
            }
        }
        for number, site in enumerate(sites)
    }
    return {
        "name": "adapt-mri-phantoms",
        "seed": 2026,
        "sites": scanners,
        "task": {
            "kind": "reconstruction",
            "contrasts": ["image"],
            "size": [sizes.size] * 2,
            "loss": {"kind": "l1"},
            "evaluation": {"baselines": list(sizes.baselines), "slices": {"per_patient": 1}, "tuning_slices": 1},
        },
        **_training(sizes, sizes.pretraining, PHANTOM_RATE),
        "model": {"kind": "swin_denoiser", "preset": sizes.preset},
    }


def adaptation(arm: str, sha256: str, sizes: Sizes) -> dict[str, Any]:
    """The study of the five institutions in one arm."""
    from wardround.study.load import read_yaml

    study = read_yaml(STUDY, "study")
    # Baselines do not depend on the arm: the first one has them.
    baselines = sizes.baselines if arm == "pretrained" else sizes.baselines[:1]
    evaluation = {
        "baselines": list(baselines),
        "slices": {"per_patient": sizes.test},
        "tuning_slices": min(2, sizes.test),
    }
    given = {"contrasts": list(sizes.contrasts), "size": [sizes.size] * 2, "evaluation": evaluation}
    study["task"] = {**study["task"], **given}
    study |= _training(sizes, 0 if arm == "pretrained" else sizes.rounds, RATES[arm])
    study["name"] = f"adapt-mri-{arm}"
    study["model"] = {"kind": "swin_denoiser", "preset": sizes.preset}
    if arm in WITH_PROMPTS:
        # The pretraining had none: they begin fresh, the same at all sites.
        study["model"]["prompts"] = PROMPTS
    if arm in ADAPTERS:
        study["adapters"] = dict(ADAPTERS[arm])
    if arm == "fedpr":
        study["method"] |= {"kind": "fedpr"}
    if arm != "scratch":
        study["start"] = {"kind": "release", "file": "pretraining", "sha256": sha256, "partial": arm in WITH_PROMPTS}
    return study


def _training(sizes: Sizes, rounds: int, rate: float) -> dict[str, Any]:
    local = {"steps": sizes.steps, "batch": 1, "optimizer": "adam", "lr": rate, "schedule": "cosine"}
    return {
        "local": {**local, "warmup": 20, "clip_norm": 1.0, "optimizer_state": "keep"},
        "schedule": {"rounds": rounds, "min_sites": 2, **({"validate_every": max(1, rounds // 6)} if rounds else {})},
        "method": {"kind": "fedavg", "weights": "equal"},
    }


def _baselines(result: Any, sizes: Sizes) -> dict[str, float]:
    sites = TRAINING if TRAINING[0] in result.values["patients"] else None
    return {name: _mean(result, name, "psnr", sites) for name in sizes.baselines}


def _mean(result: Any, arm: str, metric: str, sites: Sequence[str] | None = TRAINING) -> float:
    """Of the sites that train: where nothing is trained, a result's own mean counts EZ as well."""
    if sites is None:
        return float(result.metric(arm, "mean", metric))
    return sum(result.metric(arm, site, metric) for site in sites) / len(sites)


def _phantom_sites(folders: Mapping[str, Path]) -> Any:
    from wardround.study.sites import SitesFile

    return SitesFile.model_validate({"sites": {site: {"data": str(path)} for site, path in folders.items()}})


def _sites(arm: str, pretrained: Path) -> Any:
    """The institutions, each with its own copy of the pretrained network, where the arm starts from it."""
    from wardround.study.sites import load_sites

    sites = load_sites(SITES)
    if arm == "scratch":
        return sites
    placed = {name: site.model_copy(update={"start": pretrained.absolute()}) for name, site in sites.sites.items()}
    return sites.model_copy(update={"sites": placed})


def measured(result: Any, rounds: int) -> dict[str, Any]:
    """Decibels and bytes of one arm."""
    traffic = result.values["traffic"]
    each = {site: result.metric("federated", site, "psnr") for site in TRAINING}
    trained = result.values["rounds"] > 0
    return {
        "psnr": _mean(result, "federated", "psnr"),
        "ssim": _mean(result, "federated", "ssim"),
        "worst_site_psnr": min(each.values()),
        "unseen_psnr": result.metric("federated", "EZ", "psnr"),
        "sites": each,
        "bytes_up": traffic["bytes_up"] if trained else 0,
        "bytes_down": traffic["bytes_down"] if trained else 0,
        "bytes_up_of_a_site_in_a_round": round(traffic["bytes_up"] / (rounds * len(TRAINING))) if trained else 0,
        "round": result.selected_round,
    }


def report(
    found: Mapping[str, Mapping[str, Any]], known: Mapping[str, float], state: Mapping[str, Any], seconds: float
) -> None:
    """A table, and the last line."""
    columns = ("psnr", "worst_site_psnr", "unseen_psnr", "ssim", "bytes_up_of_a_site_in_a_round")
    print("\nPSNR in dB on test patients")
    table(["", *columns], [[arm, *(values[column] for column in columns)] for arm, values in found.items()])
    print(", ".join(f"{name} {value:.2f} dB" for name, value in known.items()))

    def gain(one: str, other: str, key: str = "psnr") -> float:
        return float(found[one][key] - found[other][key])

    finish(
        {
            "arms": found,
            **{f"{name}_psnr": value for name, value in known.items()},
            **{f"{arm}_share_of_full_bytes": found[arm]["bytes_up"] / found["full"]["bytes_up"] for arm in PARTS},
            **{f"{arm}_gain_over_pretrained_db": gain(arm, "pretrained") for arm in (*PARTS, "full")},
            **{f"{arm}_gain_over_scratch_db": gain(arm, "scratch") for arm in (*PARTS, "full")},
            **{f"{arm}_gap_to_full_db": gain("full", arm) for arm in PARTS},
            **{f"{arm}_worst_site_gap_to_full_db": gain("full", arm, "worst_site_psnr") for arm in PARTS},
            "seconds": seconds,
            "conditions": state,
        }
    )


if __name__ == "__main__":
    main()
