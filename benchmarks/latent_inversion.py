"""FL-MRCM's side channel, attacked: how much of a patient's image can be found from what the target sends?

An attacker who reads the target's latents knows the network (as the coordinator does, but for the target's last steps)
and, here, more than it would: each patient's coils and mask. It looks for images whose latents are those that were
sent, by Adam through network and scanner from the mean image of other patients, with a little total variation. Told is
the PSNR of what it finds for the patient whom it finds best, against that of the start: what is known without any
latent; and, as a control, for the same patients that of what it finds from the latents of as many others of the same
institution. What these give as well is not of the patient but of the institution, or smoothness; what counts is the
difference. `places` is what the paper's method would send of one patient; `patient` is averaged over places;
`patients` is what Wardround sends, the mean over several as well.

Real images of two institutions (LGG, FLAIR, 32 x 32, which is easier to attack than larger ones), simulated scans, and
MoDL.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, conditions, cpu_seconds, finish, need_images, table

SIZE, PATIENTS, STEPS, SEED = 32, (2, 4), 200, 7


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    need_images("lgg")
    state = conditions(size=f"{SIZE}x{SIZE}", steps=STEPS, seed=SEED, quick=options.quick)
    import torch

    torch.set_num_threads(1)
    began = cpu_seconds()
    (target, decoys), others = images_of("HT", 8).chunk(2), images_of("CS", 8)
    start = others.mean(0)
    networks = trained(others, rounds=2 if options.quick else 4)
    cases: list[tuple[str, int, int]] = [("places", 1, 1), ("patient", 1, 1), ("patient", 1, len(networks))]
    cases += [("patients", count, rounds) for count in PATIENTS for rounds in (1, len(networks))]
    rows, told = [], {}
    for kind, count, rounds in cases:
        found = attacked(networks[-rounds:], target[:count], start, pooled=kind != "places")
        control = attacked(networks[-rounds:], decoys[:count], start, pooled=kind != "places")
        before, after = best(start.expand(count, -1, -1), target[:count]), best(found, target[:count])
        of_others = best(control, target[:count])
        rows.append([kind, count, rounds, before, of_others, after, after - of_others])
        told[f"{kind}_{count}_rounds_{rounds}_gain_db"] = after - of_others
    table(["sent", "patients", "rounds", "start", "control", "attack", "gain (dB)"], rows)
    finish({**told, "cpu_seconds": cpu_seconds() - began, "conditions": state})


def images_of(site: str, count: int) -> Any:
    """The middle FLAIR slice of some patients: (count, SIZE, SIZE), 1 being its maximum."""
    import os

    import nibabel as nib
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    found = []
    for folder in sorted((Path(os.environ["WARDROUND_DATA"]) / "lgg" / site).iterdir())[:count]:
        volume = np.asarray(nib.load(folder / "flair.nii.gz").dataobj, np.float32)  # type: ignore[attr-defined]
        image = torch.from_numpy(volume[:, :, volume.shape[2] // 2].copy())
        side = max(image.shape)
        whole = torch.zeros(side, side)
        whole[: image.shape[0], : image.shape[1]] = image
        small = adaptive_avg_pool2d(whole[None, None], SIZE)[0, 0]
        found.append(small / small.max())
    return torch.stack(found)


def scanned(images: Any, first: int) -> tuple[Any, Any]:
    """The operators of images' scans, one batch, and what they measure without noise."""
    import torch

    from wardround.imaging.acquisition.mri.operator import CartesianMRI
    from wardround.imaging.acquisition.mri.simulate import simulate
    from wardround.study import MRIAcquisition

    scanner = MRIAcquisition.model_validate({"kind": "mri", "coils": 4, "mask": {"acceleration": 4}})
    scans = [simulate(x.numpy(), scanner, np.random.default_rng(first + n)) for n, x in enumerate(images)]
    operator = CartesianMRI(torch.stack([s.maps for s in scans]), torch.stack([s.mask for s in scans]))
    return operator, operator.A(images.to(torch.complex64))


def trained(images: Any, rounds: int) -> list[Any]:
    """A network after each of several rounds of 20 steps on other patients: what a target has in its rounds."""
    from copy import deepcopy

    import torch

    from wardround.models.unrolled import MoDLSettings

    torch.manual_seed(SEED)
    network = MoDLSettings.model_validate({"kind": "modl", "preset": "tiny", "channels": 32, "layers": 5}).build("mri")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    operator, data = scanned(images, 100)
    found = []
    for _ in range(rounds):
        for _ in range(20):
            optimizer.zero_grad()
            (network(operator, data).abs() - images).abs().mean().backward()
            optimizer.step()
        found.append(deepcopy(network).requires_grad_(False))
    return found


def attacked(networks: Sequence[Any], images: Any, start: Any, *, pooled: bool) -> Any:
    """What an attacker finds for images: (n, SIZE, SIZE)."""
    import torch

    operator, data = scanned(images, 0)

    def sent(data: Any) -> list[Any]:
        """What each network's middle layer says, as it is sent."""
        said = [middle(network, operator, data) for network in networks]
        return [z.mean((2, 3)).mean(0) if pooled else z for z in said]

    with torch.no_grad():
        wanted = sent(data)
    unit = sum(float(z.square().mean()) for z in wanted)
    x = start.expand(len(images), -1, -1).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        given = sent(operator.A(x.to(torch.complex64)))
        misfit = sum((z - w).square().mean() for z, w in zip(given, wanted, strict=True)) / unit
        variation = (x[:, 1:] - x[:, :-1]).abs().mean() + (x[:, :, 1:] - x[:, :, :-1]).abs().mean()
        (misfit + 1e-4 * variation).backward()
        optimizer.step()
    return x.detach().clamp(0.0, 1.0)


def middle(network: Any, operator: Any, data: Any) -> Any:
    """What the middle layer says, the mean over unrolls, before places are averaged."""
    import torch

    from wardround.learning.latents import bottleneck_of

    seen: list[Any] = []
    layer = bottleneck_of(network)
    assert layer is not None
    handle = network.get_submodule(layer.name).register_forward_hook(lambda _, __, found: seen.append(found))
    try:
        network(operator, data)
    finally:
        handle.remove()
    return torch.stack(seen).mean(0)


def best(found: Any, images: Any) -> float:
    """The largest PSNR of any of what was found for any patient."""
    errors = (found[:, None] - images[None]).square().mean((2, 3))
    return float(-10.0 * errors.min().log10())


if __name__ == "__main__":
    main()
