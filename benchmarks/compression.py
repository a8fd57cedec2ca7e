"""How many bits does an update need? Bytes, error of the mean and image quality of each kind of compression.

Trains a reconstruction network on real MRI of four institutions (the LGG study, where WARDROUND_DATA is set; else the
phantoms of `wardround demo --contrasts`), once for each kind. The error of the mean is measured apart, on the very same
changes for all kinds: sites train by hand, their changes go through every codec and ring and back, with the scales that
a coordinator would use. With error feedback a round's error is large by design; what counts there is the error of all
rounds together.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, conditions, finish, table
from wardround.results.files import read_rounds

ROOT = Path(__file__).resolve().parent.parent
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "32": (32, {"kind": "none"}),
    "24": (24, {"kind": "none"}),
    "16": (16, {"kind": "none"}),
    "16 rotation": (16, {"kind": "rotation"}),
    "subspace 0.1": (32, {"kind": "subspace", "ratio": 0.1}),
    "top_k 0.01": (32, {"kind": "top_k", "ratio": 0.01}),
}
COMMON = (
    "task.evaluation.baselines=[]",
    "task.evaluation.leave_one_out=false",
    "schedule.validate_every=0",
    "schedule.release=last",
)
QUICK = ("schedule.rounds=6", "local.steps=5", "local.warmup=5", "task.evaluation.slices.per_patient=1")
VALUE_BITS = (2, 4, 8, 16, 64, 256)


def main() -> None:
    parser = arguments(__doc__ or "")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="compression-"))
    overrides = [*COMMON, *(QUICK if options.quick else ())]
    state = conditions(size="128x128", seed=2026, repeats=1, quick=options.quick)

    import wardround
    from wardround.wire.ring import value_bits

    try:
        study, sites = _study(folder, overrides)
        plain, began = study.model_dump(mode="json"), time.process_time()
        with_kind = {
            name: wardround.load_study(
                plain, [f"protection.ring_bits={bits}", f"protection.compression={json.dumps(kind)}"]
            )
            for name, (bits, kind) in KINDS.items()
        }
        measured: dict[str, dict[str, float]] = _errors(with_kind, sites, folder / "errors")
        for name, kind in with_kind.items():
            result = wardround.run(kind, sites, folder / name.replace(" ", "-"), engine="local")
            lines = read_rounds(result.out)
            measured[name] |= {
                "bytes_up_per_round": sum(line.bytes_up for line in lines) / len(lines),
                "saturated_share": max(line.saturated_share for line in lines),
                "psnr": result.metric("federated"),
            }
            measured[name]["ratio_to_float32"] = measured[name]["bytes_up_per_round"] / measured[name].pop("float32")
        cpu = time.process_time() - began
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    columns = ("bytes_up_per_round", "ratio_to_float32", "relative_l2_error_of_mean", "error_of_all_rounds", "psnr")
    table(["", *columns], [[name, *(f"{row[c]:.4g}" for c in columns)] for name, row in measured.items()])
    print("\nbits left for a value, by ring and sites (protection.max_sites)")
    bits = {n: [value_bits(ring, n) for ring in (16, 24, 32)] for n in VALUE_BITS}
    table(["sites", "16", "24", "32"], [[str(n), *row] for n, row in bits.items()])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    one = next(iter(with_kind.values()))
    finish(
        {
            "table": measured,
            "value_bits": {str(n): row[0] for n, row in bits.items()},
            "conditions": {
                **state,
                "study": one.name,
                "sites": len(one.training_sites),
                "rounds": one.schedule.rounds,
                "steps": one.local.steps,
                "max_sites": one.protection.max_sites,
                "value_bits_ring": 16,
                "cpu_seconds": round(cpu, 1),
                "peak_mb": round(peak),
            },
        }
    )


def _study(folder: Path, overrides: list[str]) -> tuple[Any, Any]:
    """The study and where its data lie."""
    from wardround.runs.demo import CONTRASTS, demo_study
    from wardround.study.load import load_study
    from wardround.study.sites import load_sites

    if "WARDROUND_DATA" not in os.environ:
        return demo_study(folder / "data", overrides, demo=CONTRASTS)
    # Long rounds: what a round loses counts more in them.
    long = ["method.weights=samples", "local.steps=38", "schedule.rounds=40", *overrides]
    return load_study(ROOT / "examples" / "lgg-mri.yaml", long), load_sites(ROOT / "examples" / "lgg-sites.yaml")


@dataclass
class Channel:
    """One kind of compression with what its sites and its coordinator remember."""

    codec: Any
    layout: Any
    scales: dict[str, float]
    waiting: dict[str, dict[str, Any]] = field(default_factory=dict)
    sum: dict[str, Any] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)

    def carry(self, number: int, told: dict[str, Any]) -> dict[str, Any]:
        """The mean change of every tensor, as this channel says it."""
        from wardround.wire.random import public_generator
        from wardround.wire.ring import ExactSum
        from wardround.wire.scales import next_scales
        from wardround.wire.update import Aggregate, encode, limits

        sent, form = self.codec.sent(self.layout), self.codec.form
        total = ExactSum(sent.segments)
        for site, trained in told.items():
            largest = limits(sent, self.scales, trained.weights)
            memory = self.waiting.get(site, {})
            changes, self.waiting[site] = self.codec.compress(number, trained.changes, memory, largest)
            random = public_generator(1, site, number)
            offset = 0
            for chunk in encode(sent, self.scales, trained.weights, changes, {}, random):
                total.add(chunk, offset)
                offset += len(chunk)
        # What top-k leaves out is zero before it is added up: the sparse form changes the bytes, not the sum.
        assert form.nbytes(sent) <= self.layout.nbytes
        aggregate = Aggregate(sent, total, self.scales)
        self.scales, _ = next_scales(aggregate, self.codec.count, first=number == 1)
        restored = self.codec.restore(number, self.layout, aggregate)
        return {
            f"{group.name}/{info.name}": restored.mean(group.name, info.name)
            for group in self.layout.groups
            for info in group.tensors
        }


def _errors(studies: dict[str, Any], sites: Any, folder: Path) -> dict[str, dict[str, float]]:
    """The relative L2 error of the mean of each kind: the median over rounds, and of all rounds added up."""
    from wardround.runs.machine import Machine
    from wardround.storage.store import Memory
    from wardround.wire.message import Header
    from wardround.wire.update import scale_key

    channels: dict[str, Channel] = {}
    for name, study in studies.items():
        arm_spec = Machine(study, sites, folder, ()).arm_spec("federated")
        scales = {
            scale_key(group.name, info.name): study.protection.initial_scale
            for group in arm_spec.codec.sent(arm_spec.layout).groups
            for info in group.tensors
        }
        channels[name] = Channel(arm_spec.codec, arm_spec.layout, scales)
    study = next(iter(studies.values()))
    host = Machine(study, sites, folder, ())
    arm_spec = host.arm_spec("federated")
    public, _ = arm_spec.method.initial(arm_spec.layout.groups, host.model_context.shared_initial(arm_spec.policy))
    learners = {s: host.find(Header("train", arm_spec.identity, s)).learner for s in study.training_sites}
    memories: dict[str, Any] = {}
    overall: dict[str, Any] = {}
    for number in range(1, study.schedule.rounds + 1):
        told = {}
        for site, learner in learners.items():
            memory = Memory(memories.get(site, {}), {})
            learner.load(public, memory)
            told[site] = learner.train(number, public, memory)
            memories[site] = told[site].memory
        exact = _mean(told)
        overall = {name: overall.get(name, 0.0) + change for name, change in exact.items()}
        for channel in channels.values():
            found = channel.carry(number, told)
            channel.sum = {name: channel.sum.get(name, 0.0) + change for name, change in found.items()}
            channel.errors.append(_relative(found, exact))
        public = {name: np.asarray(tensor + exact[name], dtype=tensor.dtype) for name, tensor in public.items()}
    plain = sum(info.size for group in arm_spec.layout.groups for info in group.tensors) * 4
    return {
        name: {
            "relative_l2_error_of_mean": float(np.median(channel.errors)),
            "error_of_all_rounds": _relative(channel.sum, overall),
            "float32": float(plain * len(learners)),
        }
        for name, channel in channels.items()
    }


def _mean(told: dict[str, Any]) -> dict[str, Any]:
    """The weighted mean of the sites' changes in double precision."""
    first = next(iter(told.values()))
    return {
        f"{group}/{name}": sum(t.weights[group] * t.changes[group][name].astype(np.float64) for t in told.values())
        / sum(t.weights[group] for t in told.values())
        for group, tensors in first.changes.items()
        for name in tensors
    }


def _relative(found: dict[str, Any], exact: dict[str, Any]) -> float:
    """|found - exact| / |exact| over all tensors together."""
    off = sum(float(np.sum((found[name] - exact[name]) ** 2)) for name in exact)
    return float(np.sqrt(off / sum(float(np.sum(change**2)) for change in exact.values())))


if __name__ == "__main__":
    main()
