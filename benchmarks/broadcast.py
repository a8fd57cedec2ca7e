"""What a hospital downloads in a round where low-rank products are averaged exactly, as bytes of messages with headers.

The study: 4 blocks of ViT-L/16 (width 1024), frozen but LoRA of rank 4 on q and v, three sites, 12 rounds of one step.
Of `fedavg` (both factors averaged, which is not exact), `fedex_lora` and `flora`: `first`, `last` and `total` are the
bytes of the requests to train that one site gets in rounds 2 and 12, and in all 12. Training is real and short: what is
exchanged does not depend on how long. `--quick` takes one block.
"""

from __future__ import annotations

from typing import Any

from common import arguments, conditions, finish, table

SITES = ("A", "B", "C")
ROUNDS = 12
METHODS = ("fedavg", "fedex_lora", "flora")


def measured(kind: str, depth: int) -> list[int]:
    """Bytes to site A in each round, from the first."""
    from on_the_wire import counted
    from wardround.federation.exchange import TRAIN, PlainSum
    from wardround.federation.spooled import each_update

    study = {
        "name": "broadcast",
        "sites": {name: {} for name in SITES},
        "task": {"kind": "custom", "factory": "bill_task:make_task", "options": {"depth": depth}},
        "adapters": {"kind": "lora", "targets": ["blocks.*.[qv]"], "rank": 4},
        "method": {"kind": kind},
        "local": {"steps": 1, "batch": 1, "lr": 1e-3},
        "schedule": {"rounds": ROUNDS, "release": "last", "validate_every": 0},
    }
    engine, _ = counted(study, (lambda _: PlainSum) if kind == "fedavg" else each_update)
    return [engine.down[TRAIN, SITES[0], number] for number in range(1, ROUNDS + 1)]


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    state: dict[str, Any] = conditions(quick=options.quick)
    found = {kind: measured(kind, 1 if options.quick else 4) for kind in METHODS}
    rows = [[kind, f"{of[1]:,}", f"{of[-1]:,}", f"{sum(of):,}"] for kind, of in found.items()]
    table(["method", "round 2", f"round {ROUNDS}", "all rounds"], rows)
    values = {
        f"{kind}_{key}": value
        for kind, of in found.items()
        for key, value in (("first", of[1]), ("last", of[-1]), ("total", sum(of)))
    }
    finish({**values, "rounds": found, "conditions": state})


if __name__ == "__main__":
    main()
