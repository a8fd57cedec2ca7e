"""Tests of real images run where these are, and are skipped, saying why, everywhere else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_runtest_setup
from tests.real_images import VARIABLE, lacking

HERE = Path(__file__).parent


def test_an_unset_or_empty_variable_and_a_missing_folder_are_all_no_data(tmp_path: Path) -> None:
    (tmp_path / "lgg").mkdir()
    missing = tmp_path / "absent"
    assert lacking(["lgg"], {}) == "WARDROUND_DATA is not set, so there are no real images to read"
    assert lacking(["lgg"], {VARIABLE: ""}) == "WARDROUND_DATA is empty, so there are no real images to read"
    assert lacking([], {VARIABLE: str(missing)}).endswith(f": {missing} is not there")
    assert lacking(["lgg", "kspace"], {VARIABLE: str(tmp_path)}).endswith(f": {tmp_path / 'kspace'} is not there")
    assert lacking(["lgg"], {VARIABLE: str(tmp_path)}) == ""


def test_one_place_decides_whether_there_are_real_images() -> None:
    """What a test makes of an empty variable by itself is another thing in every file."""
    known = {HERE / name for name in ("real_images.py", "test_real_images.py", "test_makefile.py")}
    asking = [path for path in HERE.rglob("*.py") if path not in known and VARIABLE in path.read_text("utf-8")]
    assert not asking


@pytest.mark.parametrize("value", ["", None])
def test_a_test_of_real_images_is_skipped_and_says_why(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    marked: Any = SimpleNamespace(iter_markers=lambda name: [pytest.mark.data("lgg").mark] if name == "data" else [])
    with pytest.raises(pytest.skip.Exception, match=r"WARDROUND_DATA is .* no real images to read"):
        pytest_runtest_setup(marked)
