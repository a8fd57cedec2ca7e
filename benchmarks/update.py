"""A second cohort arrives: does the model learn from it without forgetting the first, and does the gate hold?

Vessels of the retina: a parent learns from DRIVE alone (adults, the Netherlands). Then CHASEDB1 trains (children, the
United Kingdom, another camera) and DRIVE only measures: once as it comes, and once for each setting of retention. The
setting is chosen by the validation patients of both; its candidate is the one whose test numbers count. A candidate
made worse on purpose, by a rate at which training runs away, must not be promoted. Everything is done with three seeds,
which deal out the patients, too (--quick: one seed, fewer rounds, one setting).
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import arguments, conditions, finish, need_images, table

if TYPE_CHECKING:
    from wardround import Result

ROOT = Path(__file__).resolve().parent.parent
FIRST, SECOND = "DRIVE", "CHASEDB1"
SEEDS = (1, 2, 3)
PLAIN: Mapping[str, Any] = {"kind": "none"}
SETTINGS: Sequence[Mapping[str, Any]] = (
    {"kind": "ewc", "weight": 100.0},
    {"kind": "lwf", "weight": 5.0},
    {"kind": "lwf", "weight": 20.0},
)


@dataclass(frozen=True)
class Candidate:
    """An update: its retention, its validation Dice over both institutions' patients, and its run."""

    name: str
    validation: float
    result: Result

    def dice(self, arm: str, site: str) -> float:
        """On a site's test patients."""
        found = self.result.estimate(arm, site, "dice")
        assert found is not None
        return found.value

    def gain(self, site: str) -> float:
        """Over the parent."""
        return self.dice("federated", site) - self.dice("parent", site)

    @property
    def row(self) -> list[Any]:
        """For the table."""
        gate = self.result.gate
        assert gate is not None
        return [self.name, self.validation, self.gain(FIRST), self.gain(SECOND), "yes" if gate.promoted else "no"]


@dataclass(frozen=True)
class Outcome:
    """What one seed came to: the candidate that validation patients chose, one without retention, one made worse."""

    chosen: Candidate
    plain: Candidate
    held: Sequence[Candidate]
    worse: Candidate


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--out", type=Path, help="keep the runs here, and go on with them (default: a temporary folder)"
    )
    options = parser.parse_args()
    need_images("vessels")
    folder = options.out or Path(tempfile.mkdtemp(prefix="update-"))
    seeds = SEEDS[:1] if options.quick else SEEDS
    state = conditions(patch="128x128", seeds=seeds, quick=options.quick, first=FIRST, second=SECOND)
    began = time.perf_counter()
    outcomes = [of_seed(folder / f"seed-{seed}", seed, options.quick) for seed in seeds]
    finish({**figures(outcomes), "seconds": time.perf_counter() - began, "conditions": state})
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


