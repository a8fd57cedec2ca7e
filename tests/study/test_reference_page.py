"""The pages of the study file and of the result files are generated; they must not lag behind the schemas."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

import wardround
from wardround.results.schema import Result, RoundLine

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["study.md", "results.md", "api.md"])
def test_the_page_is_the_schema(name: str) -> None:
    pages = runpy.run_path(str(DOCS / "reference.py"))["pages"]()
    assert pages[name] == (DOCS / name).read_text(encoding="utf-8"), "run: python docs/reference.py"


def test_the_api_page_has_every_public_name_and_says_what_it_is() -> None:
    reference = runpy.run_path(str(DOCS / "reference.py"))
    places = [place for section in reference["PUBLIC"].values() for place in section]
    missing = {*wardround.__all__} - {place.removeprefix("wardround:") for place in places}
    # Settings of a study have a page of their own, and the version is a text.
    assert missing == {"Study", "__version__"}
    for place in places:
        text = reference["_entry"](place)
        assert " at 0x" not in text
        assert len(text.splitlines()) > 3, place


def test_the_documented_json_schemas_are_those_of_the_code() -> None:
    blocks = re.findall(r"```json\n(.*?)\n```", (DOCS / "results.md").read_text(encoding="utf-8"), re.DOTALL)
    assert [json.loads(block) for block in blocks] == [Result.model_json_schema(), RoundLine.model_json_schema()]
