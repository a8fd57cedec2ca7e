"""What a coordinator gains from a layer that it folds something into, and how far a site's bound lets it move one.

A linear layer of 256 neurons with 784 inputs (made-up images of smooth spots, 28 x 28), LoRA of rank 8 on it, then a
ReLU and ten classes. The coordinator chooses the second factor so that each row of the first one's gradient is of one
neuron, one that few of its own images wake, and puts other weights in the layer's place. `leaked_sgd` and
`leaked_adam` are the shares of rows whose direction is that of one of the site's 8 images (|cosine| > 0.95 beside the
mean image) after one step, `moved` how far the weights are from the study's over their length, `look` what
`lint_against` finds. `reach_*` is the share of the weight's length that the bound allows in a round, for `scale` 1,
by steps and rate of Adam. `--quick` takes 5 batches for 40.
"""

from __future__ import annotations

from typing import Any

from common import arguments, conditions, finish, table

NEURONS, SIDE, RANK, BATCH, CLASSES = 256, 28, 8, 8, 10
SCHEDULES = ((5, 3e-4), (20, 1e-3))


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    import numpy as np
    import torch
    from torch.nn import functional

    from wardround.learning.methods.fedex_lora import FedExLoRA
    from wardround.learning.methods.flora import FLoRA
    from wardround.models.low_rank import folded_of, second_of
    from wardround.protection.drift import local_bound
    from wardround.protection.lint import lint_against
    from wardround.study.schema import Local

    state = conditions(quick=options.quick)
    random, inputs = np.random.default_rng(0), SIDE * SIDE
    down, across = np.mgrid[:SIDE, :SIDE] / SIDE

    def images(count: int) -> Any:
        found = np.zeros((count, SIDE, SIDE))
        for image in found:
            for _ in range(6):
                x, y, width, height = random.uniform((0.1, 0.1, 0.04, 0.2), (0.9, 0.9, 0.25, 1.0))
                image += height * np.exp(-((across - x) ** 2 + (down - y) ** 2) / (2 * width**2))
            image /= image.max()
        return found.reshape(count, inputs).astype(np.float32)

    def uniform(*shape: int) -> Any:
        return (random.uniform(-1, 1, shape) / np.sqrt(shape[-1])).astype(np.float32)

    base = {
        "0.weight": uniform(NEURONS, inputs),
        "0.bias": uniform(1, NEURONS)[0],
        "2.weight": uniform(CLASSES, NEURONS),
    }
    length = float(np.linalg.norm(base["0.weight"]))
    mean = images(256).mean(axis=0)

    def beside_mean(rows: Any) -> Any:
        rows = rows - (rows @ mean / (mean @ mean))[:, None] * mean
        return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12)

    def leaked(weight: Any, adam: bool) -> float:
        """The share of rows that show an image, over batches."""
        shares = []
        for _ in range(5 if options.quick else 40):
            wakes = ((images(64) @ weight.T + base["0.bias"]) > 0).mean(axis=0)
            chosen = torch.from_numpy(np.argsort(np.abs(wakes - 1 / BATCH))[:RANK].copy())
            truth = images(BATCH)
            first = torch.zeros(RANK, inputs, requires_grad=True)
            second = torch.zeros(NEURONS, RANK)
            second[chosen, torch.arange(RANK)] = 1e-3
            hidden = torch.from_numpy(truth) @ (torch.from_numpy(weight) + second @ first).T
            scores = torch.relu(hidden + torch.from_numpy(base["0.bias"])) @ torch.from_numpy(base["2.weight"]).T
            functional.cross_entropy(scores, torch.from_numpy(random.integers(0, CLASSES, BATCH))).backward()
            assert first.grad is not None
            sent = first.grad.numpy()
            # The first step of Adam is a sign.
            rows = np.sign(sent) if adam else sent
            shares.append(float((np.abs(beside_mean(rows) @ beside_mean(truth).T).max(axis=1) > 0.95).mean()))
        return float(np.mean(shares))

    # Half of each row weighs a little more, and less than zero (Boenisch et al., EuroS&P 2023).
    half = np.argsort(random.random((NEURONS, inputs)), axis=1) < inputs // 2
    trap = np.abs(random.standard_normal((NEURONS, inputs))) * np.where(half, -1.06, 1.0)
    whole = np.linalg.qr(random.standard_normal((inputs, NEURONS)))[0].T
    layers = {"as it is": base["0.weight"], "trap": trap, "orthogonal": whole}
    # What all rows lose alike is a bias for images that resemble one another.
    layers |= {f"shifted {share:.0%}": _shifted(base["0.weight"], mean, share * length) for share in (0.02, 0.1, 0.4)}
    rows, values = [], {}
    for name, given in layers.items():
        weight = (given / np.linalg.norm(given) * length if name in ("trap", "orthogonal") else given).astype(
            np.float32
        )
        found = {
            "moved": float(np.linalg.norm(weight - base["0.weight"]) / length),
            "look": [finding.check for finding in lint_against({**base, "0.weight": weight}, base)],
            "leaked_sgd": leaked(weight, adam=False),
            "leaked_adam": leaked(weight, adam=True),
        }
        values[name] = found
        seen = ", ".join(found["look"]) or "nothing"
        rows.append([name, f"{found['moved']:.0%}", seen, f"{found['leaked_sgd']:.0%}", f"{found['leaked_adam']:.0%}"])
    table(["layer", "moved", "look finds", "leaked, SGD", "leaked, Adam"], rows)
    reach = {}
    for steps, rate in SCHEDULES:
        bound, name = local_bound(Local(steps=steps, lr=rate, optimizer="adam")), "0.lora.a.weight"
        own = {name: bound.of(RANK * inputs, 0.0), second_of(name): bound.of(RANK * NEURONS, 0.0)}
        for kind, method in (("fedex_lora", FedExLoRA("equal")), ("flora", FLoRA("equal"))):
            most = 1.5 * method.other_moves({name: RANK}, own.__getitem__)[folded_of(name)]
            reach[f"reach_{kind}_{steps}_{rate:g}"] = most / length
    table(["bound of a round", "of the weight's length"], [[key, f"{value:.2%}"] for key, value in reach.items()])
    finish({"layers": values, **reach, "conditions": state})


def _shifted(weight: Any, mean: Any, far: float) -> Any:
    return weight - mean * far / (len(weight) ** 0.5 * (mean @ mean) ** 0.5)


if __name__ == "__main__":
    main()
