"""A new user's two commands: how long `make test` and `make demo` take, and what they show.

The tests half is measured in a clean clone without real images (`first_run_tests.py`), the demo half for fixed seeds
(`first_run_demo.py`; the first of them alone with --quick).
"""

from __future__ import annotations

from common import arguments, conditions, finish, table
from first_run_demo import SEEDS, measure_demo
from first_run_tests import CORES, measure_tests


def main() -> None:
    """Measure both halves, the tests last: they take minutes."""
    options = arguments(__doc__ or "").parse_args()
    seeds = SEEDS[:1] if options.quick else SEEDS
    said = conditions(demo_seeds=list(seeds), test_cores=CORES)
    found: dict[str, float] = {**measure_demo(seeds), **measure_tests()}
    table(("figure", "value"), list(found.items()))
    finish({**found, "conditions": said})


if __name__ == "__main__":
    main()
