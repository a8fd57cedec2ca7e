"""A coordinator alone in its process, for which large updates arrive as files; and how much memory that takes.

python benchmarks/arrivals.py make FOLDER SITES VALUES       writes the one update that all sites send
python benchmarks/arrivals.py peak FOLDER SITES VALUES       one round: peak memory, seconds
python benchmarks/arrivals.py average FOLDER SITES VALUES    the plain average of as many float32 files, for comparison
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = 20


@dataclass(frozen=True)
class Federation:
    """`sites` that send updates of a model of `values`, in twenty layers, as a large network has."""

    sites: int
    values: int

    @property
    def layer(self) -> int:
        """Values of a layer."""
        return self.values // LAYERS

    @property
    def layout(self) -> Any:
        """Of an update."""
        from wardround.plan.sums import round_metrics
        from wardround.wire.tensors import TensorInfo
        from wardround.wire.update import Group, Layout

        tensors = tuple(TensorInfo(f"layer{n}", "float32", (self.layer,)) for n in range(LAYERS))
        return Layout((Group("model", tensors),), round_metrics(()), 64, 1.0)


def measured(mode: str, folder: Path, federation: Federation) -> dict[str, float]:
    """What a process of its own says."""
    command = [sys.executable, __file__, mode, str(folder), str(federation.sites), str(federation.values)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def make(folder: Path, federation: Federation) -> dict[str, float]:
    """Write the update, and the float32 values that it is of."""
    from wardround.wire.message import write_body
    from wardround.wire.random import public_generator
    from wardround.wire.update import encode

    layout = federation.layout
    random = np.random.default_rng(0)
    tensors = {i.name: random.standard_normal(i.size, dtype=np.float32) * 1e-3 for i in layout.groups[0].tensors}
    with (folder / "plain").open("wb") as file:
        for tensor in tensors.values():
            file.write(tensor.data)
    scales = {f"model/{name}": 0.05 for name in tensors}
    chunks = encode(layout, scales, {"model": 1.0}, {"model": tensors}, {"loss": 1.0}, public_generator(0, "update"))
    body, digest = write_body(folder / "update", chunks)
    (folder / "update.json").write_text(json.dumps({"nbytes": body.nbytes, "sha256": digest}), encoding="utf-8")
    return {}


def average(folder: Path, federation: Federation) -> dict[str, float]:
    """Read every site's float32 values and average them, a layer at a time: no hash, no journal, nothing verified."""
    began = time.perf_counter()
    with (folder / "mean").open("wb") as file:
        for layer in range(LAYERS):
            total = np.zeros(federation.layer, np.float32)
            for _ in range(federation.sites):
                total += np.fromfile(
                    folder / "plain", np.float32, federation.layer, offset=4 * layer * federation.layer
                )
            file.write((total / federation.sites).data)
    return {"seconds": time.perf_counter() - began}


def peak(folder: Path, federation: Federation) -> dict[str, float]:
    """One round of the coordinator, alone in this process."""
    from wardround.federation.coordinator import Coordinator, Plan
    from wardround.federation.exchange import UPDATE
    from wardround.federation.logs import HEAD, shown
    from wardround.learning.methods.method import Method
    from wardround.storage.hash_log import START
    from wardround.storage.journal import Journal
    from wardround.wire.message import FileBody, Message

    layout = federation.layout
    known = json.loads((folder / "update.json").read_text(encoding="utf-8"))
    after_import = _peak_rss()

    class Arrivals:
        """Every site's update arrives as a file."""

        def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
            for message in messages:
                reply = message.reply(UPDATE, meta={"layout": layout.sha256})
                header = replace(reply.header, body_nbytes=known["nbytes"], body_sha256=known["sha256"])
                header = replace(header, meta={**header.meta, HEAD: shown(START, header)})
                yield Message(header, FileBody(folder / "update", known["nbytes"]))

        def close(self) -> None:
            pass

    sites = tuple(f"S{n}" for n in range(federation.sites))
    plan = Plan("federated", "study", sites, 1, 1, layout, layout, 0.05, validate_every=0, release="last")
    coordinator = Coordinator(plan, Method("equal"), Arrivals(), Journal(folder / "coordinator", "study"))

    def initial() -> tuple[dict[str, Any], dict[str, Any]]:
        zeros = np.zeros(federation.layer, np.float32)
        return {f"model/layer{n}": zeros for n in range(LAYERS)}, {}

    state = coordinator.start(initial)
    began = time.perf_counter()
    for _ in coordinator.rounds(state):
        pass
    seconds = time.perf_counter() - began
    peak = _peak_rss()
    if "torch" in sys.modules:
        raise SystemExit("the coordinator imported torch")
    return {"ratio": (peak - after_import) / known["nbytes"], "peak_mb": peak / 1e6, "seconds": seconds}


def _peak_rss() -> int:
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main() -> None:
    mode, folder, sites, values = sys.argv[1:]
    found = {"make": make, "peak": peak, "average": average}[mode](Path(folder), Federation(int(sites), int(values)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
