"""The documents say what the code does: every option is listed, every link leads somewhere."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from vllm_ssd.config import SSDConfig
from vllm_ssd.core.stats import Stats
from vllm_ssd.draft.tally import COUNTERS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_lists_exactly_the_options_there_are() -> None:
    """The table under "Options"."""
    section = (ROOT / "README.md").read_text().split("## Options")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(SSDConfig.model_fields)


def test_operations_explains_every_counter() -> None:
    """The counters of both processes."""
    text = (ROOT / "docs" / "operations.md").read_text()
    names = [field.name for field in fields(Stats)]
    names += [name for name in COUNTERS if f"mean_{name}" not in text]
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Links to files of the repository."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []
