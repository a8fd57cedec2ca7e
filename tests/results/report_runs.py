"""Made-up run directories: numbers drawn from a seed, pictures from ellipses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from wardround.tasks.metrics import RECONSTRUCTION_METRICS
from wardround.tasks.task import MetricSpec

TRAINING = ("CS", "DU", "FG", "HT")
UNSEEN = ("EZ",)
PATIENTS = {"CS": 3, "DU": 12, "FG": 4, "HT": 11, "EZ": 1}
MEAN_PSNR = {
    "zero_filled": 24.1,
    "cg_sense": 27.9,
    "tv": 29.4,
    "local": 32.0,
    "federated": 33.2,
    "pooled": 33.4,
}
SITE_SHIFT = {"CS": 0.9, "DU": -0.4, "FG": -1.4, "HT": 0.6, "EZ": -2.0}
GAIN_SHIFT = {"CS": 1.1, "DU": -0.7, "FG": 0.5, "HT": -0.9, "EZ": 0.0}


def estimate(value: float, n: int, spread: float, decimals: int = 4) -> dict[str, Any]:
    """An estimate as result.json holds it."""
    half = spread / n**0.5
    low, high = round(value - half, decimals), round(value + 0.8 * half, decimals)
    return {"value": round(value, decimals), "ci_low": low, "ci_high": high, "n": n}


def spec(name: str, **changed: Any) -> dict[str, Any]:
    """An entry of `metric_specs`."""
    return MetricSpec(name, 0.0, 1e3, 1e-6, **{"larger_is_better": True, "negligible": 0.001, **changed}).to_json()


def _metrics_at(psnr: float, n: int) -> dict[str, Any]:
    nmse = 10 ** (-psnr / 10) * 25
    return {
        "psnr": estimate(psnr, n, 2.4),
        "ssim": estimate(1 - 8 * 10 ** (-psnr / 14), n, 0.03),
        "nmse": estimate(nmse, n, nmse * 0.5),
        "psnr_head": estimate(psnr - 3.1, n, 2.1),
        "ssim_head": estimate(1 - 11 * 10 ** (-psnr / 14), n, 0.04),
        "nmse_head": estimate(nmse * 0.98, n, nmse * 0.5),
    }


def _psnr(arm: str, site: str) -> float:
    value = MEAN_PSNR[arm] + SITE_SHIFT[site]
    return value + GAIN_SHIFT[site] if arm in ("federated", "pooled") else value


def metrics() -> dict[str, Any]:
    """`metrics` of result.json: six arms, four training sites and one that is evaluated only."""
    table: dict[str, Any] = {}
    for arm in MEAN_PSNR:
        sites = TRAINING if arm == "local" else TRAINING + UNSEEN
        table[arm] = {site: _metrics_at(_psnr(arm, site), PATIENTS[site]) for site in sites}
        mean = float(np.mean([table[arm][site]["psnr"]["value"] for site in TRAINING]))
        table[arm]["mean"] = _metrics_at(mean, 30)
    for arm, value in (("zero_filled", 24.0), ("tv", 29.1), ("federated", 32.1)):
        table[arm]["unseen"] = _metrics_at(value, 30)
    table["baseline"] = table["zero_filled"]
    return table


def rounds(count: int = 20) -> list[dict[str, Any]]:
    """Lines of rounds.jsonl for every arm that trains; HT misses three rounds."""
    random = np.random.default_rng(0)
    arms = ["federated", "pooled", *(f"local/{s}" for s in TRAINING), *(f"without/{s}" for s in TRAINING)]
    lines = []
    for index, arm in enumerate(arms):
        top = 33.0 - 0.35 * index if "/" in arm else MEAN_PSNR[arm]
        for number in range(1, count + 1):
            progress = 1 - np.exp(-number / 5)
            shared = arm == "federated"
            away = {"HT": "no reply within 600 s"} if shared and number in (6, 7, 8) else {}
            away |= {"CS": "update rejected: norm gate"} if shared and number == 15 else {}
            there = [site for site in TRAINING if site not in away]
            lines.append(
                {
                    "arm": arm,
                    "round": number,
                    "attempt": int(shared and number == 6),
                    "coordinator_seconds": 0.2,
                    "training_seconds": 10.5,
                    "state_sha256": "0d" * 32,
                    "notes": [],
                    "validated": there if shared else [],
                    "participants": there if shared else [arm.partition("/")[2] or arm],
                    "missing": away,
                    "loss": 0.09 * float(np.exp(-number / 6)) + 0.02 + 0.002 * random.random() + 0.001 * index,
                    "validation": {"psnr": 24 + (top - 24) * progress + 0.15 * random.standard_normal()},
                    "bytes_up": 452_000 * len(there) if shared else 0,
                    "bytes_down": 449_000 * len(there) if shared else 0,
                    "seconds": 11.2,
                    "saturated_share": 1e-6,
                    "saturated": 3e-4 if shared and number == 1 else 0.0,
                }
            )
    return lines


STUDY: dict[str, Any] = {
    "version": 1,
    "name": "glioma-flair",
    "description": "Low-grade glioma FLAIR from four institutions with different scanners.",
    "seed": 1,
    "sites": {
        "CS": {"role": "train"},
        "DU": {"role": "train", "acquisition": {"kind": "mri", "coils": 12, "noise": 0.01,
                                                 "mask": {"family": "equispaced", "acceleration": 4.0}}},
        "FG": {"role": "train", "acquisition": {"kind": "mri", "coils": 6, "noise": 0.02,
                                                 "mask": {"family": "random", "acceleration": 6.0}}},
        "HT": {"role": "train"},
        "EZ": {"role": "unseen"},
    },
    "acquisition": {
        "kind": "mri", "coils": 8, "noise": 0.005, "mask": {"family": "random", "acceleration": 4.0}
    },
    "task": {"kind": "reconstruction", "contrasts": ["flair"], "size": [128, 128]},
    "model": {"kind": "modl", "preset": "small"},
    "method": {"kind": "fedavg", "weights": "samples"},
    "local": {"steps": 20, "optimizer": "adam", "lr": 0.001},
    "schedule": {"rounds": 20, "release": "best"},
}  # fmt: skip


def result() -> dict[str, Any]:
    """A whole result.json."""
    return {
        "version": 1,
        "study": STUDY["name"],
        "study_sha256": "5f" * 32,
        "plan_sha256": "6e" * 32,
        "model_sha256": "a1" * 32,
        "local_sha256": {site: f"{index}c" * 32 for index, site in enumerate(TRAINING)},
        "rounds": 20,
        "participants": list(TRAINING),
        "compare": ["local", "pooled"],
        "patients": {site: {"train": 20, "validation": 4, "test": count} for site, count in PATIENTS.items()},
        "scanners": {},
        "examples": {"federated": 6400, "pooled": 1600},
        "gains": {},
        "withheld": {},
        "failed": {},
        "metric_specs": [metric.to_json() for metric in RECONSTRUCTION_METRICS],
        "metrics": metrics(),
        "left_out": {
            site: {
                "federated": {"psnr": estimate(31.9 + SITE_SHIFT[site], PATIENTS[site], 2.0)},
                "best_local": {"psnr": estimate(31.2 + 1.4 * SITE_SHIFT[site], PATIENTS[site], 2.0)},
            }
            for site in TRAINING
        },
        "traffic": {"bytes_up": 34_352_000, "bytes_down": 34_124_000},
        "seconds": {"total": 1843.0, "training": 1622.5, "overhead": 8.25},
        "privacy": None,
        "fingerprint": {"python": "3.11.9", "torch": "2.13.0", "machine": "x86_64"},
        "steps": {"federated": 1600, "pooled": 1600, **{f"local/{site}": 400 for site in TRAINING}},
        "selected_round": {"federated": 18, "pooled": 20, "local/CS": 11},
        "notes": ["Coil maps were estimated from the calibration lines."],
    }


def phantom(seed: int, size: int = 64) -> NDArray[np.float32]:
    """A head of ellipses, at most 1."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    image = 0.9 * ((x / 0.72) ** 2 + (y / 0.92) ** 2 < 1) - 0.45 * ((x / 0.66) ** 2 + (y / 0.86) ** 2 < 1)
    for _ in range(9):
        cx, cy, a, b = random.uniform((-0.4, -0.5, 0.05, 0.05), (0.4, 0.5, 0.25, 0.25))
        image = image + random.uniform(-0.2, 0.35) * (((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1)
    return np.asarray(np.clip(image, 0, 1), dtype=np.float32)


def undersampled(image: NDArray[np.float32], keep: float, noise: float, seed: int) -> NDArray[np.float32]:
    """The image with a share of its phase-encode lines, and noise."""
    random = np.random.default_rng(seed)
    kspace = np.fft.fftshift(np.fft.fft2(image, norm="ortho"))
    width = image.shape[1]
    lines = random.random(width) < keep
    lines[width // 2 - 4 : width // 2 + 4] = True
    kspace = kspace * lines + noise * random.standard_normal(kspace.shape)
    return np.abs(np.fft.ifft2(np.fft.ifftshift(kspace), norm="ortho")).astype(np.float32)


def pictures(seed: int, size: int = 64, examples: int = 2) -> dict[str, NDArray[np.float32]]:
    """What a site's pictures.npz holds."""
    quality = {"zero_filled": 0.2, "tv": 0.55, "local": 0.75, "federated": 0.85, "pooled": 0.88}
    found: dict[str, NDArray[np.float32]] = {}
    for index in range(examples):
        image = phantom(seed + 100 * index, size)
        found[f"reference/{index}"] = image
        for arm, keep in quality.items():
            found[f"{arm}/{index}"] = undersampled(image, keep, 0.01, seed)
    return found


def write_run(
    out: Path,
    changed: dict[str, Any] | None = None,
    *,
    study: dict[str, Any] | None = STUDY,
    lines: list[dict[str, Any]] | None = None,
    with_pictures: bool = True,
    size: int = 64,
) -> Path:
    """Writes a run directory; `changed` replaces keys of result.json, and a value of `...` empties one."""
    out.mkdir(parents=True, exist_ok=True)
    whole = {key: {} if value is ... else value for key, value in (result() | (changed or {})).items()}
    (out / "result.json").write_text(json.dumps(whole), encoding="utf-8")
    entries = rounds() if lines is None else lines
    (out / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in entries), encoding="utf-8")
    if study is not None:
        (out / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    for index, site in enumerate((*TRAINING, *UNSEEN) if with_pictures else ()):
        folder = out / "sites" / site
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "pictures.npz", **pictures(index, size))  # type: ignore[arg-type]
    return out
