"""Tokens per second of SSD against plain vLLM and vLLM's ``draft_model``, side by side.

Every engine answers the demonstration's questions, one at a time, greedily; engines take turns,
``--rounds`` times. All of them have the same cores: plain vLLM and ``draft_model`` use them
together, SSD gives one to the draft. Each ``--ssd`` is an SSD engine with options of its own.

    python -m benchmarks.end_to_end [--draft FOLDER] [--rounds 2] \\
        --ssd '{"num_speculative_tokens": 4, "fan_out": 2}' --ssd '{"num_speculative_tokens": 6}'
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.engines import draft_model, ssd, ssd_name, ssd_options
from vllm_ssd.cli.demo import QUESTIONS
from vllm_ssd.cli.demo_engine import Answers, Questions, ask
from vllm_ssd.cli.models import demo_models

DEFAULT: dict[str, Any] = {"num_speculative_tokens": 6}


def engines(draft: str, options: list[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Speculative configs by the name of their row."""
    found: dict[str, dict[str, Any] | None] = {"plain": None}
    for k in sorted({one["num_speculative_tokens"] for one in options}):
        found[f"draft_model, K = {k}"] = draft_model(draft, k)
    for one in options:
        found[ssd_name(one)] = ssd(draft, one)
    return found


def merged(runs: list[Answers]) -> Answers:
    """Several runs of one engine as one."""
    total = Answers([tokens for run in runs for tokens in run.token_ids])
    for run in runs:
        total.seconds += run.seconds
        for name, value in run.metrics.items():
            total.metrics[name] = total.metrics.get(name, 0.0) + value
    return total


def main() -> None:
    """Run all engines and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draft", default=None, help="default: the demonstration's")
    parser.add_argument(
        "--ssd", action="append", type=ssd_options, help="options of an SSD engine, JSON"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--compile", action="store_true", help="compile the models")
    options = parser.parse_args()
    models = demo_models()
    configs = engines(options.draft or str(models.draft), options.ssd or [DEFAULT])
    runs: dict[str, list[Answers]] = {name: [] for name in configs}
    turns = [name for _ in range(options.rounds) for name in configs]
    for name in track(turns, "engines"):
        spec = Questions(
            model=str(models.target),
            speculative_config=configs[name],
            enforce_eager=not options.compile,
            prompts=QUESTIONS,
            max_tokens=options.max_tokens,
        )
        runs[name].append(ask(spec, lambda event: None))
    Console().print(_table({name: merged(some) for name, some in runs.items()}))


def _table(results: dict[str, Answers]) -> Table:
    table = Table(title="the same questions, one at a time")
    columns = ("", "tokens/s", "to plain", "to draft_model", "acceptance\nlength", "hit rate")
    for column in (*columns, "draft step", "verification", "text"):
        table.add_column(column, justify="right")
    speed = {name: _speed(answers) for name, answers in results.items()}
    plain = results["plain"]
    for name, answers in results.items():
        m = answers.metrics
        k = name.split(", ")[1] if ", " in name else ""
        base = speed.get(f"draft_model, {k}")
        table.add_row(
            name,
            f"{speed[name]:.1f}",
            f"{speed[name] / speed['plain']:.2f}",
            f"{speed[name] / base:.2f}" if base else "",
            f"{1 + m['accepted_tokens'] / m['drafts']:.2f}" if m.get("drafts") else "",
            f"{m['hits'] / m['look_ups']:.0%}" if m.get("look_ups") else "",
            _milliseconds(m, "draft_step_seconds", "draft_steps"),
            _milliseconds(m, "verify_seconds", "verify_intervals"),
            "identical" if answers.token_ids == plain.token_ids else "differs",
        )
    return table


def _speed(answers: Answers) -> float:
    return sum(map(len, answers.token_ids)) / answers.seconds


def _milliseconds(metrics: dict[str, float], total: str, count: str) -> str:
    if not metrics.get(count):
        return ""
    return f"{1e3 * metrics[total] / metrics[count]:.1f} ms"


if __name__ == "__main__":
    main()
