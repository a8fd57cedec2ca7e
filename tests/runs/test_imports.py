"""What every process of a run imports, and what only those do that need it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each takes a good part of a second, MONAI several.
LATE = ("monai", "matplotlib", "pandas", "sklearn", "skimage", "opacus", "dp_accounting", "scipy.stats")
# A site imports these with its task: a coordinator has none, and a task of one's own may need neither.
BY_TASK = ("nibabel", "pydicom", "scipy.ndimage", "scipy.optimize")


@pytest.mark.slow
def test_heavy_packages_are_imported_by_those_who_need_them() -> None:
    code = (
        "import sys, wardround.runs.machine\n"
        f"assert not (early := [name for name in {LATE + BY_TASK} if name in sys.modules]), early\n"
        "import wardround.models.build, wardround.tasks.ct, wardround.tasks.mri\n"
        f"assert not (early := [name for name in {LATE} if name in sys.modules]), early"
    )
    _run(code)


def test_a_study_whose_model_is_not_asked_for_is_read_without_torch() -> None:
    _run(
        "import sys\n"
        "import wardround.results.run\n"
        "from wardround.study.load import UNREAD, load_study\n"
        "load_study({'name': 's', 'sites': {'A': {}}, 'method': {'kind': 'elsewhere'}}, reading=UNREAD)\n"
        "assert 'torch' not in sys.modules"
    )


def _run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
