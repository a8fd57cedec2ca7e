"""What hospitals exchange to adapt a transformer of 300 million values: bytes of messages, headers and all.

The study: ViT-L/16 (24 blocks, width 1024), all of it frozen but LoRA of rank 8 on q and v, of which the second factor
is trained and averaged (FFA-LoRA), in a ring of 16 bits, two sites, one step a round. `upload_bytes` and
`download_bytes` are of one site in one round, `evaluation_bytes` what a site gets to validate a model, `model_bytes`
all values in float32. Training is real and short: what is exchanged does not depend on how long. `--quick` takes 4
blocks.
"""

from __future__ import annotations

from typing import Any

from common import arguments, conditions, finish, table

SITES = ("A", "B")


def measured(depth: int) -> dict[str, float]:
    """The JSON's values."""
    from on_the_wire import counted
    from wardround.federation.exchange import EVALUATE, TRAIN

    study = {
        "name": "bill",
        "sites": {name: {} for name in SITES},
        "task": {"kind": "custom", "factory": "bill_task:make_task", "options": {"depth": depth}},
        "adapters": {"kind": "lora", "targets": ["blocks.*.[qv]"], "rank": 8, "factors": "second"},
        "local": {"steps": 1, "batch": 1, "lr": 1e-3},
        "schedule": {"rounds": 2, "release": "last"},
        "protection": {"ring_bits": 16},
    }
    engine, host = counted(study)
    values, upload = host.model_context.parameters, engine.largest(engine.up, TRAIN)
    model = sum(4 * p.info.size for p in values)
    roles = host.arm_spec("federated").policy.roles
    return {
        "upload_bytes": upload,
        "download_bytes": engine.largest(engine.down, TRAIN),
        "evaluation_bytes": engine.largest(engine.down, EVALUATE),
        "model_bytes": model,
        "ratio": upload / model,
        "shared_values": sum(p.info.size for p in values if roles[p.name] == "shared"),
    }


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    state: dict[str, Any] = conditions(quick=options.quick)
    values = measured(4 if options.quick else 24)
    table(["", "value"], [[key.replace("_", " "), value] for key, value in values.items()])
    finish({**values, "conditions": state})


if __name__ == "__main__":
    main()
