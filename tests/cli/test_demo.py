"""The demonstration's table."""

from __future__ import annotations

from rich.console import Console

from vllm_ssd.cli.demo import DRAFT_MODEL, PLAIN, SSD, _table
from vllm_ssd.cli.demo_engine import Answers


def test_everything_is_readable_in_eighty_columns() -> None:
    speculating = {"drafts": 100.0, "accepted_tokens": 75.0, "hits": 59.0, "rounds": 100.0}
    times = {"draft_rounds": 100.0, "draft_round_seconds": 7.6}
    times |= {"verify_intervals": 100.0, "verify_seconds": 7.8}
    same = [[1] * 128] * 3
    results = {
        PLAIN: Answers(same, seconds=20.0, gaps=19.0),
        DRAFT_MODEL: Answers([[2] * 128] * 3, seconds=28.0, gaps=27.0, metrics=speculating),
        SSD: Answers(same, seconds=24.0, gaps=23.0, metrics=speculating | times),
    }
    console = Console(width=80, record=True)
    console.print(_table(results))
    text = console.export_text()
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    assert [PLAIN, "19.2", "50", "ms", "-", "-", "-", "-"] in lines
    assert [DRAFT_MODEL, "13.7", "71", "ms", "1.75", "59", "%", "-", "differs"] in lines
    last = [SSD, "16.0", "60", "ms", "1.75", "59", "%", "76", "ms", "/", "78", "ms", "identical"]
    assert last in lines
    # Whoever sees that text differs is told why.
    assert "in bfloat16 vLLM's own results depend on the shape" in " ".join(text.split())
    results[DRAFT_MODEL] = results[SSD]
    console.print(_table(results))
    assert "bfloat16" not in console.export_text()
