"""A second institution arrives: does the model learn from it without forgetting the first, and does the gate hold?

Tumours on slices of 64 x 64 (TCGA-LGG). A parent learns from the first institution alone. Then the second trains and
the first only measures: once as it comes, and once for each setting of retention. The setting is chosen by the
validation patients of both (--quick: fewer rounds and settings); its candidate is the one whose test numbers count. A
candidate made worse on purpose, by a rate at which training runs away, must not be promoted.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import arguments, conditions, finish, need_images, table
from outlines import small_tumours

if TYPE_CHECKING:
    from wardround import Result

ROOT = Path(__file__).resolve().parent.parent
FIRST, SECOND = "DU", "HT"
SEED = 2026
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


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--out", type=Path, help="keep the runs here, and go on with them (default: a temporary folder)"
    )
    options = parser.parse_args()
    need_images("lgg")
    folder = options.out or Path(tempfile.mkdtemp(prefix="update-"))
    state = conditions(size="64x64", seed=SEED, repeats=1, quick=options.quick, first=FIRST, second=SECOND)
    began = time.perf_counter()
    rounds, more, settings = (10, 6, SETTINGS[1:2]) if options.quick else (30, 25, SETTINGS)
    parent = first_release(folder / "parent", rounds)
    print(f"parent: {FIRST} alone, {parent.patients[FIRST]}")
    plain = update(parent, folder, "plain", PLAIN, more)
    held = [update(parent, folder, label(retain), retain, more) for retain in settings]
    worse = update(parent, folder, "made worse", PLAIN, 2, lr=1.0)
    chosen = max(held, key=lambda one: one.validation)
    print(f"\ngain over the parent in Dice on test patients, {FIRST}: what is forgotten is below 0")
    header = ["retention", "validation", f"gain {FIRST}", f"gain {SECOND}", "promoted"]
    table(header, [one.row for one in (plain, *held, worse)])
    print(f"chosen on validation patients: {chosen.name}")
    gate, refused = chosen.result.gate, worse.result.gate
    assert gate is not None
    assert refused is not None
    print(f"gate: {gate.reason}\nmade worse: {refused.reason}")
    finish(
        {
            "forgetting_dice": -chosen.gain(FIRST),
            "plain_forgetting_dice": -plain.gain(FIRST),
            "new_site_gain_dice": chosen.gain(SECOND),
            "plain_new_site_gain_dice": plain.gain(SECOND),
            "promoted": int(gate.promoted),
            "refused_when_worse": int(not refused.promoted),
            "chosen": chosen.name,
            "validation": {one.name: round(one.validation, 4) for one in (plain, *held)},
            "test_patients": {site: chosen.result.patients[site]["test"] for site in (FIRST, SECOND)},
            "seconds": time.perf_counter() - began,
            "conditions": state,
        }
    )
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


def label(retain: Mapping[str, Any]) -> str:
    """A setting's name, and that of its folder."""
    return f"{retain['kind']} {retain.get('weight', 0):g}"


def study(sites: Mapping[str, Any], rounds: int, lr: float, every: int) -> dict[str, Any]:
    """A study of the institutions; the last round is released, so that retention and not a choice holds it back."""
    return {
        "version": 1,
        "name": "lgg-update",
        "seed": SEED,
        "sites": dict(sites),
        "task": small_tumours(0.4),
        "model": {"kind": "monai_unet", "preset": "tiny", "norm": "instance"},
        "method": {"kind": "fedavg", "weights": "equal"},
        "local": {
            "steps": 10,
            "batch": 8,
            "optimizer": "adam",
            "lr": lr,
            "schedule": "cosine",
            "warmup": 20,
            "optimizer_state": "keep",
        },
        "schedule": {"rounds": rounds, "validate_every": every, "release": "last"},
    }


def first_release(out: Path, rounds: int) -> Result:
    """The parent, of the first institution."""
    import wardround

    given = study({FIRST: {}}, rounds, 0.005, 5)
    return wardround.run(given, ROOT / "examples" / "lgg-sites.yaml", out, engine="local", quiet=True)


def update(
    parent: Result, folder: Path, name: str, retain: Mapping[str, Any], rounds: int, lr: float = 0.005
) -> Candidate:
    """A candidate of the second institution's training patients."""
    from wardround.living.release import Release
    from wardround.living.update import update as go_on
    from wardround.results.files import read_rounds

    given = study({FIRST: {}, SECOND: {}}, rounds, lr, 12)
    out = folder / name.replace(" ", "-")
    result = go_on(
        Release.at(parent.out),
        {**given, "update": {"retain": dict(retain)}},
        ROOT / "examples" / "lgg-sites.yaml",
        out,
        engine="local",
        quiet=True,
    )
    last = [line.validation for line in read_rounds(out) if line.arm == "federated" and line.validation][-1]
    print(f"{name}: {', '.join(result.participants)} trained; validation Dice {last['dice']:.4f}", flush=True)
    return Candidate(name, last["dice"], result)


if __name__ == "__main__":
    main()
