"""A full model of 1 GB at 16 sites: what a round costs the coordinator, in a process of its own.

Updates arrive as files of 1 GB (float32 values in a ring of 32 bits), all alike; nothing trains. The coordinator
verifies each, adds it a chunk at a time, applies the mean a tensor at a time, and commits the next model.
`plain_average_seconds` is what the bare average of 16 float32 files takes on the same disk, which hashes, verifies and
keeps nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from arrivals import Federation, measured
from common import arguments, conditions, finish, table


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--folder", type=Path, help="where 4 GB of files fit (default: a temporary folder)")
    options = parser.parse_args()
    federation = Federation(sites=4 if options.quick else 16, values=250_000_000)
    state = conditions(sites=federation.sites, megabytes=1000, quick=options.quick)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measured("make", Path(name), federation)
        plain = measured("average", Path(name), federation)
        round_ = measured("peak", Path(name), federation)
    values = {
        "coordinator_peak_gb": round_["peak_mb"] / 1000,
        "seconds_per_round": round_["seconds"],
        "plain_average_seconds": plain["seconds"],
    }
    table(["", "value"], [[key.replace("_", " "), value] for key, value in values.items()])
    finish({**values, "conditions": state})


if __name__ == "__main__":
    main()
