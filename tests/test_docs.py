"""Links between the project's pages lead somewhere, and the generated pages are those of the code."""

from __future__ import annotations

import re
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

import klas_zoo

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for folder in (".", "docs", "benchmarks", "zoo/**") for page in ROOT.glob(f"{folder}/*.md"))
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def test_pages_are_found() -> None:
    assert {"README.md", "CHANGELOG.md", "layout.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (heading and heading not in _headings(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", ["api.md", "cli.md"])
def test_the_reference_is_what_the_code_says(name: str) -> None:
    """`python scripts/reference` writes it anew."""
    loader = SourceFileLoader("reference", str(ROOT / "scripts" / "reference"))
    reference = module_from_spec(spec_from_loader("reference", loader))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        loader.exec_module(reference)
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == reference.PAGES[name]()


def test_the_reference_names_what_is_public_and_nothing_else() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == klas_zoo.__all__


def _headings(page: Path) -> set[str]:
    """Headings as GitHub turns them into anchors."""
    titles = _HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
