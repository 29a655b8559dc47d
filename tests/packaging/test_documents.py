"""The documents say what the code does: every option is listed, every link leads somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vllm_ssd import metrics
from vllm_ssd.config import SSDConfig
from vllm_ssd.core.stats import COUNTERS as COUNTERS_OF_THE_TARGET
from vllm_ssd.draft.tally import ROUND_COUNTERS, STEP_COUNTERS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/*.md")),
    ROOT / "vllm_ssd" / "cli" / "smollm2_draft" / "README.md",
]
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)")
"""A relative one: its path, empty for the document itself, and its heading."""


def test_readme_lists_exactly_the_options_there_are() -> None:
    """The table under "Options"."""
    section = (ROOT / "README.md").read_text().split("## Options")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(SSDConfig.model_fields)


def test_operations_explains_every_counter() -> None:
    """The counters of both processes."""
    text = (ROOT / "docs" / "operations.md").read_text()
    names = list(COUNTERS_OF_THE_TARGET)
    names += [name for name in (*STEP_COUNTERS, *ROUND_COUNTERS) if f"mean_{name}" not in text]
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Links to files of the repository, and to their headings."""
    for path, heading in LINK.findall(without_code(document.read_text())):
        linked = document.parent / path if path else document
        assert linked.exists(), path
        if heading:
            assert heading in headings(linked), f"{path}#{heading}"


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(document: Path) -> set[str]:
    """As GitHub names them in links."""
    found = re.findall(r"^#+ (.*)$", without_code(document.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in found)
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    """Every metric of ours in its queries."""
    named = {f"{name}_total" for name in (*metrics.COUNTERS, "ssd_misses")}
    named |= {f"ssd_{what}_tokens_total" for what in ("draft", "accepted")} | set(metrics.GAUGES)
    for name in (metrics.DEPTH, *(name for name, _ in metrics.TIMES.values())):
        named |= {f"{name}_{part}" for part in ("bucket", "sum", "count")}
    text = (ROOT / "examples" / "monitoring" / "grafana.json").read_text()
    used = set(re.findall(r"vllm:(ssd_\w+)", text))
    assert len(used) > 10
    assert used <= named
    assert json.loads(text)["panels"]


def test_operations_explains_every_metric() -> None:
    """The table under "Metrics"."""
    text = (ROOT / "docs" / "operations.md").read_text()
    names = [
        *metrics.COUNTERS,
        *metrics.GAUGES,
        metrics.DEPTH,
        *(name for name, _ in metrics.TIMES.values()),
    ]
    assert [name for name in names if f"`vllm:{name}" not in text] == []
