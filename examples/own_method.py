"""A federated method of your own, tried on the task of `own_task.py` beside plain averaging.

    python examples/own_method.py

A method has hooks at the site (the loss of a step, gradients, what is sent) and at the coordinator (what becomes of the
mean of all sites' changes). The base class is FedAvg; a hook that you leave out does what FedAvg does.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import own_task
from torch import Tensor

import wardround
from wardround.learning.methods import LocalRound, Method

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Careful(Method):
    """Short steps at the site, and a longer one at the coordinator.

    The fields are the method's settings: `options` of the study's `method` section sets them.
    """

    limit: float = 1.0  # the largest absolute value of a gradient
    pull: float = 0.0  # how strongly a site is pulled back to where the round began
    server_rate: float = 1.0  # the factor of the mean change

    # At the site. `local` shows one round: the model's shared tensors, their values when the round began (`anchor`),
    # and `memory`, where a method may leave tensors for the site's next round. Tensors are on the site's device.

    def objective(self, local: LocalRound, loss: Tensor) -> Tensor:
        """The loss of a step: that of the task, and half the squared distance from the start of the round."""
        distance = [(tensor - local.anchor[name]).square().sum() for name, tensor in local.trainable().items()]
        return loss + 0.5 * self.pull * sum(distance)

    def gradients(self, local: LocalRound) -> None:
        """After the backward pass: change gradients in place."""
        for tensor in local.trainable().values():
            if tensor.grad is not None:
                tensor.grad.clamp_(-self.limit, self.limit)

    # At the coordinator, which sees the sum of the sites and none of them: this works under `protection.secure`, too.

    def server_step(
        self, name: str, mean: Floats, private: Mapping[str, Floats], keep: Callable[[str, Floats], None]
    ) -> Floats:
        """What is added to the tensor `name` of the global model; `private` and `keep` are a memory between rounds."""
        return self.server_rate * mean


def main(out: Path) -> dict[str, wardround.Result]:
    """Train the same study with FedAvg and with the method above; the results by name."""
    options = {"limit": 0.5, "pull": 0.1, "server_rate": 1.5}
    own = {"kind": "custom", "factory": "own_method:Careful", "options": options}
    methods = {"FedAvg": {"kind": "fedavg"}, "Careful": own}
    return {name: own_task.main(out / name, method=method) for name, method in methods.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name, result in main(Path(temporary)).items():
            print(f"{name:8} error {result.metric('federated', 'mean', 'error'):.3f}, mean over sites")
