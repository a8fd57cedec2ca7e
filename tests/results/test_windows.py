"""Pictures in named windows, as CT is looked at."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from report_runs import write_run

from wardround.results.html import write_report
from wardround.results.pictures import Frame, gallery, psnr, read_pictures
from wardround.results.run import load_run


def test_every_slice_is_shown_in_every_window_and_errors_are_named_in_its_unit(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", with_pictures=False)
    folder = out / "sites" / "DU"
    folder.mkdir(parents=True)
    image = np.linspace(-0.1, 2.0, 64, dtype=np.float32).reshape(8, 8)
    windows = {"window/lung/HU": np.array([-0.35, 1.15, 1000.0]), "window/soft tissue/HU": np.array([0.84, 1.24, 1e3])}
    np.savez(folder / "pictures.npz", **{"reference/0": image, "local/0": image + 0.01}, **windows)

    shown = gallery(load_run(out))

    assert [example.window.grey for example in shown.sites["DU"]] == ["lung", "soft tissue"]
    assert [example.window.error for example in shown.sites["DU"]] == ["300 HU", "80 HU"]
    write_report(out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "soft tissue" in page
    assert "inside the window shown" in page


def test_negative_values_keep_their_sign(tmp_path: Path) -> None:
    np.savez(tmp_path / "pictures.npz", **{"reference/0": np.full((4, 4), -0.2, np.float32)})
    assert read_pictures(tmp_path / "pictures.npz").examples[0]["reference"].max() == pytest.approx(-0.2)


def test_what_lies_outside_a_window_does_not_count() -> None:
    frame = Frame("soft", 0.8, 1.2)
    reference = np.array([[0.0, 1.0], [1.0, 2.0]], np.float32)
    assert psnr(reference + np.array([[-5, 0], [0, 9]], np.float32), reference, frame) == math.inf
    # An error of a tenth of the window on one pixel of four: 20 dB and 6 dB.
    off = reference + np.array([[0, 0.04], [0, 0]], np.float32)
    assert psnr(off, reference, frame) == pytest.approx(20 + 10 * math.log10(4), abs=1e-3)
