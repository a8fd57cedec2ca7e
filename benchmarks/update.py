"""A second cohort arrives: does the model learn from it without forgetting the first, and does the gate hold?

Vessels of the retina: a parent learns from DRIVE alone (adults, the Netherlands). Then CHASEDB1 trains (children, the
United Kingdom, another camera) and DRIVE only measures: once as it comes, and once with what holds the release.

Candidates are made as people would make them: held by knowledge distillation from the release (`update.retain: lwf`),
first weakly, and more strongly where the gate refuses. The first that it promotes counts, else the last one. The gate
decides on test patients, so what the promoted one forgets there is a little flattered, the more the more were tried.
Beside it: an update without retention, one with EWC, and one made worse on purpose by a rate at which training runs
away, which must not be promoted. Three seeds, which deal out the patients anew (--quick: one, and fewer rounds).
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
SEEDS = (21, 22, 23)
PLAIN: Mapping[str, Any] = {"kind": "none"}
EWC: Mapping[str, Any] = {"kind": "ewc", "weight": 1000.0}
# From what learns most to what holds most.
HELD: Sequence[Mapping[str, Any]] = tuple({"kind": "lwf", "weight": weight} for weight in (10.0, 20.0, 40.0))


@dataclass(frozen=True)
class Candidate:
    """An update: what holds it, and its run."""

    retain: Mapping[str, Any]
    result: Result

    @property
    def name(self) -> str:
        """In tables."""
        return label(self.retain)

    def dice(self, arm: str, site: str) -> float:
        """On a site's test patients."""
        found = self.result.estimate(arm, site, "dice")
        assert found is not None
        return found.value

    def gain(self, site: str) -> float:
        """Over the parent."""
        return self.dice("federated", site) - self.dice("parent", site)

    @property
    def promoted(self) -> bool:
        """What the gate says."""
        assert self.result.gate is not None
        return self.result.gate.promoted

    @property
    def row(self) -> list[Any]:
        """For the table."""
        return [self.name, self.gain(FIRST), self.gain(SECOND), "yes" if self.promoted else "no"]

    @property
    def values(self) -> dict[str, Any]:
        """For programs."""
        return {FIRST: self.gain(FIRST), SECOND: self.gain(SECOND), "promoted": self.promoted}


@dataclass(frozen=True)
class Lengths:
    """Rounds of the parent and of an update."""

    parent: int
    update: int


@dataclass(frozen=True)
class Outcome:
    """What one seed came to: the candidates in order, of which the last one counts, and those beside them."""

    tried: Sequence[Candidate]
    plain: Candidate
    ewc: Candidate
    worse: Candidate

    @property
    def held(self) -> Candidate:
        """The candidate that counts."""
        return self.tried[-1]

    @property
    def values(self) -> dict[str, Any]:
        """For programs."""
        return {
            "parent": {site: self.held.dice("parent", site) for site in (FIRST, SECOND)},
            "test_patients": {site: (self.held.result.patients[site] or {})["test"] for site in (FIRST, SECOND)},
            "candidates": {one.name: one.values for one in (self.plain, self.ewc, *self.tried)},
            "counts": self.held.name,
        }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--out", type=Path, help="keep the runs here, and go on with them (default: a temporary folder)"
    )
    options = parser.parse_args()
    need_images("vessels")
    folder = options.out or Path(tempfile.mkdtemp(prefix="update-"))
    seeds, lengths = (SEEDS[:1], Lengths(6, 4)) if options.quick else (SEEDS, Lengths(20, 10))
    state = conditions(patch="128x128", seeds=seeds, quick=options.quick, first=FIRST, second=SECOND)
    began = time.perf_counter()
    outcomes = [of_seed(folder / f"seed-{seed}", seed, lengths) for seed in seeds]
    finish({**figures(outcomes), "seconds": time.perf_counter() - began, "conditions": state})
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


def of_seed(folder: Path, seed: int, lengths: Lengths) -> Outcome:
    """A parent and its candidates."""
    parent = first_release(folder / "parent", seed, lengths.parent)
    plain, ewc = (update(parent, folder, retain, seed, lengths.update) for retain in (PLAIN, EWC))
    tried: list[Candidate] = []
    for retain in HELD:
        tried.append(update(parent, folder, retain, seed, lengths.update))
        if tried[-1].promoted:
            break
    worse = update(parent, folder, PLAIN, seed, 2, lr=1.0, name="made-worse")
    show(f"seed {seed}", (plain, ewc, *tried))
    for what, one in (("gate", tried[-1]), ("made worse", worse)):
        assert one.result.gate is not None
        print(f"{what}: {one.result.gate.reason}", flush=True)
    return Outcome(tried, plain, ewc, worse)


def show(what: str, candidates: Sequence[Candidate]) -> None:
    """A table of gains over the parent."""
    print(f"\n{what}: gain over the parent in Dice on test patients; what is forgotten is below 0")
    table(["retention", FIRST, SECOND, "promoted"], [one.row for one in candidates])


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over seeds, and each seed's own; promoted and refused are 1 where every seed's is."""

    def gain(of: str, site: str) -> float:
        return statistics.fmean(getattr(one, of).gain(site) for one in outcomes)

    return {
        "forgetting_dice": -gain("held", FIRST),
        "plain_forgetting_dice": -gain("plain", FIRST),
        "new_site_gain_dice": gain("held", SECOND),
        "plain_new_site_gain_dice": gain("plain", SECOND),
        "ewc_forgetting_dice": -gain("ewc", FIRST),
        "ewc_new_site_gain_dice": gain("ewc", SECOND),
        "promoted": int(all(one.held.promoted for one in outcomes)),
        "promoted_seeds": sum(one.held.promoted for one in outcomes),
        "plain_promoted_seeds": sum(one.plain.promoted for one in outcomes),
        "refused_when_worse": int(not any(one.worse.promoted for one in outcomes)),
        "of_seeds": [one.values for one in outcomes],
    }


def label(retain: Mapping[str, Any]) -> str:
    """A setting's name, and that of its folder."""
    return f"{retain['kind']} {retain['weight']:g}" if "weight" in retain else str(retain["kind"])


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
            "split": {"validation": 0.15, "test": 0.5},
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
    parent: Result,
    folder: Path,
    retain: Mapping[str, Any],
    seed: int,
    rounds: int,
    lr: float = 0.006,
    name: str = "",
) -> Candidate:
    """A candidate of the second cohort's training patients."""
    import wardround

    given = study({FIRST: {}, SECOND: {}}, seed, rounds, lr)
    result = wardround.update(
        parent.out,
        {**given, "update": {"retain": dict(retain)}},
        ROOT / "examples" / "vessels-sites.yaml",
        folder / (name or label(retain).replace(" ", "-")),
        engine="local",
        quiet=True,
    )
    return Candidate(retain, result)


if __name__ == "__main__":
    main()
