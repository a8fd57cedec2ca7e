"""The page of the study file is generated; it must not lag behind the schema."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_the_schema() -> None:
    page = runpy.run_path(str(DOCS / "study_reference.py"))["page"]
    assert page() == (DOCS / "study.md").read_text(encoding="utf-8"), "run: python docs/study_reference.py"