def of_seed(folder: Path, seed: int, quick: bool) -> Outcome:
    """A parent and its candidates."""
    rounds, more, settings = (6, 4, SETTINGS[1:2]) if quick else (20, 10, SETTINGS)
    parent = first_release(folder / "parent", seed, rounds)
    print(f"seed {seed}: the parent learns from {FIRST} alone, {parent.patients[FIRST]}", flush=True)
    plain = update(parent, folder, "plain", PLAIN, seed, more)
    held = [update(parent, folder, label(retain), retain, seed, more) for retain in settings]
    worse = update(parent, folder, "made worse", PLAIN, seed, 2, lr=1.0)
    chosen = max(held, key=lambda one: one.validation)
    print(f"gain over the parent in Dice on test patients, {FIRST}: what is forgotten is below 0")
    header = ["retention", "validation", f"gain {FIRST}", f"gain {SECOND}", "promoted"]
    table(header, [one.row for one in (plain, *held, worse)])
    print(f"chosen on validation patients: {chosen.name}")
    for what, one in (("gate", chosen), ("made worse", worse)):
        assert one.result.gate is not None
        print(f"{what}: {one.result.gate.reason}")
    return Outcome(chosen, plain, held, worse)


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over seeds, and each seed's own; promoted and refused are 1 where every seed's is."""

    def gains(of: str, site: str) -> list[float]:
        return [getattr(one, of).gain(site) for one in outcomes]

    promoted = [_promoted(one.chosen) for one in outcomes]
    return {
        "forgetting_dice": -statistics.fmean(gains("chosen", FIRST)),
        "plain_forgetting_dice": -statistics.fmean(gains("plain", FIRST)),
        "new_site_gain_dice": statistics.fmean(gains("chosen", SECOND)),
        "plain_new_site_gain_dice": statistics.fmean(gains("plain", SECOND)),
        "promoted": int(all(promoted)),
        "promoted_seeds": sum(promoted),
        "plain_promoted_seeds": sum(_promoted(one.plain) for one in outcomes),
        "refused_when_worse": int(not any(_promoted(one.worse) for one in outcomes)),
        "of_seeds": [
            {
                "chosen": one.chosen.name,
                "parent": {site: one.chosen.dice("parent", site) for site in (FIRST, SECOND)},
                "gains": {
                    each.name: {
                        "validation": each.validation,
                        FIRST: each.gain(FIRST),
                        SECOND: each.gain(SECOND),
                        "promoted": _promoted(each),
                    }
                    for each in (one.plain, *one.held)
                },
                "test_patients": {site: one.chosen.result.patients[site]["test"] for site in (FIRST, SECOND)},
            }
            for one in outcomes
        ],
    }


def _promoted(candidate: Candidate) -> bool:
    assert candidate.result.gate is not None
    return candidate.result.gate.promoted


def label(retain: Mapping[str, Any]) -> str:
    """A setting's name, and that of its folder."""
    return f"{retain['kind']} {retain.get('weight', 0):g}"


def study(sites: Mapping[str, Any], seed: int, rounds: int, lr: float) -> dict[str, Any]:
    """A study of the cohorts; the last round is released, so that retention and not a choice holds it back."""
    return {
        "version": 1,
        "name": "vessels-update",
        "seed": seed,
        "sites": dict(sites),
        "task": {
            "kind": "segmentation",
            "images": ["{patient}/{id}.jpg"],
            "mask": "{patient}/{id}_vessels",
            "channels": 3,
            "structures": {"vessels": "any"},
            "patch": [128, 128],
            "patches_per_image": 4,
            "augment": [{"name": "RandFlipd", "prob": 0.5, "spatial_axis": axis} for axis in (0, 1)],
            "distances": "pixels",
            "split": {"validation": 0.15, "test": 0.4},
        },
        "model": {"kind": "segresnet", "preset": "tiny", "norm": "instance"},
        "method": {"kind": "fedavg", "weights": "equal"},
        "local": {
            "steps": 10,
            "batch": 4,
            "optimizer": "adam",
            "lr": lr,
            "schedule": "cosine",
            "warmup": 20,
            "optimizer_state": "keep",
        },
        "schedule": {"rounds": rounds, "validate_every": 5, "release": "last"},
    }


def first_release(out: Path, seed: int, rounds: int) -> Result:
    """The parent, of the first cohort."""
    import wardround

    given = study({FIRST: {}}, seed, rounds, 0.006)
    return wardround.run(given, ROOT / "examples" / "vessels-sites.yaml", out, engine="local", quiet=True)


def update(
    parent: Result, folder: Path, name: str, retain: Mapping[str, Any], seed: int, rounds: int, lr: float = 0.006
) -> Candidate:
    """A candidate of the second cohort's training patients."""
    from wardround.living.release import Release
    from wardround.living.update import update as go_on
    from wardround.results.files import read_rounds

    given = study({FIRST: {}, SECOND: {}}, seed, rounds, lr)
    out = folder / name.replace(" ", "-")
    result = go_on(
        Release.at(parent.out),
        {**given, "update": {"retain": dict(retain)}},
        ROOT / "examples" / "vessels-sites.yaml",
        out,
        engine="local",
        quiet=True,
    )
    last = [line.validation for line in read_rounds(out) if line.arm == "federated" and line.validation][-1]
    print(f"{name}: {', '.join(result.participants)} trained; validation Dice {last['dice']:.4f}", flush=True)
    return Candidate(name, last["dice"], result)


if __name__ == "__main__":
    main()
