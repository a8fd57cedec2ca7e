"""The pages: their links lead somewhere, their words are plain, and the page on protection is read in ten minutes."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "SECURITY.md"])
# At 150 words a minute, a careful reader's pace.
TEN_MINUTES = 1500


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, named as MkDocs and GitHub name them."""
    titles = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    plain = [unicodedata.normalize("NFKD", re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", title)) for title in titles]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_the_page_on_protection_is_read_in_ten_minutes_and_leads_to_its_details() -> None:
    text = (DOCS / "protection.md").read_text(encoding="utf-8")
    assert len(re.findall(r"[^\s|]*\w[^\s|]*", text)) <= TEN_MINUTES
    for heading in ("What leaves a site", "What to switch on", "What is not protected"):
        assert f"\n## {heading}\n" in text
    assert "protection-details.md" in text


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_sentences_name_who_acts(page: Path) -> None:
    found = re.findall(
        r"\b(?:nobody|whoever|somebody|anybody|so many)\b", prose(page.read_text(encoding="utf-8")), flags=re.IGNORECASE
    )
    assert not found


@pytest.mark.parametrize("page", ["controls.md", "hospital-it.md", "recovery.md"])
def test_tests_that_a_page_names_exist(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:tests/)?([\w/]+\.py)`", text))
    assert named or page == "recovery.md"
    for name in named:
        assert (ROOT / "tests" / name).is_file(), name


def test_the_map_of_controls_names_every_rule_of_its_laws() -> None:
    text = (DOCS / "controls.md").read_text(encoding="utf-8")
    for rule in (
        "(a)(1)",
        "(a)(2)(i)",
        "(a)(2)(ii)",
        "(a)(2)(iii)",
        "(a)(2)(iv)",
        "(b)",
        "(c)(1)",
        "(c)(2)",
        "(d)",
        "(e)(1)",
    ):
        assert f"| **{rule}** " in text, rule
    for article in ("5(1)(a)", "5(1)(f)", "25", "30", "32(1)(a)", "33", "35"):
        assert f"| **{article}** " in text, article
    assert "not a certification" in text


def test_the_contents_name_every_page() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {page.name for page in DOCS.glob("*.md")} == set(
        re.findall(r": ([\w-]+\.md)$", contents, flags=re.MULTILINE)
    )


def test_what_code_and_tests_say_of_pages_exists() -> None:
    named = {
        (file.relative_to(ROOT), page)
        for folder in ("src", "tests", "benchmarks", "examples")
        for file in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"\bdocs/([\w-]+\.md)\b", file.read_text(encoding="utf-8"))
    }
    assert named
    for file, page in named:
        assert (DOCS / page).exists(), file
