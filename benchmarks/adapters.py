"""Five real institutions adapt LiteMedSAM (9.8 million values) together: what it gains, and what they exchange.

Runs examples/lgg-medsam.yaml with all arms: boxes that are off by up to 8 of 256 pixels a side, low-rank factors and
one output head of the mask decoder trained, all else frozen; then its federated arm again in a ring of 16 bits
(--quick: a quarter of the rounds). `zero_shot` is the published model as it is. Dice is of patients, over their
prompted slices; figures that average over institutions weigh each alike. `oracle_` has the box of the true mask, which
no reader draws.

`bytes_saving` is the upload of the whole model in float32 over what a site sends in a round, headers and all.
`exactness` is how far the weights of all adapted layers are from the mean of the sites' weights after a round of
FedEx-LoRA and of FFA-LoRA on random changes of the study's shapes, before they are written in whole numbers, over the
size of that mean.

    WARDROUND_DATA=/folder python benchmarks/adapters.py --weights lite_medsam.safetensors [--quick | --full]
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, conditions, finish, need_images
from outlines import mean_dice, print_arms
from wardround.learning.methods.fedex_lora import FedExLoRA
from wardround.learning.methods.method import MODEL, Method, Writers
from wardround.models.low_rank import folded_of, is_first_factor, second_of
from wardround.plan.arm_specs import ArmSpecs
from wardround.results.schema import Result
from wardround.study.load import load_study
from wardround.study.places import Places
from wardround.wire.update import Group, Layout

ROOT = Path(__file__).resolve().parent.parent
STUDY, SITES = ROOT / "examples" / "lgg-medsam.yaml", ROOT / "examples" / "lgg-sites.yaml"
# Test patients from which on an institution's own gain is judged.
LEAST = 5


def trained(folder: Path, weights: Path, overrides: list[str], compare: list[str]) -> Result:
    """One run of the example."""
    import wardround

    study = folder / "study" / STUDY.name
    study.parent.mkdir(exist_ok=True)
    shutil.copy(STUDY, study)
    if not (beside := study.parent / "lite_medsam.safetensors").exists():
        beside.symlink_to(weights.resolve())
    began = time.perf_counter()
    out = folder / ("16bit" if overrides and "ring_bits" in overrides[0] else "run")
    result = wardround.run(study, SITES, out, compare=compare, overrides=overrides)
    print(f"{out.name}: {time.perf_counter() - began:.0f} s", flush=True)
    return result


def upload(result: Result) -> float:
    """Bytes that a site sends in a round."""
    rounds = result.traffic.arms["federated"].rounds
    return sum(dict(rounds.up).values()) / result.rounds / len(result.participants)


@dataclass(frozen=True)
class Changes:
    """Changes of a layer's factors at two sites, as they are."""

    layout: Layout
    of: dict[str, Any]

    def parts(self, group: str) -> Any:
        return np.array([0.3, 0.7])

    def each(self, group: str, tensor: str) -> Any:
        return self.of[tensor]

    def mean(self, group: str, tensor: str) -> Any:
        return np.tensordot(self.parts(group), self.of[tensor], axes=1)


def exactness(specs: ArmSpecs) -> float:
    """The worst layer and method."""
    values = {name: np.asarray(array) for name, array in specs.model_context.initial_values().items()}
    firsts = [name for name in values if is_first_factor(name)]
    infos = {p.name: p.info for p in specs.model_context.parameters}
    random, worst = np.random.default_rng(0), 0.0
    for first in firsts:
        second, folded = second_of(first), folded_of(first)
        shape = (values[second].shape[0], *values[first].shape[1:])
        own = {first: values[first], second: values[second], folded: np.zeros(shape, np.float32)}
        for method, sent in ((FedExLoRA("equal"), (first, second)), (Method("equal"), (second,))):
            group = Group(MODEL, tuple(infos[name] for name in sent), 32)
            public, private = method.initial((group,), own)
            changed = {name: random.standard_normal((2, *own[name].shape)) for name in sent}
            following: dict[str, Any] = {}
            aggregate: Any = Changes(Layout((group,), (), 8, 1.0), changed)
            method.apply(public, private, aggregate, Writers(following.__setitem__, {}.__setitem__))
            at = {name: own[name] + changed.get(name, np.zeros((2, *own[name].shape))) for name in (first, second)}
            products = [
                b.reshape(len(b), -1) @ a.reshape(len(a), -1) for a, b in zip(at[first], at[second], strict=True)
            ]
            mean = np.tensordot(aggregate.parts(MODEL), np.array(products), axes=1)
            found = own | method.release_for(None, following, {})
            a, b = (found[name].astype(np.float64) for name in (first, second))
            now = b.reshape(len(b), -1) @ a.reshape(len(a), -1) + found[folded].reshape(len(b), -1)
            worst = max(worst, float(np.abs(now - mean).max() / np.abs(mean).max()))
    return worst


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--weights", type=Path, required=True, help="LiteMedSAM's, as `wardround weights import` made them"
    )
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    options = parser.parse_args()
    need_images("lgg")
    state = conditions(size="256x256", seed=2026, repeats=1, quick=options.quick)
    folder = options.out or Path(tempfile.mkdtemp(prefix="adapters-"))
    folder.mkdir(exist_ok=True)
    quick = ["schedule.rounds=5"] if options.quick else []
    began = time.perf_counter()
    result = trained(folder, options.weights, quick, ["local", "pooled"])
    small = trained(folder, options.weights, ["protection.ring_bits=16", *quick], [])
    specs = ArmSpecs(load_study(STUDY), (), places=Places((options.weights.resolve(),)))
    model = 4 * sum(p.info.size for p in specs.model_context.parameters)
    shared = sum(p.info.size for p in specs.model_context.parameters if p.name not in specs.model_context.frozen)
    training = result.participants
    print_arms(result, [*training, "EZ", "mean"], ("dice", "oracle_dice"), "patients", ("zero_shot", "filled_prompt"))
    gains = {
        site: found["dice"]
        for site, found in result.gains["federated"]["zero_shot"].items()
        if site in training and result.patients[site]["test"] >= LEAST
    }
    worst = min(gains, key=lambda site: gains[site].value)
    dice = {arm: mean_dice(result, arm) for arm in ("zero_shot", "local", "federated", "pooled")}
    oracle = {arm: result.metrics[arm]["mean"]["oracle_dice"].value for arm in ("zero_shot", "federated")}
    finish(
        {f"{arm}_dice": value for arm, value in dice.items()}
        | {f"oracle_{arm}_dice": value for arm, value in oracle.items()}
        | {
            "gain_over_zero_shot_dice": dice["federated"] - dice["zero_shot"],
            "worst_institution_gain_dice": gains[worst].value,
            "worst_institution": [worst, gains[worst].ci_low, gains[worst].ci_high],
            "gap_to_pooled_dice": dice["pooled"] - dice["federated"],
            "shared_values": shared,
            "bytes_saving": model / upload(result),
            "bytes_saving_16bit": model / upload(small),
            "federated_16bit_dice": mean_dice(small, "federated"),
            "exactness": exactness(specs),
            "test_patients": sum(result.patients[site]["test"] for site in training),
            "seconds": time.perf_counter() - began,
            "conditions": {**state, "selected_round": result.selected_round},
        }
    )
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
