"""What hospitals exchange to adapt a transformer of 300 million values: bytes of messages, headers and all.

The study: ViT-L/16 (24 blocks, width 1024), all of it frozen but LoRA of rank 8 on q and v, of which the second factor
is trained and averaged (FFA-LoRA), in a ring of 16 bits, two sites, one step a round. `upload_bytes` and
`download_bytes` are of one site in one round, `evaluation_bytes` what a site gets to validate a model, `model_bytes`
all values in float32. Training is real and short: what is exchanged does not depend on how long. `--quick` takes 4
blocks.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import arguments, conditions, finish, table

SITES = ("A", "B")


def measured(depth: int) -> dict[str, float]:
    """The JSON's values."""
    from wardround.engines.local import LocalEngine
    from wardround.federation.coordinator import Coordinator
    from wardround.federation.exchange import EVALUATE, TRAIN, UPDATE
    from wardround.runs.machine import Machine
    from wardround.storage.journal import Journal
    from wardround.study.schema import Study
    from wardround.study.sites import SiteData, SitesFile
    from wardround.wire.message import Message

    study = Study.model_validate(
        {
            "name": "bill",
            "sites": {name: {} for name in SITES},
            "task": {"kind": "custom", "factory": "bill_task:make_task", "options": {"depth": depth}},
            "adapters": {"kind": "lora", "targets": ["blocks.*.[qv]"], "rank": 8, "factors": "second"},
            "local": {"steps": 1, "batch": 1, "lr": 1e-3},
            "schedule": {"rounds": 2, "release": "last"},
            "protection": {"ring_bits": 16},
        }
    )

    class Counting:
        """Bytes by the kind of request, down and up."""

        def __init__(self, engine: LocalEngine) -> None:
            self._engine = engine
            self.down: dict[str, list[int]] = defaultdict(list)
            self.up: dict[str, list[int]] = defaultdict(list)

        def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
            for message in messages:
                self.down[message.header.kind].append(message.nbytes)
                for reply in self._engine.exchange([message]):
                    if reply.header.kind != UPDATE:
                        raise SystemExit(f"site {reply.header.site}: {reply.header.meta.get('reason')}")
                    self.up[message.header.kind].append(reply.nbytes)
                    yield reply

        def close(self) -> None:
            self._engine.close()

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for name in SITES:
            (out / name).mkdir()
        sites = SitesFile(sites={name: SiteData(data=out / name) for name in SITES}).with_code()
        host = Machine(study, sites, out / "run", ())
        engine = Counting(LocalEngine(host.find))
        spec = host.arm_spec("federated")
        coordinator = Coordinator(host.plan("federated"), spec.method, engine, Journal(out / "arm", spec.identity))
        values = host.model_context.parameters
        state = coordinator.start(lambda: host.initial(spec))
        for _ in coordinator.rounds(state):
            pass
        engine.close()
    model = sum(4 * p.info.size for p in values)
    return {
        "upload_bytes": max(engine.up[TRAIN]),
        "download_bytes": max(engine.down[TRAIN]),
        "evaluation_bytes": max(engine.down[EVALUATE]),
        "model_bytes": model,
        "ratio": max(engine.up[TRAIN]) / model,
        "shared_values": sum(p.info.size for p in values if spec.policy.roles[p.name] == "shared"),
    }


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    state: dict[str, Any] = conditions(quick=options.quick)
    values = measured(4 if options.quick else 24)
    table(["", "value"], [[key.replace("_", " "), value] for key, value in values.items()])
    finish({**values, "conditions": state})


if __name__ == "__main__":
    main()
