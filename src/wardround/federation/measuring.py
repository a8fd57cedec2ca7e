"""The names by which a site is asked to measure, and those of what it measures."""

from __future__ import annotations

from wardround.study.update import PARENT

# The evaluators: of a released model, which the request carries; of the model that the site trained by itself; of
# what learns nothing, which is also the key of its name; and of the model that the site fine-tuned from the released
# one, which is also the name of its row.
RELEASED, OWN, BASELINE, FINETUNED = "released", "own", "baseline", "finetuned"
# And the evaluator of the release that the study continues, which every site has: no request carries it. Its row has
# the same name (`study.update`).
CONTINUED = PARENT
# The row that every other row of a study is compared with.
REFERENCE = "federated"
