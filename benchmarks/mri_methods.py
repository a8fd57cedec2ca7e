"""Which method helps MRI reconstruction at unlike hospitals, when all have the same network, steps and examples?

Low-grade gliomas of four TCGA institutions (FLAIR and post-contrast T1), simulated acquisition of the real images with
8 coils: random lines at CS and DU, equispaced at FG and HT, a quarter of the lines in the set `4x`, an eighth in `8x`.
EZ, one patient, does not train. Every method has two settings, of which validation patients at 4x choose with one seed
(FedAvg's are learning rates, and the others begin at the one that it chose); then three seeds are run at 4x and 8x.

`mean` is PSNR in dB over training sites (peak: the volume's maximum), `worst_site` the lowest of them, `unseen` is EZ;
bytes of messages and CPU seconds are of a run. Gains are against FedAvg of the same seed. Every finished run is a file
in --out, and is not repeated: the same command goes on where it was stopped.

FedBN has nothing to keep in a network without norm layers; `FedPer` keeps the last convolution of the denoiser, or only
what weighs data against it. FedPR trains prompts of a pretrained network and is another question: adapt_mri.py. FedGIMP
trains a generative prior, which no other method has: it would have to be trained for days, and reconstructs a slice by
hundreds of steps of its own. It is not compared.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from common import add_processes, conditions, finish, need_images
from method_runs import (
    RATE,
    SEEDS,
    Method,
    Runs,
    Values,
    chosen_methods,
    method_arguments,
    of_seeds,
    of_sets,
    out_folder,
    overall,
    tuned,
)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TRAINING, UNSEEN = ("CS", "DU", "FG", "HT"), "EZ"
# The set, the acceleration, and the share of calibration lines: as fastMRI has them.
SETS = {"4x": (4, 0.08), "8x": (8, 0.04)}
TUNED_ON = "4x"
ROUNDS, STEPS, BATCH, RATE_OF_ALL = 24, 10, 2, 0.002
EQUAL = {"weights": "equal"}
LAST = "denoiser.stack.8.*"
METHODS = {
    "FedAvg": Method("fedavg", ({RATE: 1.0}, {RATE: 0.5}), EQUAL),
    "FedProx": Method("fedprox", ({"mu": 0.001}, {"mu": 0.01}), EQUAL),
    "SCAFFOLD": Method("scaffold", ({RATE: 1.0}, {RATE: 0.5})),
    "FedPer": Method("fedper", ({"head": ["log_weight"]}, {"head": ["log_weight", LAST]}), {**EQUAL, "unseen": "mean"}),
    "FedMRI": Method("fedmri", ({"contrast": 0.0}, {"contrast": 0.1}), {**EQUAL, "unseen": "mean"}),
    "ModFed": Method("modfed", ({RATE: 1.0}, {RATE: 0.5}), {"unseen": "mean"}),
    "FL-MRCM": Method(
        "fl_mrcm", ({"adversarial": 0.0003}, {"adversarial": 0.003}), {**EQUAL, "target": "DU", "patients": BATCH}
    ),
    "fair weights": Method("fair_weights", ({"step": 0.05}, {"step": 0.2})),
}


def study(which: str, section: Values, rate: float, seed: int, *, quick: bool) -> Values:
    """The study of one run; a quick one is as large, and ends after two rounds of two steps."""
    acceleration, calibration = SETS[which]

    def scanner(family: str) -> Values:
        mask = {"family": family, "acceleration": acceleration, "calibration": calibration}
        return {"coils": 8, "noise": 0.005, "mask": mask}

    families = dict(zip(TRAINING, ("random", "random", "equispaced", "equispaced"), strict=True))
    return {
        "name": f"mri-methods-{which}",
        "seed": seed,
        "sites": {**{site: {"acquisition": scanner(family)} for site, family in families.items()},
                  UNSEEN: {"role": "unseen"}},
        "acquisition": scanner("random"),
        "task": {
            "kind": "reconstruction", "contrasts": ["flair", "t1ce"], "size": [96, 96], "loss": {"kind": "l1"},
            "split": {"validation": 0.15, "test": 0.2},
            "evaluation": {"baselines": [], "slices": {"per_patient": 1 if quick else 4},
                           "tuning_slices": 1 if quick else 2},
        },
        "model": {"kind": "modl", "preset": "small", "image": "complex", "unrolls": 4},
        "method": section,
        "local": {
            "steps": 2 if quick else STEPS, "batch": BATCH, "optimizer": "adam", "lr": RATE_OF_ALL * rate,
            "schedule": "cosine", "warmup": 1 if quick else 20, "clip_norm": 1.0, "optimizer_state": "keep",
        },
        "schedule": {"rounds": 2 if quick else ROUNDS, "validate_every": 1 if quick else ROUNDS // 4},
    }  # fmt: skip


def main() -> None:
    parser = method_arguments(__doc__ or "", list(SETS), list(METHODS))
    add_processes(parser)
    options = parser.parse_args()
    need_images("lgg")
    from wardround.study.sites import load_sites

    names = chosen_methods(options.methods, METHODS)
    sets = [name for name in SETS if options.data is None or name in options.data.split(",")]
    out, quick = out_folder(options, "mri-methods-"), bool(options.quick)
    ends, sites = time.monotonic() + 60.0 * options.minutes, load_sites(EXAMPLES / "lgg-sites.yaml")
    state = conditions(size="96x96", seeds=SEEDS, rounds=ROUNDS, steps=STEPS, batch=BATCH, quick=quick)

    def run_of(which: str) -> Runs:
        folder = out / ("quick" if quick else "full") / which
        return Runs(folder, sites, TRAINING, UNSEEN, ends, processes=options.processes)

    def run(which: str, name: str, setting: Values, rate: float, seed: int) -> Values:
        rate *= setting.get(RATE, 1.0)
        written = study(which, METHODS[name].section(setting), rate, seed, quick=quick)
        return run_of(which).finished(name, written, {"set": which, "setting": setting, "rate": rate, "seed": seed})

    def of_set(which: str) -> Values:
        settings = {name: METHODS[name].settings for name in names}
        chosen = list(tuned(lambda *run_: run(TUNED_ON, *run_), settings, quick=quick))
        return of_seeds(lambda *run_: run(which, *run_), chosen, RATE_OF_ALL, quick=quick)

    found, complete = of_sets(sets, of_set)
    finish({**(overall(found) if found else {}), "data": found, "complete": complete, "conditions": state})
    if options.out is None:
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
