"""What the benchmarks of outlines share: a task, and tables of a run's arms and of the sites that were left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import wardround
from common import table


def small_tumours(test: float) -> dict[str, Any]:
    """The task of a small study of TCGA-LGG: 64 x 64, FLAIR and post-contrast T1; `test` is the share that tests."""
    return {
        "kind": "segmentation",
        "images": ["flair", "t1ce"],
        "mask": "seg",
        "channels": 2,
        "structures": {"tumour": "any"},
        "resize": [64, 64],
        "patch": [64, 64],
        "distances": "pixels",
        "split": {"validation": 0.15, "test": test},
    }


def print_arms(
    result: wardround.Result, columns: Sequence[str], metrics: Sequence[str], what: str, beside: Sequence[str] = ()
) -> None:
    """A table for each metric: a row an arm, first those `beside`; a column a site or their mean."""
    print(f"{what}:", {site: result.patients[site] for site in columns if site != "mean"})
    for metric in metrics:
        rows = []
        for arm in (*beside, "local", "federated", "pooled"):
            cells = [result.metrics[arm].get(site) for site in columns]
            rows.append([arm, *(cell[metric].value if cell and cell[metric] else "-" for cell in cells)])
        print(f"\n{metric} on test {what}")
        table(["", *columns], rows)


def mean_dice(result: wardround.Result, arm: str, site: str = "mean") -> float:
    """An arm's Dice at a site, or the mean over training sites."""
    return float(result.metrics[arm][site]["dice"].value)


def left_out_dice(result: wardround.Result) -> tuple[dict[str, float], dict[str, float]]:
    """By site that was left out, printed too: Dice there without it, and of the best other site's own model."""
    unseen = {site: entry.federated["dice"].value for site, entry in result.left_out.items()}
    best = {site: entry.best_local["dice"].value for site, entry in result.left_out.items()}
    if unseen:
        print("\nleft out: Dice of the model trained without it, and of the best other site's own model")
        table(["", *unseen], [["trained without it", *unseen.values()], ["best local", *best.values()]])
    return unseen, best
