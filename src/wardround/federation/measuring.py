"""The names by which a site is asked to measure, and those of what it measures."""

from __future__ import annotations

# The evaluators: of a released model, which the request carries; of the model that the site trained by itself; and of
# what learns nothing, which is also the key of its name.
RELEASED, OWN, BASELINE = "released", "own", "baseline"
# The row that every other row of a study is compared with.
REFERENCE = "federated"
